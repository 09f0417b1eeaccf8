"""The embedded default: shipped examples and a tiny OLMoE model trained from them, so that everything runs offline."""
