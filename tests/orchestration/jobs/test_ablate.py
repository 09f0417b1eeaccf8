"""The causal check on model processes: what one process finds, a batch once, and equal experts at once."""

from __future__ import annotations

from dataclasses import replace

import causal_model
import pandas as pd
import pytest
from ablation_plans import CONFIG, causal_plans

from moe_ray.ablation.ablate import ablate_batches
from moe_ray.config.model import ModelConfig
from moe_ray.orchestration.jobs.ablate import AblateJob, ablate
from moe_ray.storage.folder import Folder

pytestmark = [pytest.mark.needs_ray, pytest.mark.slow, pytest.mark.filterwarnings("default")]


def saved(kind, folder) -> ModelConfig:
    causal_model.build(kind).save_pretrained(folder)
    causal_model.tokenizer().save_pretrained(folder)
    return ModelConfig(path=str(folder))


@pytest.fixture(scope="module")
def planned():
    return causal_plans()


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    root = tmp_path_factory.mktemp("ablate")
    return AblateJob(model=saved("causal", root / "model"), config=CONFIG, parts=str(root / "parts"))


@pytest.fixture(scope="module")
def found(ray_cluster, planned, job):
    return ablate(planned, job, seed=0)


def test_processes_find_what_one_process_finds(found, planned):
    expected = ablate_batches(causal_model.build("causal"), causal_model.tokenizer(), planned, CONFIG, seed=0)
    assert found.verdict == expected.verdict == "causal"
    pd.testing.assert_frame_equal(found.effects, expected.effects, check_dtype=False, atol=1e-4)
    assert found.answers["answer"].tolist() == expected.answers["answer"].tolist()
    assert found.cost == expected.cost


def test_a_killed_check_goes_on_with_the_batches_that_are_missing(found, planned, job):
    parts = Folder.open(job.parts)
    names = [name for name in parts.names() if name.startswith("cost-")]
    assert len(names) == 4
    stamps = {name: parts.fs.modified(parts.file(name)) for name in names[1:]}
    parts.remove(names[0])  # as if killed before the last file of a batch
    again = ablate(planned, job, seed=0)
    assert {name: parts.fs.modified(parts.file(name)) for name in names[1:]} == stamps
    pd.testing.assert_frame_equal(again.table, found.table)


def test_a_finished_check_starts_no_process(found, planned, job):
    nowhere = replace(job, model=ModelConfig(path="/nowhere"))
    pd.testing.assert_frame_equal(ablate(planned, nowhere, seed=0).effects, found.effects)


def test_equal_experts_are_found_by_the_process_that_holds_them(ray_cluster, planned, tmp_path):
    job = AblateJob(model=saved("copies", tmp_path / "model"), config=CONFIG, parts=str(tmp_path / "parts"))
    assert ablate(planned, job, seed=0).verdict == "copies"
    assert Folder.open(job.parts).names() == []
