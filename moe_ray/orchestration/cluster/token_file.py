"""The token that protects a local Ray, for its owner's eyes only.

Who has the token can have Ray run anything as the user who started it. Ray keeps it in a file, which it makes readable for
everybody on the machine.
"""

from __future__ import annotations

import logging
import os
import secrets
import stat
from pathlib import Path

logger = logging.getLogger(__name__)

_FOR_OTHERS = 0o077


def protect_token() -> None:
    """Makes the file, or takes the rights of others from it and its folder; before Ray reads it or makes one.

    Nothing is done where the environment says where the token is, or that there is none.
    """
    if {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        return
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return
    path = Path.home() / ".ray" / "auth_token"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    _close(path.parent, 0o700)
    try:
        file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    except FileExistsError:
        _close(path, 0o600)
        return
    with os.fdopen(file, "w") as opened:
        opened.write(secrets.token_hex(32))


def _close(path: Path, mode: int) -> None:
    if stat.S_IMODE(path.stat().st_mode) & _FOR_OTHERS:
        logger.warning(
            "%s could be read by other users of this machine, who could have run programs as you while Ray was up; it is "
            "yours alone now. Delete it while no Ray is running for a new token",
            path,
        )
        path.chmod(mode)
