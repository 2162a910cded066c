"""Errors of file systems and stores: number, text, and whether a retry may help."""

import errno

import pytest

from pipelines.storage.faults import error_number, plain_text
from pipelines.storage.retry import is_transient

TREE = (
    "Generic LocalFileSystem error\n          \x1b[31m↳\x1b[0m Unable to copy data to file\n"
    "           \x1b[31m↳\x1b[0m No space left on device (os error 28)\n"
)
"""As deltalake raises a full disk: without a number."""


def test_a_tree_of_causes_becomes_one_line():
    text = "Generic LocalFileSystem error Unable to copy data to file No space left on device (os error 28)"
    assert plain_text(OSError(TREE)) == text
    assert plain_text(KeyError()) == "KeyError"


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (OSError(TREE), False),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (OSError(errno.ENAMETOOLONG, "File name too long"), False),
        (OSError("Permission denied (os error 13)"), False),
        (FileNotFoundError("s3 has no numbers"), False),
        (OSError(errno.EIO, "Input/output error"), True),
        (OSError("broken off"), True),
    ],
)
def test_only_what_may_pass_is_tried_again(error, transient):
    assert is_transient(error) is transient


def test_the_number_is_found_among_the_causes():
    error = ValueError("cannot be written")
    error.__cause__ = OSError(TREE)
    assert error_number(error) == errno.ENOSPC
    assert error_number(ValueError("nothing of this kind")) is None
