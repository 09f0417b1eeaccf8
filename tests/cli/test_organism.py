"""`moe-ray organism` builds one, once, says how to run on it, and refuses what it cannot build."""

import json
import logging

import pytest

from moe_ray.cli import organism
from moe_ray.cli.main import main as moe_ray
from moe_ray.organisms import KINDS, OrganismRecipe, build_organism, read_truth


def test_help_names_the_kinds_and_what_is_true_of_each(capsys):
    with pytest.raises(SystemExit):
        moe_ray(["organism", "--help"])
    shown = capsys.readouterr().out
    for kind, text in KINDS.items():
        assert kind in shown
        assert text in shown


@pytest.mark.slow
def test_it_builds_an_organism_once_and_says_how_to_run_on_it(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    steps = []

    def short(folder, kind, **options):
        options["progress"] = lambda done, total, loss: steps.append(done)
        return build_organism(folder, kind, recipe=OrganismRecipe(num_steps=2), **options)

    monkeypatch.setattr(organism, "build_organism", short)
    folder = tmp_path / "models" / "late"
    assert moe_ray(["organism", "late", str(folder), "--seed", "3"]) == 0
    assert (read_truth(folder).kind, read_truth(folder).seed) == ("late", 3)
    assert f"model.path={folder} 'prompts.files=[{folder}/prompts.jsonl]'" in caplog.text
    records = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    assert {record["split"] for record in records} == {"train", "validation", "test"}
    assert {"label", "category", "prompt", "response", "target"} <= records[0].keys()
    assert moe_ray(["organism", "late", str(folder), "--seed", "3"]) == 0
    assert steps == [1, 2]
    assert moe_ray(["organism", "late", str(folder), "--seed", "4"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["hidden", "models/x"], "invalid choice: 'hidden' (choose from"),
        (["planted", "models/x", "--seed", "-1"], "got seed -1, expected 0 or more"),
        (["planted", "s3://bucket/x"], "expected a folder of this machine"),
    ],
)
def test_what_cannot_be_built_is_refused_in_a_sentence(arguments, message, capsys):
    assert moe_ray(["organism", *arguments]) == 2
    assert message in capsys.readouterr().err
