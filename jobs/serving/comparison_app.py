"""The page that compares models, and its JSON API, as an ASGI application for this machine alone."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from jobs.serving.generation_queue import GenerationQueue
from jobs.serving.generation_response import GenerationResponse
from jobs.serving.image_events import ImageTask, generate_side_by_side
from jobs.serving.image_request import (
    MAX_BODY_BYTES,
    MAX_CAPTION_CHARACTERS,
    MAX_IMAGES,
    MAX_SEED,
    ImageRequest,
    Limits,
    ModelOptions,
)
from jobs.serving.own_machine import OwnMachine
from jobs.serving.served_models import Served
from snapfusion.export.web_page import PAGE_SOURCE
from snapfusion.settings import SettingsError

_PAGE = Path(__file__).with_name("compare")
_FILES = {
    **{name: _PAGE / name for name in ("compare.js", "compare.css")},
    # Of the page of a bundle.
    **{name: PAGE_SOURCE / name for name in ("style.css", "captions.js", "comparison.js", "files.js")},
}
_DISCARDED_BYTES = 64 * 2**20
"""Of a body that is too large, so that a client that sends all of it before it reads has an answer."""


def comparison_app(models: Sequence[Served], *, limits: Limits) -> Starlette:
    """The application.

    Args:
        models: with different names.
        limits: of requests.
    """
    api = _Api(models, limits=limits)
    page = {"": _PAGE / "index.html", **_FILES}
    return Starlette(
        routes=[
            *(Route(f"/{name}", partial(_send_file, path=path)) for name, path in page.items()),
            Route("/api/models", api.list_models),
            Route("/api/queue", api.count_requests),
            Route("/api/images", api.generate_images, methods=["POST"]),
        ],
        middleware=[Middleware(OwnMachine)],
        exception_handlers={
            SettingsError: _refuse,
            HTTPException: _refuse,
            ClientDisconnect: lambda *_: Response(status_code=400),
        },
    )


class _Api:
    """What a page or program may ask for."""

    def __init__(self, models: Sequence[Served], *, limits: Limits) -> None:
        self._models = {model.loaded.source: model for model in models}
        self._queue = GenerationQueue(max_waiting=limits.waiting)

    async def list_models(self, _: Request) -> Response:
        """What requests may name, and their bounds."""
        limits = {
            "body_bytes": MAX_BODY_BYTES,
            "caption_characters": MAX_CAPTION_CHARACTERS,
            "images": MAX_IMAGES,
            "seed": MAX_SEED,
        }
        return JSONResponse({"models": [one.facts() for one in self._models.values()], "limits": limits})

    async def count_requests(self, _: Request) -> Response:
        """Requests that are here, and those that have ended."""
        return JSONResponse(self._queue.counts())

    async def generate_images(self, request: Request) -> Response | GenerationResponse:
        """Generate images, the answer as `GenerationResponse`."""
        image_request = ImageRequest.parse(await _read_object(request))
        chosen = image_request.models or tuple(ModelOptions(name=name) for name in self._models)
        tasks = [self._task(number, options, image_request) for number, options in enumerate(chosen)]
        return GenerationResponse(
            self._queue,
            partial(generate_side_by_side, tasks, image_request),
            as_lines="application/x-ndjson" in request.headers.get("accept", ""),
        )

    def _task(self, number: int, options: ModelOptions, request: ImageRequest) -> ImageTask:
        model = self._models.get(options.name)
        if model is None:
            raise SettingsError(f"models.{number}: no {options.name!r}; {', '.join(self._models)} is served")
        try:
            generator = model.generator(options, request)
        except SettingsError as error:
            # Some messages are of the command line.
            raise SettingsError(f"models.{number}: {options.name}: {str(error).removeprefix('--')}") from None
        return ImageTask(number=number, model=model, generator=generator)


async def _read_object(request: Request) -> dict[str, object]:
    """The JSON object that a request has as its body.

    Raises:
        HTTPException: if it is of another type or too large.
        SettingsError: if it is no JSON object.
    """
    given = request.headers.get("content-type", "none")
    # A page of another origin can send any other type without asking.
    if given.partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, f"content-type {given}: application/json is accepted")
    size, parts = 0, list[bytes]()
    async for part in request.stream():
        size += len(part)
        if size <= MAX_BODY_BYTES:
            parts.append(part)
        elif size > _DISCARDED_BYTES:
            break
    if size > MAX_BODY_BYTES:
        more = " or more" if size > _DISCARDED_BYTES else ""
        raise HTTPException(413, f"a body of {size} bytes{more}: at most {MAX_BODY_BYTES} are accepted")
    try:
        values = json.loads(b"".join(parts))
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"the body is no JSON: {error}") from None
    if not isinstance(values, dict):
        raise SettingsError(f"the body is {json.dumps(values)[:40]}; a JSON object is accepted")
    return values


async def _send_file(_: Request, path: Path) -> Response:
    return FileResponse(path, headers={"Cache-Control": "no-cache"})


async def _refuse(_: Request, error: Exception) -> Response:
    """One line about what is wrong."""
    if isinstance(error, HTTPException):
        return JSONResponse({"error": error.detail}, error.status_code, headers=error.headers)
    return JSONResponse({"error": str(error)}, 400)
