"""Commands and recipes: one clear line for what the user can mend."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from pipelines.cli.command import fail, parse, run_command
from pipelines.cli.help_text import COMMON
from pipelines.config import Run
from pipelines.config.recipes import load_recipe, recipes_of
from pipelines.errors import InterruptedRun, RunFailedError
from pipelines.train import _main

RECIPE_FILE = """
from __future__ import annotations
import dataclasses
from pipelines.config import Run
from recipes import demo

def mine() -> Run:
    return dataclasses.replace(demo.demo(), recipe="mine", seed=7)

def variant(seed: int = 8) -> Run:
    return dataclasses.replace(mine(), seed=seed)

def helper(run: Run) -> Run:
    return run

def _hidden() -> Run:
    return mine()

def liar() -> Run:
    return 3
"""


def parsed(*arguments: str) -> Run:
    return parse(
        Run, default=load_recipe("demo"), arguments=arguments, prog="sovit-train"
    )


def test_overrides_are_typed_and_nested() -> None:
    run = parsed(
        *("--data.batch-size", "32", "--optim.lr", "3e-4", "--seed", "3"),
        *("--model.pooling.power", "0.25", "--model.kwargs.depth", "3"),
        *("--augment.crop-scale", "0.1", "0.9", "--scale.use-gpu"),
    )
    assert (run.data.batch_size, run.optim.lr, run.seed) == (32, 3e-4, 3)
    assert run.model.pooling is not None
    assert run.model.pooling.power == 0.25
    assert run.model.kwargs["depth"] == 3
    assert run.augment.crop_scale == (0.1, 0.9)
    assert run.scale.use_gpu
    assert parsed() == load_recipe("demo")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data.batchsize", "3"], ["--data.batchsize", "--data.batch-size"]),
        (["--data.batch-size", "many"], ["--data.batch-size", "'many'"]),
        (["--data.batch-size", "0"], ["data.batch_size: expected at least 1, got 0"]),
        (["--data.decoder", "cv2"], ["'cv2'", "--data.decoder", "dali"]),
        (["--augment.crop-scale", "0.5"], ["--augment.crop-scale", "2 values"]),
        (["--optim.warmup-epochs", "99"], ["warmup_epochs <= num_epochs"]),
        (["--scale.num-workers", "999"], ["raise --data.batch-size"]),
        (["--model.pooling.power", "7"], ["power", "at most 1"]),
        (["stray"], ["stray"]),
    ],
)
def test_a_wrong_argument_is_one_line_that_names_it(
    arguments: list[str], words: list[str]
) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        parsed(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert "  " not in message
    assert "│" not in message
    assert message.count("Unrecognized options") <= 1
    for word in words:
        assert word in message


def test_a_recipes_own_arguments_may_be_tuples() -> None:
    run = load_recipe("demo")
    model = dataclasses.replace(run.model, kwargs={"hidden_dims": (4,), "bias": True})
    run = dataclasses.replace(run, model=model)

    def given(*arguments: str) -> dict[str, object]:
        kwargs = parse(Run, default=run, arguments=arguments, prog="a").model.kwargs
        return dict(kwargs)

    assert given("--seed", "2") == model.kwargs
    changed = given("--model.kwargs.hidden-dims", "8", "9", "--model.kwargs.no-bias")
    assert changed == {"hidden_dims": (8, 9), "bias": False}
    with pytest.raises(ValueError, match=r"^Unrecognized options: --foo; For full"):
        given("--foo")


def test_help_is_printed_and_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parsed("--help")
    assert not caught.value.code
    assert "--data.batch-size" in capsys.readouterr().out


def helped(*arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    _main(arguments)
    return capsys.readouterr().out


def test_help_shows_the_commands_own_options_first_on_two_screens(
    capsys: pytest.CaptureFixture[str],
) -> None:
    short = helped("demo", "--help", capsys=capsys)
    lines = short.splitlines()
    assert len(lines) <= 100
    assert max(map(len, lines)) <= 80
    places = [
        short.index(f"\n  {option}")
        for option in ("--name", "--resume", "--dry-run", "--plot", "--data.batch-size")
    ]
    assert places == sorted(places)
    for field in COMMON:
        assert f"\n  --{field} " in short
    # The recipe's batch size.
    batch_size = load_recipe("demo").data.batch_size
    assert f"workers (default: {batch_size})" in " ".join(short.split())
    assert "--recipe" not in short
    everything = helped("--help-all", capsys=capsys)
    assert everything.index("--plot") < everything.index("--augment.re-mode")
    assert "--recipe" not in everything
    with pytest.raises(ValueError, match="a recipe's name in front, got --recipe"):
        _main(["demo", "--recipe", "nonsense"])


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ValueError("expected a,\n  got b"), 2, "tool: expected a, got b\n"),
        (
            RunFailedError("a, b"),
            1,
            "tool: a, b; its checkpoints are kept, see --resume\n",
        ),
        (KeyboardInterrupt(), 130, "tool: interrupted\n"),
        (KeyboardInterrupt("go on so"), 130, "tool: interrupted; go on so\n"),
        (InterruptedRun("ended"), 75, "tool: ended\n"),
        (InterruptedRun("ended by SIGHUP", status=129), 129, "tool: ended by SIGHUP\n"),
        (None, 0, ""),
    ],
)
def test_a_command_ends_with_a_status_and_one_line(
    error: BaseException | None,
    status: int,
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["tool", "a", "b"])

    def command(arguments: Sequence[str]) -> None:
        assert arguments == ["a", "b"]
        if error is not None:
            raise error

    with pytest.raises(SystemExit) as caught:
        run_command(command, prog="tool")
    assert caught.value.code == status
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("arguments", "new_arguments"),
    [
        (["--key-log", "k"], ["--audit-log", "k"]),
        (["--key_log=k"], ["--audit-log=k"]),
        (["--validation.beside"], ["--validation.asynchronous"]),
        (["--validation.no-beside"], ["--validation.no-asynchronous"]),
    ],
)
def test_a_flag_by_its_former_name_is_taken_and_the_new_one_named(
    arguments: list[str],
    new_arguments: list[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def command(given: Sequence[str]) -> None:
        runs.append(parsed(*given))

    runs: list[Run] = []
    for words in (arguments, new_arguments):
        monkeypatch.setattr(sys, "argv", ["tool", *words])
        with pytest.raises(SystemExit) as caught:
            run_command(command, prog="tool")
        assert caught.value.code == 0
    assert runs[0] == runs[1]
    former, new = (words[0].partition("=")[0] for words in (arguments, new_arguments))
    assert caplog.messages == [f"{former.replace('_', '-')} is called {new} now"]


def test_a_flag_by_both_names_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["tool", "--audit-log=a", "--key-log", "b"])
    with pytest.raises(SystemExit) as caught:
        run_command(_main, prog="tool")
    assert caught.value.code == 2
    said = "tool: expected --audit-log alone, got --key-log too; leave out one\n"
    assert capsys.readouterr().err == said


def test_other_errors_keep_their_traceback() -> None:
    def broken(_: Sequence[str]) -> None:
        raise RuntimeError("a fault of ours")

    with pytest.raises(RuntimeError, match="a fault of ours"):
        run_command(broken, prog="tool")
    with pytest.raises(SystemExit):
        fail("x", status=1)


@pytest.mark.parametrize(
    "name", ["", "nope", "nope.x", "../demo", "demo-1", "my/file.py", "recipes.demo"]
)
def test_an_unknown_recipe_gets_the_list(name: str) -> None:
    with pytest.raises(ValueError, match="expected a recipe, got") as caught:
        load_recipe(name)
    assert repr(name) in str(caught.value)
    assert "demo" in str(caught.value)
    assert "my/file.py:run" in str(caught.value)


def test_an_unknown_function_gets_the_functions_of_its_file() -> None:
    with pytest.raises(ValueError, match=r"'x'; there are .*demo"):
        load_recipe("demo.x")
    with pytest.raises(ValueError, match="there are none"):
        load_recipe("fashion_mnist")


def test_recipes_of_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "my_recipes.py"
    path.write_text(RECIPE_FILE)
    assert load_recipe(f"{path}:mine").seed == 7
    assert load_recipe(f"{path}:variant").seed == 8
    with pytest.raises(ValueError, match=r"'helper'; there are liar, mine, variant$"):
        load_recipe(f"{path}:helper")
    with pytest.raises(ValueError, match="returns a Run, got 3"):
        load_recipe(f"{path}:liar")
    missing = tmp_path / "none.py"
    with pytest.raises(ValueError, match=r"none\.py"):
        load_recipe(f"{missing}:mine")


def test_a_recipe_that_lacks_a_library_says_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import recipes

    (tmp_path / "needy.py").write_text("import no_such_library\n")
    monkeypatch.setattr(recipes, "__path__", [*recipes.__path__, str(tmp_path)])
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        load_recipe("needy")


def test_the_demo_is_a_recipe() -> None:
    from recipes import demo

    assert recipes_of(demo) == ["demo"]
    assert load_recipe("demo") == load_recipe("demo.demo") == demo.demo()


SPEAKER = """
import logging, sys
from pipelines.cli.command import run_command
def command(arguments):
    for name in ("pipelines.train", "tuning.sweep", "__main__", "ray.tune"):
        logging.getLogger(name).info("%s begins", name)
        logging.getLogger(name).warning("%s warns", name)
run_command(command, prog="speaker")
"""


def test_progress_of_ours_is_shown_and_of_other_libraries_warnings_alone() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SPEAKER], capture_output=True, text=True, check=True
    )
    ours = ("pipelines.train", "tuning.sweep", "__main__")
    said = [f"{name} {verb}" for name in ours for verb in ("begins", "warns")]
    assert done.stderr.splitlines() == [*said, "ray.tune warns"]
