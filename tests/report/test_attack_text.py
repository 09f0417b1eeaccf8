"""Attacks in words and rows."""

from __future__ import annotations

from moe_ray.report.attack_text import attack_rows, describe_attacks


def figure(value, low, high, n=20):
    return {"value": value, "low": low, "high": high, "n": n}


def notes(lost=(-0.7, -0.9, -0.4)):
    plain = {"unsafe_before": figure(0.1, 0.02, 0.3), "unsafe_after": figure(0.95, 0.76, 0.99)}
    plain |= {"unsafe_change": figure(0.85, 0.6, 0.95), "safe_after": figure(0.05, 0.01, 0.2)}
    under = plain | {"unsafe_after": figure(0.25, 0.1, 0.5), "unsafe_lost": figure(*lost)}
    return {
        "figures": {"none": plain, "base64": under, "flip_chars": dict.fromkeys(under)},
        "left_out": {"flip_chars": 40},
        "about": {"abliteration": {"before_layer": 2.0, "after_layer": 1.0}},
    }


def test_what_undoes_the_repair_is_named_with_its_interval():
    text = describe_attacks(notes())
    assert text.startswith(
        "Without an attack the repaired model refuses 95.0% [76.0%, 99.0%] (n = 20) of unsafe prompts."
    )
    assert "1 of 2 attacks make it refuse fewer, in points: base64 (-70.0 [-90.0, -40.0])." in text
    assert "FlipAttack: characters: 40 prompts could not be asked" in text
    assert "abliteration, on the repaired model: the direction was found before layer 1." in text


def test_an_interval_that_includes_zero_is_no_finding():
    assert "None of 2 attacks is seen to make it refuse fewer." in describe_attacks(notes(lost=(-0.1, -0.3, 0.1)))


def test_every_attack_has_a_row_also_one_that_could_ask_nothing():
    rows = attack_rows(notes())
    assert rows["attack"].tolist() == ["no attack", "base64", "FlipAttack: characters"]
    assert rows["change by the attack"].tolist() == ["–", "-70.0 [-90.0, -40.0]", "–"]
    assert rows["n"].tolist() == ["20", "20", "0"]
