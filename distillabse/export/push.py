"""Publishing a bundle on the Hugging Face hub, or on what HF_ENDPOINT names."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distillabse import layout
from distillabse.errors import ConfigurationError, InputError, StorageError, first_line
from distillabse.export.flavors import require_whole

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pushed:
    """What was published.

    Attributes:
        commit: address of the commit.
        pull_request: address of the pull request, where one was asked for.
    """

    commit: str
    pull_request: str | None


def push(
    bundle: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    api: Any = None,
) -> Pushed:
    """Upload every file of a bundle, or of a flavor of one, as one commit.

    The repository is made where it is not there. Its files that the bundle does not have stay as they are.

    Args:
        bundle: The folder; it must be whole and have a model card.
        repo_id: user/name or organisation/name.
        private: Whether a new repository is private; by default as the organisation has it.
        revision: Branch; made where it is not there. By default main.
        create_pr: Open a pull request against main instead of committing.
        message: First line of the commit.
        api: A `huggingface_hub.HfApi`; by default one with the token that `hf auth login` stored, or HF_TOKEN.

    Raises:
        InputError: the bundle is not whole, has no card, or the hub refuses the name or the card.
        ConfigurationError: there is no token, it may not write there, or a pull request to a branch is asked for.
        StorageError: the hub cannot be reached, or the upload broke off.
    """
    from huggingface_hub import HfApi

    require_whole(bundle)
    if not (bundle / layout.MODEL_CARD).is_file():
        raise InputError(
            f"{bundle} has no {layout.MODEL_CARD}. Export it again, or write it with `distillabse report`."
        )
    if create_pr and revision is not None:
        raise ConfigurationError("A pull request is always against main: give --create-pr or --revision, not both.")
    api = api or HfApi(library_name="distillabse")
    try:
        _require_token(api)
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=bundle,
            revision=revision,
            create_pr=create_pr,
            commit_message=message or "Upload the bundle with distillabse",
        )
    except Exception as error:
        raise _explained(error, repo_id) from error
    return Pushed(str(commit.commit_url), str(commit.pr_url) if commit.pr_url else None)


def _require_token(api: Any) -> None:
    from huggingface_hub import get_token

    if not (getattr(api, "token", None) or get_token()):
        raise ConfigurationError("There is no token for the hub. Log in with `hf auth login`, or set HF_TOKEN.")


def _explained(error: Exception, repo_id: str) -> Exception:
    """The error as one of ours, where the hub, its client or the network are the cause."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if isinstance(error, HFValidationError):
        return InputError(f"{repo_id!r} is no name of a repository ({first_line(error)}). Give user/name.")
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        said = error.server_message or first_line(error)
        if status == 401:
            return ConfigurationError(f"The hub does not know the token ({said}). Log in again with `hf auth login`.")
        if status == 403:
            return ConfigurationError(
                f"The token may not write to {repo_id} ({said}). Use one with the role `write`, from an account that "
                "may, and log in with `hf auth login`."
            )
        if status < 500:
            return InputError(f"The hub refused {repo_id}: {said}. Mend it and push again.")
        return StorageError(f"The hub broke off the upload to {repo_id} ({said}). Push again; it goes on where it was.")
    # The hub's client passes on the errors of its HTTP library, httpx, whose name has changed before.
    if isinstance(error, ConnectionError) or type(error).__module__.startswith("httpx"):
        return StorageError(
            f"The hub cannot be reached ({first_line(error)}). Check the network and HF_ENDPOINT, and push again."
        )
    return error
