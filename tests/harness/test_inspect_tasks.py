"""inspect_ai on a model in memory, on a task of four rows in a file."""

from __future__ import annotations

import pytest
from families import build
from harness_tasks import inspect_task, needs_inspect
from word_tokenizer import TEMPLATE, make_tokenizer

from moe_ray.config.harness import HarnessConfig
from moe_ray.errors import InputError
from moe_ray.harness.inspect_tasks import inspect_scores, task_in_file
from moe_ray.harness.tasks import HarnessTask
from moe_ray.models.generation import generate_responses
from moe_ray.models.tokenization import encode_prompt

pytestmark = [pytest.mark.slow, needs_inspect, pytest.mark.filterwarnings("default")]


def test_every_sample_has_its_score_and_the_log_holds_the_models_own_answers(tmp_path):
    from inspect_ai.log import read_eval_log

    model, tokenizer = build("olmoe"), make_tokenizer(pad_token="<pad>", eos_token="<end>")
    tokenizer.chat_template = TEMPLATE
    task = HarnessTask(harness="inspect_ai", name=inspect_task(tmp_path / "task"))
    table, data = inspect_scores(model, tokenizer, task, HarnessConfig(max_new_tokens=4), name="before")
    assert table["metric"].unique().tolist() == ["includes"]
    assert table["sample"].tolist() == ["1/1", "2/1", "3/1", "4/1"]
    (tmp_path / "log.eval").write_bytes(data)
    log = read_eval_log(str(tmp_path / "log.eval"))
    assert log.status == "success"
    assert log.eval.model == "moe_ray/before"
    assert log.eval.task == "four_rows"
    asked = [encode_prompt(tokenizer, [{"role": "user", "content": "how are you"}])]
    (answer,) = generate_responses(model, tokenizer, asked, max_new_tokens=4)
    assert log.samples[0].output.completion == answer.text
    assert table["value"].iloc[0] == float("fine" in answer.text)


def test_of_several_tasks_in_a_file_one_must_be_named(tmp_path):
    file = inspect_task(tmp_path / "task")
    with open(file, "a") as more:
        more.write("\n@task\ndef second():\n    return four_rows()\n")
    with pytest.raises(InputError, match=r"got tasks \['four_rows', 'second'\] in it, expected one"):
        task_in_file(HarnessTask(harness="inspect_ai", name=file))
    assert len(task_in_file(HarnessTask(harness="inspect_ai", name=f"{file}@second")).dataset) == 4
