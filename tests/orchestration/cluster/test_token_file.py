"""The token of a local Ray is read by nobody but its owner."""

import logging
import os
import stat
import subprocess

import pytest

from moe_ray.orchestration.cluster.token_file import protect_token


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder of one's own, that others may look into, without what would say where a token is."""
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def modes(home):
    return [stat.S_IMODE((home / name).stat().st_mode) for name in (".ray", ".ray/auth_token")]


def test_a_token_is_made_for_its_owner_alone_and_stays(home, caplog):
    protect_token()
    token = (home / ".ray/auth_token").read_text()
    assert len(token) == 64
    assert modes(home) == [0o700, 0o600]
    protect_token()
    assert (home / ".ray/auth_token").read_text() == token
    assert caplog.messages == []


def test_one_that_others_could_read_is_closed_to_them_and_they_are_warned_of(home, caplog):
    (home / ".ray").mkdir(mode=0o755)
    (home / ".ray/auth_token").write_text("secret")
    (home / ".ray/auth_token").chmod(0o644)
    with caplog.at_level(logging.WARNING):
        protect_token()
    assert modes(home) == [0o700, 0o600]
    assert (home / ".ray/auth_token").read_text() == "secret"
    assert len(caplog.messages) == 2
    assert "secret" not in caplog.text


@pytest.mark.parametrize(
    ("name", "value"), [("RAY_AUTH_TOKEN", "x"), ("RAY_AUTH_TOKEN_PATH", "/x"), ("RAY_AUTH_MODE", "disabled")]
)
def test_what_the_environment_says_stays(home, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    protect_token()
    assert not (home / ".ray").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_another_user_of_the_machine_cannot_read_it(home):
    for folder in (home, *home.parents[:-1]):
        if folder.owner() == "root" and str(folder).startswith("/tmp/"):
            folder.chmod(0o755)
    protect_token()
    read = subprocess.run(
        ["cat", str(home / ".ray/auth_token")], user=65534, capture_output=True, text=True, check=False
    )
    assert read.returncode != 0
    assert "Permission denied" in read.stderr
    (home / "open").write_text("for all")
    assert (
        subprocess.run(["cat", str(home / "open")], user=65534, capture_output=True, check=False).stdout == b"for all"
    )
