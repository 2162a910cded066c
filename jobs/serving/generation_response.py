"""Answers a request with the events of its work, and ends the work when the client goes away."""

import asyncio
import json
from collections.abc import AsyncIterator

from starlette.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send

from jobs.serving.generation_queue import Event, GenerationQueue, QueueFullError, Turn, Work

_SECONDS_TO_READ = 60.0
"""In which a client has to read what it is sent; others wait for it."""
_RETRY_SECONDS = 5


class GenerationResponse:
    """An ASGI response: each event as a line of JSON once it happens, or all images as one JSON object.

    Args:
        queue: in which the request waits.
        work: of the request.
        as_lines: whether each event is a line.
    """

    def __init__(self, queue: GenerationQueue, work: Work, *, as_lines: bool) -> None:
        self._queue, self._work, self._as_lines = queue, work, as_lines

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or say that there is no room."""
        try:
            with self._queue.turn() as turn:
                await self._answer_while_connected(turn, scope, receive, send)
        except QueueFullError as error:
            headers = {"Retry-After": str(_RETRY_SECONDS)}
            await JSONResponse({"error": str(error)}, 503, headers=headers)(scope, receive, send)

    async def _answer_while_connected(self, turn: Turn, scope: Scope, receive: Receive, send: Send) -> None:
        answer = asyncio.ensure_future(self._answer(turn, scope, receive, _with_deadline(send)))
        departure = asyncio.ensure_future(_departure(receive))
        try:
            await asyncio.wait({answer, departure}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            finished = answer.done()
            answer.cancel()
            departure.cancel()
            await asyncio.gather(answer, departure, return_exceptions=True)
        if finished:
            await answer

    async def _answer(self, turn: Turn, scope: Scope, receive: Receive, send: Send) -> None:
        events = self._queue.events(turn, self._work)
        try:
            if self._as_lines:
                await _send_lines(events, send)
            else:
                await (await _as_one(events))(scope, receive, send)
        except TimeoutError:
            return  # it counts as one that left
        except Exception:
            turn.outcome = "failed"
            raise
        turn.outcome = "finished"


async def _send_lines(events: AsyncIterator[Event], send: Send) -> None:
    headers = [(b"content-type", b"application/x-ndjson"), (b"cache-control", b"no-store")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    async for event in events:
        line = json.dumps(event).encode() + b"\n"
        await send({"type": "http.response.body", "body": line, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _as_one(events: AsyncIterator[Event]) -> JSONResponse:
    """All images, or why one failed; a server error if none was made."""
    images = [event async for event in events if event["event"] in ("image", "failed")]
    failed = all(event["event"] == "failed" for event in images)
    return JSONResponse({"images": images}, status_code=500 if failed else 200)


async def _departure(receive: Receive) -> None:
    """Wait until the client goes away."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _with_deadline(send: Send) -> Send:
    async def send_in_time(message: Message) -> None:
        async with asyncio.timeout(_SECONDS_TO_READ):
            await send(message)

    return send_in_time
