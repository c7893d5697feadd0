"""Signals ask once for an orderly end; what that is depends on what is being done."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from pipelines.driver import signals
from pipelines.driver.signals import SIGNALS, StopRequest, stop_requests
from pipelines.errors import CHECKPOINTED, InterruptedRun


@pytest.fixture
def default_handlers() -> Iterator[None]:
    """Have no signal ignored, as it may be where tests run in the background."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def _wait_for_an_echo() -> None:
    time.sleep(1.1 * signals.ECHO_S)


@contextlib.contextmanager
def raised(number: signal.Signals) -> Iterator[None]:
    """Expect what a signal ends a process with: its status is 128 and its number."""
    error = KeyboardInterrupt if number == signal.SIGINT else InterruptedRun
    with pytest.raises(error) as caught:
        yield
    if isinstance(caught.value, InterruptedRun):
        assert caught.value.code == 128 + number
        assert number.name in str(caught.value)


@pytest.mark.parametrize("number", SIGNALS)
def test_training_the_first_is_noted_and_the_second_ends(
    number: signal.Signals, default_handlers: None, capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)
    with stop_requests() as stop:
        stop.begun.set()
        with stop.noted() as is_over:
            assert not is_over.is_set()
            os.kill(os.getpid(), number)
            assert is_over.wait(5)
            assert stop.name == number.name
            assert f"{number.name}: writing a checkpoint" in capfd.readouterr().err
            signal.raise_signal(number)  # what `timeout` sends to its group asks once
            _wait_for_an_echo()
            with raised(number):
                signal.raise_signal(number)
        with raised(number):
            stop.check()
    assert signal.getsignal(number) == before


def test_signals_that_a_library_took_are_taken_back(default_handlers: None) -> None:
    """As ray.init takes SIGTERM, after which a training would end without a word."""
    with stop_requests() as stop:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))
        stop.arm()
        stop.begun.set()
        with stop.noted() as is_over:
            os.kill(os.getpid(), signal.SIGTERM)
            assert is_over.wait(5)
    with stop_requests(is_wanted=False) as stop:
        before = signal.getsignal(signal.SIGTERM)
        stop.arm()
        assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("number", SIGNALS)
def test_before_there_is_anything_to_keep_the_first_ends(
    number: signal.Signals, default_handlers: None
) -> None:
    with stop_requests() as stop:
        stop.check()
        with raised(number):
            signal.raise_signal(number)
    with stop_requests() as stop, stop.noted(), raised(number):
        signal.raise_signal(number)  # workers are starting


def test_while_a_record_is_written_all_wait(default_handlers: None) -> None:
    with stop_requests() as stop:
        with stop.noted(), stop.waiting():
            for _ in range(3):
                signal.raise_signal(signal.SIGTERM)
        with raised(signal.SIGTERM):
            stop.check()
        stop.finish()
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_what_ray_makes_of_a_signal_is_undone(
    number: signal.Signals, default_handlers: None
) -> None:
    """It raises SystemExit(1) for whatever a handler raises while it waits."""

    def wait_as_ray() -> None:
        try:
            signal.raise_signal(number)
        except SystemExit:
            sys.exit(1)

    with raised(number), stop_requests():
        wait_as_ray()
    with stop_requests() as stop, raised(number), stop.restored():
        wait_as_ray()


@pytest.mark.parametrize("status", [3, 75])
def test_an_end_that_no_signal_made_stays_as_it_is(
    status: int, default_handlers: None
) -> None:
    def end() -> None:
        with stop_requests() as stop:
            if status == CHECKPOINTED:
                stop.begun.set()
                with stop.noted():
                    signal.raise_signal(signal.SIGTERM)
            sys.exit(status)

    with pytest.raises(SystemExit) as caught:
        end()
    assert caught.value.code == status
    assert not isinstance(caught.value, InterruptedRun)


def test_what_is_ignored_stays_so(default_handlers: None) -> None:
    """As under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with stop_requests() as stop:
        signal.raise_signal(signal.SIGHUP)
        stop.check()
        with raised(signal.SIGTERM):
            signal.raise_signal(signal.SIGTERM)


def test_where_it_is_not_wanted_signals_are_left_alone() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with stop_requests(is_wanted=False) as stop:
        assert [signal.getsignal(number) for number in SIGNALS] == before
        stop.check()


def test_a_thread_leaves_signals_alone() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def run() -> None:
        with stop_requests() as stop:
            seen.append((stop.event.is_set(), signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [(False, before)]


def test_what_is_told_a_terminal_that_is_gone_goes_nowhere() -> None:
    """Its other end is closed: without the answer to SIGHUP, printing would raise."""
    master, terminal = pty.openpty()
    code = (
        "import os, signal, time\nfrom pipelines.driver.signals import stop_requests\n"
        # Whoever starts the tests may ignore it, as nohup does.
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        "with stop_requests() as stop, stop.noted() as is_over:\n"
        "    stop.begun.set()\n"
        "    print('ready', flush=True)\n"
        # Not by waiting for the event: what the handler sets it by is held then.
        "    while not is_over.is_set():\n"
        "        time.sleep(0.01)\n"
        "    print('still here', flush=True)\n"
        "    os._exit(7)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
    )
    os.close(terminal)
    said = b""
    while not said.endswith(b"ready\r\n"):  # else its own printing fails
        said += os.read(master, 100)
    os.close(master)
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 7


def test_a_stop_request_begins_unasked() -> None:
    stop = StopRequest()
    assert not stop.event.is_set()
    stop.check()
