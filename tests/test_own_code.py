"""A recipe file of one's own: it works, or one line says which line of it does not."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
from timm.models import _registry

from pipelines.checkpoints.manifest import is_trusted, load_model_code
from pipelines.checkpoints.run_record import find_record
from pipelines.config import Run, Validation
from pipelines.config.own_code import read_code
from pipelines.config.recipes import load_recipe, own_code_of
from pipelines.config.serialization import to_json
from pipelines.driver.fit import fit
from pipelines.evaluate import Options, evaluate_checkpoint
from pipelines.predict import load_subject
from pipelines.train import _main
from tests.demo_runs import small_demo
from tests.mlflow_stores import prepare_store
from tests.seen_environment import SeenEnvironment

HEAD = """
from pipelines.config import Data, Model, Optim, Run
"""
BODY = """
def mine() -> Run:
    optim = Optim(lr=1e-3, num_epochs=9)
    return Run(recipe="mine", model=Model(name=NAME), data=DATA, optim=optim)
"""
PLAIN = "\nNAME, DATA = 'resnet10t', Data(train='a', val='b', batch_size=64)\n"
MODEL = """
from torch import nn
from timm.models import register_model
from pipelines.config import Run
from pipelines.config.serialization import from_json
from parts.body import Body

class Tiny(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.body = Body()
        self.head = nn.Linear(8, num_classes)

    def get_classifier(self): return self.head

    def forward(self, images): return self.head(self.body(images))

@register_model
def my_tiny_net(pretrained=False, **kwargs): return Tiny(kwargs["num_classes"])

def mine() -> Run:
    import pathlib
    return from_json(pathlib.Path(__file__).with_name("run.json").read_text())
"""
PARTS = """
from torch import nn

class Body(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten())
"""


def write(folder: Path, *, text: str, name: str = "mine.py", **beside: str) -> str:
    """Write a recipe file, and others beside it."""
    (folder / name).write_text(text)
    for other, content in beside.items():
        path = folder / f"{other}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    return f"{folder / name}:mine"


WORK: dict[str, dict[str, str]] = {
    "plain": {"text": HEAD + PLAIN + BODY},
    "a dataclass whose annotations are texts": {
        "text": "from __future__ import annotations\nimport dataclasses"
        + HEAD
        + "@dataclasses.dataclass\nclass Paths:\n    a: str = 'a'\n"
        + "NAME, DATA = 'resnet10t', Data(train=Paths().a, val='b', batch_size=64)\n"
        + BODY
    },
    "the name of a module of Python's": {
        "text": HEAD + PLAIN + BODY,
        "name": "dataclasses.py",
    },
    "a name that is none in Python": {"text": HEAD + PLAIN + BODY, "name": "my-1.2.py"},
    "a helper beside": {
        "text": HEAD + "from where_it_is import DATA\nNAME = 'resnet10t'\n" + BODY,
        "where_it_is": HEAD + "from further import VAL\n"
        "DATA = Data(train='a', val=VAL, batch_size=64)\n",
        "further": "VAL = 'b'\n",
    },
    "a helper that is imported when it is called": {
        "text": HEAD
        + PLAIN
        + BODY.replace("    return", "    from where_it_is import NAME\n    return"),
        "where_it_is": "NAME = 'resnet10t'\n",
    },
    "a package beside": {
        "text": HEAD + "from mine_own.data import DATA, NAME\n" + BODY,
        "mine_own/__init__": "",
        "mine_own/data": HEAD
        + "from .names import NAME\nDATA = Data(train='a', val='b', batch_size=64)",
        "mine_own/names": "NAME = 'resnet10t'\n",
    },
    "a folder beside": {
        "text": HEAD
        + "import mine_too.data as it\nNAME, DATA = it.NAME, it.DATA\n"
        + BODY,
        "mine_too/data": HEAD + PLAIN,
    },
    "no annotation": {"text": (HEAD + PLAIN + BODY).replace(" -> Run", "")},
    "an annotation by its module": {
        "text": "from __future__ import annotations\nfrom pipelines import config"
        + HEAD
        + PLAIN
        + BODY.replace("-> Run", "-> config.Run")
    },
}


@pytest.mark.parametrize("kind", WORK)
def test_a_file_that_python_runs_is_a_recipe(kind: str, tmp_path: Path) -> None:
    path = list(sys.path)
    name = write(tmp_path, **WORK[kind])
    for _ in range(2):  # asked for again, it is the same
        run = load_recipe(name)
        assert (run.model.name, run.data.val) == ("resnet10t", "b")
    assert sys.path == path
    assert dataclasses.dataclass is sys.modules["dataclasses"].dataclass


def test_helpers_of_one_name_are_those_beside_each_recipe(tmp_path: Path) -> None:
    names = []
    for model in ("resnet10t", "resnet18"):
        (tmp_path / model).mkdir()
        text = HEAD + "from where_it_is import DATA, NAME\n" + BODY
        helper = HEAD + PLAIN.replace("resnet10t", model)
        names.append(write(tmp_path / model, text=text, where_it_is=helper))
    assert [load_recipe(name).model.name for name in names] == ["resnet10t", "resnet18"]
    assert load_recipe(names[0]).model.name == "resnet10t"


BAD: dict[str, tuple[dict[str, str], str]] = {
    "a syntax error": (
        {"text": HEAD + PLAIN + "def mine() -> Run:\n    return Run("},
        r"mine\.py, line 6: SyntaxError: '\(' was never closed",
    ),
    "a syntax error in a helper": (
        {"text": "import where_it_is\n", "where_it_is": "a = = 1\n"},
        r"where_it_is\.py, line 1: SyntaxError",
    ),
    "a field that isn't there": (
        {"text": (HEAD + PLAIN + BODY).replace("lr=1e-3", "learnrate=1")},
        r"mine\.py, line 7: expected a field of Optim, got 'learnrate'; near it are ",
    ),
    "a field by its former name": (
        {"text": (HEAD + PLAIN + BODY).replace("Run(", "Run(key_log='k', ", 1)},
        r"mine\.py, .*: expected a field of Run, got 'key_log'; near it are audit_log",
    ),
    "a misspelt field": (
        {"text": (HEAD + PLAIN + BODY).replace("batch_size=", "batchsize=")},
        r"mine\.py, line 4: .*'batchsize'; near it are batch_size",
    ),
    "a value that is refused": (
        {"text": (HEAD + PLAIN + BODY).replace("=64", "=0")},
        r"mine\.py, line 4: data\.batch_size: expected at least 1, got 0",
    ),
    "a text in a number's place": (
        {"text": (HEAD + PLAIN + BODY).replace("=64", "='8'")},
        r"mine\.py, line 4: batch_size: expected int, got '8'",
    ),
    "a path in a text's place": (
        {
            "text": "import pathlib"
            + (HEAD + PLAIN + BODY).replace("val='b'", "val=pathlib.Path('b')")
        },
        r"mine\.py: data\.val: expected str, got PosixPath\('b'\)",
    ),
    "a thing that no record holds": (
        {
            "text": "import torch"
            + (HEAD + PLAIN + BODY).replace(
                "Model(name=NAME)", "Model(name=NAME, kwargs={'act': torch.nn.GELU})"
            )
        },
        r"mine\.py: TypeError: .*not JSON serializable",
    ),
    "a name that is not known": (
        {"text": HEAD + BODY},
        r"mine\.py, line 6: NameError: name 'NAME' is not defined",
    ),
    "a library that isn't there": (
        {"text": "import no_such_library\n"},
        r"mine\.py, line 1: ModuleNotFoundError: No module named 'no_such_library'",
    ),
    "a helper with the name of a module of Python's": (
        {"text": "from statistics import ROOT\n", "statistics": "ROOT = 1\n"},
        r"mine\.py, line 1: ImportError: .*statistics beside mine\.py can't be imported"
        r".*rename it",
    ),
    "a helper that fails": (
        {"text": "import where_it_is\n", "where_it_is": "\n1 / 0\n"},
        r"where_it_is\.py, line 2: ZeroDivisionError",
    ),
    "an exit": ({"text": "import sys\nsys.exit()\n"}, r"mine\.py, line 2: SystemExit"),
    "an exit in the function": (
        {"text": HEAD + "def mine() -> Run:\n    raise SystemExit(3)\n"},
        r"mine\.py, line 4: SystemExit: 3",
    ),
    "another thing than a run": (
        {"text": "def mine():\n    return 3\n"},
        r"mine\.py:mine: expected a function that returns a Run, got 3",
    ),
    "a name that timm has": (
        {
            "text": "from timm.models import register_model\n@register_model\n"
            "def resnet18(**kwargs): ...\n"
        },
        r"expected models under names of their own, got 'resnet18'",
    ),
    "no Python": ({"text": "\0"}, r"mine\.py"),
}


@pytest.fixture
def registry() -> Iterator[None]:
    """Put timm's registry back as it was."""
    kept = {
        name: dict(value) if isinstance(value, dict) else set(value)
        for name, value in vars(_registry).items()
        if isinstance(value, dict | set) and name.startswith("_model")
    }
    yield
    for name, value in kept.items():
        there = getattr(_registry, name)
        there.clear()
        there.update(value)


@pytest.mark.filterwarnings("ignore:Overwriting resnet18")
@pytest.mark.parametrize("kind", BAD)
def test_a_file_that_fails_is_one_line(
    kind: str, tmp_path: Path, registry: None
) -> None:
    files, said = BAD[kind]
    name = write(tmp_path, **files)
    with pytest.raises(ValueError, match=said) as caught:
        load_recipe(name)
    assert "\n" not in str(caught.value)
    if "timm" in kind:
        return  # whose registry has forgotten the first of the two
    with pytest.raises(ValueError, match=said):  # the same when asked again
        load_recipe(name)


def test_a_whole_project_is_no_helper(tmp_path: Path) -> None:
    folder = tmp_path / "project_of_mine"
    folder.mkdir()
    for number in range(201):
        (folder / f"m{number}.py").touch()
    name = write(tmp_path, text="import project_of_mine\n")
    with pytest.raises(ValueError, match="at most 200 files"):
        load_recipe(name)


def forget(name: str = "my_tiny_net") -> None:
    """Be a process that has not run the file."""
    _registry._model_entrypoints.pop(name, None)
    for module in [name for name in sys.modules if name.startswith("own_recipe")]:
        del sys.modules[module]


@pytest.fixture
def own(
    tmp_path: Path, registry: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Run, str]]:
    """Make a run of a model of one's own, and the recipe file's name."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    run = small_demo(tmp_path, num_epochs=2, num_workers=0)
    prepare_store(run.storage)
    model = dataclasses.replace(run.model, name="my_tiny_net", pooling=None, kwargs={})
    run = dataclasses.replace(
        run,
        model=dataclasses.replace(model, drop_path_rate=0.0),
        validation=Validation(num_worst=0),
    )
    (tmp_path / "run.json").write_text(to_json(run))
    yield run, write(tmp_path, text=MODEL, **{"parts/body": PARTS})
    forget()


def test_a_model_of_ones_own_is_evaluated_exported_and_goes_on(
    own: tuple[Run, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, name = own
    _main([name, "--name", "mine"])
    folder, shards = Path(run.storage, "mine"), run.data.val
    record = find_record(run.storage, name="mine")
    assert record is not None
    code = record.code
    assert code is not None
    assert set(code.sources) == {"mine.py", "parts/body.py"}
    assert code == own_code_of(name)

    # The file is not needed any more: the record has it.
    (tmp_path / "mine.py").rename(tmp_path / "elsewhere.py")
    shutil.rmtree(tmp_path / "parts")
    checkpoint = str(folder / "epoch_0002")
    options = Options(checkpoint=checkpoint, shards=shards, batch_size=64)
    forget()
    found = evaluate_checkpoint(options)
    assert found["num_images"] == 101
    forget()
    load_model_code(checkpoint)
    assert type(load_subject(checkpoint).model).__name__ == "Tiny"

    shutil.rmtree(folder / "epoch_0002")
    text = (folder / "run.json").read_text()
    (folder / "run.json").write_text(text.replace('"finished"', '"running"'))
    forget()
    _main(["--resume", "mine", "--storage", run.storage])
    (tmp_path / "mine.py").write_text(MODEL + "\n# changed\n")
    (folder / "run.json").write_text(text.replace('"finished"', '"running"'))
    forget()
    _main([name, "--resume", "mine", "--storage", run.storage])
    assert "mine.py has changed since this run began" in caplog.text


def test_code_of_a_stranger_runs_only_where_it_is_named(
    own: tuple[Run, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run's folder from elsewhere: its checkpoints are data, its code is not run."""
    run, name = own
    fit(load_recipe(name), name="theirs", keep_model=False, code=own_code_of(name))
    code = own_code_of(name)
    assert code is not None
    assert is_trusted(code)
    checkpoint = str(Path(run.storage, "theirs", "epoch_0002"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another"))
    forget()
    with pytest.raises(ValueError, match=r"mine\.py, code that was not .*--code FILE"):
        load_model_code(checkpoint)
    assert not timm.is_model("my_tiny_net")
    assert not [name for name in sys.modules if name.startswith("own_recipe")]
    record = Path(run.storage, "theirs", "run.json")
    # Changed code is not what was trained with.
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    raw = json.loads(record.read_text())
    raw["code"]["sources"]["mine.py"] += "\nimport os\n"
    record.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="--code FILE"):
        load_model_code(checkpoint)
    load_model_code(checkpoint, given=name.rpartition(":")[0])
    assert timm.is_model("my_tiny_net")


@pytest.mark.ray
def test_rays_workers_and_evaluation_know_a_model_of_ones_own(
    ray_local: None, own: tuple[Run, str], tmp_path: Path
) -> None:
    """And Ray Train's controller, with all that it starts, knows which Ray is its own.

    Its helpers ask the Ray that RAY_ADDRESS names, and any other without it.
    """
    _, name = own
    run = load_recipe(name)
    scale = dataclasses.replace(run.scale, num_workers=1)
    validation = dataclasses.replace(run.validation, asynchronous=True)
    run = dataclasses.replace(run, scale=scale, validation=validation)
    code, seen = read_code(tmp_path / "mine.py"), tmp_path / "seen.json"
    trained = fit(
        run,
        name="on-ray",
        keep_model=False,
        code=code,
        callbacks=[SeenEnvironment(seen)],
    )
    assert trained.metrics["epoch"] == 2
    assert trained.best is not None
    found = json.loads(seen.read_text())
    assert found["told"] == found["own"]
