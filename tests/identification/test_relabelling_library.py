"""The kernel is built once, for the machine that uses it, and a machine that cannot build it counts without."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_ray.identification import relabelling_library
from moe_ray.identification.relabelling_kernel import kernel_of
from moe_ray.identification.relabelling_library import library
from moe_ray.identification.relabellings import relabellings


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    library.cache_clear()
    kernel_of.cache_clear()
    yield
    library.cache_clear()
    kernel_of.cache_clear()


@pytest.mark.slow
def test_it_is_built_once_and_then_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if library() is None:
        pytest.skip("no C compiler")
    (built,) = (tmp_path / "moe_ray/kernels").iterdir()
    changed = built.stat().st_mtime_ns
    library.cache_clear()
    assert library() is not None
    assert built.stat().st_mtime_ns == changed


@pytest.mark.slow
def test_another_processor_has_a_library_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if library() is None:
        pytest.skip("no C compiler")
    library.cache_clear()
    monkeypatch.setattr(relabelling_library, "_processor", lambda: "another")
    assert library() is not None
    assert len(list((tmp_path / "moe_ray/kernels").iterdir())) == 2


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_working_compiler_there_is_none_and_a_line_says_so(
    compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", compiler)
    with caplog.at_level(logging.INFO):
        assert library() is None
        assert kernel_of(relabellings(((6, 3),), 1000, 0)) is None
    assert "relabellings are counted by numpy" in caplog.text
    assert not list(tmp_path.rglob("*.so"))


def test_a_folder_that_others_may_write_to_is_not_loaded_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "moe_ray/kernels").mkdir(parents=True)
    (tmp_path / "moe_ray/kernels").chmod(0o777)
    with caplog.at_level(logging.INFO):
        assert library() is None
    assert "other users may write" in caplog.text or "no C compiler" in caplog.text
    assert list((tmp_path / "moe_ray/kernels").iterdir()) == []
