from dataclasses import replace

import pytest
from run_directory import write_identified, write_repaired

from moe_ray.config.io import flatten, to_yaml
from moe_ray.errors import InputError
from moe_ray.report.html.runs import runs_page
from moe_ray.report.runs_text import figures_of_runs, settings_of_runs, what_is_compared
from moe_ray.run_directory import ANSWERS, figures_of, open_run
from moe_ray.storage.folder import Folder
from moe_ray.studies.run_comparison import compare_runs


def written(path, *, prompt="How?", drop=0):
    """A run that was repaired; without the first `drop` of its held-out answers."""
    folder = Folder.open(str(path))
    write_identified(folder)
    write_repaired(folder, prompt=prompt)
    if drop:
        answers = folder.sub(figures_of("after"))
        answers.write_table(ANSWERS, answers.read_frame(ANSWERS).iloc[drop:].reset_index(drop=True))
    return open_run(str(path))


@pytest.fixture
def runs(tmp_path):
    return [written(tmp_path / "one" / "run"), written(tmp_path / "two" / "run", drop=2)]


@pytest.mark.slow
def test_a_run_beside_itself_differs_in_nothing(runs):
    first, again = compare_runs([runs[0], runs[0]])
    assert first.minus_first is None
    assert again.minus_first["unsafe_refusal_rate"]["value"] == 0.0
    assert again.jaccard == 1.0
    assert again.set_otherwise == {}
    assert again.num_other == 0


@pytest.mark.slow
def test_differences_are_about_the_examples_that_both_have(runs):
    _, second = compare_runs(runs)
    assert second.name == "two/run"
    assert second.num_other == 2
    n = [second.minus_first[f"{label}_refusal_rate"]["n"] for label in ("unsafe", "safe")]
    assert sum(n) == second.num_shared
    (sentence,) = what_is_compared([second, second])[1:]
    assert "2 that only one" in sentence


@pytest.mark.slow
def test_other_settings_are_named_with_both_values(tmp_path, runs):
    folder = runs[1].folder
    changed = replace(runs[0].config, identify=replace(runs[0].config.identify, top_k=7))
    folder.write_bytes("config.yaml", to_yaml(changed).encode())
    compared = compare_runs([runs[0], open_run(folder.url)])
    table = settings_of_runs(compared, dict(flatten(runs[0].config)))
    assert table.to_dict("records") == [
        {"setting": "identify.top_k", "one/run": str(runs[0].config.identify.top_k), "two/run": "7"}
    ]


@pytest.mark.slow
def test_the_page_escapes_what_it_shows_and_forbids_scripts(runs):
    html = runs_page(compare_runs(runs), {"identify.top_k": "<script>alert(1)</script>"})
    assert "<script" not in html
    assert "default-src 'none'" in html
    assert html.count("two/run") >= 2


def test_runs_that_cannot_be_compared_are_refused_by_name(tmp_path):
    folder = Folder.open(str(tmp_path / "bare"))
    write_identified(folder)
    bare = open_run(folder.url)
    with pytest.raises(InputError, match="expected two or more"):
        compare_runs([bare])
    with pytest.raises(InputError, match="holds no held-out answers; run `moe-ray evaluate"):
        compare_runs([bare, bare])


@pytest.mark.slow
def test_runs_on_other_prompts_have_nothing_in_common(tmp_path):
    runs = [written(tmp_path / "a", prompt="How?"), written(tmp_path / "b", prompt="Why?")]
    with pytest.raises(InputError, match="no held-out example in common"):
        compare_runs(runs)


@pytest.mark.slow
def test_the_rows_are_those_of_the_runs(runs):
    table = figures_of_runs(compare_runs(runs))
    assert list(table["run"]) == ["one/run (after repair)", "two/run (after repair)"]
    assert table["minus first"].iloc[0] == "–"
