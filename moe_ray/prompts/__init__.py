"""Prompts as people have them, grouped into batches that keep their `batch_idx`."""
