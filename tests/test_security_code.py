"""No module of ours runs code that it reads, but for recipes that a user names."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

pytestmark = pytest.mark.fast
ROOT = Path(__file__).parents[1]
ROOMS = ("sovit", "pipelines", "tuning", "recipes", "benchmarks")
# What runs code that it reads.
BUILTINS = {"eval", "exec", "compile", "__import__"}
RUNS_CODE = {
    *("os.system", "os.popen", "pty.spawn", "runpy.run_path", "runpy.run_module"),
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load"),
    *("marshal.loads", "shelve.open", "joblib.load", "pandas.read_pickle"),
    *("ray.cloudpickle.load", "ray.cloudpickle.loads"),
    *("cloudpickle.load", "cloudpickle.loads", "dill.load", "dill.loads"),
    *("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load"),
    *("mlflow.pyfunc.load_model", "ray.tune.Tuner.restore", "torch.hub.load"),
    *("torch.jit.load", "torch.export.load", "shutil.unpack_archive"),
}
# The same by the last name, whatever the object: archives write where they like.
METHODS = {"extract", "extractall", "exec_module"}
ALLOWED = {
    # A recipe or a space is Python that its user names: the one way in for code.
    "pipelines/config/recipes.py": {"spec.loader.exec_module"},
    # Tries the program that sovit-export wrote a line before.
    "pipelines/export/program.py": {"torch.export.load"},
}


def dangers_in(source: str) -> list[str]:
    """Name what a module refers to, or calls, that runs code which it reads."""
    tree = ast.parse(source)
    known = _imported(tree)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute):
            name = _named(node, known=known)
            is_method = isinstance(node, ast.Attribute) and node.attr in METHODS
            if name in RUNS_CODE or is_method:
                found.append(name)
        elif isinstance(node, ast.Call):
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            name = _named(node.func, known=known)
            if name in BUILTINS or _is_open(name, given=given):
                found.append(ast.unparse(node))
    return found


def _imported(tree: ast.Module) -> dict[str, str]:
    known: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.partition(".")[0]
                known[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                known[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return known


def _named(node: ast.expr, *, known: Mapping[str, str]) -> str:
    if isinstance(node, ast.Name):
        return known.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{_named(node.value, known=known)}.{node.attr}"
    return "?"


def _is_open(name: str, *, given: Mapping[str | None, str]) -> bool:
    """Tell whether a call that can be safe is not."""
    if name == "torch.load":
        return given.get("weights_only") != "True"
    if name == "numpy.load":
        return given.get("allow_pickle", "False") != "False"
    return name.startswith("subprocess.") and given.get("shell", "False") != "False"


def sources() -> dict[str, str]:
    """Read every module of ours, by its name."""
    paths = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in paths}


def test_no_module_runs_what_it_reads() -> None:
    found = {name: set(dangers_in(text)) for name, text in sources().items()}
    assert {name: of for name, of in found.items() if of} == ALLOWED


def holding(pattern: str) -> list[str]:
    return [name for name, text in sources().items() if re.search(pattern, text)]


def test_no_module_lets_ray_or_torch_unpickle() -> None:
    """These switches of theirs open what is shut by default."""
    switches = "RAY_DATA_AUTOLOAD|TORCH_FORCE_NO_WEIGHTS_ONLY|ALLOW_PICKLE"
    assert holding(switches) == []


LISTENS = (
    r"\b(socket\.(socket|create_server)|socketserver|http\.server|start_server|"
    r"wsgiref|aiohttp|flask|fastapi|uvicorn|grpc\.server)\b"
)


def test_no_module_listens() -> None:
    """What listens is Ray's, MLflow's or torch's: docs/security.md has the list."""
    assert re.search(LISTENS, "import http.server")
    assert holding(LISTENS) == []


def test_the_page_names_tests_that_are_there() -> None:
    text = (ROOT / "docs/security.md").read_text()
    files = {ROOT / "tests" / name for name in re.findall(r"\btest_\w+\.py", text)}
    assert len(files) > 5
    assert [path.name for path in sorted(files) if not path.exists()] == []
    code = "".join(path.read_text() for path in files)
    names = set(re.findall(r"\b(test_\w+)\b(?!\.py)", text))
    assert [name for name in sorted(names) if f"def {name}(" not in code] == []


@pytest.mark.parametrize(
    "line",
    [
        "eval(text)",
        "import os; os.system(text)",
        "import pickle as p; p.loads(data)",
        "from pickle import loads as read; read(data)",
        "import pickle; reader = pickle.Unpickler",
        "import ray.cloudpickle; ray.cloudpickle.loads(data)",
        "import yaml; yaml.load(text, Loader=yaml.Loader)",
        "import torch; torch.load(path)",
        "import torch; torch.load(path, weights_only=False)",
        "from torch import load; load(path, weights_only=safe)",
        "import numpy as np; np.load(path, allow_pickle=True)",
        "import subprocess; subprocess.run(text, shell=True)",
        "import subprocess as s; s.Popen(text, shell=is_text)",
        "import tarfile; tarfile.open(path).extractall()",
        "from ray import tune; tune.Tuner.restore(path)",
        "import mlflow; mlflow.pyfunc.load_model(uri)",
        "spec.loader.exec_module(module)",
    ],
)
def test_what_runs_code_is_found(line: str) -> None:
    assert len(dangers_in(line)) == 1


def test_what_reads_values_alone_is_let_through() -> None:
    lines = """
import numpy as np, pickle, subprocess, torch, yaml
torch.load(path, weights_only=True, map_location="cpu")
np.load(path, mmap_mode="r")
subprocess.run(["git", "status"], shell=False)
subprocess.run(["git", "status"])
model.eval()
build(compile=compile or True)
yaml.safe_load(text)
try: pass
except pickle.UnpicklingError: pass
"""
    assert dangers_in(lines) == []
