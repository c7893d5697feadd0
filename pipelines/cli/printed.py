"""Format commands for pasting into a shell."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

from pipelines.storage.redaction import without_credentials


def command_line(program: str, *arguments: object) -> str:
    """Format a command of ours or MLflow's, quoted where a shell needs it.

    A program that is not on PATH gets its folder; addresses lose their secrets.
    """
    beside = Path(sys.executable).with_name(program)
    is_found = shutil.which(program) or not beside.exists()
    words = [program if is_found else os.path.relpath(beside)]
    return shlex.join([*words, *(without_credentials(str(word)) for word in arguments)])
