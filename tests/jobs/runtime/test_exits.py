"""Signals: Ctrl-C and SIGTERM, once and twice, end a command with one line and an exit code."""

import signal
import subprocess
import sys

import pytest

WORK = """
import sys, time
from jobs.runtime.exit_codes import exit_process, run_guarded
def work():
    try:
        print("working", flush=True)
        time.sleep(60)
    finally:
        print("unwinding", flush=True)
        time.sleep({unwinding})
exit_process(run_guarded("verb", work))
"""


def started(script: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "working\n"
    return process


def ended(process, *signals) -> tuple[int, str, str]:
    """Exit code and output of a process that is sent signals."""
    for number in signals:
        process.send_signal(number)
    output, error = process.communicate(timeout=30)
    return process.returncode, output, error


@pytest.mark.parametrize(
    ("number", "code", "how"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]
)
def test_a_signal_unwinds_the_work(number, code, how):
    process = started(WORK.format(unwinding=0.0))
    last = f"verb: {how}; run the same command again to go on\n"
    assert ended(process, number) == (code, "unwinding\n", last)


def test_nothing_is_printed_after_the_last_line():
    noisy = """
import os, signal, sys, types
from jobs.runtime.exit_codes import exit_process, run_guarded
def complain():
    os.write(2, b"(raylet) an actor is dead\\n")
    print("dead, too", flush=True)
sys.modules["ray"] = types.SimpleNamespace(shutdown=complain)
class Actors:
    def __del__(self):
        complain()
def work():
    actors = Actors()
    print("working", flush=True)
    if sys.argv[1] == "stop":
        os.kill(os.getpid(), signal.SIGTERM)
exit_process(run_guarded("verb", work))
"""
    for how, last in (
        ("stop", "verb: terminated; run the same command again to go on\n"),
        ("end", 2 * "(raylet) an actor is dead\ndead, too\n"),
    ):
        command, merged = [sys.executable, "-c", noisy, how], subprocess.STDOUT
        done = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=merged, text=True)
        assert done.stdout == f"working\n{last}"


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_process(second):
    process = started(WORK.format(unwinding=60.0))
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "unwinding\n"
    assert ended(process, second)[0] == -second


def test_a_lost_interrupt_still_ends_the_process():
    lost = """
import signal, time
import jobs.runtime.exit_codes as exit_codes
exit_codes._UNWIND_SECONDS = 0.3
def work():
    print("working", flush=True)
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        time.sleep(60)
exit_codes.exit_process(exit_codes.run_guarded("verb", work))
"""
    code, _, error = ended(started(lost), signal.SIGTERM)
    assert (code, error) == (143, "verb: terminated; run the same command again to go on\n")


def test_sigterm_ends_what_ignores_ctrl_c():
    """A shell starts background jobs like this."""
    ignoring = f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); {WORK.strip()}"
    code, _, error = ended(started(ignoring.format(unwinding=0.0)), signal.SIGINT, signal.SIGTERM)
    assert code == 143
    assert error.startswith("verb: terminated;")


def test_signal_handlers_are_restored():
    script = """
import signal
from jobs.runtime.exit_codes import run_guarded
before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
assert run_guarded("verb", lambda: None) == 0
assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
"""
    subprocess.run([sys.executable, "-c", script], check=True)
