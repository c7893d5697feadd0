"""Share what the commands have in common: typed overrides and one-line errors."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeVar

import tyro

from pipelines.errors import RunFailedError

T = TypeVar("T")
_BOX = re.compile(r"[─-╿\s]+")


def parse(
    kind: type[T],
    *,
    default: T | None = None,
    arguments: Sequence[str],
    prog: str,
    text: str | None = None,
) -> T:
    """Apply `--typed.overrides` to a default value of a dataclass.

    Raises ValueError, in one line, where a field is not known or a value is no such
    thing.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                kind,
                default=tyro.MISSING_NONPROP if default is None else default,
                args=list(arguments),
                prog=prog,
                description=text,
                config=(tyro.conf.AvoidSubcommands,),
            )
    except SystemExit as error:
        if error.code in (0, None):  # --help was printed
            raise
        raise ValueError(_BOX.sub(" ", said.getvalue()).strip()) from error


def run_command(command: Callable[[Sequence[str]], None], *, prog: str) -> NoReturn:
    """Run a command; what the user can mend becomes one line and exit status 2.

    A run whose workers failed too often becomes one line and exit status 1.
    """
    _show_progress_of_ours()
    try:
        command(sys.argv[1:])
    except ValueError as error:
        fail(f"{prog}: {error}", status=2)
    except RunFailedError as error:
        fail(f"{prog}: {error}; its checkpoints are kept, see --resume", status=1)
    except KeyboardInterrupt:
        fail(f"{prog}: interrupted", status=130)
    sys.exit(0)


def _show_progress_of_ours() -> None:
    """Print what our modules log at INFO, plainly; other libraries' warnings alone."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger(__package__).setLevel(logging.INFO)


def fail(message: str, *, status: int) -> NoReturn:
    """Say why in one line on stderr and leave."""
    print(" ".join(message.split()), file=sys.stderr)
    sys.exit(status)
