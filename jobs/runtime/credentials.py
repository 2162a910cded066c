"""Credentials for object stores: environment variables, or a file of them on every node.

All clients read the same variables, so they are set before any store is accessed. A recipe has the path of
the file and never its content. Neither has anything that Ray keeps or shows: workers of a local cluster
inherit the driver's environment, and those of another read the file on their own node.
"""

import os
import stat
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

from jobs.runtime.settings import StorageSettings
from pipelines.tables.settings import CHECK_FILES_VARIABLE

CREDENTIAL_VARIABLES: Final = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "GOOGLE_APPLICATION_CREDENTIALS",
    "AZURE_STORAGE_ACCOUNT_NAME",
    "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_SAS_TOKEN",
    "AZURE_STORAGE_CLIENT_ID",
    "AZURE_STORAGE_CLIENT_SECRET",
    "AZURE_STORAGE_TENANT_ID",
)
"""Variables that a file may set: those that fsspec's client of the store and Delta Lake's both read."""

_FILE_VARIABLE: Final = "SNAPFUSION_CREDENTIALS"
_PUBLIC_VARIABLES: Final = (
    *("AWS_ENDPOINT_URL", "AWS_ALLOW_HTTP", "AWS_DEFAULT_REGION", "AWS_REGION"),
    CHECK_FILES_VARIABLE,
)
_MAX_BYTES: Final = 1 << 16


class CredentialsError(ValueError):
    """A file of credentials that cannot be used; the message names file, line and fault, and no value."""


def apply_storage(storage: StorageSettings) -> None:
    """Export the recipe's storage settings to the environment of this process and its children.

    Raises:
        CredentialsError: if the file cannot be used.
    """
    if storage.check_files:
        os.environ.pop(CHECK_FILES_VARIABLE, None)
    else:
        os.environ[CHECK_FILES_VARIABLE] = "0"
    if storage.endpoint is not None:
        os.environ["AWS_ENDPOINT_URL"] = storage.endpoint.rstrip("/")
        if storage.endpoint.startswith("http://"):
            os.environ["AWS_ALLOW_HTTP"] = "true"
    if storage.region is not None:
        os.environ["AWS_DEFAULT_REGION"] = os.environ["AWS_REGION"] = storage.region
    if storage.credentials is not None:
        _export(read_credentials(Path(storage.credentials)))
        os.environ[_FILE_VARIABLE] = storage.credentials


def worker_runtime_env(variables: Mapping[str, str]) -> dict[str, Any]:
    """A `runtime_env` with these variables, by which workers on other nodes access the same stores alike.

    Ray shows it, so it holds only what everybody may see: endpoint, region and the path of the file.
    """
    exported = {name: os.environ[name] for name in (_FILE_VARIABLE, *_PUBLIC_VARIABLES) if name in os.environ}
    public = {**variables, **exported}
    if _FILE_VARIABLE not in public:
        return {"env_vars": public}
    hook = f"{apply_storage_in_worker.__module__}.{apply_storage_in_worker.__name__}"
    return {"env_vars": public, "worker_process_setup_hook": hook}


def apply_storage_in_worker() -> None:
    """Read the file on a worker's own node; Ray calls this as each worker starts.

    A file that cannot be used is only logged: Ray would restart a worker that fails here, without end and
    without a message. Its first access to a store then fails with one.
    """
    if _FILE_VARIABLE in os.environ:
        try:
            _export(read_credentials(Path(os.environ[_FILE_VARIABLE])))
        except CredentialsError as error:
            print(error, file=sys.stderr, flush=True)


def read_credentials(file: Path) -> dict[str, str]:
    """Read the variables in a file of lines NAME=VALUE; blank lines and those that begin with # are skipped.

    Raises:
        CredentialsError: if there is no such file, everybody can read it, or a line is not of that form,
            sets a variable that no client of a store reads, or sets one twice.
    """
    try:
        with file.open("rb") as opened:
            mode = os.fstat(opened.fileno()).st_mode
            data = opened.read(_MAX_BYTES + 1)
    except OSError as error:
        raise CredentialsError(f"storage.credentials {file}: {error.strerror or error}") from None
    if mode & stat.S_IROTH:
        raise CredentialsError(
            f"storage.credentials {file} can be read by everybody on this machine: `chmod o-r` it (of a "
            "Kubernetes Secret, set defaultMode)"
        )
    if len(data) > _MAX_BYTES:
        raise CredentialsError(f"storage.credentials {file} has more than {_MAX_BYTES} bytes")
    values: dict[str, str] = {}
    for number, line in enumerate(data.decode("utf-8", "replace").removeprefix("\ufeff").splitlines(), 1):
        if not line.strip() or line.strip().startswith("#"):
            continue
        name, _, value = (part.strip() for part in line.partition("="))
        if fault := _fault(name, value, values):
            raise CredentialsError(f"storage.credentials {file}, line {number}: {fault}")
        values[name] = value
    if not values:
        raise CredentialsError(
            f"storage.credentials {file} sets no variable; accepted are {', '.join(CREDENTIAL_VARIABLES)}"
        )
    return values


def _fault(name: str, value: str, known: Collection[str]) -> str | None:
    """The mistake in a line, without repeating the line; None if there is none."""
    if not value:
        return "is not of the form NAME=VALUE"
    if name not in CREDENTIAL_VARIABLES:
        return f"sets no variable that is read here; accepted are {', '.join(CREDENTIAL_VARIABLES)}"
    if not value.isascii() or not value.isprintable() or value[0] in "'\"":
        return "has a value in quotes, or one that is not plain text"
    return "sets a variable for the second time" if name in known else None


def _export(values: Mapping[str, str]) -> None:
    """Export a file's variables, and remove others of the same stores, so that identities do not mix."""
    stores = {name.partition("_")[0] for name in values}
    for name in CREDENTIAL_VARIABLES:
        if name.partition("_")[0] in stores:
            os.environ.pop(name, None)
    os.environ.update(values)
