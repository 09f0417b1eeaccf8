"""What is decided for `auto`: one type for all, as many processes as have room, and what a setting says is done."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_ray.config.io import with_settings
from moe_ray.config.keys import keys_of
from moe_ray.config.run import Config
from moe_ray.errors import InputError
from moe_ray.resources.decide import decide, local_cpus
from moe_ray.resources.fitting import RESERVED, copies_on, gpus_for
from moe_ray.resources.model_size import ModelSize
from moe_ray.resources.nodes import GB, Node

OLMOE = ModelSize(
    name="OLMoE-1B-7B", parameters=6_919_161_856, experts=1024, expert_parameters=6_291_456, own_dtype="bfloat16"
)
SMALL = replace(OLMOE, name="small", parameters=10**8)
H100 = Node(cpus=64, memory=1000 * GB, gpus=8, gpu_memory=80 * GB, gpu_name="H100")
LAPTOP = Node(cpus=4, memory=24 << 30)

nodes = st.lists(
    st.builds(
        Node,
        cpus=st.integers(0, 64),
        memory=st.integers(1, 2000).map(lambda size: size * GB),
        gpus=st.integers(0, 8),
        gpu_memory=st.one_of(st.none(), st.integers(8, 180).map(lambda size: size * GB)),
    ),
    min_size=1,
    max_size=4,
)
models = st.builds(
    ModelSize,
    name=st.just("m"),
    parameters=st.integers(10**6, 10**12),
    experts=st.just(64),
    expert_parameters=st.just(1000),
    own_dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
)


def try_to_decide(*args, **options):
    try:
        return decide(*args, **options)
    except InputError:
        return None


NOT_OF_THE_MACHINE = ("model.experts_implementation", "cluster.num_cpus", "ablate.run", "evaluate.guard_family")


@settings(max_examples=50)
@given(models, nodes)
def test_nothing_is_left_to_be_decided_and_nothing_else_is_changed(model, there):
    config = with_settings(Config(), {"finetune.num_workers": 2, "capture.max_actors": 3})
    decision = try_to_decide(config, model, there)
    if decision is None:
        return
    for key in keys_of():
        before, after = key.value_in(config), key.value_in(decision.config)
        assert before in ("auto", after), key.name
        # The kernels are each device's own, and a Ray that is there has its CPUs.
        assert after != "auto" or key.name in NOT_OF_THE_MACHINE, key.name
    for name in ("capture.num_actors", "evaluate.num_actors", "ablate.num_actors"):
        assert get(decision.config, name) >= 1


@settings(max_examples=50)
@given(models, nodes)
def test_processes_have_room_on_the_gpus_that_there_are(model, there):
    decision = try_to_decide(Config(), model, there)
    if decision is None or not decision.gpus_per_copy:
        return
    capture = decision.config.capture
    assert capture.gpus_per_actor == decision.gpus_per_copy == decision.config.finetune.gpus_per_worker
    assert capture.num_actors * capture.gpus_per_actor <= max(sum(node.gpus for node in there), decision.gpus_per_copy)
    known = [node for node in there if node.gpu_memory and node.gpus >= decision.gpus_per_copy]
    unknown = any(node.gpus and node.gpu_memory is None for node in there)
    held = model.bytes_in(decision.dtype)
    assert unknown or any(decision.gpus_per_copy * node.gpu_memory > held for node in known)


@pytest.mark.slow
@settings(max_examples=50)
@given(models, nodes, st.sampled_from(["float32", "bfloat16"]))
def test_numbers_that_are_given_are_kept(model, there, dtype):
    settings = {
        "capture.num_actors": 5, "capture.gpus_per_actor": 0.5, "evaluate.num_actors": 2, "evaluate.gpus_per_actor": 0,
        "ablate.gpus_per_actor": 2, "finetune.gpus_per_worker": 4, "sweep.gpus_per_trial": 1, "model.dtype": dtype,
    }  # fmt: skip
    decision = try_to_decide(with_settings(Config(), settings), model, there)
    if decision is not None:
        assert {name: get(decision.config, name) for name in settings} == settings


@settings(max_examples=50)
@given(models, nodes)
def test_weights_on_the_cpu_fit_a_node_or_are_refused(model, there):
    config = with_settings(Config(), dict.fromkeys(GPUS, 0))
    decision = try_to_decide(config, model, there)
    most = max((node.memory for node in there if node.cpus), default=0)
    if decision is None:
        assert model.bytes_in(model.own_dtype) * 1.05 + RESERVED > most
    else:
        assert model.bytes_in(decision.dtype) < most
        assert decision.config.capture.num_actors <= len(there)


GPUS = (
    "capture.gpus_per_actor", "evaluate.gpus_per_actor", "ablate.gpus_per_actor", "finetune.gpus_per_worker",
    "sweep.gpus_per_trial",
)  # fmt: skip


def get(config, name):
    group, _, key = name.partition(".")
    return getattr(getattr(config, group), key)


def test_a_model_that_fits_one_gpu_has_a_process_on_each():
    decision = decide(Config(), OLMOE, [H100])
    assert decision.in_words == (
        "OLMoE-1B-7B, 13.8 GB in bfloat16: capture 8 x 1 H100, answers 8 x 1 H100, training 1 x 1 H100"
    )
    assert decision.warnings == ()


def test_every_process_has_as_many_gpus_as_the_weights_need():
    large = replace(OLMOE, parameters=61 * 10**9)  # 122 GB
    decision = decide(Config(), large, [H100, replace(H100, gpus=4), LAPTOP])
    assert (decision.gpus_per_copy, decision.config.capture.num_actors) == (2, 6)


def test_a_driver_without_cpus_gets_no_process():
    assert decide(Config(), SMALL, [replace(LAPTOP, cpus=0), LAPTOP, LAPTOP]).config.capture.num_actors == 2


@pytest.mark.parametrize(
    ("model", "memory", "dtype"),
    [
        (SMALL, 24 << 30, "float32"),
        (OLMOE, 24 << 30, "bfloat16"),
        (OLMOE, 64 << 30, "float32"),
        (replace(OLMOE, own_dtype="float16"), 24 << 30, "float16"),
    ],
)
def test_without_gpus_the_type_is_float32_where_that_has_room(model, memory, dtype):
    decision = decide(Config(), model, [replace(LAPTOP, memory=memory)])
    assert decision.dtype == decision.config.model.dtype == dtype
    assert ("have no room" in decision.in_words) == (dtype != "float32")


def test_with_gpus_the_type_is_the_checkpoints_own_in_every_process():
    mixed = with_settings(Config(), {"evaluate.gpus_per_actor": 0})
    decision = decide(mixed, SMALL, [H100])
    assert decision.dtype == "bfloat16"
    assert "8 GPUs are there, and answers use none, as the settings say" in decision.warnings


def test_a_run_directory_keeps_the_type_that_it_was_begun_with():
    assert decide(Config(), SMALL, [LAPTOP], dtype="bfloat16").dtype == "bfloat16"
    assert decide(Config(), SMALL, [H100], dtype="float32").dtype == "float32"
    given_now = with_settings(Config(), {"model.dtype": "float16"})
    assert decide(given_now, SMALL, [LAPTOP], dtype="bfloat16").dtype == "float16"


def test_a_model_that_fits_nowhere_is_refused_with_what_is_there_and_what_it_takes():
    with pytest.raises(
        InputError, match=r"OLMoE-1B-7B, 13\.8 GB in bfloat16: got at most 8\.0 GB .* expected 16\.5 GB"
    ):
        decide(Config(), OLMOE, [Node(cpus=4, memory=8 * GB)])
    assert decide(Config(), OLMOE, [Node(cpus=4, memory=8 * GB)], may_grow=True).dtype == "bfloat16"


def test_gpus_that_are_too_small_are_named():
    small_cards = Node(cpus=16, memory=256 * GB, gpus=1, gpu_memory=8 * GB, gpu_name="T4")
    decision = decide(Config(), OLMOE, [small_cards])
    assert decision.config.capture.gpus_per_actor == 0
    assert "have no room on the GPUs of one node (8 GB)" in decision.warnings[0]


def test_gpus_that_a_cluster_will_add_are_asked_for_in_every_stage_once_one_asks():
    head = Node(cpus=2, memory=16 * GB)
    asked = with_settings(Config(), {"capture.gpus_per_actor": 1, "capture.num_actors": 4})
    decision = decide(asked, SMALL, [head], may_grow=True)
    assert (decision.dtype, decision.config.capture.num_actors, decision.warnings) == ("bfloat16", 4, ())
    assert {get(decision.config, name) for name in GPUS} == {1}
    assert "ask with capture.gpus_per_actor=1" in decide(Config(), SMALL, [head], may_grow=True).warnings[0]


def test_a_fraction_of_a_gpu_shares_one_and_never_spans_two():
    node = Node(cpus=64, memory=GB, gpus=3)
    assert [copies_on(node, gpus) for gpus in (0.5, 0.4, 1, 2, 3)] == [6, 6, 3, 1, 1]
    assert copies_on(replace(node, cpus=2), 0.5) == 2


def test_gpus_of_unknown_memory_are_taken_for_large_enough():
    assert gpus_for(10**12, None) == 1
    assert gpus_for(100 * GB, 80 * GB) == 2


def test_a_local_ray_has_a_cpu_for_every_process():
    assert local_cpus(Config(), gpus=0) == 4
    assert local_cpus(Config(), gpus=8) == 10
    assert local_cpus(with_settings(Config(), {"capture.num_actors": 7}), gpus=0) == 9
    assert local_cpus(with_settings(Config(), {"cluster.num_cpus": 2}), gpus=8) == 2


class TestShards:
    """Of a model that several processes hold together each takes its part."""

    BIG = replace(OLMOE, name="big", parameters=10 * OLMOE.parameters)

    @pytest.mark.parametrize(("shards", "copies"), [(2, 8), (4, 4), (16, 1)])
    def test_a_process_has_one_gpu_and_copies_share_the_gpus_of_all_nodes(self, shards, copies):
        decision = decide(with_settings(Config(), {"model.num_shards": shards}), self.BIG, [H100, H100])
        config = decision.config
        assert decision.gpus_per_copy == shards
        assert config.capture.gpus_per_actor == config.evaluate.gpus_per_actor == config.ablate.gpus_per_actor == 1
        assert config.capture.num_actors == config.evaluate.num_actors == copies
        assert f"capture {copies} x {shards} shards x 1 H100" in decision.in_words
        whole = decide(Config(), self.BIG, [H100, H100])
        assert decision.process_bytes == pytest.approx(whole.process_bytes / shards, abs=1)

    def test_a_model_that_no_node_has_room_for_is_spread_over_several(self):
        nodes = [replace(LAPTOP, memory=60 * GB)] * 4
        with pytest.raises(InputError, match=r"got at most 60\.0 GB of memory on a node"):
            decide(Config(), self.BIG, nodes)
        decision = decide(with_settings(Config(), {"model.num_shards": 4}), self.BIG, nodes)
        assert (decision.dtype, decision.gpus_per_copy, decision.config.capture.num_actors) == ("bfloat16", 0, 1)
        assert decision.process_bytes < 40 * GB

    @pytest.mark.parametrize("number", [1, 3])
    def test_on_cpus_no_more_copies_compute_than_there_are_nodes(self, number):
        decision = decide(with_settings(Config(), {"model.num_shards": 2}), SMALL, [LAPTOP] * number)
        assert decision.config.capture.num_actors == decision.config.evaluate.num_actors == number

    def test_parts_that_have_no_room_are_said(self):
        nodes = [replace(LAPTOP, memory=60 * GB)] * 2
        with pytest.raises(InputError, match=r"room for 3 processes \(model\.num_shards\) of 48\.4 GB each"):
            decide(with_settings(Config(), {"model.num_shards": 3}), self.BIG, nodes)

    def test_a_local_ray_has_cpus_for_all_of_them(self):
        spread = with_settings(Config(), {"model.num_shards": 3, "capture.num_actors": 2})
        assert local_cpus(spread, gpus=0) == 8
