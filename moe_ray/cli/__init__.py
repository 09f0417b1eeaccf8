"""Commands that need no Ray: what the scripts of `workflows/` and the `moe-ray` command run."""
