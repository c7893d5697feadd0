"""Imports go one way, and each outside library has its own file; read with ast."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipelines.config import Run
from pipelines.config.recipes import load_recipe, recipes_of

pytestmark = pytest.mark.fast
ROOT = Path(__file__).parents[1]
LAYERS = ("sovit", "pipelines", "tuning", "recipes")
HOMES = {
    "ray.data": {
        "pipelines/worker/ray_source.py",
        "pipelines/shards/command.py",
        "tuning/heads/ray_extract.py",
    },
    "ray.train": {
        "pipelines/driver/failures.py",
        "pipelines/driver/launch_local.py",
        "pipelines/driver/launch_ray.py",
        "pipelines/driver/run_channel.py",
        "pipelines/driver/fit.py",
        "pipelines/worker/opener.py",
        "pipelines/worker/ray_group.py",
    },
    "nvidia": {f"pipelines/transforms/{name}.py" for name in ("dali", "dali_ops")},
    "mlflow": {
        f"pipelines/tracking/{name}.py"
        for name in (
            *("client", "entries", "late_run", "metric_writer", "model", "registry"),
            *("runs", "sweeps", "usable"),
        )
    },
}
RUNNING = ("ray", "mlflow", "nvidia")


@dataclass(frozen=True, kw_only=True)
class Import:
    """Say which file imports what, for types alone, if it is there, or when called."""

    file: str
    name: str
    for_types: bool
    guarded: bool
    in_call: bool


def sources() -> list[Path]:
    return [path for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py"))]


def imports_of(path: Path) -> Iterator[Import]:
    tree = ast.parse(path.read_text())
    file = path.relative_to(ROOT).as_posix()

    def visit(
        node: ast.AST, *, for_types: bool, guarded: bool, in_call: bool
    ) -> Iterator[Import]:
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # `from ray import data` names a module as `import ray.data` does.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            yield Import(
                file=file,
                name=name,
                for_types=for_types,
                guarded=guarded,
                in_call=in_call,
            )
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                yield from visit(child, for_types=True, guarded=True, in_call=in_call)
            for child in node.orelse:
                yield from visit(
                    child, for_types=for_types, guarded=guarded, in_call=in_call
                )
            return
        inside = guarded or isinstance(node, ast.Try)
        called = in_call or isinstance(node, ast.FunctionDef)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, for_types=for_types, guarded=inside, in_call=called)

    return visit(tree, for_types=False, guarded=False, in_call=False)


def is_of(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def all_imports() -> list[Import]:
    return [found for path in sources() for found in imports_of(path)]


def test_the_sources_are_found() -> None:
    files = {path.relative_to(ROOT).as_posix() for path in sources()}
    assert {
        "sovit/architectures/vit.py",
        "pipelines/training/step.py",
        "recipes/demo.py",
    } <= files
    assert {file for homes in HOMES.values() for file in homes} <= files
    names = {
        found.name for found in imports_of(ROOT / "pipelines/worker/ray_source.py")
    }
    assert {"functools", "pyarrow", "ray.data.DataContext"} <= names


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_go_one_way(layer: str) -> None:
    above = LAYERS[LAYERS.index(layer) + 1 :]
    wrong = [
        found
        for found in all_imports()
        if found.file.startswith(f"{layer}/")
        and any(is_of(found.name, other) for other in (*above, "tests", "benchmarks"))
    ]
    assert wrong == []


@pytest.mark.parametrize("library", HOMES)
def test_a_library_is_imported_at_home_only(library: str) -> None:
    files = {found.file for found in all_imports() if is_of(found.name, library)}
    if library == "ray.train":  # Tune's callbacks are Train's
        files = {file for file in files if not file.startswith("tuning/")}
    assert files == HOMES[library]


def test_tune_is_known_to_tuning_only() -> None:
    files = {found.file for found in all_imports() if is_of(found.name, "ray.tune")}
    assert all(file.startswith("tuning/") for file in files)


def test_the_library_needs_torch_and_timm_only() -> None:
    allowed = {"torch", "timm", "sovit", *sys.stdlib_module_names}
    other = {
        (found.file, found.name.partition(".")[0], found.guarded)
        for found in all_imports()
        if found.file.startswith("sovit/")
        and found.name.partition(".")[0] not in allowed
    }
    assert other <= {("sovit/shapes.py", "jaxtyping", True)}


def module_path(name: str) -> Path | None:
    """Find the source of one of our modules, or of the module that has this name."""
    for parts in (name.split("."), name.split(".")[:-1]):
        path = ROOT.joinpath(*parts)
        if parts and path.with_suffix(".py").is_file():
            return path.with_suffix(".py")
        if parts and (path / "__init__.py").is_file():
            return path / "__init__.py"
    return None


def reached_from(start: str, *, when_called: bool) -> set[str]:
    """Name what a module imports, and what that imports, types apart.

    `when_called` adds what functions import as they run.
    """
    seen, names, waiting = set(), set(), [ROOT / start]
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        for found in imports_of(path):
            if not found.for_types and (when_called or not found.in_call):
                names.add(found.name)
                ours = found.name.split(".")[0] in LAYERS
                below = module_path(found.name) if ours else None
                waiting += [below] if below is not None else []
    return names


@pytest.mark.parametrize(
    "start",
    [
        "pipelines/training/step.py",
        "pipelines/worker/group.py",
        "pipelines/data/epoch_plan.py",
        "pipelines/data/batching.py",
        "pipelines/data/loader.py",
        "pipelines/config/recipes.py",
        "recipes/demo.py",
    ],
)
def test_the_loop_the_data_and_the_recipes_know_nothing_that_runs(start: str) -> None:
    reached = reached_from(start, when_called=False)
    assert reached
    wrong = [name for name in reached if any(is_of(name, lib) for lib in RUNNING)]
    assert wrong == []


def test_what_runs_is_seen_where_it_is() -> None:
    """Hold the test above: from the driver, all that runs is reached."""
    reached = reached_from("pipelines/driver/fit.py", when_called=True)
    for library in RUNNING:
        assert any(is_of(name, library) for name in reached)


def test_workers_do_not_know_mlflow() -> None:
    """The driver alone writes to it: they may be where it does not listen."""
    reached = reached_from("pipelines/worker/ray_group.py", when_called=True)
    assert any(is_of(name, "ray") for name in reached)
    assert not any(is_of(name, "mlflow") for name in reached)


STARTED_OFTEN = (
    "pipelines.data.reading",
    "pipelines.driver.run_channel",
    "pipelines.worker.probe_figure",
    "pipelines.evaluation.figures",
    "pipelines.driver.failures",
    "tuning.trials.trial",
    "tuning.heads.parts",
)


def test_what_starts_often_starts_without_torch() -> None:
    """Read tasks, channel and controller: torch would cost each five seconds."""
    code = f"""
import importlib, sys
for module in {STARTED_OFTEN}:
    importlib.import_module(module)
    assert not {{"torch", "timm"}} & set(sys.modules), module
"""
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 0, found.stderr


def recipe_modules() -> list[str]:
    return sorted(path.stem for path in (ROOT / "recipes").glob("[!_]*.py"))


@pytest.mark.parametrize("module", recipe_modules())
def test_every_recipe_builds(module: str) -> None:
    names = recipes_of(importlib.import_module(f"recipes.{module}"))
    assert names
    for name in names:
        run = load_recipe(f"{module}.{name}")
        assert isinstance(run, Run)
        assert run.recipe in (f"{module}.{name}", name)
        assert load_recipe(run.recipe) == run
