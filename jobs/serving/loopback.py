"""Listens at this machine's own address, and serves an application there until it is interrupted."""

import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager

import uvicorn
from starlette.types import ASGIApp

from jobs.serving.site import HOST

_GRACE_SECONDS = 2
"""For answers that are under way when it is interrupted."""


@contextmanager
def listening(port: int) -> Iterator[socket.socket]:
    """A socket that listens at `HOST`, as long as the body runs; port 0 is any free one.

    Raises:
        OSError: if the port is in use.
    """
    with closing(socket.create_server((HOST, port), backlog=128)) as server:
        yield server


def url_of(server: socket.socket) -> str:
    """Where a listening socket is reached."""
    return f"http://{HOST}:{server.getsockname()[1]}/"


def uvicorn_server(app: ASGIApp) -> uvicorn.Server:
    """What serves the application; `run(sockets=[...])` returns when it is interrupted."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            loop="asyncio",
            http="h11",
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=_GRACE_SECONDS,
        )
    )
