"""Choose the packages that a machine lacks, and fetch their wheels with uv."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

_ROOT = Path(__file__).parents[2]
_DALI = "nvidia-dali-cuda130"
# What the tests need beside `train`, so that those marked gpu run there too.
_TEST_REQUIREMENTS = ("beartype", "hypothesis", "jaxtyping", "pytest")
# Codecs of JPEG 2000, TIFF and compressed tensors on a GPU: nothing of ours asks for
# them, and DALI goes without where they are not there.
_UNUSED = frozenset(
    {"nvidia-libnvcomp-cu13", "nvidia-nvjpeg2k-cu13", "nvidia-nvtiff-cu13"}
)
_PLATFORM = "x86_64-manylinux_2_28"
_LINE = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*)\s*(==\s*(?P<version>[\w.!]+).*|@.*)?")


def read_present(file: Path) -> dict[str, str | None]:
    """Read which packages a machine has, and their versions where they are known.

    The file is what `pip freeze` prints there, or names alone, one a line; builds as
    in 2.11.0+cu130 are left out. Raises ValueError where it is neither.
    """
    if not file.is_file():
        raise ValueError(
            f"expected a file of packages, got {file}, which is not there; write it "
            "with `pip freeze` on the machine"
        )
    present: dict[str, str | None] = {}
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        text = line.partition("#")[0].strip()
        if not text or text.startswith("-"):  # pip's options, and editable installs
            continue
        if not (found := _LINE.fullmatch(text)):
            raise ValueError(
                f"expected NAME or NAME==VERSION, got {text!r} in line {number} of "
                f"{file}; write it with `pip freeze` on the machine"
            )
        present[found["name"]] = found["version"]
    return present


def choose(
    *, python: str, present: Mapping[str, str | None], folder: Path
) -> dict[str, list[str]]:
    """Resolve each pack's requirements beside the installed packages.

    Known versions stand; else the versions of requirements-dev.txt are preferred.
    `folder` keeps what was resolved. Raises ValueError where nothing fits.
    """
    known = folder / "present.txt"
    known.write_text(
        "".join(f"{name}=={version}\n" for name, version in present.items() if version)
    )
    tests = folder / "tests.in"
    tests.write_text("\n".join(_TEST_REQUIREMENTS) + "\n")
    resolved, of_dali = folder / "everything.txt", folder / "dali.txt"
    # uv prefers the versions in the file that it is to write.
    shutil.copy(_ROOT / "requirements-dev.txt", resolved)
    project = [str(_ROOT / "pyproject.toml"), "--extra", "train", str(tests)]
    omitted = [f"--no-emit-package={name}" for name in (*present, *_UNUSED)]
    resolve = functools.partial(_compile, python=python, omitted=omitted)
    everything = resolve(project, constraints=[known], out=resolved)
    dali = folder / "dali.in"
    dali.write_text(_DALI + "\n")
    packed = resolve([str(dali)], constraints=[known, resolved], out=of_dali)
    return {"dali": packed, "rest": [of for of in everything if of not in packed]}


def fetch(requirements: Sequence[str], *, python: str, folder: Path) -> None:
    """Unpack wheels into a folder; raises ValueError where there is none for it."""
    names = folder.with_suffix(".txt")
    names.write_text("\n".join(requirements) + "\n")
    # Copied, since uv's cache and other environments share hard links.
    copied = ("--link-mode", "copy", "--no-deps", "--target", str(folder))
    _uv("install", *copied, "-r", str(names), python=python)


def _compile(
    sources: Sequence[str],
    *,
    python: str,
    omitted: Sequence[str],
    constraints: Sequence[Path],
    out: Path,
) -> list[str]:
    plain = ("--no-header", "--no-annotate", "--strip-extras", *omitted)
    files = [f"--constraints={path}" for path in constraints]
    _uv("compile", *plain, *files, "-o", str(out), *sources, python=python)
    return out.read_text().splitlines()


def _uv(command: str, *arguments: str, python: str) -> None:
    target = ("--python-version", python, "--python-platform", _PLATFORM)
    wheels = ("--only-binary", ":all:")
    asked = ["pip", command, "-q", *target, *wheels, *arguments]
    run_tool("uv", asked, hint="run `make install`, see --present and --python")


def run_tool(name: str, arguments: Sequence[str], *, hint: str) -> None:
    """Run a program of this environment or the PATH.

    Raises ValueError, one line that ends in a hint, where it is missing or fails.
    """
    folders = (str(Path(sys.executable).parent), os.environ.get("PATH", ""))
    if not (tool := shutil.which(name, path=os.pathsep.join(folders))):
        raise ValueError(f"expected {name} on the PATH, got none; {hint}")
    done = subprocess.run(
        [tool, *arguments],
        text=True,
        capture_output=True,
        check=False,
        env={**os.environ, "LC_ALL": "C"},
    )
    if done.returncode:
        raise ValueError(f"{name} failed: {' '.join(done.stderr.split())}; {hint}")
