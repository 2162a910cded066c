"""Settings of the Ray cluster and of object stores."""

from __future__ import annotations

from pydantic import Field, field_validator

from snapfusion.settings import Settings


class ClusterSettings(Settings):
    """Where to run.

    Attributes:
        address: of a running cluster, or None: the one this job was submitted to, else a local one.
        cpus: logical CPUs of a local one; None takes the machine's, at least four.
        worker_logs: whether the workers' own output is shown here.
    """

    address: str | None = None
    cpus: int | None = None
    worker_logs: bool = False


class StorageSettings(Settings):
    """How object stores are reached. Nothing here is secret: it is printed, saved and hashed.

    Attributes:
        endpoint: of a store that speaks S3's protocol and is not Amazon's, as in https://minio.example:9000.
        region: of S3 buckets.
        credentials: an absolute path of a file with lines NAME=VALUE, the same on every node; who else may
            read it is said by the file's mode, and "everybody" is refused. None leaves it to the environment:
            variables, or the rights that a node has by its role.
    """

    endpoint: str | None = Field(None, pattern=r"^https?://[A-Za-z0-9.\-\[\]:]+/?$")
    region: str | None = Field(None, pattern=r"^[a-z0-9-]{1,40}$")
    credentials: str | None = None

    @field_validator("credentials")
    @classmethod
    def _is_a_place(cls, credentials: str | None) -> str | None:
        if credentials is not None and not credentials.startswith("/"):
            raise ValueError("the absolute path of a file is accepted, and no credentials themselves")
        return credentials
