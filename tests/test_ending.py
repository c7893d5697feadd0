"""SIGTERM asks once, and ends the process the second time."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from pipelines.ending import noted_sigterm


def test_the_first_is_noted_and_the_second_ends() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with noted_sigterm() as is_over:
        assert not is_over.is_set()
        os.kill(os.getpid(), signal.SIGTERM)
        assert is_over.wait(5)
        with pytest.raises(SystemExit) as caught:
            signal.raise_signal(signal.SIGTERM)
        assert caught.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before


def test_where_it_is_not_wanted_signals_are_left_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with noted_sigterm(is_wanted=False) as is_over:
        assert signal.getsignal(signal.SIGTERM) == before
        assert not is_over.is_set()


def test_a_thread_leaves_signals_alone() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def run() -> None:
        with noted_sigterm() as is_over:
            seen.append((is_over.is_set(), signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [(False, before)]
