"""Parses a command's arguments, and reports a mistake in one line that begins with the option."""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from jobs.runtime.secrets import refuse_secrets_in_options
from snapfusion.settings import SettingsError


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that raises SettingsError instead of printing its usage and exiting."""

    def options(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Parse `argv`, or the process's own arguments if it is None.

        Raises:
            SettingsError: if an argument is not accepted, or holds a secret.
        """
        arguments = list(sys.argv[1:] if argv is None else argv)
        refuse_secrets_in_options(arguments)
        return self.parse_args(arguments)

    def error(self, message: str) -> NoReturn:
        """Raise the message without argparse's own prefix."""
        raise SettingsError(message.removeprefix("argument "))
