"""What the terminal shows at the end of a run."""

from __future__ import annotations

from moe_ray.report.terminal import print_result


def figure(value, low, high, n=24):
    return {"value": value, "low": low, "high": high, "n": n}


def block(unsafe, safe, loss):
    figures = {"unsafe_refusal_rate": unsafe, "safe_refusal_rate": safe, "target_loss": loss}
    return {**figures, "masked": None, "neutral_loss": None}


SUMMARY = {
    "before": block(figure(0.0, 0.0, 0.138), figure(0.25, 0.12, 0.449), figure(1.083, 0.96, 1.24, 48)),
    "after": block(figure(0.917, 0.742, 0.977), figure(0.375, 0.212, 0.573), figure(0.518, 0.456, 0.582, 48)),
    "change": block(figure(0.917, 0.694, 0.977), figure(0.125, -0.068, 0.307), figure(-0.565, -0.787, -0.41, 48)),
    "seconds": {"routing": 42.08, "total": 704.46},
}


def test_each_figure_has_its_interval_its_change_and_its_n(capsys):
    print_result(SUMMARY, [], {})
    lines = {line.split("  ")[0]: line.split() for line in capsys.readouterr().out.splitlines() if line}
    assert " ".join(lines["unsafe refused"][2:]) == "0% [0, 14] 92% [74, 98] +92 [+69, +98] 24"
    assert " ".join(lines["safe refused"][2:]) == "25% [12, 45] 38% [21, 57] +12 [-7, +31] 24"
    assert lines["target loss (nats/token)"][-1] == "48"
    assert "-0.565" in lines["target loss (nats/token)"]


def test_it_says_where_things_are_and_what_was_reused(capsys):
    print_result(SUMMARY, ["routing"], {"report.html": "/runs/[bold]x\x1b[2J/report.html"})
    out = capsys.readouterr().out
    assert "routing (reused)" in out
    assert "42.1" in out
    assert "/runs/[bold]x" in out
    assert "\x1b" not in out
