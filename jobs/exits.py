"""How a command ends: one line for what went wrong, and an exit code.

0 done, 1 the work failed (a second try may help), 2 the request cannot be carried out as it stands, 130
interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn


def guarded(verb: str, work: Callable[[], None]) -> int:
    """Carry out `work`; whatever goes wrong is said in one line, and told in the exit code."""
    try:
        work()
    except KeyboardInterrupt:
        print(f"{verb}: interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    except Exception as error:
        cause = _cause(error)
        if isinstance(cause, ValueError):
            print(f"{verb}: {cause}", file=sys.stderr)
            return 2
        if _is_ours(cause):
            print(f"{verb}: {cause}", file=sys.stderr)
            return 1
        raise
    return 0


def leave(code: int) -> NoReturn:
    """End the process with this exit code, and at once.

    Now and then a process that ends in the ordinary way soon after it read a Delta table is aborted by the
    native threads of its libraries, and a job whose work is committed would count as failed.
    """
    ray = sys.modules.get("ray")
    if ray is not None:
        ray.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _cause(error: BaseException) -> BaseException:
    """What our code raised, maybe inside a worker: without the layers that Ray puts round it."""
    seen = error
    while not _is_ours(seen):
        inner = getattr(seen, "cause", None) or seen.__cause__
        if not isinstance(inner, BaseException):
            break
        seen = inner
    return seen


def _is_ours(error: BaseException) -> bool:
    return type(error).__module__.split(".")[0] in ("jobs", "pipelines", "snapfusion")
