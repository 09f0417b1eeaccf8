"""A folder on the Hugging Face hub: pushed as one commit, or fetched into the hub's cache.

Address, token and cache are those of huggingface_hub: `HF_ENDPOINT`, `hf auth login` or `HF_TOKEN`, `HF_HUB_CACHE`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from moe_ray.errors import InputError, MoeRayError, OutsideFailed

_CARD = "README.md"
_THE_USERS = (400, 401, 403, 404, 409)
"""Statuses that say no to what was asked, and would say so again; any other may pass."""


def make_repository(repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
    """Makes a model repository if it is missing, so that a refusal comes before any work for it.

    Args:
        repo_id: such as `user/name`, or `name` for the token's owner.
        private: whether only its owners see it, where it is new; None = as the owner's settings say.
        token: with the right to write; None = the one logged in with.

    Returns:
        its name with its owner.

    Raises:
        InputError: there is no token, or the hub refuses the name or the token.
        OutsideFailed: the hub cannot be reached or fails.
    """
    from huggingface_hub import HfApi, get_token

    doing = f"pushing to {repo_id!r}"
    if token is None and get_token() is None:
        raise InputError(f"{doing}: there is no token of the hub; log in with `hf auth login`, or set HF_TOKEN")
    with _asking(doing):
        return str(HfApi(token=token).create_repo(repo_id, private=private, exist_ok=True).repo_id)


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload with moe-ray",
    token: str | None = None,
    allow_patterns: Sequence[str] | None = None,
) -> str:
    """Uploads a folder's files as one commit to a model repository, which is made if missing.

    Files of the repository that the folder lacks stay, but for weights: those of an earlier model would be loaded in place
    of the new ones, or beside them.

    Args:
        folder: whose files are uploaded, with their paths in it.
        repo_id: such as `user/name`.
        private: whether only its owners see the repository; None = as the owner's settings say. Of a repository that is
            there already nothing is changed.
        revision: branch; None = main.
        commit_message: first line of the commit.
        token: with the right to write; None = the one logged in with.
        allow_patterns: names of files to upload, such as `*.json`; None = all.

    Returns:
        the commit's address.

    Raises:
        InputError: the folder holds no file, or the hub refuses the name or the token.
        OutsideFailed: the hub cannot be reached or fails.
    """
    if not any(path.is_file() for path in Path(folder).rglob("*")):
        raise InputError(f"{str(folder)!r} holds no file to push; give a folder that save_adapter or merge has written")
    from huggingface_hub import HfApi

    repo_id = make_repository(repo_id, private=private, token=token)
    api = HfApi(token=token)
    with _asking(f"pushing to {repo_id!r}"):
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        patterns = None if allow_patterns is None else list(allow_patterns)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message,
            allow_patterns=patterns,
            # Files that are also uploaded are not deleted.
            delete_patterns=["*.safetensors", "*.safetensors.index.json"],
        )
    return str(commit.commit_url)


def fetch_folder(
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    allow_patterns: Sequence[str] | None = None,
) -> Path:
    """A model repository's files in the hub's cache; only those that are not there yet are downloaded.

    Args:
        repo_id: such as `user/name`.
        revision: branch, tag or commit; None = main.
        token: for private repositories; None = the one logged in with.
        allow_patterns: names of files, such as `*.json`; None = all.

    Raises:
        InputError: the hub has no such repository or revision, or refuses the token.
        OutsideFailed: the hub cannot be reached or fails.
    """
    from huggingface_hub import HfApi

    patterns = None if allow_patterns is None else list(allow_patterns)
    with _asking(f"fetching {repo_id!r}"):
        return Path(HfApi(token=token).snapshot_download(repo_id, revision=revision, allow_patterns=patterns))


def licence_of(base: str, revision: str) -> str:
    """The licence that a model's card names, such as `apache-2.0`; empty = none, or the card cannot be had now.

    Args:
        base: a checkpoint's folder, or a hub name.
        revision: of a hub repository.
    """
    from huggingface_hub import ModelCard, hf_hub_download

    try:
        local = Path(base, _CARD)
        file = local if Path(base).is_dir() else Path(hf_hub_download(base, _CARD, revision=revision))
        return str(ModelCard.load(file, ignore_metadata_errors=True).data.to_dict().get("license") or "")
    except (OSError, ValueError):
        return ""


@contextmanager
def _asking(what: str) -> Iterator[None]:
    """Errors of huggingface_hub inside the context say whose turn it is."""
    from huggingface_hub import errors

    try:
        yield
    except errors.HfHubHTTPError as error:
        raise _by_status(what, error.response.status_code, error) from error
    except errors.HFValidationError as error:
        raise InputError(f"{what}: {error}; expected a name such as 'user/name'") from error
    except (errors.LocalTokenNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise InputError(f"{what}: {error}; log in with `hf auth login`, and unset HF_HUB_OFFLINE") from error
    except errors.LocalEntryNotFoundError as error:
        # Also raised where the hub was reached and said no, which is then its cause.
        cause = error.__cause__
        if isinstance(cause, errors.HfHubHTTPError):
            raise _by_status(what, cause.response.status_code, cause) from error
        raise OutsideFailed(f"{what}: the hub cannot be reached, and the cache holds nothing of it: {error}") from error
    except (OSError, _of_http()) as error:
        raise OutsideFailed(f"{what}: {error}; try again later") from error


def _of_http() -> type[Exception]:
    """What the HTTP library of huggingface_hub raises, whichever that is, where nobody answers."""
    from huggingface_hub.errors import HfHubHTTPError

    found = [base for base in HfHubHTTPError.__mro__ if base.__name__ in ("HTTPError", "RequestException")]
    return found[0] if found else HfHubHTTPError


def _by_status(what: str, status: int, error: Exception) -> MoeRayError:
    said = str(error).strip().replace("\n", " ")
    if status in _THE_USERS:
        return InputError(
            f"{what}: the hub answered {status}: {said}; check the name, and that the token (`hf auth login`) may do it"
        )
    return OutsideFailed(f"{what}: the hub answered {status}: {said}; try again later")
