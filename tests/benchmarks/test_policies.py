"""The comparison of policies trains every one on the same batches, and pairs their figures by prompt."""

from __future__ import annotations

import json
import runpy

import numpy as np
import pandas as pd
import pytest
from families import build
from paths import ROOT
from word_tokenizer import TEMPLATE, make_tokenizer

from moe_ray.prompts.batches import Batch

SCRIPT = runpy.run_path(str(ROOT / "benchmarks" / "policies.py"), run_name="policies")


def answers(refused, losses, ids=("a", "b", "c", "d"), *, tokens=2):
    """Two unsafe and two safe prompts."""
    return pd.DataFrame(
        {
            "id": ids,
            "label": ["safe" if name in "cd" else "unsafe" for name in ids],
            "messages": [f"[{name!r}]" for name in ids],
            "pair": None,
            "refused": np.array(refused, bool),
            "target_loss": losses,
            "target_tokens": tokens,
        }
    )


def test_seeds_are_averaged_and_differences_paired_by_prompt_whatever_the_order():
    mine = pd.concat([answers([1, 1, 0, 0], [2.0] * 4), answers([0, 0, 1, 1], [4.0] * 4, ids=("d", "c", "b", "a"))])
    natural = answers([0, 1, 0, 0], [1.0, 1.0, 2.0, 2.0])
    got = SCRIPT["figures"](mine, natural, natural)
    assert got["unsafe_refused"]["value"] == 1.0
    assert got["unsafe_refused_to_natural"]["value"] == 0.5
    assert got["safe_refused"]["value"] == 0.0
    assert got["unsafe_loss_to_natural"]["value"] == pytest.approx(1.0)
    assert got["safe_loss_change"]["value"] == pytest.approx(0.5)
    assert got["unsafe_loss"]["n"] == 2


def test_batches_are_drawn_over_all_categories_and_others_with_another_seed():
    batches = [Batch(batch_idx=n, category="abc"[n % 3], examples=()) for n in range(12)]
    draws = [SCRIPT["drawn"](batches, 6, seed) for seed in range(4)]
    assert all(sorted(batch.category for batch in draw) == [*"aabbcc"] for draw in draws)
    assert len({tuple(batch.batch_idx for batch in draw) for draw in draws}) > 1
    assert SCRIPT["drawn"](batches, 6, 1) == draws[1]


@pytest.mark.slow
def test_policies_are_compared_under_each_routing_and_share_of_the_steps(tmp_path, capsys):
    model, tokenizer = build("olmoe"), make_tokenizer(eos_token="<end>", pad_token="<pad>")
    tokenizer.chat_template = TEMPLATE
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    records = [
        {
            "id": f"{split}-{n}-{label}",
            "label": label,
            "category": "fraud",
            "split": split,
            "prompt": " ".join(["how", "are", "you"][: 1 + n % 3] + ([] if label == "safe" else ["thanks"] * (1 + n))),
            "target": "fine thanks" if label == "safe" else "fine",
        }
        for split, number in (("train", 4), ("test", 3))
        for n in range(number)
        for label in ("safe", "unsafe")
    ]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(map(json.dumps, records)))
    options = ["--model", str(tmp_path), "--prompts", str(prompts), "--seeds", "0", "1", "--batches", "2"]
    SCRIPT["main"](
        [
            *options,
            *("--policies", "masked_unsafe", "annealed", "--routings", "natural", "union"),
            *("--json", str(tmp_path / "all.json")),
            *(
                "prompts.safe_per_batch=2",
                "prompts.unsafe_per_batch=2",
                "finetune.epochs=2",
                "evaluate.max_new_tokens=2",
                "capture.max_new_tokens=4",
            ),
            *("identify.permutations=0", "identify.resamples=0", "identify.threshold=0.05"),
        ]
    )
    out = capsys.readouterr().out
    assert out.count("answered under natural routing") == out.count("answered under union routing") == 3
    rows = json.loads((tmp_path / "all.json").read_text())["rows"]
    assert {row["policy"] for row in rows} == {"natural", "masked_unsafe", "annealed"}
    assert [row["steps"] for row in rows if row["policy"] == "annealed" and row["routing"] == "union"] == [1, 2, 4]
    by_name = {(row["policy"], row["routing"], row["steps"]): row for row in rows}
    assert by_name["natural", "natural", 4]["unsafe_loss_to_natural"]["value"] == 0
    assert by_name["masked_unsafe", "natural", 4]["unsafe_loss_to_natural"]["value"] != 0
