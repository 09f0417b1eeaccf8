"""The causal check: what becomes of the model's own answers when tokens are routed around the selected experts."""
