"""Run the tests that are marked `gpu`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from benchmarks.on_gpu.stages import Figures, Setting, Tasks

_TESTS = Path(__file__).parents[2] / "tests"


def tasks(setting: Setting) -> Tasks:
    """Run pytest once: the tests' imports take longer than the tests."""
    return {"pytest -m gpu": lambda: _run(setting)}


class _Outcomes:
    """Plugin that counts the tests' outcomes."""

    def __init__(self) -> None:
        self.counts = Counter({"passed": 0, "failed": 0, "skipped": 0})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a test's call, or a failure or skip before it."""
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1


def _run(setting: Setting) -> Figures:
    marked = sorted(
        path
        for path in _TESTS.glob("test_*.py")
        if "pytest.mark.gpu" in path.read_text()
    )
    # All of them would import everything.
    marked = setting.pick(marked, tiny=[_TESTS / "test_erasing.py"])
    outcomes = _Outcomes()
    # Here, where torch is imported already; each line comes as its test ends.
    code = pytest.main(
        ["-m", "gpu", "-v", "--tb=short", "-p", "no:cacheprovider", *map(str, marked)],
        plugins=[outcomes],
    )
    if code != pytest.ExitCode.OK:
        raise RuntimeError(f"pytest ended with {code!r}: {dict(outcomes.counts)}")
    return {**outcomes.counts, "files": len(marked)}
