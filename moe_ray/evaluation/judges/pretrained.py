"""Loading what a local judge is made of, with one error that names the setting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from moe_ray.errors import InputError
from moe_ray.models.whole_numbers import from_pretrained, reason_of


def load_pretrained(kind: Any, path: str, *, setting: str, what: str, **options: Any) -> Any:
    """`kind.from_pretrained` of a folder or hub name.

    Args:
        kind: a class of transformers such as `AutoTokenizer`.
        path: folder or hub name.
        setting: that names it.
        what: it should be.
        options: of `from_pretrained`.

    Raises:
        InputError: it cannot be loaded.
    """
    folder = Path(path).expanduser()
    try:
        return from_pretrained(kind, str(folder) if folder.is_dir() else path, **options)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise InputError(
            f"{setting} {path!r} cannot be loaded: {reason_of(error)}; give a folder or hub name of a {what} in "
            "safetensors form"
        ) from error
