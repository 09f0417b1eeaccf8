"""Masked fine-tuning: only a batch's unsafe experts learn from it."""
