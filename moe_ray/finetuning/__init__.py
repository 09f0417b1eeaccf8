"""Fine-tuning by batches: only a batch's unsafe experts learn from it."""
