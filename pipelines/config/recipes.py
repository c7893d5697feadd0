"""Find the recipe that a command names, and run a file of the user's own."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib
import importlib.util
import inspect
import re
import sys
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import timm

from pipelines import config
from pipelines.config.compatibility import RENAMED
from pipelines.config.facts import Facts
from pipelines.config.overrides import wrong_fields
from pipelines.config.own_code import (
    OwnCode,
    TextLoader,
    hidden_names,
    importable,
    read_code,
    syntax_line,
)
from pipelines.config.run import Run
from pipelines.config.serialization import to_json

_UNKNOWN = re.compile(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'")


def load_recipe(name: str, *, facts: Facts | None = None) -> Run:
    """Build the run of a recipe, fitted to facts if they are given and it takes them.

    `imagenet.so_vit_14` is the function `so_vit_14` of `recipes/imagenet.py`, `demo`
    the function `demo` of `recipes/demo.py`, and `my/file.py:run` a function of your
    own file. Raises ValueError that lists what there is, and where a file of your own
    fails, in one line.
    """
    if code := own_code_of(name):
        return own_run(code, function=name.rpartition(":")[2], facts=facts)
    module_name, _, function = name.partition(".")
    function = function or module_name
    try:
        module = importlib.import_module(f"recipes.{module_name}")
    except ModuleNotFoundError as error:
        if not f"recipes.{module_name}".startswith(error.name or ""):
            raise  # the recipe is there, and something that it imports is not
        raise ValueError(
            f"expected a recipe, got {name!r}; there are {', '.join(_modules())}, or "
            "name a function of your own: my/file.py:run"
        ) from error
    check_named(function, found=recipes_of(module), module=module.__name__)
    return _run_of(_called(getattr(module, function), facts), name=name)


def _called(function: Callable[..., object], facts: Facts | None) -> object:
    takes = facts is not None and "facts" in inspect.signature(function).parameters
    return function(facts=facts) if takes else function()


def own_code_of(name: str) -> OwnCode | None:
    """Read the file that a recipe's or a space's name begins with; None for ours."""
    path, separator, _ = name.rpartition(":")
    return read_code(Path(path)) if separator and path.endswith(".py") else None


def check_named(function: str, *, found: list[str], module: str) -> None:
    """Raise ValueError where a module has no such recipe."""
    if function not in found:
        raise ValueError(
            f"expected a recipe of {module}, got {function!r}; there are "
            f"{', '.join(found) or 'none: write a function without arguments -> Run'}"
        )


def own_run(code: OwnCode, *, function: str, facts: Facts | None = None) -> Run:
    """Build the run of a function in a file of the user's own.

    Raises ValueError in one line where there is none, or it fails.
    """
    module = load_code(code)
    found = recipes_of(module)
    recipe = vars(module).get(function)
    # Asked for by name, what it returns says whether it is one.
    if inspect.isfunction(recipe) and _lacks_annotation(recipe):
        found.append(function)
    check_named(function, found=found, module=code.file)
    with explained(code):
        built = _called(getattr(module, function), facts)
        run = _run_of(built, name=f"{code.file}:{function}")
        if wrong := wrong_fields(run):
            raise ValueError(wrong[0])
        to_json(run)  # its record; a model's further arguments may be anything
    return run


def _run_of(run: object, *, name: str) -> Run:
    if not isinstance(run, Run):
        raise ValueError(f"{name}: expected a function that returns a Run, got {run!r}")
    return run


def recipes_of(module: ModuleType) -> list[str]:
    """List the functions of a module that return a Run and need no argument."""
    return [
        name
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if not name.startswith("_")
        and function.__module__ == module.__name__
        and _returns_run(function)
    ]


def _returns_run(function: Callable[..., object]) -> bool:
    if _needs_arguments(function):
        return False
    try:
        returned = typing.get_type_hints(function).get("return")
    except (NameError, AttributeError, TypeError):  # of names for type checkers alone
        returned = inspect.signature(function).return_annotation
    return returned is Run or returned == "Run"


def _lacks_annotation(function: Callable[..., object]) -> bool:
    signature = inspect.signature(function)
    has_none = signature.return_annotation is signature.empty
    return has_none and not _needs_arguments(function)


def _needs_arguments(function: Callable[..., object]) -> bool:
    return any(
        parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        for parameter in inspect.signature(function).parameters.values()
    )


def load_code(code: OwnCode) -> ModuleType:
    """Run a file of the user's own, once in a process, with what lies beside it.

    Raises ValueError in one line where it fails, or registers a model with timm under
    a name that timm has: without the file another model would be built.
    """
    known = sys.modules.get(code.module_name)
    if known is not None and known.__file__ == code.origin:
        return known
    models = _models()
    spec = importable(code)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[code.module_name] = module  # dataclasses and timm look for it there
    try:
        with explained(code):
            spec.loader.exec_module(module)
            _check_models(models)
    except BaseException:
        del sys.modules[code.module_name]
        raise
    return module


def _models() -> dict[str, Callable[..., Any]]:
    return {name: timm.model_entrypoint(name) for name in timm.list_models()}


def _check_models(before: dict[str, Callable[..., Any]]) -> None:
    for name, entry in before.items():
        is_own = isinstance(_globals(entry).get("__loader__"), TextLoader)
        if timm.model_entrypoint(name) is not entry and not is_own:
            raise ValueError(
                f"expected models under names of their own, got {name!r}, which timm "
                "has already; give yours another name"
            )


def _globals(function: Callable[..., Any]) -> dict[str, Any]:
    return getattr(inspect.unwrap(function), "__globals__", {})


@contextlib.contextmanager
def explained(code: OwnCode) -> Iterator[None]:
    """Turn errors of the user's own code into a ValueError that names the line."""
    try:
        yield
    except SyntaxError as error:
        raise ValueError(syntax_line(error, file=code.file)) from error
    except (Exception, SystemExit) as error:
        where = _line_in(error.__traceback__, code=code) or code.file
        text = " ".join(str(error).split())
        reason = text if isinstance(error, ValueError) else _reason(error, text=text)
        if isinstance(error, ImportError) and (hidden := hidden_names(code)):
            reason += (
                f"; {', '.join(hidden)} beside {code.file} can't be imported, since "
                "Python or sovit has a module of that name: rename it"
            )
        raise ValueError(f"{where}: {reason}") from error


def _new_name(name: str) -> str | None:
    """Return what a field of this former name is called now, if it was renamed."""
    new_names = {
        former.rpartition(".")[2]: new.rpartition(".")[2]
        for new, former in RENAMED.items()
    }
    return new_names.get(name)


def _reason(error: BaseException, *, text: str) -> str:
    """Describe an error; name the field where it is missing or of another type."""
    if found := _UNKNOWN.search(text):
        kind = getattr(config, found[1], None)
        if dataclasses.is_dataclass(kind):
            fields = [field.name for field in dataclasses.fields(kind)]
            near = difflib.get_close_matches(found[2], fields, n=3) or fields
            near = [name for name in fields if name == _new_name(found[2])] or near
            return (
                f"expected a field of {found[1]}, got {found[2]!r}; near it are "
                f"{', '.join(near)}"
            )
    if isinstance(error, TypeError):
        for frame in _frames(error.__traceback__):
            owner = frame.tb_frame.f_locals.get("self")
            is_ours = type(owner).__module__.startswith("pipelines.")
            is_field = is_ours and dataclasses.is_dataclass(owner)
            if is_field and (wrong := wrong_fields(owner)):
                return wrong[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _line_in(traceback: TracebackType | None, *, code: OwnCode) -> str:
    """Return the innermost line of the user's own; "" where there is none."""
    lines = [
        f"{Path(frame.tb_frame.f_code.co_filename).name}, line {frame.tb_lineno}"
        for frame in _frames(traceback)
        if isinstance(frame.tb_frame.f_globals.get("__loader__"), TextLoader)
    ]
    return lines[-1] if lines else ""


def _frames(traceback: TracebackType | None) -> Iterator[TracebackType]:
    while traceback is not None:
        yield traceback
        traceback = traceback.tb_next


def module_of(path: Path) -> ModuleType:
    """Run a Python file that is not importable; ValueError where that fails."""
    return load_code(read_code(path))


def _modules() -> list[str]:
    package = importlib.import_module("recipes")
    folder = Path(next(iter(package.__path__)))
    return sorted(path.stem for path in folder.glob("[!_]*.py"))
