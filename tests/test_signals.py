"""A run that a signal ends, whenever it comes, is recorded so and goes on as one."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.signalled import KINDS, Moment, moments, rehearse

SEED = 20261130
NUM = int(os.environ.get("SOVIT_NUM_SIGNALS", "30"))


def test_signals_at_moments_drawn_at_random(tmp_path: Path) -> None:
    """One of each kind: a run takes some two seconds once its process is there."""
    drawn = moments(SEED, num=len(KINDS), longest_s=2.5)
    ends = rehearse(tmp_path, drawn, keeps_model=False)
    assert sum(ends.values()) == len(KINDS)


def test_ctrl_c_as_soon_as_a_run_is_recorded_ends_it_at_once(tmp_path: Path) -> None:
    moment = Moment(number=signal.SIGINT, seconds=0, is_recorded=True)
    assert rehearse(tmp_path, [moment], keeps_model=False) == {"SIGINT at once": 1}


@pytest.mark.slow
def test_signals_at_many_moments(tmp_path: Path) -> None:
    """Some of them while the model is kept in MLflow, at the run's end."""
    ends = rehearse(tmp_path, moments(SEED, num=NUM, longest_s=8))
    print(dict(ends))
    assert any(end.endswith("checkpointed") for end in ends)


@pytest.mark.slow
@pytest.mark.ray
def test_signals_at_many_moments_on_ray(tmp_path: Path) -> None:
    """Each run starts a Ray of its own, which takes most of it."""
    drawn = moments(SEED, num=NUM, longest_s=25)
    print(dict(rehearse(tmp_path, drawn, num_workers=1)))
