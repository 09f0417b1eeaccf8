"""An example survives being a row of plain values."""

from prompt_examples import example

from moe_ray.prompts.example_rows import example_to_row, row_to_example
from moe_ray.prompts.example_tables import examples_to_frame


def test_an_example_survives_being_a_row_of_a_table():
    examples = [example(1, "safe", "fraud", pair="p", split="test"), example(2, "unsafe")]
    rows = examples_to_frame(examples).to_dict("records")
    assert [row_to_example(row) for row in rows] == examples
    assert [row_to_example(example_to_row(one)) for one in examples] == examples
