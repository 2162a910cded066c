"""The queue of `serve`: one request at a time, in order, within a bound, and none that nobody waits for."""

import asyncio
import threading

import pytest

from jobs.serving.generation_queue import GenerationQueue, QueueFullError


async def collected(queue, work, *, into):
    with queue.turn() as turn:
        async for event in queue.events(turn, work):
            into.append(event)
        turn.outcome = "finished"


def test_one_works_at_a_time_in_order_of_arrival():
    order, working = [], threading.Lock()

    def work_of(number):
        def work(emit):
            assert working.acquire(blocking=False)
            for step in range(3):
                order.append((number, step))
                emit({"event": "step", "step": step})
            working.release()

        return work

    async def run():
        queue, events = GenerationQueue(max_waiting=3), [[] for _ in range(4)]
        await asyncio.gather(*(collected(queue, work_of(n), into=events[n]) for n in range(4)))
        return queue.counts(), events

    counts, events = asyncio.run(run())
    assert order == [(number, step) for number in range(4) for step in range(3)]
    assert [event["ahead"] for event in events[3] if event["event"] == "waiting"] == [3, 2, 1]
    assert [event["step"] for event in events[2] if event["event"] == "step"] == [0, 1, 2]
    assert counts == {"generating": 0, "waiting": 0, "finished": 4, "left": 0, "failed": 0, "refused": 0}


def test_more_than_the_bound_are_refused():
    async def run():
        queue = GenerationQueue(max_waiting=1)
        with queue.turn(), queue.turn():
            with pytest.raises(QueueFullError, match="--max-waiting 1: as many requests wait already"):
                queue.turn().__enter__()
            assert queue.counts()["waiting"] == 1
        with queue.turn():
            return queue.counts()

    assert asyncio.run(run()) == {
        **{"generating": 1, "waiting": 0, "refused": 1},
        **{"finished": 0, "left": 2, "failed": 0},
    }


def test_work_ends_when_its_client_goes_away():
    begun, emitted = threading.Event(), []

    def endless(emit):
        while True:
            emit({"event": "step"})
            emitted.append(1)
            begun.set()

    async def run():
        queue, others = GenerationQueue(max_waiting=1), []
        leaving = asyncio.create_task(collected(queue, endless, into=[]))
        await asyncio.to_thread(begun.wait)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        # The thread is free for the next one only when the endless work has ended.
        await collected(queue, lambda emit: emit({"event": "done"}), into=others)
        return queue.counts(), others

    counts, others = asyncio.run(run())
    assert [event["event"] for event in others] == ["begun", "done"]
    assert (counts["left"], counts["finished"]) == (1, 1)


def test_an_error_of_the_work_reaches_its_client():
    def broken(emit):
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        asyncio.run(collected(GenerationQueue(max_waiting=0), broken, into=[]))
