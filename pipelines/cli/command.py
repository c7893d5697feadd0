"""Common parts of the commands: typed overrides and one-line errors."""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeVar

import tyro

from pipelines.config import RENAMED
from pipelines.config.own_code import look_here_last
from pipelines.errors import InterruptedRun, RunFailedError
from pipelines.storage.redaction import holds_secret, without_credentials

T = TypeVar("T")
logger = logging.getLogger(__name__)
_BROKEN_PIPE = 141
# Whose progress is shown; a module that Python runs by -m is called __main__.
_OURS = ("pipelines", "tuning", "sovit", "__main__")
# Boxes that tyro draws: their title repeats what is in them, lines part sentences.
_TITLE = re.compile(r"^\u256d.*$", re.MULTILINE)
_RULE = re.compile(r"\s*\u2502 \u2500+ \u2502\s*")
_BOX = re.compile(r"[\u2500-\u257f\s]+")
_COMPILE, _NO_COMPILE = "--scale.compile", "--scale.no-compile"
_COMPILE_CHOICES = ("True", "False", "auto")


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
    if any(word.partition("=")[0] == "--recipe" for word in arguments):
        raise ValueError(
            f"expected a recipe's name in front, got --recipe; write `{prog} NAME ...`"
        )
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                kind,
                default=tyro.MISSING_NONPROP if default is None else default,
                args=_with_choices(arguments),
                prog=prog,
                description=text,
                config=(tyro.conf.AvoidSubcommands,),
            )
    except SystemExit as error:
        if error.code in (0, None):  # --help was printed
            raise
        raise ValueError(_unboxed(said.getvalue())) from error


def _unboxed(text: str) -> str:
    """Join the text that tyro draws in a box into one line."""
    parts = _RULE.split(_TITLE.sub("", text))
    return "; ".join(_BOX.sub(" ", part).strip() for part in parts)


def _with_choices(arguments: Sequence[str]) -> list[str]:
    """Rewrite a flag that has become a choice as the choice; it may be either."""
    found: list[str] = []
    for argument, after in itertools.zip_longest(arguments, arguments[1:]):
        option = argument.replace("_", "-")
        if option == _NO_COMPILE:
            found += [_COMPILE, "False"]
        elif option == _COMPILE and after not in _COMPILE_CHOICES:
            found += [_COMPILE, "True"]
        else:
            found.append(argument)
    return found


def _with_new_names(arguments: Sequence[str]) -> list[str]:
    """Rewrite flags by fields' former names, each with a line that names the new one.

    Raises ValueError where a flag is given by both names.
    """
    new_names = {
        _flag(former, no=no): _flag(new, no=no)
        for new, former in RENAMED.items()
        for no in ("", "no-")
    }
    options = [word.partition("=")[0].replace("_", "-") for word in arguments]
    found: list[str] = []
    for word, option in zip(arguments, options, strict=True):
        new = new_names.get(option)
        if new in options:
            raise ValueError(f"expected {new} alone, got {option} too; leave out one")
        if new:
            logger.warning("%s is called %s now", option, new)
        found.append(word if new is None else new + word[len(option) :])
    return found


def _flag(name: str, *, no: str) -> str:
    group, dot, last = name.replace("_", "-").rpartition(".")
    return f"--{group}{dot}{no}{last}"


def run_command(command: Callable[[Sequence[str]], None], *, prog: str) -> NoReturn:
    """Run a command; user errors become one line and exit status 2.

    So does an argument that holds a secret: the command does not begin. A run whose
    workers failed too often becomes one line and exit status 1. One that was asked to
    end becomes one line and 75 after a checkpoint, 128 and the signal's number else.
    """
    _show_progress_of_ours()
    look_here_last()
    try:
        refuse_secrets(sys.argv[1:])
        command(_with_new_names(sys.argv[1:]))
    except ValueError as error:
        fail(f"{prog}: {error}", status=2)
    except RunFailedError as error:
        fail(f"{prog}: {error}; its checkpoints are kept, see --resume", status=1)
    except InterruptedRun as error:
        fail(f"{prog}: {error}", status=int(error.code or 0))
    except KeyboardInterrupt as error:
        hint = f"; {error}" if str(error) else ""
        fail(f"{prog}: interrupted{hint}", status=130)
    except BrokenPipeError:  # who reads has seen enough: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(_BROKEN_PIPE)
    sys.exit(0)


def refuse_secrets(arguments: Sequence[str]) -> None:
    """Raise ValueError, without the secret, where an address in an argument holds one.

    `ps` shows arguments to everybody on the machine, for as long as a run lives.
    """
    option = ""
    for number, argument in enumerate(arguments, start=1):
        if argument.startswith("--"):
            option = without_credentials(argument.partition("=")[0])
        if not holds_secret(argument):
            continue
        after = f" ({option})" if option else ""
        raise ValueError(
            "expected addresses without secrets, got one with a secret as argument "
            f"{number}{after}, which ps shows to everybody on this machine; leave it "
            "out and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, "
            "or give the machine an instance profile; MLflow's belong in "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or with the whole "
            "address in MLFLOW_TRACKING_URI. Then replace the secret: it was seen"
        )


class _WithoutCredentials(logging.Formatter):
    """Log formatter that removes the secrets of addresses."""

    def format(self, record: logging.LogRecord) -> str:
        return without_credentials(super().format(record))


def _show_progress_of_ours() -> None:
    """Log our modules' progress at INFO, plainly; other libraries' warnings alone."""
    handler = logging.StreamHandler()
    handler.setFormatter(_WithoutCredentials("%(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    for name in _OURS:
        logging.getLogger(name).setLevel(logging.INFO)


def fail(message: str, *, status: int) -> NoReturn:
    """Print the reason in one line on stderr, without credentials, and exit."""
    print(without_credentials(" ".join(message.split())), file=sys.stderr)
    sys.exit(status)
