"""Scores of experts that need more than routing: what its weights and its output do to the model's own answers."""
