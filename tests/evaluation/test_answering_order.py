"""Rows of like length are answered together, in portions for the processes there are, and come out in the frame's order."""

import json

import numpy as np
import pandas as pd
import pytest
from held_out_examples import held_out

from moe_ray.config.evaluate import EvaluateConfig
from moe_ray.evaluation.answering_order import in_answering_order, in_frame_order, rows_per_block
from moe_ray.evaluation.evaluate import rows_to_answer


def of_lengths(*lengths):
    """Held-out rows whose prompts have so many characters."""
    messages = [json.dumps([{"role": "user", "content": "x" * length}]) for length in lengths]
    return pd.DataFrame(
        {"id": [f"e{n}" for n in range(len(lengths))], "messages": messages, "target": "t", "batch_idx": 0}
    )


def padding(lengths, rows):
    """Share of padding where so many rows, in their order, share a pass."""
    passes = [lengths[start : start + rows] for start in range(0, len(lengths), rows)]
    return 1 - sum(lengths) / sum(len(some) * max(some) for some in passes)


def test_the_longest_prompts_come_first_and_those_of_one_length_keep_their_order():
    ordered = in_answering_order(rows_to_answer(of_lengths(5, 90, 5, 40, 90), ["natural"]))
    assert ordered["id"].tolist() == ["e1", "e4", "e3", "e0", "e2"]


def test_rows_of_each_routing_are_ordered_apart_until_the_frames_order_is_restored():
    rows = rows_to_answer(held_out(6), ("natural", "masked", "union"))
    ordered = in_answering_order(rows)
    assert ordered["routing"].tolist() == ["masked"] * 6 + ["natural"] * 6 + ["union"] * 6
    assert not ordered.equals(rows)
    pd.testing.assert_frame_equal(in_frame_order(ordered), rows)


def test_the_order_does_not_depend_on_the_batches_of_masked_rows():
    frame = of_lengths(30, 10, 20)
    orders = [
        in_answering_order(rows_to_answer(frame.assign(batch_idx=batches), ["masked"])) for batches in (0, [2, 0, 1])
    ]
    assert orders[0]["id"].tolist() == orders[1]["id"].tolist() == ["e0", "e2", "e1"]


def test_ordered_rows_are_padded_less_than_rows_as_they_came():
    lengths = (np.random.default_rng(0).lognormal(5, 0.8, 512).astype(int) + 1).tolist()
    ordered = in_answering_order(rows_to_answer(of_lengths(*lengths), ["natural"]))["place"]
    assert 2 * padding([lengths[place] for place in ordered], 32) < padding(lengths, 32)


def test_plain_texts_are_ordered_by_what_is_scored():
    texts = pd.DataFrame(
        {"routing": "neutral", "messages": "", "target": ["a" * 8, None, "a" * 20], "place": [0, 1, 2]}
    )
    assert in_answering_order(texts)["place"].tolist() == [2, 0, 1]


@pytest.mark.parametrize("actors", [1, 2, 7])
def test_every_process_gets_a_block(actors):
    rows = rows_to_answer(of_lengths(*[40] * 20), ["natural"])
    size = rows_per_block(rows, EvaluateConfig(num_actors=actors))
    assert len(range(0, 20, size)) == actors


def test_a_block_is_a_few_forward_passes_of_the_mean_length():
    rows = rows_to_answer(of_lengths(*[1000] * 5000), ["natural"])
    config = EvaluateConfig(tokens_per_forward=8192, max_new_tokens=50)
    tokens = rows["messages"].str.len().iloc[0] / 4 + 50
    assert rows_per_block(rows, config) == int(4 * 8192 / tokens)


def test_a_block_has_a_row_however_long_it_is():
    assert rows_per_block(rows_to_answer(of_lengths(9000), ["natural"]), EvaluateConfig(tokens_per_forward=1)) == 1
