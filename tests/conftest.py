"""Share one local Ray among all tests, and check shapes while they run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

from tests.bare import BareProcesses

# Before the package is imported: every annotated shape is then checked by beartype.
install_import_hook("sovit", "beartype.beartype")

# Tests keep to their own stores and their own Ray, wherever the user's point.
os.environ.pop("MLFLOW_TRACKING_URI", None)
os.environ.pop("RAY_ADDRESS", None)
# Workers of a test share two cores; more threads only get in each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What a killed worker leaves of its process group is waited for 30 seconds otherwise.
os.environ.setdefault("TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S", "5")


# What a file with a test of that mark has in its text.
MARKED = {"ray": ("mark.ray", "ray_local"), "cluster": ("mark.cluster",)}
MARKED["slow"] = ("mark.slow",)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out files without the mark that is asked for: all take a minute of CPU."""
    wanted = MARKED.get(config.option.markexpr.partition(" ")[0])
    if wanted is None or collection_path.suffix != ".py":
        return None
    text = collection_path.read_text()
    return None if any(word in text for word in wanted) else True


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what uses the shared Ray, before tests are chosen by their marks."""
    for item in items:
        if "ray_local" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.ray)


@pytest.fixture(scope="session")
def ray_local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Start one Ray for the whole session: it takes 10 to 25 seconds."""
    import ray

    # The label stands for machines that read and decode for others.
    ray.init(
        num_cpus=4,
        labels={"role": "data"},
        # Little enough for a test to fill.
        object_store_memory=512 << 20,
        # Sweeps ask it which trials live.
        include_dashboard=True,
        log_to_driver=False,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def bare_processes() -> Iterator[BareProcesses]:
    """Share the processes that compile and export, which run side by side."""
    processes = BareProcesses()
    yield processes
    processes.close()
