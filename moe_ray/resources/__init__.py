"""What a model needs and what the machines have: types, devices, processes and memory, decided before anything loads."""
