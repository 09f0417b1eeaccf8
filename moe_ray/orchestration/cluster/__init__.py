"""Connecting to Ray, and the processes and pools that hold a model."""
