"""Find the recipe that a command names."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from pipelines.config import Run


def load_recipe(name: str) -> Run:
    """Build the run of a recipe.

    `imagenet.so_vit_14` is the function `so_vit_14` of `recipes/imagenet.py`, `demo`
    the function `demo` of `recipes/demo.py`, and `my/file.py:run` a function of your
    own file. Raises ValueError that lists what there is.
    """
    if ".py:" in name:
        path, _, function = name.rpartition(":")
        module = module_of(Path(path))
    else:
        module_name, _, function = name.partition(".")
        function = function or module_name
        try:
            module = importlib.import_module(f"recipes.{module_name}")
        except ModuleNotFoundError as error:
            if not f"recipes.{module_name}".startswith(error.name or ""):
                raise  # the recipe is there, and something that it imports is not
            raise ValueError(
                f"wanted a recipe, came {name!r}; there are {', '.join(_modules())}, "
                "or name a function of your own: my/file.py:run"
            ) from error
    found = recipes_of(module)
    if function not in found:
        raise ValueError(
            f"wanted a recipe of {module.__name__}, came {function!r}; there are "
            f"{', '.join(found) or 'none: write a function without arguments -> Run'}"
        )
    run = getattr(module, function)()
    if not isinstance(run, Run):
        raise ValueError(f"{name}: wanted a function that returns a Run, came {run!r}")
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
    signature = inspect.signature(function)
    needed = [
        parameter
        for parameter in signature.parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    return signature.return_annotation in (Run, "Run") and not needed


def module_of(path: Path) -> ModuleType:
    """Run a Python file that is on no path; ValueError where it is not there."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ValueError(f"wanted a Python file, came {str(path)!r}, which is none")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _modules() -> list[str]:
    package = importlib.import_module("recipes")
    folder = Path(next(iter(package.__path__)))
    return sorted(path.stem for path in folder.glob("[!_]*.py"))
