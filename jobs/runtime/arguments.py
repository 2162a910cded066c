"""A command's options, whose mistakes are told in one line that begins with the option."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from jobs.runtime.secrets import refuse_secrets_in_options
from snapfusion.settings import SettingsError


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that raises SettingsError in place of printing its usage and leaving."""

    def options(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """What `argv` says, or without it the command line.

        Raises:
            SettingsError: if it is not understood, or if there is a secret in it.
        """
        words = list(sys.argv[1:] if argv is None else argv)
        refuse_secrets_in_options(words)
        return self.parse_args(words)

    def error(self, message: str) -> NoReturn:
        """Say what was wrong; argparse's own word for an option is left out."""
        raise SettingsError(message.removeprefix("argument "))
