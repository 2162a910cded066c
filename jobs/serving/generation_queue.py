"""Requests that generate one at a time, in the order of their arrival, while a bounded number waits."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

Event = dict[str, Any]
"""What happened to a request, as JSON; `event` names it."""
Emit = Callable[[Event], None]
Work = Callable[[Emit], None]
"""Generates, and emits an event for each thing that happens; where it emits is where it can be stopped."""


class QueueFullError(RuntimeError):
    """A request for which there is no room."""


class _ClientGone(Exception):
    """Stops the work of a request that nobody waits for."""


@dataclass(eq=False)
class Turn:
    """A request from its arrival to its end.

    Attributes:
        outcome: how it ends; a client that goes away leaves it as it is.
        is_over: whether it has ended.
    """

    outcome: Literal["left", "finished", "failed"] = "left"
    is_over: bool = False


class GenerationQueue:
    """Lets one request at a time generate.

    Args:
        max_waiting: requests that may wait beside the one that generates.
    """

    def __init__(self, *, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._line: list[Turn] = []
        self._moved = asyncio.Event()
        # One thread for all: torch keeps a pool of its own for each thread that it is called from.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="generation")
        self._ended = dict.fromkeys(("finished", "left", "failed", "refused"), 0)

    def counts(self) -> dict[str, int]:
        """Requests that are here, and those that have ended, by how."""
        generating = min(1, len(self._line))
        return {"generating": generating, "waiting": len(self._line) - generating, **self._ended}

    @contextmanager
    def turn(self) -> Iterator[Turn]:
        """Stand in line as long as the body runs; then the next one moves up.

        Raises:
            QueueFullError: if as many wait as may.
        """
        if len(self._line) > self._max_waiting:
            self._ended["refused"] += 1
            raise QueueFullError(
                f"--max-waiting {self._max_waiting}: as many requests wait already; try again later"
            )
        turn = Turn()
        self._line.append(turn)
        try:
            yield turn
        finally:
            turn.is_over = True
            self._ended[turn.outcome] += 1
            self._line.remove(turn)
            moved, self._moved = self._moved, asyncio.Event()
            moved.set()

    async def events(self, turn: Turn, work: Work) -> AsyncIterator[Event]:
        """Wait for the turn, then work in the thread; yield how many are ahead, and what the work emits."""
        while ahead := self._line.index(turn):
            yield {"event": "waiting", "ahead": ahead}
            await self._moved.wait()
        loop = asyncio.get_running_loop()
        events = asyncio.Queue[Event | None]()

        def emit(event: Event) -> None:
            if turn.is_over:
                raise _ClientGone
            loop.call_soon_threadsafe(events.put_nowait, event)

        def run() -> None:
            with suppress(_ClientGone):
                emit({"event": "begun"})
                work(emit)

        # The thread may still be about a step of a request that has ended; this one comes after it.
        done = loop.run_in_executor(self._thread, run)
        done.add_done_callback(lambda _: events.put_nowait(None))
        while (event := await events.get()) is not None:
            yield event
        await done
