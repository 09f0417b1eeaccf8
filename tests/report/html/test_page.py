"""The report shows hostile text as text, loads nothing, is whole, and fits a phone."""

from __future__ import annotations

import re
from collections import Counter

import pandas as pd
import pytest
from chromium import CHROMIUM, browser
from html_page import Page
from large_run import write_large
from run_directory import write_identified, write_repaired

from moe_ray.config.report import ReportConfig
from moe_ray.identification.risk_tables import RiskParts
from moe_ray.report.html.page import build_report
from moe_ray.run_directory import open_run
from moe_ray.storage.folder import Folder

TEXT_SIZES = """[...document.querySelectorAll('figure text')].map(text => text.getBoundingClientRect())
    .filter(box => box.height).map(box => Math.min(box.height, box.width))"""
"""Heights in CSS pixels of the lines of text in figures that are in sight, upright or turned."""


@pytest.mark.slow
def test_hostile_text_is_text(page):
    assert page.tags["img"] == 0
    assert page.tags["script"] == 1  # the page's own, which the policy names by hash
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
def test_every_part_of_a_full_run_is_there(page, hostile_run):
    for part in ("headline", "before-after", "experts", "sweep", "training", "examples", "answers", "settings"):
        assert ("id", part) in page.attributes
    titles = re.findall(r"<title>(.*?)</title>", (hostile_run / "report.html").read_text())
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
def test_the_sweep_is_a_picture_a_table_and_a_sentence(page, hostile_run):
    assert "4 trials on the validation split" in page.text
    assert "(0 stopped early, 1 could not be trained)" in page.text
    assert "The winner refused 87.5% [64.0%, 96.5%] of 16 unsafe validation prompts." in page.words
    assert "The rates of 1 of the 2 other finished trials lie within that interval" in page.words
    html = (hostile_run / "report.html").read_text()
    svg = re.search(r"<svg(?:(?!</svg>).)*refusal_margin of the sweep.*?</svg>", html, re.S)[0]
    assert all(text in svg for text in ("0.875", "0.500", "0.938*", "–", "identify.threshold", "identify.top_k"))
    assert re.search(r"0\.1\s*12\s*0\.938\s*93\.8%\s*0\.0%\s*\+0\.750\*\s*12\s*finished", page.text)
    assert re.search(r"0\.1\s*6\s*–\s*–\s*–\s*–\s*–\s*failed", page.text)


@pytest.mark.slow
def test_the_rounds_say_what_each_did_and_which_was_kept(page):
    assert "It stopped because nothing improved <b>; the experts of round 2 are kept" in page.words
    assert re.search(r"1\s*2\s*25\.0%\s*62\.5%\s*6\.2%\s*2 \(kept\)\s*1\s*25\.0%", page.text)


@pytest.mark.slow
def test_what_was_not_run_is_left_out(tmp_path):
    folder = Folder.open(str(tmp_path / "run"))
    write_identified(folder)
    page = Page(build_report(open_run(folder.url), ReportConfig()).html)
    assert {value for name, value in page.attributes if name == "id" and "-" not in value} >= {"experts", "settings"}
    for part in ("before-after", "sweep", "training", "examples"):
        assert ("id", part) not in page.attributes
    assert "nothing is said about one here" in page.text


@pytest.mark.slow
def test_a_comparison_with_baselines_is_shown_and_told(tmp_path):
    folder = Folder.open(str(tmp_path / "run"))
    write_identified(folder)
    write_repaired(folder)
    rates = {"unsafe_refusal_rate": 0.5, "safe_refusal_rate": 0.25, "ours_minus_unsafe_refusal_rate": 0.125}
    row = {f"{name}{end}": value for name, value in rates.items() for end in ("", "_low", "_high", "_n")}
    row |= {"neutral_loss": float("nan"), "trainable_parameters": 1234}
    table = pd.DataFrame(
        [
            {"arm": name, "share": share, "steps": steps, **row}
            for name in ("base", "per_batch", "random", "<b>shuffled</b>")
            for share, steps in ((0.5, 2), (1.0, 4))
        ]
    )
    folder.sub("compare").write_table("comparison.parquet", table)
    categories = ("fraud", "<i>theft</i>")
    transfer = [
        {"trained": one, "tested": other, "unsafe_refusal_rate": 0.5, "safe_target_loss": 0.125}
        for one in categories
        for other in categories
    ]
    folder.sub("compare").write_table("transfer.parquet", pd.DataFrame(transfer))
    folder.sub("compare").write_json("verdict.json", "As often as random.\nEach interval is 95%.")
    page = Page(build_report(open_run(folder.url), ReportConfig()).html)
    assert "how other experts do is below. As often as random." in page.text
    assert "that was not tried here" not in page.text
    assert "<b>shuffled</b>" in page.text
    assert "+12.5 [+12.5, +12.5]" in page.words
    assert "After 100% of the steps." in page.words
    assert "Trained on one category, tested on all" in page.text
    assert "1,234" in page.text
    assert page.text.count("<i>theft</i>") >= 2


@pytest.mark.slow
def test_hundreds_of_batches_make_a_small_page_from_one_reading_of_each_that_is_drawn(tmp_path, monkeypatch):
    write_identified(Folder.open(str(tmp_path)), num_batches=80)
    read, of_batch = Counter(), RiskParts.batch
    monkeypatch.setattr(RiskParts, "batch", lambda risk, batch: (read.update([batch]), of_batch(risk, batch))[1])
    report = build_report(open_run(str(tmp_path)), ReportConfig(batches=8))
    assert list(read.values()) == [1] * 8
    assert len(report.html) < 1_000_000
    assert sum(name.startswith("risk_batch_") for name in report.figures) == 8
    assert "72 batches are not drawn" in report.html


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine; .ci/run installs it")
def test_a_browser_shows_it_whole_at_desktop_and_phone_width(page, hostile_run, tmp_path):
    with browser(tmp_path / "profile") as tab:
        for width in (1280, 390):
            tab.open(hostile_run / "report.html", width)
            assert tab.value("innerWidth") == width
            assert tab.value("document.documentElement.scrollWidth") <= width
            assert tab.complaints() == []
            assert tab.requests() == [(hostile_run / "report.html").as_uri()]
            assert tab.value("document.body.innerText.includes('<script>alert(1)</script>')")
            assert tab.value("document.scripts.length") == 1
            assert min(tab.value(TEXT_SIZES)) >= 5
        shot = tab.screenshot(1200)
    assert len(shot) > 20_000


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine; .ci/run installs it")
def test_in_a_browser_tables_sort_and_filter_maps_are_read_links_open_and_print_is_whole(page, hostile_run, tmp_path):
    column = "[...document.querySelector('#selected-rows').rows].map(row => parseFloat(row.cells[3].textContent))"
    head = "document.querySelector('#selected-rows').parentElement.tHead.rows[0].cells[3]"
    with browser(tmp_path / "profile") as tab:
        tab.open(hostile_run / "report.html", 1280)
        tab.value(f"{head}.querySelector('button').click()")
        assert tab.value(column) == sorted(tab.value(column))
        assert tab.value(f"{head}.getAttribute('aria-sort')") == "ascending"
        tab.value(f"{head}.querySelector('button').click()")
        assert tab.value(column) == sorted(tab.value(column), reverse=True)
        field = "document.querySelector('input[data-filters=selected-rows]')"
        tab.value(f"{field}.value = 'theft'; {field}.dispatchEvent(new Event('input'))")
        seen = tab.value(
            "[...document.querySelector('#selected-rows').rows].filter(r => !r.hidden).map(r => r.textContent)"
        )
        assert seen
        assert all("theft" in text for text in seen)
        assert len(seen) < len(tab.value(column))
        values = tab.value("document.querySelector('figure[data-values]').dataset.values").split()
        assert tab.value(f"{POINT_AT_FIRST_CELL}; map.querySelector('output').textContent") == (
            f"layer 0, expert 0: {int(values[0]) / 1e4:.4f}"
        )
        leads = [value[1:] for name, value in page.attributes if name == "href" and value.startswith("#")]
        assert [name for name in leads if not tab.value(f"!!document.getElementById({name!r})")] == []
        tab.value("dispatchEvent(new Event('beforeprint'))")
        assert tab.value("[...document.querySelectorAll('details')].every(part => part.open)")
        assert tab.complaints() == []


POINT_AT_FIRST_CELL = """map = document.querySelector('figure[data-values]'),
    box = map.querySelector('svg image').getBoundingClientRect(),
    map.dispatchEvent(new MouseEvent('mousemove', {clientX: box.left + 2, clientY: box.top + 2}))"""


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


@pytest.mark.slow
def test_what_survives_the_control_for_topic_is_said_and_tabled(run, identified):
    html = build_report(run, ReportConfig()).html
    assert "Of 6 selected experts in 3 batches 4 survive the control for topic" in html
    assert re.search(r"<tr><td>topic</td><td>6</td><td>6</td><td>4</td><td>66.7%</td><td>3</td><td>1</td></tr>", html)
    assert "held fixed" not in build_report(identified, ReportConfig()).html


@pytest.mark.slow
def test_maps_of_many_experts_take_the_whole_width_and_the_page_stays_small(tmp_path):
    write_large(Folder.open(str(tmp_path)), num_layers=4, num_experts=128, num_batches=4, distinct=2)
    html = build_report(open_run(str(tmp_path)), ReportConfig()).html
    assert html.count('<figure class="wide"') == 5
    assert '<div class="grid wide">' in html
    assert len(html) < 2_000_000
