"""A command's options, whose mistakes are told in one line that begins with the option."""

from __future__ import annotations

import argparse
from typing import NoReturn

from snapfusion.settings import SettingsError


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that raises SettingsError in place of printing its usage and leaving."""

    def error(self, message: str) -> NoReturn:
        """Say what was wrong; argparse's own word for an option is left out."""
        raise SettingsError(message.removeprefix("argument "))
