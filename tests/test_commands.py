"""Console scripts answer Ctrl-C without a traceback, also while they import."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.cli import scripts

# A package that takes long to import, as torch does, and says when it has begun.
SLOW = "import sys, time\nprint('importing', flush=True)\ntime.sleep(60)\n"
CODE = (
    "import signal\n"
    "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    "from pipelines.cli import scripts\n"
    "scripts._run('slow_to_import')\n"
)


def test_ctrl_c_while_a_command_is_imported_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "slow_to_import.py").write_text(SLOW)
    root = str(Path(__file__).parents[1])
    process = subprocess.Popen(
        [sys.executable, "-c", CODE],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([root, str(tmp_path)])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGINT
    assert said == ""


def test_a_command_has_pythons_answer_to_ctrl_c_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "quick_to_import.py").write_text(
        "import signal\nat_import = signal.getsignal(signal.SIGINT)\n"
        "def main():\n    global answer\n    answer = signal.getsignal(signal.SIGINT)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        scripts._run("quick_to_import")
        quick = sys.modules["quick_to_import"]
        assert quick.at_import == signal.SIG_DFL
        assert quick.answer == signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
