"""The export for pandas users opens with pandas alone and feeds the usual loop."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from answered_counts import answered
from paths import ROOT
from prompt_tokens import by_prompt_tokens

from moe_ray.errors import InputError
from moe_ray.experts import Expert, ExpertMasks, masks_from_experts
from moe_ray.identification.identify import identify
from moe_ray.identification.pandas_export import export_data, export_name, export_pickle
from moe_ray.identification.selection import select
from moe_ray.routing.counts import RoutingCounts, concat_counts

KEYS = {
    "batch_unsafe_experts", "batch_expert_masks", "aggregated_risk_diff", "global_unsafe_experts", "batch_data_list",
    "num_layers", "n_experts", "num_experts_per_tok", "model_name", "batch_size", "safe_ratio",
}  # fmt: skip


def masks() -> ExpertMasks:
    """Batches 3 and 7 of a model whose layers 2 and 3 have experts, of 5 layers in all."""
    return masks_from_experts(
        {3: [Expert(3, 1), Expert(2, 0)], 7: [Expert(3, 1), Expert(3, 2)]}, layers=[2, 3], num_experts=3
    )


def contents() -> dict[str, Any]:
    counts = RoutingCounts(
        batch_idx=np.array([3, 3, 7, 7]),
        in_batch_idx=np.array([0, 1, 0, 1]),
        label=np.array(["safe", "unsafe"] * 2, dtype=object),
        category=np.full(4, "fraud", dtype=object),
        role=np.full(4, "prompt", dtype=object),
        num_tokens=np.full(4, 10),
        counts_NLE=np.array(
            [[[4, 3, 3], [8, 1, 1]], [[6, 2, 2], [1, 8, 1]], [[4, 3, 3], [8, 1, 1]], [[4, 3, 3], [0, 4, 6]]]
        ),
        layers=(2, 3),
        num_experts_per_tok=1,
    )  # fmt: skip
    rows = [
        {
            "batch_idx": batch,
            "in_batch_idx": position,
            "id": f"{batch}-{position}",
            "label": label,
            "category": "fraud",
            "messages": json.dumps([{"role": "user", "content": f"prompt {batch} {label}"}]),
            "target": "I can't help." if label == "unsafe" else None,
        }
        for batch in (7, 3)
        for position, label in enumerate(["safe", "unsafe"])
    ]
    return {
        "masks": masks(),
        "risk": identify(counts, by_prompt_tokens(permutations=0, resamples=0)),
        "batches": pd.DataFrame(rows),
        "model_name": "org/tiny-moe",
        "num_experts_per_tok": 1,
        "num_layers": 5,
        "selection": by_prompt_tokens(),
    }


@pytest.fixture
def exported(tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / export_name("org/tiny-moe")
    export_pickle(path, **contents())
    assert path.name == "sft_dataset_tiny-moe.pkl"
    return pd.read_pickle(path)


def test_the_keys_are_exactly_the_agreed_ones(exported: dict[str, Any]) -> None:
    assert set(exported) == KEYS
    assert (exported["num_layers"], exported["n_experts"], exported["num_experts_per_tok"]) == (5, 3, 1)
    assert (exported["batch_size"], exported["safe_ratio"]) == (2, 0.5)


def test_the_usual_loop_works(exported: dict[str, Any]) -> None:
    for experts, mask, data in zip(
        exported["batch_unsafe_experts"], exported["batch_expert_masks"], exported["batch_data_list"], strict=True
    ):
        assert mask.shape == (exported["num_layers"], exported["n_experts"])
        assert all(mask[layer, expert] == 1 for layer, expert in experts)
        assert mask.sum() == len(experts)
        assert [example["label"] for example in data] == ["safe", "unsafe"]


def test_overlap_of_two_batches_works(exported: dict[str, Any]) -> None:
    first, second = map(set, exported["batch_unsafe_experts"])
    assert first & second == {(3, 1)}
    both = exported["batch_expert_masks"][0] * exported["batch_expert_masks"][1]
    assert both.sum() == 1


def test_layers_are_decoder_layers_and_dense_ones_are_rows_of_zeros(exported: dict[str, Any]) -> None:
    assert exported["batch_unsafe_experts"][0] == [(3, 1), (2, 0)]
    for mask in exported["batch_expert_masks"]:
        assert mask.dtype == np.float32
        assert not mask[[0, 1, 4]].any()


def test_entries_follow_the_masks_batches_whatever_the_tables_order(exported: dict[str, Any]) -> None:
    assert [data[0]["batch_idx"] for data in exported["batch_data_list"]] == [3, 7]
    assert exported["batch_data_list"][0][1]["prompt"] == "prompt 3 unsafe"
    assert exported["batch_data_list"][0][0]["target"] is None


def test_global_experts_are_the_largest_means_first(exported: dict[str, Any]) -> None:
    assert exported["global_unsafe_experts"] == [(3, 1), (3, 2), (2, 0)]
    assert exported["aggregated_risk_diff"]["risk_diff"].is_monotonic_decreasing


@pytest.mark.slow
def test_pandas_alone_opens_it(tmp_path: Path) -> None:
    path = tmp_path / "export.pkl"
    export_pickle(path, **contents())
    blocked = "import sys; sys.modules.update(moe_ray=None, torch=None)"
    code = f"{blocked}; import pandas; print(len(pandas.read_pickle({str(path)!r})))"
    done = subprocess.run([sys.executable, "-I", "-c", code], check=True, cwd=tmp_path, capture_output=True, text=True)
    assert int(done.stdout) == len(KEYS)


def test_an_open_file_may_be_given() -> None:
    file = io.BytesIO()
    export_pickle(file, **contents())
    assert set(pd.read_pickle(io.BytesIO(file.getvalue()))) == KEYS


def test_a_batch_without_examples_is_an_error() -> None:
    given = contents()
    given["batches"] = given["batches"][given["batches"]["batch_idx"] == 3]
    with pytest.raises(InputError, match=r"batches \[7\] have masks but no examples"):
        export_data(**given)


def test_too_few_layers_are_an_error() -> None:
    with pytest.raises(InputError, match="num_layers: got 3, expected more than the last MoE layer's index 3"):
        export_data(**{**contents(), "num_layers": 3})


def test_the_package_never_reads_a_pickle() -> None:
    package = ROOT / "moe_ray"
    for path in package.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "pickle.load" not in text, path
        assert "read_pickle(" not in text, path


def test_global_experts_are_those_of_the_rule() -> None:
    config = by_prompt_tokens(rule="attribution", min_share=0.5, permutations=0, resamples=0)
    counts = concat_counts([answered(batch, batch_idx=batch, planted=4.0) for batch in (3, 7)])
    risk = identify(counts, config)
    given = {**contents(), "masks": select(risk, config), "risk": risk, "selection": config, "num_layers": None}
    data = export_data(**given)
    assert data["global_unsafe_experts"] == [(1, 2)]
    assert data["batch_unsafe_experts"] == [[(1, 2)], [(1, 2)]]
