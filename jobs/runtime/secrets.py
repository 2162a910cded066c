"""Refuses secrets in settings, options and URLs.

Settings are printed, saved beside the data and hashed, and Ray keeps command lines. So a secret among them is
refused before it is used, with a message that says where it is and does not repeat it.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any, Final

from snapfusion.settings import Settings, SettingsError

_PATTERNS: Final = {
    "a user and a password before the @ of a URL": re.compile(
        # A colon before a port precedes no password, and a path may contain both ":" and "@".
        r"://(?![^/@:\s]*:\d{1,5}(?:[/\s\"']|$))[^/@:\s]*:[^@\s]*@|(?:https?|s3a?|gcs?|gs)://[^/@\s]+@"
    ),
    "a signature or a token among the parameters of a URL": re.compile(
        r"[?&](?:sig|signature|x-amz-signature|x-amz-credential|x-amz-security-token|x-goog-signature|"
        r"x-goog-credential|awsaccesskeyid|googleaccessid|(?:access_|private_|refresh_)?token|api[_-]?key|key|"
        r"auth|password|pwd|(?:client_)?secret)=",
        re.IGNORECASE,
    ),
    "a token of a service": re.compile(
        r"\b(?:hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|Bearer\s+[\w.~+/-]{8,})"
    ),
    "the key of an account": re.compile(
        r"\b(?:AccountKey|SharedAccessSignature|SharedAccessKey|aws_secret_access_key|aws_session_token|"
        r"azure_storage_account_key|azure_storage_sas_token|azure_storage_client_secret)\s*=|"
        r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
        re.IGNORECASE,
    ),
}
_REMEDY: Final = (
    "leave it out, put it into the environment or the file that storage.credentials names, and replace it, "
    "as it may have been kept"
)


def refuse_secrets_in_options(words: Sequence[str]) -> None:
    """Check that no word of a command line holds a secret.

    Raises:
        SettingsError: if one does; it names the option or setting, and not its value.
    """
    option = "an argument"
    for word in words:
        name, equals, _ = word.partition("=")
        where = f"{option} {name}" if equals and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]*", name) else option
        _refuse(word, where=name if equals and name.startswith("--") else where)
        option = word if word.startswith("--") and not equals else "an argument"


def without_secret(error: SettingsError) -> str:
    """The message of an error, without the given value if it concerns `storage`, where it may be a secret."""
    text = str(error)
    return text.partition(", given ")[0] if text.startswith("storage") else text


def refuse_secrets(settings: Settings) -> None:
    """Check that no setting holds a secret.

    Raises:
        SettingsError: if one does; it names the setting, and not its value.
    """
    for where, text in string_values(settings.to_values()):
        _refuse(text, where=where)


def string_values(value: Any, path: str = "") -> Iterator[tuple[str, str]]:  # noqa: ANN401 - JSON values
    """Every string in a tree of settings with its path, as in schedules.staged.0.teacher."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from string_values(inner, f"{path}.{key}".strip("."))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from string_values(inner, f"{path}.{index}")


def _refuse(text: str, *, where: str) -> None:
    for kind, pattern in _PATTERNS.items():
        if pattern.search(text):
            raise SettingsError(f"{where}: {kind} is a secret, and is not repeated here; {_REMEDY}")
