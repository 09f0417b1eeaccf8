"""MLflow: runs, what waits for a lost server, and what of a run is logged."""
