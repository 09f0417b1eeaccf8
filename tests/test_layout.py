"""The folders of `tests/` are those of the package, and a test file is named after the module that it tests."""

from pathlib import Path

import pytest
from paths import ROOT, TESTS

OF_OTHER_FOLDERS = {"docs", "benchmarks"}
NAMED_AFTER_A_PROPERTY = {
    "organisms/test_found.py",
    "identification/test_damaged_masks.py",
    "prompts/test_damaged_prompts.py",
    "prompts/test_prompts_from_afar.py",
    "routing/test_damaged_counts.py",
    "storage/test_object_store.py",
    "storage/test_other_users.py",
    "finetuning/test_damaged_files.py",
    "orchestration/test_foreign_run.py",
    "orchestration/test_s3_run.py",
    "finetuning/test_quantised_experts.py",
    "orchestration/test_quantised_run.py",
    "orchestration/test_malformed_inputs.py",
    "orchestration/test_kills.py",
    "cli/test_terminal_run.py",
    # of the whole repository
    "test_cluster_yaml.py",
    "test_examples.py",
    "test_import.py",
    "test_layers.py",
    "test_layout.py",
    "test_project_files.py",
    "test_rayjob.py",
    "test_public_names.py",
    "test_readme.py",
    "test_wheel.py",
    # of several modules
    "finetuning/test_all_families.py",
    "finetuning/test_workers.py",
    "models/test_released_configs.py",
    "orchestration/cluster/test_nodes.py",
    "orchestration/test_submitted_job.py",
    "report/test_imports.py",
    "routing/test_all_families.py",
    "routing/test_host_waits.py",
}


def files_of_tests() -> list[Path]:
    files = (path.relative_to(TESTS) for path in sorted(TESTS.rglob("test_*.py")))
    return [path for path in files if path.parts[0] not in OF_OTHER_FOLDERS]


def is_of_a_module(test: Path) -> bool:
    tested = ROOT / "moe_ray" / test.parent / test.name.removeprefix("test_")
    return tested.is_file() or (tested.with_suffix("") / "__init__.py").is_file()


def test_every_test_file_is_named_after_a_module_or_listed_here():
    files = files_of_tests()
    assert len(files) > 100
    named_otherwise = {path.as_posix() for path in files if not is_of_a_module(path)}
    assert named_otherwise == NAMED_AFTER_A_PROPERTY


@pytest.mark.parametrize(("name", "is_one"), [("routing/test_counts.py", True), ("routing/test_count.py", False)])
def test_a_file_named_after_nothing_would_be_seen(name, is_one):
    assert is_of_a_module(Path(name)) is is_one
