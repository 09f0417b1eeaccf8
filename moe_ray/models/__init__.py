"""Models and tokenizers: where the experts are, token ids, losses and generation."""
