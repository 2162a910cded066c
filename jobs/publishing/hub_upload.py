"""Uploads files to a repository on a hub, in one commit, by huggingface_hub."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path

from snapfusion.settings import SettingsError

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_REFUSED = {
    401: "it does not accept the token; log in again with `hf auth login`",
    403: "the token may not write there; take one with write access, or another owner",
}
_LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


class HubError(ValueError):
    """A hub that cannot be reached, or that refuses what was asked of it."""


class HubFailedError(OSError):
    """A hub that has failed; a second try may help."""


def check_repository(repository: str) -> None:
    """Check the form of a repository's name.

    Raises:
        SettingsError: if it is not OWNER/NAME.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, not in __all__

    try:
        validate_repo_id(repository)
        valid = _REPOSITORY.fullmatch(repository)
    except HFValidationError:
        valid = None
    if valid is None:
        raise SettingsError(
            f"REPO {repository!r}: OWNER/NAME is accepted, of letters, digits, '-', '_' and '.', without "
            "'--' or '..', at most 96 characters"
        )


def check_token() -> None:
    """Check that a hub's token is stored on this machine or in the environment.

    Raises:
        HubError: if there is none.
    """
    from huggingface_hub import get_token

    if get_token() is None:
        raise HubError(f"there is no token of a hub; {_LOGIN}")


def upload(files: Mapping[str, Path | bytes], *, repository: str, private: bool, message: str) -> str:
    """Upload files in one commit to a repository, which is made if there is none; returns the commit's URL.

    Files that are there already and have the same content are not sent again; others stay.

    Args:
        files: by path in the repository.
        repository: OWNER/NAME.
        private: whether a new repository is private.
        message: of the commit.

    Raises:
        HubError: if the hub cannot be reached, or refuses it.
        HubFailedError: if the hub fails.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    additions = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()
    ]
    with _explained(repository):
        api.create_repo(repository, private=private, exist_ok=True)
        return str(api.create_commit(repository, additions, commit_message=message).commit_url)


@contextmanager
def _explained(repository: str) -> Iterator[None]:
    """Turn errors of the hub's client into one line."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
    except OfflineModeIsEnabled:
        raise HubError("HF_HUB_OFFLINE is set, so that nothing is uploaded; unset it") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        reason = _REFUSED.get(status, error.server_message or str(error).splitlines()[0])
        if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            raise HubFailedError(f"the hub failed with {status} ({reason}); try again") from None
        raise HubError(f"the hub refuses {repository} with {status}: {reason}") from None
    except ValueError as error:
        raise HubError(f"the hub refuses {repository}: {' '.join(str(error).split())}") from None
    except Exception as error:  # noqa: BLE001 - of an HTTP library that the hub's client may exchange
        raise HubError(f"the hub cannot be reached ({type(error).__name__}: {error})") from None
