"""Check where a command is to write, before the work whose result it writes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

PLOT_SUFFIXES = (".png", ".svg", ".pdf")


def check_file(
    path: str | Path | None, *, option: str, suffixes: Sequence[str] = ()
) -> None:
    """Raise ValueError where no file can be written at a path; an empty one is none.

    Args:
        option: Name of the option that the path came by.
        suffixes: What its name may end in; anything if empty.
    """
    if not path:
        return
    file = Path(path)
    if suffixes and file.suffix.lower() not in suffixes:
        raise ValueError(
            f"{option}: expected a file that ends in {', '.join(suffixes)}, got "
            f"{str(path)!r}; set --{option}"
        )
    folder = file.absolute().parent
    if not folder.is_dir():
        raise ValueError(
            f"{option}: expected a file in a folder that is there, got {str(path)!r}; "
            f"make {folder} first"
        )
    if file.is_dir() or not os.access(file if file.exists() else folder, os.W_OK):
        why = "a folder" if file.is_dir() else "where nothing may be written"
        raise ValueError(
            f"{option}: expected a file that can be written, got {str(path)!r}, {why}; "
            f"set --{option}"
        )


def check_plot(path: str | Path | None, *, option: str = "plot") -> None:
    """Raise ValueError where no picture can be written at a path."""
    check_file(path, option=option, suffixes=PLOT_SUFFIXES)


def check_folder(path: str | Path | None, *, option: str) -> None:
    """Raise ValueError where no folder can be made at a path, with those above it."""
    if not path:
        return
    if why := why_no_folder(Path(path)):
        raise ValueError(
            f"{option}: expected a folder that can be made and written, got "
            f"{str(path)!r} ({why}); set --{option}"
        )


def why_no_folder(path: Path) -> str:
    """Return why no folder can be made at a path and written into; "" where one can."""
    whole = path.absolute()
    there = next(part for part in (whole, *whole.parents) if part.exists())
    if not there.is_dir():
        return f"Not a directory: {str(there)!r}"
    is_free = os.access(there, os.W_OK | os.X_OK)
    return "" if is_free else f"Permission denied: {str(there)!r}"
