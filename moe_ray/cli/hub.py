"""A merged model on a model hub, and what the hub says of its base, through huggingface_hub."""

from __future__ import annotations

import os
from pathlib import Path

import httpx
from huggingface_hub import HfApi, ModelCard, get_token, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from moe_ray.errors import InputError, OutsideFailed

_CARD = "README.md"


class HubRepository:
    """A repository that a model is to be pushed to; made at once, so that a refusal comes before any work.

    Args:
        name: `OWNER/NAME`, or `NAME` for the token's owner.
        private: whether only its owner sees it, where it is new.

    Raises:
        InputError: the name is none, there is no token, or the hub refuses it.
        OutsideFailed: the hub does not answer.
    """

    def __init__(self, name: str, *, private: bool) -> None:
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise InputError(f"--push-to-hub: got {name!r}, expected OWNER/NAME: {error}") from error
        if get_token() is None:
            raise InputError("--push-to-hub needs a token of the hub; set HF_TOKEN, or run `hf auth login`")
        self._api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
        try:
            self.name = self._api.create_repo(name, private=private, exist_ok=True).repo_id
        except (HfHubHTTPError, httpx.HTTPError) as error:
            raise _as_ours(error, name) from error

    def push(self, folder: Path) -> str:
        """Uploads a folder as one commit; returns its address.

        Raises:
            InputError: the hub refuses it.
            OutsideFailed: the hub does not answer; the folder is complete, and can be pushed later.
        """
        try:
            done = self._api.upload_folder(
                folder_path=folder, repo_id=self.name, commit_message="A model that moe-ray repaired"
            )
        except (HfHubHTTPError, httpx.HTTPError) as error:
            raise _as_ours(error, self.name, kept=folder) from error
        return str(done.commit_url)


def _as_ours(error: Exception, name: str, *, kept: Path | None = None) -> InputError | OutsideFailed:
    said = " ".join(str(error).split())[:300]
    what_next = "" if kept is None else f"; the model is in {kept}, push it with `hf upload {name} {kept}`"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else 0
    if 400 <= status < 500:
        return InputError(f"the hub refused {name!r}: {said}; check the name and the token's rights{what_next}")
    return OutsideFailed(f"the hub failed for {name!r}: {said}{what_next}")


def licence_of(base: str, revision: str) -> str:
    """The licence that a model's card names, such as `apache-2.0`; empty = none, or the card cannot be had now."""
    try:
        local = Path(base, _CARD)
        file = local if Path(base).is_dir() else Path(hf_hub_download(base, _CARD, revision=revision))
        return str(ModelCard.load(file, ignore_metadata_errors=True).data.to_dict().get("license") or "")
    except (OSError, ValueError, httpx.HTTPError):
        return ""
