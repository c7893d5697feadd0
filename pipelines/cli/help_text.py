"""Format a command's help: its own options first, and no more than two screens.

What the typed fields are comes from tyro's help, of which all is shown on `--help-all`.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from unittest import mock

WANTED = ("-h", "--help", "--help-all")
_ALL = WANTED[-1]
_WIDTH = 80
_OPTION = re.compile(r"│ (-\S.*?) +│")
_LINE = re.compile(r"│ {7}(.*?) *│")
# Not the user's to set: the recipe is named in front.
_HIDDEN = "--recipe"
COMMON = (
    *("data.train", "data.val", "data.val-share"),
    *("data.batch-size", "data.balance", "data.num-decode-threads"),
    *("model.name", "model.img-size", "model.init-from"),
    *("optim.lr", "optim.num-epochs", "optim.warmup-epochs", "optim.ema-decay"),
    "optim.freeze-layers",
    *("scale.num-workers", "scale.use-gpu", "scale.compile", "scale.min-workers"),
    *("validation.every-epochs", "validation.also", "seed", "experiment"),
    *("log-every-steps", "checkpoint-every-minutes", "num-checkpoints-to-keep"),
)
"""Fields of a run that most people set."""


def wants_help(arguments: Sequence[str]) -> bool:
    """Check whether one of the arguments asks for help."""
    return any(argument in WANTED for argument in arguments)


def help_text(
    ask: Callable[[list[str]], object],
    *,
    text: str,
    own: Mapping[str, str],
    common: Sequence[str],
    arguments: Sequence[str],
) -> str:
    """Compose the help that the arguments ask for.

    Args:
        ask: Parses the typed fields, and prints tyro's help on `--help`.
        text: What the command is for.
        own: The command's own options, and what they do.
        common: Typed fields of the short help, without `--`.
    """
    # Of an encoding that has the boxes' lines, which tyro leaves out elsewhere.
    said = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    columns = mock.patch.dict(os.environ, {"COLUMNS": str(_WIDTH), "NO_COLOR": "1"})
    with columns, contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        ask(["--help"])
    said.seek(0)
    lines = said.read().splitlines()
    parts = [*_paragraphs(text), "options:", *_wrapped(own)]
    if _ALL in arguments:
        boxes = next(at for at, line in enumerate(lines) if line.startswith("╭"))
        return "\n".join([*parts, "", *_without(lines[boxes:], hidden=_HIDDEN)])
    found = _described(lines)
    shown = {name: found[f"--{name}"] for name in common if f"--{name}" in found}
    named = {f"--{name} {kind}".strip(): words for name, (kind, words) in shown.items()}
    return "\n".join([*parts, "", "fields that are most often set:", *_wrapped(named)])


def _paragraphs(text: str) -> list[str]:
    """Wrap a module's description to the width; its indented examples stay."""
    found: list[str] = []
    for paragraph in text.strip().split("\n\n"):
        is_example = paragraph.startswith(" ")
        found += [paragraph if is_example else textwrap.fill(paragraph, _WIDTH), ""]
    return found


def _described(lines: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Parse each option's kind of value, first sentence and default."""
    found: dict[str, tuple[str, list[str]]] = {}
    words: list[str] = []
    for line in lines:
        if option := _OPTION.fullmatch(line):
            name, _, kind = option[1].partition(", --")[0].partition(" ")
            words = []
            found[name] = kind, words
        elif more := _LINE.fullmatch(line):
            words.append(more[1])
    return {name: (kind, _short(" ".join(w))) for name, (kind, w) in found.items()}


def _short(words: str) -> str:
    sentence, mark, default = words.rpartition("(default: ")
    first = re.split(r"(?<=[.;])\s", sentence.strip())[0].rstrip(".;")
    return f"{first} {mark}{default}".strip()


def _wrapped(options: Mapping[str, str]) -> list[str]:
    found: list[str] = []
    for option, words in options.items():
        first = f"  {option}  " if len(option) < 28 else f"  {option}\n"
        indent = " " * 32
        body = textwrap.fill(
            words, _WIDTH, initial_indent=indent, subsequent_indent=indent
        )
        if first.endswith("\n") or not words:
            found += [first.rstrip(), *([body] if words else [])]
        else:
            found.append(f"{first:<32}{body[32:]}")
    return found


def _without(lines: Sequence[str], *, hidden: str) -> list[str]:
    """Remove one option with the lines that describe it."""
    kept, is_hidden = list[str](), False
    for line in lines:
        if option := _OPTION.fullmatch(line):
            is_hidden = option[1].split()[0] == hidden
        elif not _LINE.fullmatch(line):
            is_hidden = False
        if not is_hidden:
            kept.append(line)
    return kept
