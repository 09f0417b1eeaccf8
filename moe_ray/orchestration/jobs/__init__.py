"""Work on a cluster: what each actor, worker and task does, and what the driver does with it."""
