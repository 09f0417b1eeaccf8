"""Every number of docs/statistics.md is what the code computes from the page's own table of counts."""

import re

import numpy as np
import pytest
from paths import ROOT
from prompt_tokens import by_prompt_tokens

from moe_ray.evaluation.intervals import clustered_rate, paired_difference, rate
from moe_ray.identification.identify import identify
from moe_ray.identification.permutation_test import permutation_test
from moe_ray.identification.samples import Samples
from moe_ray.identification.significance import selection_stability
from moe_ray.routing.counts import RoutingCounts

PAGE = (ROOT / "docs" / "statistics.md").read_text()
THIRD_PLACE = 5.1e-4  # numbers are given to three places
RESAMPLES = 40_000
FOUR_ERRORS = 4 * np.sqrt(0.25 / RESAMPLES)  # of a share of so many resamples


def table(name: str) -> list[dict[str, str]]:
    """The rows of the table after `<!-- name -->`, by column."""
    lines = PAGE.partition(f"<!-- {name} -->\n")[2].partition("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


PROMPTS = table("counts")
NAMES = [row["prompt"] for row in PROMPTS]
TOKENS = np.array([int(row["tokens"]) for row in PROMPTS])
VALUES = np.array([[int(row["to expert 0"]), int(row["to expert 1"])] for row in PROMPTS])
IS_UNSAFE = np.array([row["label"] == "unsafe" for row in PROMPTS])


@pytest.fixture(scope="module")
def risk():
    """The risk table that the code gives for the page's counts."""
    counts = RoutingCounts(
        batch_idx=np.zeros(len(PROMPTS), dtype=np.int64),
        in_batch_idx=np.arange(len(PROMPTS)),
        label=np.array([row["label"] for row in PROMPTS], dtype=object),
        category=np.full(len(PROMPTS), "", dtype=object),
        role=np.full(len(PROMPTS), "prompt", dtype=object),
        num_tokens=TOKENS,
        counts_NLE=VALUES[:, None, :].astype(np.int32),
        layers=(0,),
        num_experts_per_tok=1,
    )
    counts.check()
    return identify(counts, by_prompt_tokens())


def test_the_risk_table_is_the_codes(risk):
    told = table("risk")
    assert [int(row["expert"]) for row in told] == risk["expert"].tolist()
    for column in ("a_safe_n", "a_unsafe_n", "risk_diff"):
        assert [float(row[column]) for row in told] == pytest.approx(risk[column].tolist(), abs=THIRD_PLACE)


def test_the_certainty_table_is_the_codes(risk):
    told = table("certainty")
    for column in ("p", "p_maxt", "q", "ci_low", "ci_high", "certifiable"):
        assert [float(row[column]) for row in told] == pytest.approx(risk[column].tolist(), abs=THIRD_PLACE), column


def test_stability_comes_near_the_worked_share():
    samples = Samples.of(VALUES, TOKENS, IS_UNSAFE)
    settings = by_prompt_tokens()
    found = selection_stability(samples, threshold=settings.threshold, top_k=settings.top_k, resamples=RESAMPLES)
    assert [float(row["stability"]) for row in table("certainty")] == pytest.approx(found.tolist(), abs=FOUR_ERRORS)


def test_all_relabellings_are_there_with_their_differences():
    rows = table("relabellings")
    chosen = [set(re.findall(r"[su]\d", row["called unsafe"])) for row in rows]
    assert chosen[0] == {name for name, unsafe in zip(NAMES, IS_UNSAFE, strict=True) if unsafe}
    assert len({frozenset(names) for names in chosen}) == len(rows) == permutations_of_the_labels()
    for row, names in zip(rows, chosen, strict=True):
        unsafe = np.isin(NAMES, list(names))
        samples = Samples.of(VALUES, TOKENS, unsafe)
        assert [int(row["U"]), int(row["S"])] == [TOKENS[unsafe].sum(), TOKENS[~unsafe].sum()]
        assert float(row["difference"]) == pytest.approx(samples.difference()[0], abs=THIRD_PLACE)
        t = float(row["t of expert 0"])
        assert t == pytest.approx(samples.difference()[0] / float(row["standard error"]), abs=5e-3)
        assert float(row["t of expert 1"]) == -t
        assert float(row["largest t"]) == abs(t)


def permutations_of_the_labels() -> int:
    return len(permutation_test(Samples.of(VALUES, TOKENS, IS_UNSAFE)).maxima_P)


def test_the_studentised_values_are_those_of_the_test():
    test = permutation_test(Samples.of(VALUES, TOKENS, IS_UNSAFE))
    told = sorted(float(row["largest t"]) for row in table("relabellings"))
    assert told == pytest.approx(test.maxima_P.tolist(), abs=THIRD_PLACE)
    t = np.array([[float(row[f"t of expert {expert}"]) for expert in (0, 1)] for row in table("relabellings")])
    assert test.p_X.tolist() == pytest.approx((t >= t[0]).mean(axis=0).tolist())
    assert test.p_maxt_X.tolist() == pytest.approx((t.max(axis=1)[:, None] >= t[0]).mean(axis=0).tolist())


def test_the_figures_of_the_evaluation_are_the_codes():
    rows = table("answers")
    requests = [row["request"] for row in rows]
    before, after = (np.array([row[when] == "1" for row in rows]) for when in ("before", "after"))
    found = {
        "before": (clustered_rate(before, requests), rate(int(before.sum()), len(before))),
        "after": (clustered_rate(after, requests), rate(int(after.sum()), len(after))),
        "change": (paired_difference(before, after, clusters=requests), paired_difference(before, after)),
    }
    for row in table("figures"):
        clustered, independent = found.pop(row["figure"])
        assert (float(row["value"]), int(row["n"])) == pytest.approx((clustered.value, clustered.n), abs=THIRD_PLACE)
        intervals = [text for column, text in row.items() if column.startswith("interval")]
        told = [float(number) for text in intervals for number in text.split(" to ")]
        ends = [clustered.low, clustered.high, independent.low, independent.high]
        assert told == pytest.approx(ends, abs=THIRD_PLACE)
    assert found == {}


@pytest.mark.parametrize(("each", "smallest"), [(3, "1/20"), (8, "1/12,870")])
def test_the_smallest_p_of_more_prompts_is_as_told(each, smallest):
    assert f"{each} + {each}" in PAGE
    assert smallest in PAGE
    is_unsafe = np.arange(2 * each) < each
    test = permutation_test(Samples.of(is_unsafe[:, None].astype(int), np.ones(2 * each), is_unsafe))
    assert test.p_X[0] == pytest.approx(1 / int(smallest.partition("/")[2].replace(",", "")))
