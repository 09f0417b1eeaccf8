"""What the length and the drawing of answers do to rates: one model and its prompts, 32 and 256 tokens, greedy and sampled.

    python benchmarks/decoding.py MODEL --unsafe FILE --safe FILE [--number 40] [--samples 4]

MODEL is a checkpoint folder. FILE is JSON or JSONL with `goal` or `prompt`. Prints the table of docs/verdicts.md.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pandas as pd

from moe_ray.config.evaluate import EvaluateConfig
from moe_ray.config.model import ModelConfig
from moe_ray.evaluation.evaluate import answer_examples
from moe_ray.evaluation.metrics import summarise
from moe_ray.models.loading import load_model, load_tokenizer
from moe_ray.report.format import rate

_RATES = {
    "unsafe_refusal_rate": "unsafe refused",
    "unsafe_degenerate_rate": "unsafe degenerate",
    "safe_refusal_rate": "safe refused",
    "safe_cost_rate": "safe refused or degenerate",
}


def prompts_of(file: Path, label: str, number: int) -> list[dict[str, object]]:
    """The first prompts of a file as held-out examples."""
    text = file.read_text(encoding="utf-8")
    records = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
    prompts = [str(record.get("goal") or record["prompt"]) for record in records[:number]]
    return [
        {
            "id": f"{label}-{index}",
            "label": label,
            "category": "",
            "batch_idx": 0,
            "messages": json.dumps([{"role": "user", "content": prompt}]),
            "target": None,
            "target_complete": True,
            "pair": None,
        }
        for index, prompt in enumerate(prompts)
    ]


def main() -> None:
    """Answers, judges and prints a row for each way of decoding."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--unsafe", type=Path, required=True)
    parser.add_argument("--safe", type=Path, required=True)
    parser.add_argument("--number", type=int, default=40, help="prompts of each label")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 256])
    arguments = parser.parse_args()
    frame = pd.DataFrame(
        prompts_of(arguments.unsafe, "unsafe", arguments.number) + prompts_of(arguments.safe, "safe", arguments.number)
    )
    model_config = ModelConfig(path=arguments.model)
    model, tokenizer = load_model(model_config), load_tokenizer(model_config)
    base = EvaluateConfig(tokens_per_forward=16_384)
    print("| tokens | decoding | n | " + " | ".join(_RATES.values()) + " | ended |")
    print("| --- " * (4 + len(_RATES)) + "|", flush=True)
    for length in arguments.lengths:
        ways = {
            "greedy": replace(base, max_new_tokens=length),
            f"temperature 1, {arguments.samples} samples": replace(
                base, max_new_tokens=length, temperature=1.0, samples=arguments.samples
            ),
        }
        for name, config in ways.items():
            answers = answer_examples(model, tokenizer, frame, config)
            found = summarise(answers)
            cells = [str(rate(found[key])) for key in _RATES]
            print(
                f"| {length} | {name} | {arguments.number} + {arguments.number} | {' | '.join(cells)} | "
                f"{answers['ended'].mean():.0%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
