"""Share one local Ray among all tests, and check shapes while they run."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

# A busy machine is slow, and no test asserts a time.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

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
MARKED = {"ray": "mark.ray|ray_local", "cluster": "mark.cluster", "slow": "mark.slow"}
# A file without any of these is fast, as one that says so: it starts no process, trains
# nothing of size, builds no whole network, lives through no random histories, and
# imports no library that takes seconds.
NOT_FAST = re.compile(
    r"subprocess|multiprocessing|mlflow|\bray\b|nvidia|onnx|torch\.(compile|export)|"
    r"create_model|from hypothesis|"
    r"from (benchmarks|pipelines\.train|tests\.(bare|browser|demo_runs|exports|"
    r"fake_gpu|fault_runs|hosts|lives|mocked_aws|s3_server|small_checkpoints|"
    r"small_runs|small_validation|stored_runs|token_sets))\b"
)


def is_fast(text: str) -> bool:
    return "mark.fast" in text or NOT_FAST.search(text) is None


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Skip files without the requested mark: importing all takes a minute of CPU."""
    wanted = config.option.markexpr.partition(" ")[0]
    if collection_path.suffix != ".py" or wanted not in (*MARKED, "fast"):
        return None
    text = collection_path.read_text()
    has = is_fast(text) if wanted == "fast" else re.search(MARKED[wanted], text)
    return None if has else True


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what uses the shared Ray, and what is fast, before tests are chosen."""
    fast = {path for path in {item.path for item in items} if is_fast(path.read_text())}
    for item in items:
        if "ray_local" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.ray)
        if item.path in fast:
            item.add_marker(pytest.mark.fast)


def pytest_runtest_setup() -> None:
    """Compute on one thread, whatever a command of an earlier test has set.

    Threads that wait for each other spin: on a busy machine a test takes ten times the
    CPU seconds.
    """
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


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
