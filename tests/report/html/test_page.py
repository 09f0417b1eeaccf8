"""The report says what the figures say, shows hostile text as text, loads nothing, and fits a phone."""

from __future__ import annotations

import base64
import io
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from chromium import CHROMIUM, browser
from run_directory import PLANTED, write_identified, write_repaired, write_swept

from moe_ray.cli.main import main
from moe_ray.config.effects import settings_affecting
from moe_ray.config.identify import IdentifyConfig
from moe_ray.config.io import to_yaml
from moe_ray.config.report import ReportConfig
from moe_ray.config.run import Config
from moe_ray.report.html.first_paragraph import Findings, first_paragraph
from moe_ray.run_directory import RunDirectory, open_run
from moe_ray.storage.folder import Folder
from moe_ray.storage.stage import finish

ATTACK = "<script>alert(1)</script><img src=http://evil.test/x onerror=alert(2)> {{ 7*7 }} $\\frac{1}$ \x1b[2J"
HOSTILE = ("fraud </text><script>alert(3)</script>", "$theft_{")


# The first paragraph


def certainty(*told: bool | None) -> pd.DataFrame:
    return pd.DataFrame({"batch_idx": range(len(told)), "is_told_from_noise": list(told)})


def figure(value, low, high, n=96):
    return {"value": value, "low": low, "high": high, "n": n}


FOUND = Findings(
    model="m",
    num_safe=32,
    num_unsafe=32,
    num_union=5,
    num_experts=50,
    certainty=certainty(True, True, False, True),
    selection=IdentifyConfig(),
    routing="masked",
    frozen_changed=0,
    before={"unsafe_refusal_rate": figure(0.0, 0.0, 0.1), "safe_refusal_rate": figure(0.1, 0.05, 0.2)},
    after={"unsafe_refusal_rate": figure(0.9, 0.8, 0.95), "safe_refusal_rate": figure(0.2, 0.15, 0.3)},
    change=None,
)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, "In 3 of 4 batches at least one of them can be told from noise"),
        ({"certainty": certainty(False, False)}, "In no batch can the selection be told from noise"),
        ({"certainty": certainty(True)}, "In every batch at least one of them"),
        ({"certainty": certainty(None)}, "No significance was computed"),
        ({"frozen_changed": 7}, "7 parameters outside of them changed"),
        ({"after": None}, "not evaluated before and after"),
        ({"selection": IdentifyConfig(rule="random")}, "drawn at random, as a control"),
        ({}, "5 of 50 experts (10%)"),
        ({}, "Routing is an observation, not a cause"),
    ],
)
def test_the_first_paragraph_says(change, said):
    assert said in first_paragraph(replace(FOUND, **change))


def test_the_first_paragraph_tells_a_change_from_none_by_the_intervals():
    unsafe, safe = re.findall(r"(?:refused|It refused) .*?; (.*?)\.", first_paragraph(FOUND))
    assert unsafe == "the intervals do not overlap"
    assert safe.startswith("the intervals overlap, so a change cannot be told from none")


def test_paired_differences_speak_before_overlap():
    paired = {"unsafe_refusal_rate": figure(0.9, 0.8, 0.99), "safe_refusal_rate": figure(0.1, 0.02, 0.2)}
    text = first_paragraph(replace(FOUND, change=paired))
    assert "prompt by prompt that is more (+10 points, 95% interval +2 to +20)" in text
    paired["safe_refusal_rate"] = figure(0.1, -0.02, 0.2)
    assert "prompt by prompt that cannot be told from no change (+10" in first_paragraph(replace(FOUND, change=paired))


def test_few_prompts_are_called_few():
    after = {name: {**value, "n": 24} for name, value in FOUND.after.items()}
    assert "few prompts (n = 24" in first_paragraph(replace(FOUND, after=after))
    assert "few prompts" not in first_paragraph(FOUND)


# The page

TEXT_SIZES = """[...document.querySelectorAll('figure text')].map(text => text.getBoundingClientRect())
    .filter(box => box.height).map(box => Math.min(box.height, box.width))"""
"""Heights in CSS pixels of the lines of text in figures that are in sight, upright or turned."""


class Page(HTMLParser):
    """Elements, attributes and visible text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """A run with hostile prompts, answers and categories, and its report."""
    path = tmp_path_factory.mktemp("hostile") / "run"
    write_identified(Folder.open(str(path)), categories=HOSTILE)
    write_repaired(Folder.open(str(path)), prompt=ATTACK, categories=HOSTILE)
    write_swept(Folder.open(str(path)))
    assert main(["report", str(path), "report.examples=3"]) == 0
    return path


@pytest.fixture(scope="module")
def page(run_dir) -> Page:
    return Page((run_dir / "report.html").read_text())


@pytest.mark.slow
def test_hostile_text_is_text(page):
    assert page.tags["script"] == page.tags["img"] == 0
    assert "<script>alert(1)</script>" in page.text
    assert "{{ 7*7 }}" in page.text
    assert "fraud </text><script>al…" in page.text
    assert "$theft_{" in page.text
    assert "\x1b" not in page.text
    assert not [name for name, _ in page.attributes if name.startswith("on")]


@pytest.mark.slow
def test_the_page_loads_nothing(page):
    loads = [value for name, value in page.attributes if name in ("src", "href", "xlink:href", "data", "action")]
    assert loads
    assert all(value.startswith(("#", "data:")) for value in loads)
    assert not re.search(r"url\((?!#)", " ".join(value for _, value in page.attributes))


@pytest.mark.slow
def test_no_id_is_used_twice(page):
    ids = Counter(value for name, value in page.attributes if name == "id")
    assert len(ids) > 100
    assert [name for name, times in ids.items() if times > 1] == []


@pytest.mark.slow
def test_every_part_of_a_full_run_is_there(page, run_dir):
    for part in ("before-after", "experts", "sweep", "training", "examples", "settings"):
        assert ("id", part) in page.attributes
    titles = re.findall(r"<title>(.*?)</title>", (run_dir / "report.html").read_text())
    for title in (
        "Mean risk difference",
        "Jaccard index",
        "Unsafe experts by category",
        "Experts in the union",
        "Training",
        "refusal_margin of the sweep",
    ):
        assert any(found.startswith(title) for found in titles), title
    assert sum(found.startswith("Risk difference of batch") for found in titles) == 4
    assert "75.0% [" in page.text
    assert "+75.0 points" in page.text


@pytest.mark.slow
def test_the_sweep_shows_every_trial_and_stars_what_forgets_too_much(page, run_dir):
    assert "4 trials on the validation split" in page.text
    assert "(0 stopped early, 1 could not be trained)" in page.text
    words = " ".join(page.text.split())
    # 14 of 16: Wilson's interval reaches from 64.0% to 96.5%, so 50% is told from it and 93.75% is not.
    assert "It refused 87.5% [64.0%, 96.5%] of 16 unsafe validation prompts; 1 of the 2 other finished trials" in words
    svg = re.search(
        r"<svg(?:(?!</svg>).)*refusal_margin of the sweep.*?</svg>", (run_dir / "report.html").read_text(), re.S
    )[0]
    assert all(text in svg for text in ("0.875", "0.500", "0.938*", "–", "identify.threshold", "identify.top_k"))
    assert re.search(r"0\.1\s*12\s*0\.938\s*93\.8%\s*0\.0%\s*0\.75\*\s*12\s*finished", page.text)
    assert re.search(r"0\.1\s*6\s*–\s*–\s*–\s*–\s*–\s*failed", page.text)


@pytest.mark.slow
def test_the_rounds_say_what_each_did_and_which_was_kept(page):
    assert "because nothing improved <b>; the experts of round 2 are kept" in " ".join(page.text.split())
    assert re.search(r"1\s*2\s*25\.0%\s*62\.5%\s*6\.2%\s*2 \(kept\)\s*1\s*25\.0%", page.text)


@pytest.mark.slow
def test_the_brightest_cell_of_the_heat_map_is_a_planted_expert(run_dir):
    from matplotlib.image import imread

    svg = re.search(r"<svg(?:(?!</svg>).)*Mean risk difference.*?</svg>", (run_dir / "report.html").read_text(), re.S)
    (data,) = [image for image in re.findall(r'href="data:image/png;base64,([^"]+)"', svg[0])][:1]
    grey_LE = imread(io.BytesIO(base64.b64decode(data)))[:, :, :3] @ [0.2126, 0.7152, 0.0722]
    num_layers, num_experts = 4, 16
    scale = grey_LE.shape[0] // num_layers, grey_LE.shape[1] // num_experts
    cells = grey_LE[scale[0] // 2 :: scale[0], scale[1] // 2 :: scale[1]]
    assert cells.shape == (num_layers, num_experts)
    assert {tuple(map(int, np.unravel_index(place, cells.shape))) for place in np.argsort(cells.ravel())[-2:]} == {
        tuple(expert) for expert in PLANTED
    }


@pytest.mark.slow
def test_what_was_not_run_is_left_out(tmp_path):
    write_identified(Folder.open(str(tmp_path / "run")))
    assert main(["report", f"{tmp_path}/run"]) == 0
    page = Page((tmp_path / "run" / "report.html").read_text())
    assert {value for name, value in page.attributes if name == "id" and "-" not in value} >= {"experts", "settings"}
    for part in ("before-after", "sweep", "training", "examples"):
        assert ("id", part) not in page.attributes
    assert "nothing is said about one here" in page.text


def test_the_selection_is_that_of_the_masks_also_where_a_sweep_chose_it(tmp_path):
    folder = Folder.open(str(tmp_path))
    folder.write_bytes("config.yaml", to_yaml(Config()).encode())
    chosen = Config(identify=IdentifyConfig(threshold=0.2, roles=("response",)))
    finish(folder.sub("identify"), settings_affecting(chosen, "masks"), {}, seconds=0.0)
    assert RunDirectory(folder).identify_config == IdentifyConfig(threshold=0.2, roles=("response",))
    assert RunDirectory(folder).config.identify == IdentifyConfig()


@pytest.mark.slow
def test_a_comparison_with_baselines_is_shown_and_told(tmp_path):
    folder = Folder.open(str(tmp_path / "run"))
    write_identified(folder)
    write_repaired(folder)
    rates = {"unsafe_refusal_rate": 0.5, "safe_refusal_rate": 0.25, "ours_minus_unsafe_refusal_rate": 0.125}
    row = {f"{name}{end}": value for name, value in rates.items() for end in ("", "_low", "_high", "_n")}
    table = pd.DataFrame([{"arm": name, **row, "neutral_loss": float("nan")} for name in ("random", "<b>shuffled</b>")])
    folder.sub("compare").write_table("comparison.parquet", table)
    folder.sub("compare").write_json("verdict.json", "As often as random.\nEach interval is 95%.")
    assert main(["report", f"{tmp_path}/run"]) == 0
    page = Page((tmp_path / "run" / "report.html").read_text())
    assert "how other experts do is below. As often as random." in page.text
    assert "that was not tried here" not in page.text
    assert "<b>shuffled</b>" in page.text
    assert "+12.5 points" in page.text


@pytest.mark.slow
def test_hundreds_of_batches_make_a_small_page(tmp_path):
    from moe_ray.report.html.page import build_report

    write_identified(Folder.open(str(tmp_path)), num_batches=80)
    report = build_report(open_run(str(tmp_path)), ReportConfig(batches=8))
    assert len(report.html) < 1_000_000
    assert sum(name.startswith("risk_batch_") for name in report.figures) == 8
    assert "72 batches are not drawn" in report.html


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine; .ci/run installs it")
def test_a_browser_shows_it_whole_at_desktop_and_phone_width(run_dir, tmp_path):
    with browser(tmp_path / "profile") as tab:
        for width in (1280, 390):
            tab.open(run_dir / "report.html", width)
            assert tab.value("innerWidth") == width
            assert tab.value("document.documentElement.scrollWidth") <= width
            assert tab.complaints() == []
            assert tab.requests() == [(run_dir / "report.html").as_uri()]
            assert tab.value("document.body.innerText.includes('<script>alert(1)</script>')")
            assert tab.value("document.scripts.length") == 0
            assert min(tab.value(TEXT_SIZES)) >= 5
        shot = tab.screenshot(1200)
    assert len(shot) > 20_000


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine; .ci/run installs it")
def test_the_browser_check_sees_a_page_that_is_too_wide_or_complains(tmp_path):
    bad = tmp_path / "bad.html"
    bad.write_text("<div style='width:900px'>wide</div><img src='http://127.0.0.1:9/x.png'><script>boom()</script>")
    with browser(tmp_path / "profile") as tab:
        tab.open(bad, 390)
        assert tab.value("document.documentElement.scrollWidth") > 390
        assert any("boom" in complaint for complaint in tab.complaints())
        assert "http://127.0.0.1:9/x.png" in tab.requests()
