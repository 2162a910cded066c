"""Tasks in processes: dependencies, errors, lost processes; none outlives the process that started it."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial

import pytest

import snapfusion.export.processes as processes
from snapfusion.export.parity import ParityError
from snapfusion.export.processes import LostProcessError, Progress, Task, run_tasks, worker_processes


def total(*numbers):
    return sum(numbers)


def process_after(seconds):
    time.sleep(seconds)
    return os.getpid()


def refuse(error):
    raise error


def end_this_process():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def two():
    with worker_processes(2) as executor:
        yield executor


def run(tasks, executor, *, slots=2, status=lambda text: None):
    """The results, and the lines of progress without times."""
    lines = []
    results = run_tasks(tasks, executor, slots=slots, progress=Progress(log=lines.append, status=status))
    return results, [re.sub(r" (in|\()[ \d]*s\)?$", "", line) for line in lines]


def test_a_task_gets_the_results_of_those_before_it(two):
    tasks = [
        Task(name="sum", run=total, after=("three", "four")),
        Task(name="three", run=partial(total, 1, 2)),
        Task(name="four", run=partial(total, 4)),
    ]
    results, lines = run(tasks, two)
    assert results == {"three": 3, "four": 4, "sum": 7}
    assert sorted(lines[:4]) == ["four: begun", "four: done", "three: begun", "three: done"]
    assert lines[4:] == ["sum: begun", "sum: done"]


def test_tasks_run_side_by_side_in_other_processes(two):
    results, lines = run([Task(name=name, run=partial(process_after, 0.5)) for name in "ab"], two)
    assert len({*results.values(), os.getpid()}) == 3
    assert lines[:2] == ["a: begun", "b: begun"]


def test_no_more_tasks_run_than_there_are_slots(two):
    _, lines = run([Task(name=name, run=total) for name in "ab"], two, slots=1)
    assert lines == ["a: begun", "a: done", "b: begun", "b: done"]


def test_a_long_task_is_not_silent(two, monkeypatch):
    monkeypatch.setattr(processes, "_STATUS_SECONDS", 0.1)
    shown = []
    run([Task(name="sleep", run=partial(process_after, 0.5))], two, status=shown.append)
    assert shown
    assert shown[0] == "sleep (0 s)"


def test_an_error_arrives_as_it_was_raised(two):
    with pytest.raises(ParityError, match=r"^12 dB$") as raised:
        run([Task(name="gate", run=partial(refuse, ParityError("12 dB")))], two)
    # A cause would be printed in its place.
    assert raised.value.__cause__ is None


def test_an_error_of_the_system_keeps_its_number(two):
    with pytest.raises(OSError, match="No space left") as raised:
        run([Task(name="full", run=partial(refuse, OSError(28, "No space left", "a.pte")))], two)
    assert (raised.value.errno, raised.value.filename) == (28, "a.pte")


def test_a_lost_process_is_named():
    tasks = [Task(name="unet", run=end_this_process), Task(name="decoder", run=total)]
    with (
        worker_processes(1) as executor,
        pytest.raises(LostProcessError, match=r"a process was ended, .* during unet \(\d+ s\); free memory"),
    ):
        run(tasks, executor, slots=1)


def exists(process):
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, 0)
        return True
    return False


def await_end(pids):
    deadline = time.monotonic() + 20
    while any(map(exists, pids)):
        assert time.monotonic() < deadline, "processes go on"
        time.sleep(0.05)


def test_leaving_ends_running_tasks():
    with worker_processes(1) as executor:
        pid = executor.submit(os.getpid).result()
        executor.submit(time.sleep, 600)
    await_end([pid])


KILLED = """
import os, time
from snapfusion.export.processes import worker_processes
with worker_processes(2) as executor:
    futures = [executor.submit(os.getpid) for _ in range(8)]
    print(*{future.result() for future in futures}, flush=True)
    executor.submit(time.sleep, 60)
    time.sleep(60)
"""


@pytest.mark.slow
def test_processes_end_with_one_that_is_killed():
    with subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True) as parent:
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert pids
        assert all(map(exists, pids))
        parent.kill()
    await_end(pids)


def test_the_number_of_processes_is_bounded_by_cores_and_memory():
    cores = len(os.sched_getaffinity(0))
    assert processes.num_processes(bytes_each=1) == cores
    assert processes.num_processes(bytes_each=2**60) == 1
