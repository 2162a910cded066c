import os
import pickle
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from isolated_work import act, process

from pipelines.rejections import Rejected
from pipelines.stages.image import decode_image
from pipelines.stages.isolation import Isolation, IsolationError
from pipelines.stages.settings import ImageSettings


@pytest.fixture(scope="module")
def isolated() -> Isolation:
    with Isolation(act, timeout=20, tries=2) as isolation:
        yield isolation


@pytest.mark.parametrize(
    ("order", "ending"),
    [
        ("segfault", "SIGSEGV"),
        ("read nowhere", "SIGSEGV"),
        ("exit", "exit status 7"),
        ("leave", "exit status 3"),
        ("leave a process behind", "exit status 1"),
    ],
)
def test_item_that_kills_its_process_is_rejected(isolated: Isolation, order: str, ending: str) -> None:
    with pytest.raises(Rejected, match=f"crashed: 2 tries, the last ended by {ending}"):
        isolated(order)
    assert isolated("good") == "done good"


def test_item_that_hangs_is_rejected() -> None:
    with Isolation(act, timeout=1.0, tries=2) as isolation:
        started = time.monotonic()
        with pytest.raises(Rejected, match="timed_out: 2 tries of 1 s"):
            isolation("hang")
        assert time.monotonic() - started < 30
        assert isolation("good") == "done good"


def test_closed_pipe_counts_as_crash() -> None:
    with Isolation(act, timeout=20, tries=1) as isolation, pytest.raises(Rejected, match="crashed"):
        isolation("close and hang")


def test_item_that_kills_once_is_tried_again(isolated: Isolation, tmp_path: Path) -> None:
    assert isolated(f"once:{tmp_path}/mark").startswith("done")


def test_exceptions_are_raised_in_the_parent(isolated: Isolation) -> None:
    with pytest.raises(Rejected) as caught:
        isolated("reject")
    assert (caught.value.reason, caught.value.detail) == ("too_small", "1 x 1")
    with pytest.raises(RuntimeError, match=r"Unsendable.* cannot be sent"):
        isolated("raise the unsendable")
    with pytest.raises(RuntimeError, match="cannot be sent"):
        isolated("return the unsendable")
    with pytest.raises((pickle.PicklingError, AttributeError)):
        isolated(lambda: None)
    assert isolated("good") == "done good"


def test_output_of_the_function_is_no_answer(isolated: Isolation) -> None:
    assert isolated("print") == "done print"


def test_child_serves_many_items() -> None:
    with Isolation(process) as isolation:
        pids = {isolation(index) for index in range(5)}
        (pid,) = pids
        assert pid != os.getpid()
        isolation.close()
        assert isolation(0) != pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_large_items_and_partial_functions_work() -> None:
    data = bytes(range(256)) * 50_000
    decode = partial(decode_image, size=32, settings=ImageSettings())
    with Isolation(decode) as isolation, pytest.raises(Rejected, match="not_an_image"):
        isolation(data)
    with Isolation(bytes) as echo:
        assert echo(data) == data


def test_function_that_cannot_be_loaded_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((pickle.PicklingError, AttributeError)), Isolation(lambda item: item) as isolation:
        isolation(1)
    hidden = type("Hidden", (), {"__call__": lambda self, item: item, "__module__": __name__})
    monkeypatch.setattr(sys.modules[__name__], "Hidden", hidden, raising=False)
    with pytest.raises(IsolationError, match="cannot be loaded in a child"), Isolation(hidden()) as isolation:
        isolation(1)


def test_impossible_bounds_are_refused() -> None:
    with pytest.raises(ValueError, match="above 0 and at least 1"):
        Isolation(act, timeout=0)
    with pytest.raises(ValueError, match="above 0 and at least 1"):
        Isolation(act, tries=0)
