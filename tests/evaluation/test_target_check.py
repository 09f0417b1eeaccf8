"""Compliance is not trained without the user's word: the targets of unsafe examples are read first."""

from __future__ import annotations

import json

import pytest

from moe_ray.config.io import load_config
from moe_ray.demo.examples import embedded_records
from moe_ray.errors import InputError
from moe_ray.evaluation.target_check import refuse_complying_targets, refuse_targets_without_answer
from moe_ray.prompts.examples import Example
from moe_ray.prompts.prompt_set import read_prompts

PROMPT = ({"role": "user", "content": "a prompt"},)
REFUSAL = "I'm sorry, but I can't help with that."


def examples(targets):
    made = [Example(id=f"u{n}", messages=PROMPT, label="unsafe", target=target) for n, target in enumerate(targets)]
    return [*made, Example(id="s", messages=PROMPT, label="safe", target="Sure, here is a cake.")]


def test_the_targets_of_advbench_are_refused_with_what_to_do():
    targets = [f"Sure, here is a script that can exploit vulnerabilities number {n} of a system" for n in range(20)]
    with pytest.raises(
        InputError, match=r"20 of 20 that were read refuse nothing.*'Sure, here is a script.*\(u0\)"
    ) as error:
        refuse_complying_targets(examples(targets))
    assert "prompts.allow_complying_targets=true" in str(error.value)


@pytest.mark.parametrize(
    "thought", ["<think>\nThey ask", " <think>Hm.</think>\n", "[THINK]a[/THINK]", "<|channel|>analysis<|message|>Hm."]
)
def test_a_target_that_is_a_thought_alone_is_refused_by_name(thought, tmp_path):
    with pytest.raises(InputError, match=r"`target` is a thought without an answer in 1 of 4 examples.*\(u1\)"):
        refuse_targets_without_answer(examples([REFUSAL, thought, None]))
    rows = [{"prompt": f"p{n}", "label": "safe", "target": [None, "", "Yes.", thought][n % 4]} for n in range(8)]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, [*rows, *({"prompt": f"u{n}", "label": "unsafe"} for n in range(8))])))
    config = load_config(None, [f"prompts.files=[{path}]", "prompts.safe_per_batch=1", "prompts.unsafe_per_batch=1"])
    with pytest.raises(InputError, match=r"in 2 of 16 examples.*\(mine:4\)"):
        refuse_targets_without_answer(read_prompts(config).examples)


@pytest.mark.parametrize(
    "target",
    ["<think>Hm.</think>No.", "Hm.</think>No.", "Write <think> first.", "", None, "<|channel|>final<|message|>No."],
)
def test_a_thought_before_an_answer_and_a_text_about_thoughts_are_fine(target):
    refuse_targets_without_answer(examples([target]))


@pytest.mark.parametrize(
    "targets",
    [
        [REFUSAL] * 10,
        [None] * 10,
        [REFUSAL, REFUSAL, "Here you go."],
        ["I can't assist with making weapons."] * 5 + [None] * 50,
    ],
)
def test_refusals_and_missing_targets_are_fine(targets):
    refuse_complying_targets(examples(targets))


def test_the_few_targets_among_many_examples_without_are_what_counts():
    with pytest.raises(InputError, match="3 of 3"):
        refuse_complying_targets(examples([*[None] * 50, *["Sure!"] * 3]))


def test_a_refusal_in_the_thought_is_none():
    with pytest.raises(InputError, match="3 of 3"):
        refuse_complying_targets(examples([f"<think>{REFUSAL} Or can I?</think>Sure, here is one."] * 3))
    refuse_complying_targets(examples([f"<think>Shall I?</think>{REFUSAL}"] * 3))


def test_the_shipped_prompts_pass_and_a_benchmarks_pairs_do_not(tmp_path):
    config = load_config()
    refuse_complying_targets(read_prompts(config).examples)
    rows = [
        {"goal": f"Write a virus {n}", "all_prompt": f"jailbreak {n}", "target": "Sure, here is one"} for n in range(40)
    ]
    benign = [
        {"prompt": record["prompt"], "label": "safe"}
        for record in embedded_records("train")
        if record["label"] == "safe"
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, [*rows, *benign])))
    config = load_config(None, [f"prompts.files=[{path}]", "prompts.paired_records=goal"])
    with pytest.raises(InputError, match="of 40 that were read"):
        refuse_complying_targets(read_prompts(config).examples)
