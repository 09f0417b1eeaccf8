"""What an engine answers is scored and counted by transformers, as its own answers are; also of a repaired model."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import fake_vllm
import numpy as np
import pytest
import ray
import torch

from moe_ray.config.evaluate import EvaluateConfig
from moe_ray.config.model import ModelConfig
from moe_ray.demo.examples import embedded_records
from moe_ray.experts import Expert, masks_from_experts
from moe_ray.finetuning.adapter import expert_weights, save_adapter
from moe_ray.finetuning.adapter_tensors import hash_weights
from moe_ray.finetuning.trainable_experts import trainable_experts
from moe_ray.models.loading import load_model
from moe_ray.models.moe_layers import find_moe_layers
from moe_ray.orchestration.jobs.answer import answer
from moe_ray.orchestration.jobs.answer_job import AnswerJob
from moe_ray.prompts.example_tables import examples_to_frame
from moe_ray.prompts.examples import records_to_examples
from moe_ray.storage.folder import Folder

# Ray's workers cannot import test modules.
ray.cloudpickle.register_pickle_by_value(fake_vllm)

CONFIG = EvaluateConfig(max_new_tokens=8)
EXPERTS = [Expert(0, 1), Expert(1, 2), Expert(2, 3)]


@pytest.fixture(scope="module")
def held_out():
    frame = examples_to_frame(records_to_examples(embedded_records("test"))[:12])
    return frame.assign(batch_idx=0)


def save_moved_experts(folder, model):
    """An adapter whose experts are far from the base's."""
    layers = find_moe_layers(model)
    masks = masks_from_experts(
        {0: [(layers.layers.index(e.layer), e.expert) for e in EXPERTS]},
        layers=layers.layers,
        num_experts=layers.num_experts,
    )
    base_hash = hash_weights(expert_weights(model, EXPERTS))
    with trainable_experts(model, masks.union) as trainable:
        with torch.no_grad():
            for parameter in trainable.all_parameters():
                parameter.mul_(-3.0)
        save_adapter(folder, trainable, base="", base_hash=base_hash, mask_hash=masks.digest())


@pytest.mark.needs_ray
@pytest.mark.slow
@pytest.mark.filterwarnings("default")
class TestOnRay:
    @pytest.fixture
    def asked(self, monkeypatch, tmp_path):
        """Has engine processes hold the fake; the file in which they say what they were started with."""
        file = tmp_path / "asked"
        file.touch()
        monkeypatch.setattr(
            "moe_ray.orchestration.cluster.engine_process.EngineHolder",
            partial(fake_vllm.holder, asked_file=str(file)),
        )
        return file

    def test_answers_losses_and_counts_are_those_of_transformers_of_base_and_repaired_model(
        self, ray_cluster, tiny_model_path, held_out, tmp_path, asked
    ):
        model = ModelConfig(path=str(tiny_model_path), dtype="float32")
        save_moved_experts(tmp_path / "run" / "finetune", load_model(model, device="cpu"))
        found = {}
        for adapter in (None, "finetune"):
            for engine in ("transformers", "vllm"):
                job = AnswerJob(
                    model=model,
                    config=replace(CONFIG, engine=engine),
                    run_url=str(tmp_path / "run"),
                    parts=f"parts-{engine}-{adapter}",
                    adapter=adapter,
                    count=True,
                )
                found[adapter, engine] = answer(held_out, job, what="test", neutral=["Snow fell."])
            own, theirs = found[adapter, "transformers"], found[adapter, "vllm"]
            assert theirs.answers.equals(own.answers)
            assert np.array_equal(theirs.routing.counts_NLE, own.routing.counts_NLE)
            assert theirs.neutral.equals(own.neutral)
            assert theirs.first_tokens["id"].tolist() == own.first_tokens["id"].tolist()
        base, repaired = (found[adapter, "vllm"].answers["answer"] for adapter in (None, "finetune"))
        assert (base != repaired).any()
        first, second = asked.read_text().splitlines()
        assert str(tiny_model_path) in first
        assert "moe-ray-merged-" in second

    @pytest.mark.exhaustive
    def test_drawn_answers_are_of_their_example_and_nothing_is_generated_twice(
        self, ray_cluster, tiny_model_path, held_out, tmp_path, asked
    ):
        config = EvaluateConfig(engine="vllm", max_new_tokens=8, temperature=1.0, samples=2)
        job = AnswerJob(
            model=ModelConfig(path=str(tiny_model_path)), config=config, run_url=str(tmp_path), parts="parts"
        )
        whole = answer(held_out, job, what="test").answers.set_index(["id", "sample"])
        assert (whole.xs(0, level="sample")["answer"] != whole.xs(1, level="sample")["answer"]).any()
        alone = answer(held_out.iloc[3:5], replace(job, parts="some"), what="test").answers.set_index(["id", "sample"])
        assert alone["answer"].to_dict() == whole.loc[alone.index, "answer"].to_dict()
        folder = Folder.open(str(tmp_path)).sub("parts")
        for name in folder.parquet_names():
            if name.startswith("answers-"):
                folder.remove(name)
        num_started = len(asked.read_text().splitlines())
        again = answer(held_out, job, what="test").answers.set_index(["id", "sample"])
        assert again["answer"].equals(whole["answer"])
        assert len(asked.read_text().splitlines()) == num_started
