"""Baselines of a whole run: equal in what they say is equal, resumed by arm and seed, told and tracked."""

import json
import shutil

import mlflow
import pandas as pd
import pytest
from study_runs import LOSS_TOLERANCE, modified, settings, study
from workflow import run_workflow

from moe_ray.config.io import load_config
from moe_ray.models.loading import load_model
from moe_ray.studies.baselines import BASE, OURS

pytestmark = [pytest.mark.needs_ray, pytest.mark.slow, pytest.mark.filterwarnings("default")]

ARMS = [BASE, OURS, "policy:masked", "random_0", "full", "lora_same", "mask_only"]
FOLDERS = {name: name.replace(":", "_") for name in ARMS}


@pytest.fixture(scope="module")
def table(finished):
    return pd.read_parquet(finished / "compare" / "comparison.parquet")


@pytest.fixture(scope="module")
def at_end(table):
    return table[table["share"] == 1.0].set_index("arm")


def test_the_baselines_took_the_same_steps_on_the_same_prompts(finished, summary, table, at_end):
    assert list(at_end.index) == ARMS
    assert table.groupby("arm")["share"].apply(list).tolist() == [[0.25, 0.5, 1.0]] * len(ARMS)
    trained = [name for name in ARMS if name not in (BASE, "mask_only")]
    losses = {
        name: json.loads((finished / "compare" / FOLDERS[name] / "seed_0" / "losses.json").read_text())
        for name in trained
    }
    assert {len(steps) for steps in losses.values()} == {3}
    assert (at_end.loc[trained, "steps"] == 3).all()
    assert (table["unsafe_refusal_rate_n"] == 6).all()
    assert at_end.loc["random_0", "experts_per_batch"] == at_end.loc[OURS, "experts_per_batch"]
    model = load_model(load_config(str(finished / "config.yaml")).model, device="cpu")
    assert at_end.loc["full", "trainable_parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert at_end.loc[[BASE, "mask_only"], "trainable_parameters"].tolist() == [0, 0]
    assert at_end.loc[OURS, "parameters_share"] == 1
    assert at_end.loc["lora_same", "rank"] == 8
    answers = [pd.read_parquet(finished / "compare" / FOLDERS[name] / "seed_0" / "answers.parquet") for name in ARMS]
    assert all(frame[["id", "share"]].equals(answers[0][["id", "share"]]) for frame in answers)
    assert "Per-batch masks refused unsafe prompts (n = 6)" in summary["compare"]["verdict"]


def test_the_base_is_measured_as_the_evaluation_before_measures_it_at_every_share(table, at_end, summary):
    base = table[table["arm"] == BASE]
    for name in ("unsafe_refusal_rate", "safe_refusal_rate"):
        assert set(base[name]) == {summary["before"][name]["value"]}
    assert set(base["neutral_loss"]) == {0}
    assert at_end.loc["full", "neutral_loss"] != 0
    assert table.loc[table["arm"] == "mask_only", "neutral_loss"].isna().all()


def test_per_batch_masks_end_as_the_run_itself(finished, summary):
    """The first round of the run is the same training; without further rounds it is what the run is."""
    if summary["rounds"]["kept_round"] != 1:
        pytest.skip("the run kept a later round, which trained on")
    own = pd.read_parquet(finished / "evaluate" / "after" / "figures" / "answers.parquet").set_index("id")[
        "target_loss"
    ]
    arm = pd.read_parquet(finished / "compare" / OURS / "seed_0" / "answers.parquet")
    end = arm[arm["share"] == 1.0].set_index("id")["target_loss"]
    num_tokens = 100  # more than any target has: the losses are sums
    assert (end - own).abs().max() < LOSS_TOLERANCE * num_tokens


def test_another_baseline_and_another_seed_run_and_the_finished_ones_do_not(finished, tiny_model_path, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    compare = tmp_path / "run" / "compare"
    before = modified(compare / "random_0" / "seed_0")
    more = ("compare.names=[random,global]", "compare.seeds=2")
    assert run_workflow("compare", study(tiny_model_path, tmp_path / "run", *more)) == 0
    assert modified(compare / "random_0" / "seed_0") == before
    table = pd.read_parquet(compare / "comparison.parquet")
    assert table["arm"].unique().tolist() == [BASE, OURS, "random_0", "global"]
    assert set(table["seeds"]) == {2}
    assert (table["unsafe_refusal_rate_n"] == 6).all()
    assert not (compare / BASE / "seed_1").exists()
    orders = [json.loads((compare / OURS / f"seed_{seed}" / "losses.json").read_text()) for seed in (0, 1)]
    assert orders[0] != orders[1]


@pytest.mark.exhaustive
def test_equal_parameters_and_transfer(captured, tiny_model_path, tmp_path, capsys):
    shutil.copytree(
        captured, tmp_path / "run", ignore=shutil.ignore_patterns("compare", "sweep", "finetune", "mlflow*")
    )
    more = [
        "compare.names=[lora_all,busiest,attention_only,router_only]", "compare.budget=parameters", "compare.at=[1.0]",
        "compare.transfer=true",
    ]  # fmt: skip
    assert run_workflow("compare", settings(tiny_model_path, tmp_path / "run", *more)) == 0
    table = pd.read_parquet(tmp_path / "run" / "compare" / "comparison.parquet").set_index("arm")
    # A rank of all experts is some 3% of the budget here, an expert of the union some 4%.
    assert table.loc["lora_all", "parameters_share"] == pytest.approx(1, abs=0.1)
    assert table.loc["busiest", "parameters_share"] == pytest.approx(1, abs=0.1)
    assert table.loc["router_only", "parameters_share"] < 1
    transfer = pd.read_parquet(tmp_path / "run" / "compare" / "transfer.parquet")
    categories = set(transfer["trained"])
    assert len(categories) >= 2
    assert len(transfer) == len(categories) * transfer["tested"].nunique()
    assert transfer["is_own"].sum() == len(categories & set(transfer["tested"]))
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Trained on one category, tested on all" in page
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert len(summary["compare"]["transfer"]) == len(transfer)
    assert "Trained on one category alone" in capsys.readouterr().out


def test_trials_and_baselines_are_nested_under_the_run_in_mlflow_over_their_steps(finished, summary):
    client = mlflow.MlflowClient(f"sqlite:///{finished.parent}/mlflow.db")
    experiment = client.get_experiment_by_name("moe-ray")
    nested = client.search_runs([experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{summary['mlflow_run_id']}'")
    names = {run.info.run_name: run for run in nested}
    assert {"trial 1", "trial 4", f"compare {OURS}", "compare full", "compare policy:masked"} <= set(names)
    assert names["trial 1"].data.params["identify.top_k"] == str(summary["sweep"]["winner"]["identify.top_k"])
    history = client.get_metric_history(names["compare full"].info.run_id, "unsafe_refusal_rate")
    assert [point.step for point in history] == [1, 2, 3]
    artifacts = {item.path for item in client.list_artifacts(summary["mlflow_run_id"], "sweep")}
    assert {"sweep/heat_map.png", "sweep/winner.yaml"} <= artifacts
