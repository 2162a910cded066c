"""Reads errors of file systems and stores: their number, and their text in one line."""

import errno
import re
from collections.abc import Iterator
from typing import Final

NO_SPACE: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""A full disk, a full quota, or a file above the size that the system allows."""

WRONG_PATH: Final = frozenset(
    {
        *(errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY, errno.ENAMETOOLONG),
        *(errno.ELOOP, errno.EACCES, errno.EPERM, errno.EROFS),
    }
)
"""A path that does not exist, is of the wrong kind, or is not permitted."""

# Libraries written in Rust raise errors without a number, draw their causes as a coloured tree, and may
# append a stack.
_NUMBER_IN_TEXT: Final = re.compile(r"\(os error (\d+)\)")
_TREE: Final = re.compile(r"\x1b\[[0-9;]*m|↳")
_STACK: Final = re.compile(r"\n\s+0: .*", re.DOTALL)


def plain_text(error: BaseException) -> str:
    """The error's message in one line, without colours and stack; its class if it has none."""
    return " ".join(_TREE.sub(" ", _STACK.sub("", str(error))).split()) or type(error).__name__


def error_number(error: BaseException) -> int | None:
    """The operating system's number of an error, or of the first of its causes that has one."""
    for cause in _causes(error):
        if isinstance(cause, OSError) and cause.errno is not None:
            return cause.errno
        if found := _NUMBER_IN_TEXT.search(str(cause)):
            return int(found[1])
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, what it was raised from, and so on."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        inner = getattr(cause, "cause", None)  # Ray's errors
        cause = inner if isinstance(inner, BaseException) else cause.__cause__
