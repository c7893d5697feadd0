"""Import this project's packages where a folder of the user's has the same name.

`recipes`, `tuning` and `pipelines` are common names. Python looks for them first in
the working directory where a module is run by its name, and in Ray's processes always.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

PACKAGES = ("sovit", "pipelines", "tuning", "recipes")
_HOME = Path(__file__).parents[2]


def look_here_last() -> None:
    """Have modules of the working directory come after installed ones, if any clash."""
    if not _clashes(Path.cwd()):
        return
    here = ("", os.getcwd())
    behind = [path for path in sys.path if path in here]
    sys.path[:] = [path for path in sys.path if path not in here] + behind


def away_from_clashes() -> contextlib.AbstractContextManager[None]:
    """Be in the folder of our packages for a block in which Ray is started or joined.

    Ray's processes look for modules first where their driver was then.
    """
    if _clashes(Path.cwd()):
        return contextlib.chdir(_HOME)
    return contextlib.nullcontext()


def _clashes(folder: Path) -> bool:
    """Whether a folder that isn't ours has modules by the names of our packages."""
    if folder == _HOME:
        return False
    return any(
        (folder / name / "__init__.py").is_file() or (folder / f"{name}.py").is_file()
        for name in PACKAGES
    )
