"""Which arms there are, and what is equal in them."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from risk_tables import EVERYTHING, LAYERS, NUM_EXPERTS, masks_of_batches, risk_table

from moe_ray.config.compare import BASELINES, POLICIES, POLICY, CompareConfig
from moe_ray.config.finetune import FinetuneConfig
from moe_ray.config.keys import keys_of
from moe_ray.errors import InputError
from moe_ray.experts import masks_from_experts
from moe_ray.studies.baselines import OURS, masks_to_compare, plan_arms

TRAIN = FinetuneConfig()
NAMES = {3: "fraud", 8: "theft", 9: "fraud"}


def three_batches():
    selected = {3: EVERYTHING[:2], 8: EVERYTHING[:5], 9: EVERYTHING[3:6]}
    return masks_from_experts(selected, layers=LAYERS, num_experts=NUM_EXPERTS)


def planned(*names, train=TRAIN, weights=True, ours=None, **settings_):
    ours = ours or three_batches()
    risk = risk_table(ours.batch_idx, weights=weights)
    return plan_arms(ours, risk, train, CompareConfig(names=names, **settings_), NAMES)


@settings(max_examples=6)
@given(masks_of_batches(), st.sampled_from(["steps", "parameters"]))
def test_every_arm_trains_the_batches_that_ours_trains_for_as_long(ours, budget):
    for arm in planned(ours=ours, train=FinetuneConfig(patience=2), draws=2, budget=budget):
        if arm.masks is not None:
            assert arm.masks.trained_batches == ours.trained_batches
            assert arm.masks.batch_idx == ours.batch_idx
        assert arm.train.epochs == FinetuneConfig().epochs
        assert arm.train.patience == 0


def test_without_names_there_are_all_but_most_policies_and_what_needs_a_column_that_is_missing():
    both = [[arm.kind for arm in planned(weights=weights, draws=1)] for weights in (True, False)]
    policies = {f"{POLICY}{name}" for name in POLICIES}
    assert set(both[0]) == {OURS, *BASELINES} - policies | {"policy:masked"}
    assert set(both[0]) - set(both[1]) == {"esft_gate", "reap"}
    masked = [arm.kind for arm in planned(draws=1, train=FinetuneConfig(routing="masked"))]
    assert policies & set(masked) == {"policy:natural"}


def test_no_arm_is_there_twice():
    for budget in ("steps", "parameters"):
        arms = planned(draws=2, budget=budget)
        assert len({arm.folder for arm in arms}) == len(arms)
    assert "global_union" not in [arm.kind for arm in planned(budget="parameters")]  # global is then


@pytest.mark.parametrize(("name", "said"), [("esft_gate", r"capture\.weights"), ("reap", r"capture\.scores=\[reap\]")])
def test_a_baseline_without_its_column_is_refused_when_named(name, said):
    with pytest.raises(InputError, match=said):
        planned(name, weights=False)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_can_be_an_arm_that_differs_in_routing_alone(policy):
    own = next(name for name in POLICIES if name != policy and name in ("masked", "natural"))
    ours, other = planned(f"{POLICY}{policy}", train=FinetuneConfig(routing=own))
    assert other.masks is ours.masks
    assert other.train.routing == policy
    assert dataclasses.replace(other.train, routing=own, boost=0.0) == ours.train
    if policy == "boosted":
        assert other.train.boost == CompareConfig().policy_boost


def test_the_runs_own_policy_is_no_baseline():
    with pytest.raises(InputError, match="policy:masked is what the run does"):
        planned("policy:masked", train=FinetuneConfig(routing="masked"))


def test_one_batch_is_not_shuffled():
    ours = masks_from_experts({3: EVERYTHING[:4]}, layers=LAYERS, num_experts=NUM_EXPERTS)
    assert "shuffled_0" not in [arm.name for arm in planned(ours=ours)]


def test_what_has_no_mask_trains_under_natural_routing_and_has_its_own_learning_rate():
    full, everything = planned("full", "all_experts", full_learning_rate=1e-5)[1:]
    assert full.masks is None
    assert full.learns == "all"
    assert full.train == dataclasses.replace(FinetuneConfig(), learning_rate=1e-5)
    assert everything.masks.masks_BLE.all()


def test_lora_has_the_named_rank_at_equal_steps_and_none_yet_at_equal_parameters():
    names = ("lora_same", "lora_all", "moe_sieve")
    for arm in planned(*names, lora_rank=5, lora_learning_rate=1e-4)[1:]:
        assert (arm.learns, arm.rank, arm.is_matched, arm.train.learning_rate) == ("low_rank", 5, False, 1e-4)
    for arm in planned(*names, lora_rank=5, budget="parameters")[1:]:
        assert (arm.rank, arm.is_matched) == (0, True)
    same, *published = planned(*names)[1:]
    assert same.masks.digest() == three_batches().digest()
    assert same.train.routing == FinetuneConfig().routing
    assert {arm.train.routing for arm in published} == {"natural"}


def test_arms_that_a_budget_changes_have_another_folder():
    names = ("lora_same", "global", "attention_only", "all_experts", "policy:masked")
    steps, parameters = (planned(*names, budget=budget) for budget in ("steps", "parameters"))
    same = {one.name for one, other in zip(steps, parameters, strict=True) if one.folder == other.folder}
    assert same == {OURS, "all_experts", "policy:masked"}
    assert not any(":" in arm.folder for arm in steps)


def test_some_categories_alone_can_be_compared():
    ours = masks_to_compare(three_batches(), CompareConfig(categories=("fraud",)), NAMES)
    assert ours.trained_batches == (3, 9)
    assert masks_to_compare(three_batches(), CompareConfig(), NAMES).trained_batches == (3, 8, 9)
    with pytest.raises(InputError, match=r"compare\.categories: got 'arson', expected .*\['fraud', 'theft'\]"):
        masks_to_compare(three_batches(), CompareConfig(categories=("arson",)), NAMES)


def test_every_baseline_is_described_where_it_is_chosen():
    (names,) = (key for key in keys_of() if key.name == "compare.names")
    assert [name for name in BASELINES if f"; {name} = " not in names.setting.text and POLICY not in name] == []
    assert f"; {POLICY}NAME = " in names.setting.text


@pytest.mark.parametrize(
    ("settings_", "said"),
    [
        ({"names": ("lora",)}, r"compare\.names: got 'lora'"),
        ({"at": (0.5, 0.25, 1.0)}, r"compare\.at: got \(0\.5, 0\.25, 1\.0\), expected shares in ascending order"),
        ({"at": (0.5,)}, "the last of them 1"),
        ({"at": ()}, "the last of them 1"),
        ({"at": (0.0, 1.0)}, r"compare\.at: got 0\.0, expected above 0"),
    ],
)
def test_a_wrong_setting_is_named(settings_, said):
    with pytest.raises(InputError, match=said):
        CompareConfig(**settings_)


def test_an_arms_repr_is_one_line():
    assert [repr(arm) for arm in planned("full")] == [
        "Arm(per_batch, learns experts, 6 experts in the union)",
        "Arm(full, learns all, no mask)",
    ]
