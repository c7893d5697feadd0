"""Recipe file of the user's own, with the modules beside it that it imports.

The texts are read once, kept in the run's record and run from there, so workers on
other machines, `--resume` and `sovit-eval` get the code that the run began with.

A module beside the file wins over an installed one of the same name, as for a script of
Python's; over Python's own modules, and over ours, it does not. `recipes`, `tuning` and
`pipelines` are common names: Python looks for them first in the working directory where
a module is run by its name, and in Ray's processes always.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.abc
import importlib.util
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

PACKAGES = ("sovit", "pipelines", "tuning", "recipes")
_HOME = Path(__file__).parents[2]
_OURS = frozenset(PACKAGES)
_PREFIX = "own_recipe"
# A package beside a recipe is kept whole; a whole project tree is no helper.
_MAX_FILES, _MAX_BYTES = 200, 2 << 20


@dataclass(frozen=True, kw_only=True)
class OwnCode:
    """Source texts of a recipe file and of the modules beside it."""

    origin: str
    """Absolute path of the file, on the machine that the run began on."""
    sources: Mapping[str, str]
    """Texts by their paths in the file's folder, the file's own among them."""

    def __post_init__(self) -> None:
        """Reject a record that was changed by hand."""
        if self.file not in self.sources:
            raise ValueError(
                f"expected the text of {self.file} in the record, got those of "
                f"{', '.join(self.sources) or 'no file'}; start a new run"
            )

    @property
    def digest(self) -> str:
        """SHA-256 of the file's name and of all names and texts."""
        text = json.dumps([self.file, dict(self.sources)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def folder(self) -> Path:
        """Folder that the file lay in."""
        return Path(self.origin).parent

    @property
    def file(self) -> str:
        """Name of the file."""
        return Path(self.origin).name

    @property
    def module_name(self) -> str:
        """Name in `sys.modules`, which no file's name can take from another module."""
        stem = re.sub(r"\W", "_", Path(self.origin).stem)
        return f"{_PREFIX}_{self.digest[:12]}.{stem}".replace(".", "_")


def read_code(path: Path) -> OwnCode:
    """Read a Python file and the modules beside it that it imports.

    Imports are found in the text, those within functions too, not those by a computed
    name. Raises ValueError where a file is missing, unreadable or no Python.
    """
    path = Path(os.path.abspath(path.expanduser()))
    if path.suffix != ".py" or not path.is_file():
        raise ValueError(
            f"expected a Python file, got {str(path)!r}, which is none; mend its path"
        )
    sources: dict[str, str] = {}
    waiting = [path]
    while waiting:
        file = waiting.pop()
        name = file.relative_to(path.parent).as_posix()
        if name in sources:
            continue
        sources[name], tree = _read(file)
        waiting += _beside(path.parent, imported_by(tree))
        size = sum(map(len, sources.values()))
        if len(sources) > _MAX_FILES or size > _MAX_BYTES:
            raise ValueError(
                f"expected at most {_MAX_FILES} files and {_MAX_BYTES >> 20} MiB of "
                f"code beside {path.name}, got more with {name}; install what it "
                "imports as a package instead"
            )
    return OwnCode(origin=str(path), sources=sources)


def _read(file: Path) -> tuple[str, ast.Module]:
    try:
        text = importlib.util.decode_source(file.read_bytes())
        return text, ast.parse(text, filename=str(file))
    except SyntaxError as error:
        raise ValueError(syntax_line(error, file=file.name)) from error
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{file}: expected a Python file, got one that can't be read ({error})"
        ) from error


def syntax_line(error: SyntaxError, *, file: str) -> str:
    """Describe a syntax error in one line."""
    file = Path(error.filename or file).name
    return f"{file}, line {error.lineno or '?'}: {type(error).__name__}: {error.msg}"


def imported_by(tree: ast.Module) -> set[str]:
    """List the first names of a module's absolute imports."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names.add(node.module.partition(".")[0])
    return names


def _beside(folder: Path, names: set[str]) -> Iterator[Path]:
    """List the files in a folder that imports of these names reach; packages whole."""
    for name in names - _OURS - sys.stdlib_module_names:
        if _is_elsewhere(name, folder=folder):
            continue
        if (folder / name / "__init__.py").is_file():
            yield from _python_in(folder / name)
        elif (folder / f"{name}.py").is_file():
            yield folder / f"{name}.py"
        elif (folder / name).is_dir() and not _is_installed(name):
            yield from _python_in(folder / name)


def _is_installed(name: str) -> bool:
    """Check whether a module or a package of this name lies in another folder.

    Python prefers either to a folder without `__init__.py`, which does not count.
    """
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None


def _python_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*.py") if file.is_file())


def _is_elsewhere(name: str, *, folder: Path) -> bool:
    """Check whether a module of this name is imported already, from another folder."""
    module = sys.modules.get(name)
    if module is None or _loaded_by_us(module):
        return False
    places = [getattr(module, "__file__", None), *getattr(module, "__path__", ())]
    return not any(Path(place).is_relative_to(folder) for place in places if place)


def _loaded_by_us(module: ModuleType) -> bool:
    return isinstance(getattr(module, "__loader__", None), TextLoader)


def hidden_names(code: OwnCode) -> list[str]:
    """List files beside the recipe that an import of its own does not reach.

    They have the name of one of Python's modules, or of ours.
    """
    names = {name for text in code.sources.values() for name in _names_in(text)}
    taken = names & (_OURS | sys.stdlib_module_names)
    return sorted(n for n in taken if (code.folder / f"{n}.py").is_file())


def _names_in(text: str) -> set[str]:
    return imported_by(ast.parse(text))


class TextLoader(importlib.abc.ExecutionLoader):
    """Import loader of one module from a text in memory."""

    def __init__(self, text: str, *, path: str, is_package: bool) -> None:
        self._text, self._path, self._is_package = text, path, is_package

    def get_source(self, fullname: str) -> str:
        """Return the text, which tracebacks and `torch.compile` ask for."""
        return self._text

    def get_filename(self, fullname: str) -> str:
        """Return the path that the text was read from."""
        return self._path

    def is_package(self, fullname: str) -> bool:
        """Whether it is a package's `__init__.py`."""
        return self._is_package


class _Finder(importlib.abc.MetaPathFinder):
    """Import finder of the modules beside a recipe file."""

    def __init__(self, code: OwnCode) -> None:
        self.code = code

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        """Find a module among the code's texts; None for all others."""
        inner = fullname.replace(".", "/")
        for file in (f"{inner}/__init__.py", f"{inner}.py"):
            if file in self.code.sources and file != self.code.file:
                return _spec(fullname, file, code=self.code)
        if any(file.startswith(f"{inner}/") for file in self.code.sources):
            spec = ModuleSpec(fullname, None, is_package=True)
            spec.submodule_search_locations = [str(self.code.folder / inner)]
            return spec
        return None


def _spec(name: str, file: str, *, code: OwnCode) -> ModuleSpec | None:
    is_package = file.endswith("/__init__.py")
    path = str(code.folder / file)
    loader = TextLoader(code.sources[file], path=path, is_package=is_package)
    return importlib.util.spec_from_loader(name, loader, is_package=is_package)


def importable(code: OwnCode) -> ModuleSpec | None:
    """Make the modules beside a recipe importable; return the spec of the file itself.

    Those of the same names that another recipe brought before are forgotten.
    """
    sys.meta_path[:] = [
        finder
        for finder in sys.meta_path
        if not (isinstance(finder, _Finder) and finder.code.origin == code.origin)
    ]
    sys.meta_path.insert(0, _Finder(code))
    tops = {file.partition("/")[0].removesuffix(".py") for file in code.sources}
    tops -= {Path(code.file).stem}
    for name in [name for name in sys.modules if name.partition(".")[0] in tops]:
        del sys.modules[name]
    return _spec(code.module_name, code.file, code=code)


def look_here_last() -> None:
    """Move the working directory behind installed modules, if any names clash."""
    if not _clashes(Path.cwd()):
        return
    here = ("", os.getcwd())
    behind = [path for path in sys.path if path in here]
    sys.path[:] = [path for path in sys.path if path not in here] + behind


def away_from_clashes() -> contextlib.AbstractContextManager[None]:
    """Change to our packages' folder for a block in which Ray is started or joined.

    Ray's processes look for modules first where their driver was then.
    """
    if _clashes(Path.cwd()):
        return contextlib.chdir(_HOME)
    return contextlib.nullcontext()


def _clashes(folder: Path) -> bool:
    """Check whether a folder that isn't ours has modules named as our packages."""
    if folder == _HOME:
        return False
    return any(
        (folder / name / "__init__.py").is_file() or (folder / f"{name}.py").is_file()
        for name in PACKAGES
    )
