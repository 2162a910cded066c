"""Settings of the Ray cluster and of object stores."""

from pydantic import Field, field_validator

from snapfusion.settings import Settings


class ClusterSettings(Settings):
    """Settings of the Ray cluster.

    Attributes:
        address: of a running cluster; None takes the one this job was submitted to, or else a local one.
        cpus: logical CPUs of a local one; None takes the machine's, at least four.
        wait: minutes that a job waits for the resources of its workers on a running cluster.
        worker_logs: whether the workers' own output is shown.
    """

    address: str | None = None
    cpus: int | None = None
    wait: float = Field(10.0, ge=0.0)
    worker_logs: bool = False


class StorageSettings(Settings):
    """Access to stores. Nothing here is secret: it is printed, saved and hashed.

    Attributes:
        endpoint: of a store that speaks S3's protocol and is not Amazon's, as in https://minio.example:9000.
        region: of S3 buckets.
        credentials: absolute path of a file with lines NAME=VALUE, the same on every node, which not
            everybody may read. None leaves it to the environment: variables, or a node's role.
        check_files: whether the data files of tables are compared with their checksums when a process first
            reads them.
    """

    endpoint: str | None = Field(None, pattern=r"^https?://[A-Za-z0-9.\-\[\]:]+/?$")
    region: str | None = Field(None, pattern=r"^[a-z0-9-]{1,40}$")
    credentials: str | None = None
    check_files: bool = True

    @field_validator("credentials")
    @classmethod
    def _is_a_path(cls, credentials: str | None) -> str | None:
        if credentials is not None and not credentials.startswith("/"):
            raise ValueError("the absolute path of a file is accepted, not credentials themselves")
        return credentials
