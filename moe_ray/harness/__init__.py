"""The field's own harnesses on a model in memory: lm-eval tasks, inspect_ai tasks, and logs that `inspect view` opens."""
