"""Install the project as a user does: a wheel in a fresh environment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from pipelines.config.own_code import PACKAGES

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, kw_only=True)
class Installed:
    """An environment that has the project's wheel, and nothing of the checkout."""

    folder: Path

    def run(
        self, *command: str, cwd: Path, status: int = 0
    ) -> subprocess.CompletedProcess[str]:
        """Run a command by its name, as in a shell; an AssertionError if it fails."""
        found = shutil.which(command[0], path=str(self.folder / "bin"))
        assert found is not None
        hidden = ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME")
        kept = {name: text for name, text in os.environ.items() if name not in hidden}
        path = f"{self.folder / 'bin'}{os.pathsep}{kept['PATH']}"
        done = subprocess.run(
            [found, *command[1:]],
            cwd=cwd,
            env=kept | {"PATH": path, "XDG_STATE_HOME": str(self.folder / "state")},
            capture_output=True,
            text=True,
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done


def install(folder: Path) -> Installed:
    """Build a wheel and install it; libraries are those of this environment."""
    source, environment = folder / "source", folder / "env"
    for name in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    plain = ["--quiet", "--no-deps", "--no-index"]
    wheel = [*pip, "wheel", *plain, "--no-build-isolation", "-w", folder, source]
    subprocess.run(wheel, check=True)
    (built,) = folder.glob("*.whl")
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", environment], check=True
    )
    python = environment / "bin/python"
    subprocess.run([*pip, "--python", python, "install", *plain, built], check=True)
    # A line of such a file is a folder whose own ones are left alone: an editable
    # install of the checkout is not found there.
    (packages,) = environment.glob("lib/*/site-packages")
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib"))
    return Installed(folder=environment)
