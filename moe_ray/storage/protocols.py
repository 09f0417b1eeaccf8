"""What reads the URLs that fsspec alone does not."""

from __future__ import annotations

_PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
}


def protocol_of(url: str) -> str:
    """Such as `gs` of `gs://BUCKET/FILE`, in small letters."""
    return url.partition("://")[0].lower()


def cure_of(error: Exception, url: str, otherwise: str) -> str:
    """What to do where a URL cannot be opened: install what reads it, where that is missing.

    Args:
        error: that was raised when it was opened.
        url: that was opened.
        otherwise: what to do if the error is another one.
    """
    if not isinstance(error, ImportError):
        return otherwise
    return f"pip install {_PACKAGES.get(protocol_of(url), 'what the message names')}"
