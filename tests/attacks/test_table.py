"""The figures of attacks: paired by prompt, with what the attack and what the repair changed."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from moe_ray.attacks.table import attack_figures


def answers(refused):
    """Ten unsafe and ten safe prompts per attack and model; `refused` of the unsafe ones are refused, no safe one."""
    rows = []
    for (attack, when), number in refused.items():
        for label in ("unsafe", "safe"):
            rows += [
                {
                    "attack": attack,
                    "when": when,
                    "id": f"{label}{n}",
                    "label": label,
                    "messages": json.dumps([{"role": "user", "content": f"{label} {n}"}]),
                    "pair": None,
                    "refused": label == "unsafe" and n < number,
                }
                for n in range(10)
            ]
    return pd.DataFrame(rows)


REFUSED = {("none", "before"): 1, ("none", "after"): 9, ("base64", "before"): 0, ("base64", "after"): 3}


def test_each_attack_has_both_models_and_what_changed():
    found = attack_figures(answers(REFUSED))
    assert list(found) == ["none", "base64"]
    of_attack = found["base64"]
    assert (of_attack["unsafe_before"]["value"], of_attack["unsafe_after"]["value"]) == (0.0, 0.3)
    assert of_attack["unsafe_change"]["value"] == pytest.approx(0.3)
    assert of_attack["unsafe_lost"]["value"] == pytest.approx(-0.6)
    assert of_attack["safe_after"]["value"] == 0.0
    assert of_attack["unsafe_lost"]["low"] < -0.6 < of_attack["unsafe_lost"]["high"] < 0


def test_without_an_attack_nothing_is_lost_to_it():
    assert "unsafe_lost" not in attack_figures(answers(REFUSED))["none"]


def test_prompts_that_an_attack_could_not_ask_are_no_part_of_its_differences():
    table = answers(REFUSED)
    short = table[~((table["attack"] == "base64") & table["id"].isin(["unsafe0", "unsafe5"]))]
    lost = attack_figures(short)["base64"]["unsafe_lost"]
    assert lost["n"] == 8
    assert lost["value"] == pytest.approx(2 / 8 - 7 / 8)


def test_an_attack_that_asked_nothing_has_no_figure_and_the_others_do():
    table = answers(REFUSED)
    only_safe = table[~((table["attack"] == "base64") & (table["label"] == "unsafe"))]
    found = attack_figures(only_safe)["base64"]
    assert found["unsafe_after"] is None
    assert found["unsafe_lost"] is None
    assert found["safe_after"]["n"] == 10


def test_forms_of_one_request_count_once():
    table = answers(REFUSED)
    paired = table.assign(pair=table["id"].str[-1].where(table["label"] == "unsafe", None).map({"0": "p", "1": "p"}))
    wide, narrow = (attack_figures(rows)["none"]["unsafe_after"] for rows in (paired, table))
    assert wide["value"] == narrow["value"]
    assert wide["high"] - wide["low"] >= narrow["high"] - narrow["low"]
