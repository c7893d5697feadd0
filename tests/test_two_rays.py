"""A training on Ray goes on while another Ray with a dashboard is on the machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipelines.config.overrides import change_fields
from pipelines.config.serialization import to_json
from tests.lives import begin
from tests.signalled import CHECKPOINTED, ended, signalled_run
from tests.waiting import wait_for

# Ray Train looks every second whether the run of its workers' places is still known:
# the other Ray, asked by mistake, had them removed within two.
_BESIDE_S = 15
_OTHER = (
    "import ray, sys\n"
    "def start():\n"
    "    ray.init(address='local', num_cpus=1, include_dashboard=True)\n"
    "try:\n"
    "    start()\n"
    "except Exception:  # on a busy machine not in the time that Ray gives itself\n"
    "    start()\n"
    "print('started', flush=True)\n"
    "sys.stdin.read()\n"
    "ray.shutdown()\n"
)


@contextmanager
def another_ray() -> Iterator[None]:
    """Start a Ray with a dashboard that belongs to somebody else."""
    process = subprocess.Popen(
        [sys.executable, "-c", _OTHER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    assert "started" in process.stdout.readline()
    try:
        yield
    finally:
        process.communicate(timeout=300)


@pytest.mark.slow
@pytest.mark.ray
def test_another_ray_with_a_dashboard_takes_no_worker_away(tmp_path: Path) -> None:
    run = signalled_run(tmp_path, num_workers=1)
    run = change_fields(run, {"optim.num_epochs": 500})
    (tmp_path / "run.json").write_text(to_json(run))
    log = tmp_path / "log"
    process = begin([f"{tmp_path}/recipe.py:small", "--name", "ours"], log=log)
    assert process.pid is not None
    # Ray has half a minute to start: the other one goes first.
    os.setpriority(os.PRIO_PROCESS, process.pid, 10)
    try:
        wait_for(
            lambda: "epoch 1/" in log.read_text() or not process.is_alive(),
            what="the first epoch",
            log=log.read_text,
        )
        with another_ray():
            time.sleep(_BESIDE_S)
            assert process.is_alive(), log.read_text()
            os.kill(process.pid, signal.SIGTERM)
            assert ended(process) == CHECKPOINTED, log.read_text()
        assert "failed" not in log.read_text()
        assert log.read_text().count("from step") == 1  # no worker was started again
    finally:
        if process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)
