"""Connect to a running Ray, or start one for this process and shut it down after."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import signal
import socket
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import ray
import ray.util
from ray.autoscaler.sdk import request_resources
from ray.util.state import get_node

from pipelines.config import CPUS_PER_READ, Scale
from pipelines.config.own_code import away_from_clashes
from pipelines.storage.redaction import error_summary, without_credentials
from pipelines.tracking import environment

logger = logging.getLogger(__name__)
_POLL_S = 1.0
# Readers need CPUs beside the workers'; they mostly wait, so these do not exist.
_NUM_READER_CPUS = 2
_HERE = ("127.0.0.1", "localhost")
# The first worker process of a cluster takes seconds to start, however big the hurry.
_LEAST_JOIN_S = 30.0
_MAX_REASON_CHARS = 300
_DASHBOARD_TIMEOUT_S = 30
# Ray gives a node 30 s, which no setting changes: too few while others use the machine.
_TOO_SLOW = "timed out during startup"
_START_HINT = (
    "see that HOME and the folder for Ray's files can be written, set RAY_TMPDIR to "
    "one with a short path, and try again later where the machine is busy"
)
_JOIN_HINT = "see that it runs with the same Python and the same Ray as this command"


@contextlib.contextmanager
def ray_session(
    scale: Scale, *, num_runs: int = 1, dashboard: bool = False
) -> Iterator[None]:
    """Provide a Ray with room for the workers of `num_runs` runs at a time.

    A Ray that this process is connected to, or that RAY_ADDRESS names, is used and
    left running. Else one is started here, optionally with its dashboard, and
    shut down at the end.

    Raises ValueError where Ray does not start or answer, or the machine, or the cluster
    after a while, is too small.
    """
    if ray.is_initialized():
        _wait_for_room(scale, num_runs=num_runs)
        yield
        return
    on_cluster = bool(os.environ.get("RAY_ADDRESS"))
    if not on_cluster:
        _check_machine(scale, num_runs=num_runs)
    try:
        with environment({} if on_cluster else _without_proxy()):
            if on_cluster:
                _join(scale)
            else:
                _start(dashboard=dashboard)
            _wait_for_room(scale, num_runs=num_runs)
            yield
    finally:
        ray.shutdown()


def ask_dashboard() -> None:
    """Raise LookupError, or what Ray raises, unless this Ray's own dashboard answers.

    A Ray without one still names an address for it, mostly 127.0.0.1:8265, at which
    another Ray's dashboard may answer: so it is asked for this node.
    """
    context = ray.get_runtime_context()
    node = get_node(
        context.get_node_id(),
        address=context.gcs_address,
        timeout=_DASHBOARD_TIMEOUT_S,
    )
    if node is None:
        raise LookupError("the dashboard at Ray's address is another Ray's")


def has_dashboard() -> bool:
    """Return whether this Ray's own dashboard answers."""
    try:
        ask_dashboard()
    except Exception:  # LookupError, requests' and Ray's own
        return False
    return True


def _start(*, dashboard: bool) -> None:
    logger.info("starting Ray on this machine")
    with (
        _refused("this machine's own Ray", hint=_START_HINT),
        _shielded(),
        away_from_clashes(),
    ):
        try:
            _init_local(dashboard=dashboard)
        except Exception as error:
            if _TOO_SLOW not in str(error):
                raise
            logger.warning("Ray did not start in the time that it gives itself: again")
            _init_local(dashboard=dashboard)


def _init_local(*, dashboard: bool) -> None:
    ray.init(
        address="local",
        num_cpus=(os.cpu_count() or 1) + _NUM_READER_CPUS,
        include_dashboard=dashboard,
        log_to_driver=False,
        logging_level=logging.WARNING,
    )


def _join(scale: Scale) -> None:
    """Connect to the Ray at RAY_ADDRESS, and check that it has this project."""
    address, timeout_s = os.environ["RAY_ADDRESS"], scale.start_timeout_s
    logger.info("joining Ray at %s", address)
    wait_for_address(address, timeout_s=timeout_s)
    with (
        _refused(f"a Ray at RAY_ADDRESS={address}", hint=_JOIN_HINT),
        away_from_clashes(),
    ):
        ray.init(log_to_driver=False, logging_level=logging.WARNING)
    versions = ray.remote(num_cpus=0)(_project)
    hint = (
        "give it this project: `ray job submit --working-dir .`, or install its wheel "
        "on all machines"
    )
    with _refused(f"a Ray that has this project at RAY_ADDRESS={address}", hint=hint):
        ray.get(versions.remote(), timeout=max(timeout_s, _LEAST_JOIN_S))


def _project() -> str:
    return __name__


def wait_for_address(address: str, *, timeout_s: float) -> None:
    """Wait until a Ray's address accepts connections: ray.init retries 14 minutes.

    Raises ValueError at the timeout. An address without host and port is left to Ray.
    """
    try:
        parts = urlsplit(address if "://" in address else f"ray://{address}")
        host, port = parts.hostname, parts.port
    except ValueError:
        return
    if host is None or port is None:
        return
    deadline_s, why = time.monotonic() + timeout_s, ""
    while True:
        try:
            left_s = max(deadline_s - time.monotonic(), _POLL_S)
            socket.create_connection((host, port), timeout=left_s).close()
        except OSError as error:
            why = error_summary(error)
        else:
            return
        if time.monotonic() > deadline_s:
            raise ValueError(
                f"expected a Ray at RAY_ADDRESS={address}, got none in {timeout_s:g} s "
                f"({why}); start it, mend RAY_ADDRESS, unset it to train on this "
                "machine, or raise --scale.start-timeout-s"
            )
        time.sleep(_POLL_S)


@contextlib.contextmanager
def _refused(wanted: str, *, hint: str) -> Iterator[None]:
    """Convert any error of starting or joining a Ray into one line."""
    try:
        yield
    except Exception as error:
        reason = " ".join(without_credentials(str(error)).split())
        raise ValueError(
            f"expected {wanted}, got {type(error).__name__}: "
            f"{reason[:_MAX_REASON_CHARS]}; {hint}"
        ) from error


@contextlib.contextmanager
def _shielded() -> Iterator[None]:
    """Block SIGHUP in child processes: the driver ends them, not a closed terminal.

    They inherit the mask of blocked signals.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _without_proxy() -> dict[str, str]:
    """Return the environment that exempts this machine's Ray from any proxy."""
    settings = {}
    for name in ("no_proxy", "NO_PROXY"):
        parts = [os.environ.get(name, ""), *_HERE, ray.util.get_node_ip_address()]
        settings[name] = ",".join(filter(None, parts))
    return settings


def needed(scale: Scale) -> dict[str, float]:
    """Return the resources of all workers together."""
    wanted = {"CPU": scale.world_size * scale.cpus_per_worker}
    return wanted | ({"GPU": float(scale.world_size)} if scale.use_gpu else {})


def per_worker(scale: Scale) -> dict[str, float]:
    """Return the resources that Ray reserves for one worker."""
    return {name: total / scale.world_size for name, total in needed(scale).items()}


def room(scale: Scale) -> int:
    """Count the runs whose workers fit into this process's Ray at a time."""
    has = ray.cluster_resources()
    if not os.environ.get("RAY_ADDRESS"):
        # Not those that are there for the readers alone.
        has["CPU"] = min(has.get("CPU", 0), os.cpu_count() or 1)
    return min(int(has.get(name, 0) // total) for name, total in needed(scale).items())


def _lacking(scale: Scale, *, num_runs: int) -> str:
    """List the resources Ray lacks for the workers of some runs; "" for none."""
    has, wanted = ray.cluster_resources(), needed(scale)
    # Were all CPUs the workers', reading would wait for one forever.
    wanted["CPU"] += CPUS_PER_READ
    totals = {name: num_runs * total for name, total in wanted.items()}
    return ", ".join(
        f"{name} {total:g} (there are {has.get(name, 0):g})"
        for name, total in totals.items()
        if has.get(name, 0) < total
    )


def _check_machine(scale: Scale, *, num_runs: int) -> None:
    has, wanted = os.cpu_count() or 1, num_runs * needed(scale)["CPU"]
    if wanted > has:
        raise ValueError(
            f"expected {wanted:g} CPUs for {_workers(scale, num_runs)}, got a machine "
            f"with {has}; lower {_fewer(num_runs)}--scale.num-workers or "
            "--scale.cpus-per-worker, or set RAY_ADDRESS to a cluster"
        )


def _workers(scale: Scale, num_runs: int) -> str:
    runs = f" in each of {num_runs} trials at a time" if num_runs > 1 else ""
    return f"{scale.world_size} workers{runs}"


def _fewer(num_runs: int) -> str:
    return "--num-concurrent, " if num_runs > 1 else ""


def _wait_for_room(scale: Scale, *, num_runs: int) -> None:
    """Request the workers from the autoscaler and wait; Train would wait forever.

    At the timeout, `min_workers` are enough if set.
    """
    is_local = not os.environ.get("RAY_ADDRESS")
    deadline_s = time.monotonic() + (0 if is_local else scale.start_timeout_s)
    if not _lacking(scale, num_runs=num_runs):
        return
    num_workers = num_runs * scale.world_size
    request_resources(bundles=[per_worker(scale)] * num_workers)
    try:
        while short := _lacking(scale, num_runs=num_runs):
            if time.monotonic() > deadline_s:
                break
            time.sleep(_POLL_S)
    finally:
        # A request stands until it is taken back, and keeps nodes from being idle. What
        # came stays for some minutes; by then the workers hold it.
        request_resources(bundles=[])
    least = dataclasses.replace(scale, num_workers=scale.min_workers or 1)
    is_enough = scale.min_workers and not _lacking(least, num_runs=num_runs)
    if short and not is_enough:
        raise ValueError(
            f"expected {short} for {_workers(scale, num_runs)} and what reads for "
            f"them; lower {_fewer(num_runs)}--scale.num-workers or "
            "--scale.cpus-per-worker, add nodes, or raise --scale.start-timeout-s"
        )
