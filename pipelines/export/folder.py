"""Write an export folder atomically, replacing only an earlier export.

`export.json`, written last, is the mark: it lists the other files, each with its size
and CRC-32. A folder with any further or changed file is refused as somebody else's.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipelines.checkpoints.snapshot import fingerprint
from pipelines.storage.path import partial_name

MARK = "export.json"
_MAX_NAMES = 3


@contextlib.contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Create a temporary folder that becomes `out` at the end, or is removed.

    Raises ValueError where `out` holds what is not ours, and where it can't be written.
    """
    _refuse_foreign(out)
    partial = Path(partial_name(str(out)))
    try:
        partial.mkdir(parents=True)
        yield partial
        _refuse_foreign(out)  # it took a while
        _put(partial, out=out)
    except OSError as error:
        raise ValueError(
            f"{out}: expected a folder that can be written, got {error}; name another, "
            "or make room"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def mark(folder: Path, *, content: Mapping[str, Any]) -> None:
    """Write a folder's mark, with further content."""
    files = {path.name: fingerprint(path) for path in sorted(folder.iterdir())}
    text = json.dumps({**content, "files": files}, indent=2)
    (folder / MARK).write_text(f"{text}\n")


def _refuse_foreign(out: Path) -> None:
    if not out.exists() and not out.is_symlink():
        return
    if not out.is_dir():
        raise ValueError(
            f"expected a folder to export into, got {str(out)!r}, a file; name another"
        )
    foreign = sorted(_foreign_in(out))
    if foreign:
        shown = ", ".join(foreign[:_MAX_NAMES])
        more = f" and {len(foreign) - _MAX_NAMES} more" * (len(foreign) > _MAX_NAMES)
        raise ValueError(
            f"{out}: expected a new or an empty folder, or one that sovit-export "
            f"wrote, got one with {shown}{more}, which it did not write; name another"
        )


def _foreign_in(out: Path) -> set[str]:
    names = {path.name for path in out.iterdir()}
    try:
        files = json.loads((out / MARK).read_text())["files"].items()
        ours = {name for name, wanted in files if _is_as(out / name, wanted=wanted)}
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return names
    return names - ours - {MARK}


def _is_as(path: Path, *, wanted: Any) -> bool:
    return path.is_file() and fingerprint(path) == wanted


def _put(partial: Path, *, out: Path) -> None:
    """Swap the folders: for a moment there is none, never a partial one."""
    before = partial.with_name(f"{partial.name}.before")
    if out.exists():
        out.rename(before)
    try:
        partial.rename(out)
    except OSError:
        if before.exists():
            before.rename(out)
        raise
    shutil.rmtree(before, ignore_errors=True)
