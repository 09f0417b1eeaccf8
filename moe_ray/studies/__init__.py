"""Studies: what runs many trainings, such as sweeps, baselines and rounds."""
