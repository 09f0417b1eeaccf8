"""An example survives being a row of plain values."""

from dataclasses import replace

from prompt_examples import example

from moe_ray.prompts.example_rows import example_to_row, row_to_example
from moe_ray.prompts.example_tables import examples_to_frame


def test_an_example_survives_being_a_row_of_a_table():
    examples = [example(1, "safe", "fraud", pair="p", split="test"), example(2, "unsafe")]
    rows = examples_to_frame(examples).to_dict("records")
    assert [row_to_example(row) for row in rows] == examples


def test_topic_and_template_survive_as_well_and_are_empty_in_tables_that_have_neither():
    one = replace(example(1, "safe"), topic="weather", template="how_do")
    assert row_to_example(example_to_row(one)) == one
    row = {name: value for name, value in example_to_row(one).items() if name not in ("topic", "template")}
    assert row_to_example(row) == replace(one, topic="", template="")


def test_examples_survive_being_rows():
    examples = [example(1, "safe", "fraud", pair="p", split="test"), example(2, "unsafe")]
    assert [row_to_example(example_to_row(one)) for one in examples] == examples
