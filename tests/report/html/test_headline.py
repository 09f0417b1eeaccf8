from moe_ray.report.html.headline import headline

RATE = {"value": 0.25, "low": 0.1, "high": 0.5, "n": 48}
SIZES = {"num_union": 40, "num_experts": 6144, "num_batches": 36}
NOTHING = {"before": None, "after": None, "change": None, "ablation": None}


def titles(cards):
    return [card["title"] for card in cards]


def test_only_what_was_measured_has_a_card():
    (card,) = headline(**SIZES, **NOTHING)
    assert card["number"] == "40 of 6,144"
    measured = NOTHING | {"before": {"unsafe_refusal_rate": RATE, "safe_refusal_rate": {"value": 0.5}}}
    assert titles(headline(**SIZES, **measured)) == ["unsafe experts", "unsafe refused"]


def test_a_repair_is_shown_as_before_and_after_with_the_interval_of_after():
    after = {"unsafe_refusal_rate": RATE | {"value": 1.0, "low": 0.9, "high": 1.0}}
    change = {"neutral_loss": {"value": 0.012, "low": -0.1, "high": 0.2}}
    cards = headline(**SIZES, before={"unsafe_refusal_rate": RATE}, after=after, change=change, ablation=None)
    assert cards[1]["number"] == "25.0% → 100.0%"
    assert cards[1]["note"] == "after: 100.0% [90.0%, 100.0%] (n = 48)"
    assert cards[2] == {
        "title": "loss on neutral text",
        "number": "+0.012",
        "note": "nats/token [-0.100, +0.200]",
    }


def test_the_causal_check_answers_yes_or_no_with_what_was_lost():
    row = {"set": "selected", "unsafe": 5.09, "safe": 0.24}
    for verdict, answer in (("causal", "yes"), ("not", "no"), ("undecided", "undecided"), ("nothing", "not asked")):
        cards = headline(**SIZES, **NOTHING | {"ablation": {"verdict": verdict, "table": [row]}})
        assert cards[1]["number"] == answer
        assert "5.09 (unsafe) and 0.24 (safe)" in cards[1]["note"]


def test_what_rounds_to_nothing_has_no_sign():
    row = {"set": "selected", "unsafe": 1.5, "safe": -0.001}
    cards = headline(**SIZES, **NOTHING | {"ablation": {"verdict": "causal", "table": [row]}})
    assert "0.00 (safe)" in cards[1]["note"]
    assert "-0.00" not in cards[1]["note"]
