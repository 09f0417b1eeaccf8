"""The page's table of how a run was made: model, prompts, judge, decoding, command, machine, date."""

from __future__ import annotations

from typing import Any

from moe_ray.config.evaluate import EvaluateConfig
from moe_ray.report.printable import printable
from moe_ray.run_directory import CAPTURE, RunDirectory, figures_of

_DIGESTS = ("examples", "model", "model revision", "model weights", "model configuration", "tokenizer", "chat template")
"""Of a capture's inputs; those it has depend on where the model is from."""


def how_it_was_made(run: RunDirectory) -> dict[str, str]:
    """What one needs to judge or repeat the figures, as text by name; untrusted parts without control characters."""
    config = run.config
    captured, judged = run.manifest(CAPTURE), run.manifest(figures_of("before"))
    inputs: dict[str, Any] = {} if captured is None else captured["inputs"]
    digests = (f"{name} {inputs[name]}" for name in _DIGESTS if name in inputs)
    made = {
        "model": f"{config.model.path}, revision {config.model.revision}, {inputs.get('model.dtype', config.model.dtype)}",
        "prompts": ", ".join(config.prompts.files),
        "digests": ", ".join(digests),
        "judge": config.evaluate.judge if judged is not None else "",
        "decoding": _decoding(config.evaluate) if judged is not None else "",
        "seed": str(config.seed),
    }
    done = [manifest for manifest in map(run.manifest, run.stages) if manifest is not None]
    latest: dict[str, Any] = done[-1]["environment"] if done else {}
    made |= {name: str(latest.get(name) or "") for name in ("command", "machine", "finished")}
    return {name: printable(text) for name, text in made.items()}


def _decoding(evaluate: EvaluateConfig) -> str:
    how = f"temperature {evaluate.temperature:g}, {evaluate.samples} samples" if evaluate.temperature else "greedy"
    return f"{how}, at most {evaluate.max_new_tokens} new tokens"
