"""A run directory from somebody else: nothing in it is code, whatever it holds."""

from __future__ import annotations

import io
import pickle
import shutil

import numpy as np
import pytest
from workflow import run_workflow

from moe_ray.errors import InputError
from moe_ray.experts import Expert, masks_from_experts
from moe_ray.identification.mask_files import MASKS, read_masks, write_masks
from moe_ray.storage.folder import Folder

pytestmark = [pytest.mark.needs_ray, pytest.mark.slow, pytest.mark.filterwarnings("default")]


class Planted:
    """Leaves a file where it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (open, (str(self.mark), "w"))


NAMES = (
    # What Ray Tune keeps of a sweep, and reads when it restores one.
    *("sweep/tune/tuner.pkl", "sweep/tune/trainable.pkl", "sweep/tune/search_gen_state-1.json"),
    *("sweep/tune/experiment_state-2026-01-01_00-00-00.json", "sweep/tune/searcher-state-2026.pkl"),
    *("sweep/sweep/tuner.pkl", "sweep/tuner.pkl", "sweep/tune/.is_checkpoint", "sweep/trials/params.pkl"),
    # Ray Train, torch and numpy.
    *("finetune/ray_train/checkpoint_manager_snapshot.json", "finetune/ray_train/trainer.pkl"),
    *("finetune/checkpoints/step-000000001/training.pt", "finetune/experts.bin", "finetune/experts.pt"),
    *("identify/sft_dataset_x.pkl", "identify/masks.pkl", "prompts/batches.pkl", "capture/counts/counts.npy"),
)

"""Where something of the kind lies in a run, or lay in those of earlier versions."""


@pytest.fixture
def mark(tmp_path):
    return tmp_path / "code has run"


def plant(run_dir, mark):
    """A pickle under every name that a library might read from a run, and beside every file of it."""
    data = pickle.dumps(Planted(mark))
    for name in NAMES:
        path = run_dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    for folder in [path for path in run_dir.rglob("*") if path.is_dir()]:
        for name in (".metadata.pkl", "data.pkl", "state.pkl"):
            (folder / name).write_bytes(data)


def arguments(tiny_model_path, run_dir, *more):
    return [
        f"run_dir={run_dir}",
        f"model.path={tiny_model_path}",
        "prompts.max_batches=2",
        "prompts.max_test_examples=4",
        "evaluate.max_new_tokens=4",
        "identify.permutations=10",
        "identify.resamples=0",
        "finetune.epochs=1",
        "sweep.space={identify.top_k: [3, 6]}",
        *more,
    ]


def test_what_is_planted_would_run(mark):
    pickle.loads(pickle.dumps(Planted(mark))).close()
    assert mark.exists()


def test_no_pickle_in_a_run_directory_is_read(ray_cluster, tiny_model_path, tmp_path, mark):
    run_dir = tmp_path / "run"
    assert run_workflow("sweep", arguments(tiny_model_path, run_dir)) == 0
    assert not list((run_dir / "sweep").rglob("*.pkl"))
    # As after a kill, so that the sweep and the training are taken up again.
    for stage in ("sweep", "finetune"):
        (run_dir / stage / "manifest.json").unlink()
    shutil.rmtree(next((run_dir / "sweep" / "trials").glob("*/manifest.json")).parent)
    plant(run_dir, mark)
    assert run_workflow("sweep", arguments(tiny_model_path, run_dir)) == 0
    assert not mark.exists()


def test_pickled_masks_are_refused_with_a_sentence(tmp_path, mark):
    masks = masks_from_experts({0: (Expert(0, 1),)}, layers=(0,), num_experts=2)
    folder = Folder.open(str(tmp_path / "identify"))
    write_masks(folder, masks)
    planted = np.asarray([Planted(mark)], dtype=object)
    buffer = io.BytesIO()
    np.savez(buffer, batch_idx=planted, layers=planted, masks=planted)
    folder.write_bytes(MASKS, buffer.getvalue())
    with pytest.raises(InputError, match=r"masks\.npz"):
        read_masks(folder)
    assert not mark.exists()
