"""Data with a known answer and models with random weights, for tests and benchmarks."""
