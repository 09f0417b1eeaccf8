"""Batches and examples survive being stored as tables."""

from prompt_examples import many

from moe_ray.prompts.batches import assemble_batches
from moe_ray.prompts.example_tables import batches_to_frame, frame_to_batches


def test_batches_survive_being_stored():
    batches = assemble_batches(many(16, 16, "fraud")).batches
    frame = batches_to_frame(batches)
    assert frame_to_batches(frame.sample(frac=1, random_state=0)) == list(batches)


def test_a_dropped_batch_does_not_rename_the_others():
    frame = batches_to_frame(assemble_batches(many(24, 24)).batches)
    kept = frame_to_batches(frame[frame["batch_idx"] != 1])
    assert [batch.batch_idx for batch in kept] == [0, 2]


def test_the_table_of_batches_is_that_of_each_one_after_the_other():
    batches = assemble_batches(many(16, 16, "fraud")).batches
    frame = batches_to_frame(batches)
    assert frame["batch_idx"].tolist() == [0] * 16 + [1] * 16
    for batch in batches:
        rows = frame[frame["batch_idx"] == batch.batch_idx].reset_index(drop=True).astype(object)
        assert rows.where(rows.notna(), None).equals(batch.to_frame().astype(object))
