"""What the pages name is there, and so is what workflow and hooks run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.test_rooms import RANKS, rank_of

pytestmark = pytest.mark.fast
ROOT = Path(__file__).parents[1]
PACKAGES = ("sovit", "pipelines", "tuning", "recipes", "benchmarks", "tests")
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
FILES = [
    path.relative_to(ROOT).as_posix()
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
]
CODE = "\n".join(
    (ROOT / file).read_text() for file in FILES if file != "tests/test_docs.py"
)
# Files that the pages tell the reader to write, and what a sweep writes.
EXAMPLES = {
    "recipes/MODULE.py",
    "recipes/NAME.py",
    "clothes.py",
    "mine.py",
    "my/file.py",
    "my/space.py",
    "space.py",
} | {
    "report/winner.py",
    "runs/NAME/report/winner.py",
    "winner.py",
}
# An MLflow tag, and an entry of an exported config.json.
NO_CODE = {"sovit.id", "sovit.needs"}
# Pages about how the code is built: there every identifier in backquotes is code's.
ABOUT_CODE = ("architecture.md", "CONTRIBUTING.md")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def files_in(text: str) -> set[str]:
    """Find names such as `loop.py` and `training/loop.py`."""
    return set(re.findall(r"(?<![\w/.*-])[a-z_][\w/]*\.py\b", text)) - EXAMPLES


def is_file(name: str) -> bool:
    return any(file == name or file.endswith(f"/{name}") for file in FILES)


def dotted_in(text: str) -> set[str]:
    """Find names such as `pipelines.train` and `sovit.Pooling.named`."""
    pattern = rf"(?<![\w/.:@-])(?:{'|'.join(PACKAGES)})(?:\.(?!md\b)[A-Za-z_]\w*)+"
    return set(re.findall(pattern, text)) - NO_CODE


def is_dotted(name: str) -> bool:
    """Tell whether a module has this name, or defines or imports its last parts."""
    parts = name.split(".")
    for num_parts in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:num_parts])
        rest = parts[num_parts:]
        if path.is_dir() and not rest:
            return True
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return not rest or (
                    is_word(rest[0], file.read_text())
                    and all(is_word(part, CODE) for part in rest[1:])
                )
    return False


def is_word(word: str, text: str) -> bool:
    return re.search(rf"\b{word}\b", text) is not None


def named_tests(text: str) -> Iterator[tuple[str, str]]:
    """Find `test_x.py::test_name`; a name that is cut short ends in `_…`."""
    yield from re.findall(r"\b(test_\w+\.py)::(\w+…?)", text)


def tree_in(text: str) -> Iterator[str]:
    """Find the paths of README's tree: what is indented lies in the folder above."""
    (tree,) = re.findall(r"^sovit/  .*?^```$", text, flags=re.DOTALL | re.MULTILINE)
    folder = ""
    for line in tree.splitlines()[:-1]:
        names = re.split(r"  +", line.strip())[0].split()
        if not line.startswith(" "):
            folder = names[0]
            yield from names
        elif not line.startswith("   "):
            yield from (folder + name for name in names)


@each_page
def test_every_file_that_a_page_names_is_there(page: Path) -> None:
    missing = [name for name in files_in(page.read_text()) if not is_file(name)]
    assert missing == []


@each_page
def test_every_module_that_a_page_names_is_there(page: Path) -> None:
    missing = [name for name in dotted_in(page.read_text()) if not is_dotted(name)]
    assert missing == []


@each_page
def test_every_test_that_a_page_names_is_there(page: Path) -> None:
    for file, name in named_tests(page.read_text()):
        ends = "" if name.endswith("…") else r"\("
        wanted = rf"^def {name.rstrip('…')}{ends}"
        text = (ROOT / "tests" / file).read_text()
        assert re.search(wanted, text, flags=re.MULTILINE), f"{file}::{name}"


@each_page
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:\s]*)(?:#([\w-]+))?\)", page.read_text())
    for name, heading in links:
        path = page.parent / name if name else page
        assert path.exists(), name
        headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M) if heading else []
        marks = {re.sub(r"[^\w -]", "", text.lower()) for text in headings}
        assert not heading or heading in {mark.replace(" ", "-") for mark in marks}


def test_readmes_tree_is_the_repositorys() -> None:
    paths = list(tree_in((ROOT / "README.md").read_text()))
    assert [path for path in paths if not (ROOT / path).exists()] == []
    rooms = {path.parent.name for path in (ROOT / "pipelines").glob("*/__init__.py")}
    told = {path.split("/")[1] for path in paths if path.startswith("pipelines/")}
    assert rooms <= told


@pytest.mark.parametrize("name", ABOUT_CODE)
def test_every_identifier_in_backquotes_is_in_the_code(name: str) -> None:
    (page,) = [page for page in PAGES if page.name == name]
    words = set(re.findall(r"\w+", CODE)) | {Path(file).stem for file in FILES}
    named = re.findall(r"`([A-Za-z_][\w.]*)(?:\([^`]*\))?`", page.read_text())
    parts = {
        part
        for span in named
        if "_" in span or span[0].isupper()
        for part in span.split(".")
    }
    assert parts
    assert parts - words - {"py", "md"} == set()


def test_the_workflow_types_what_the_makefile_has() -> None:
    text = (ROOT / ".github/workflows/test.yml").read_text()
    steps = yaml.safe_load(text)["jobs"]["test"]["steps"]
    typed = [step["run"] for step in steps if "run" in step]
    assert typed == ["make install", "make check", "make test"]
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.M)
    assert {line.removeprefix("make ") for line in typed} <= set(targets)


def test_hooks_are_the_pinned_ruffs() -> None:
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repo["repo"] == "local"
    entries = [hook["entry"].split()[:2] for hook in repo["hooks"]]
    assert entries == [[".venv/bin/ruff", "format"], [".venv/bin/ruff", "check"]]


def test_the_picture_of_rooms_is_that_of_their_ranks() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    block = text.split("```")[1].strip().splitlines()
    lines = [re.split(r" {3,}", line)[0].split() for line in block]
    drawn = [{rank_of(f"pipelines.{name}") for name in names} for names in lines[:-1]]
    assert all(len(ranks) == 1 for ranks in drawn)
    ranks = [rank for (rank,) in drawn]
    assert ranks == sorted(set(ranks), reverse=True)
    rooms = {name.partition(".")[2] for name in RANKS if name.startswith("pipelines.")}
    assert rooms <= {name for names in lines for name in names}


def test_names_that_are_not_there_are_found() -> None:
    assert files_in("`pixels/dali.py`, mine.py, *.py") == {"pixels/dali.py"}
    assert not is_file("pixels/dali.py")
    assert is_file("transforms/dali.py")
    assert dotted_in("`pipelines.loop`") == {"pipelines.loop"}
    for wrong in ("pipelines.loop", "pipelines.train.keeper", "sovit.Pool"):
        assert not is_dotted(wrong), wrong
    for right in ("pipelines.evaluate.evaluate_checkpoint", "sovit.Pooling.named"):
        assert is_dotted(right), right
