"""Stored batches are those of the table, and a worker reads only the row groups that its own are in."""

from __future__ import annotations

from dataclasses import replace

import pyarrow.parquet as pq
import pytest

from moe_ray.errors import InputError
from moe_ray.finetuning.batch_rows import BatchesInMemory
from moe_ray.finetuning.training_batches import TrainingBatches
from moe_ray.prompts.batches import Batch
from moe_ray.prompts.example_tables import BATCHES, batches_to_frame, frame_to_batches
from moe_ray.prompts.examples import Example
from moe_ray.prompts.quarantine import QUARANTINE, TRUNCATED, quarantine_frame, training_examples


def example(name, label, **changes):
    message = {"role": "user", "content": f"how is {name} ♥"}
    values = {"target": "fine", "category": "fraud" if label == "unsafe" else "", **changes}
    return Example(id=name, messages=(message,), label=label, **values)


def batch(batch_idx, size, **changes):
    labels = ["safe", "unsafe"] * size
    examples = tuple(example(f"{batch_idx}-{n}", labels[n], **changes) for n in range(size))
    return Batch(batch_idx=batch_idx, category="fraud", examples=examples)


ALL = [batch(2, 3), batch(3, 5), batch(7, 9), batch(8, 2), batch(11, 4)]


def stored(folder, batches=ALL, *, quarantined=(), truncated=(), rows_per_group=4):
    """The batches on disk, in row groups so small that batches begin in one and end in another."""
    folder.sub("prompts").write_table(BATCHES, batches_to_frame(batches), row_group_size=rows_per_group)
    frame = batches_to_frame(batches).assign(reason="", detail="")
    for name, ids in ((QUARANTINE, quarantined), (TRUNCATED, truncated)):
        folder.sub("capture").write_table(name, quarantine_frame(frame[frame["id"].isin(ids)]))
    return TrainingBatches(folder.sub("prompts"), folder.sub("capture"))


@pytest.mark.slow
@pytest.mark.parametrize("rows_per_group", [1, 2, 4, 7, 100])
@pytest.mark.parametrize("batch_ids", [[2, 3, 7, 8, 11], [7], [11, 2], [3, 8]])
def test_the_batches_asked_for_come_once_and_whole(folder, rows_per_group, batch_ids):
    source = stored(folder, rows_per_group=rows_per_group)
    read = {found.batch_idx: found for found in source.read(batch_ids)}
    assert read == {one.batch_idx: one for one in ALL if one.batch_idx in batch_ids}
    assert list(read) == sorted(batch_ids)


def test_only_the_row_groups_of_these_batches_are_read(folder, monkeypatch):
    source = stored(folder)
    groups = []
    read_row_group = pq.ParquetFile.read_row_group

    def spied(self, group, *args, **kwargs):
        groups.append(group)
        return read_row_group(self, group, *args, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", spied)
    list(source.read([2, 11]))
    # Of 23 examples in groups of 4: batch 2 is 0 to 2, batch 11 is 19 to 22.
    assert groups == [0, 4, 5]


@pytest.mark.slow
def test_examples_that_cannot_be_trained_on_are_left_out_as_from_the_whole_table(folder):
    batches = [replace(ALL[0], examples=(example("cut", "safe", target=None), *ALL[0].examples[1:])), *ALL[1:]]
    source = stored(folder, batches, quarantined=["3-1", "7-8", "8-0", "8-1"], truncated=["cut", "3-2"])
    capture = folder.sub("capture")
    usable = training_examples(batches_to_frame(batches), capture.read_frame(QUARANTINE), capture.read_frame(TRUNCATED))
    expected = frame_to_batches(usable)
    assert [len(one.examples) for one in expected] == [2, 4, 8, 4]
    assert list(source.read([2, 3, 7, 8, 11])) == expected
    assert set(source.survey([2, 3, 7, 11], lengths=False).categories) == {2, 3, 7, 11}


def test_the_survey_is_that_of_batches_in_memory(folder):
    mixed = replace(batch(20, 4), category="mixed")
    mixed = replace(mixed, examples=(*mixed.examples[:3], example("other", "unsafe", category="theft")))
    no_category = replace(batch(21, 2, category=""), category="mixed")
    batches = [*ALL, mixed, no_category]
    source = stored(folder, batches)
    for trained in ([2, 7, 20], [21]):
        survey, expected = (one.survey(trained, lengths=True) for one in (source, BatchesInMemory(batches)))
        assert dict(survey.lengths) == expected.lengths
        assert survey.categories == expected.categories


@pytest.mark.slow
@pytest.mark.parametrize("target", [None, ""])
def test_a_missing_target_is_refused_before_anything_is_trained(folder, target):
    batches = [*ALL[:3], replace(ALL[3], examples=(example("bare", "safe", target=target), *ALL[3].examples[1:]))]
    source = stored(folder, batches)
    with pytest.raises(InputError, match=r"examples \['bare'\] have no `target`"):
        source.survey([2, 8], lengths=True)
    assert set(source.survey([2, 3], lengths=True).lengths) == {2, 3}
