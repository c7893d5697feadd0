"""Join the Ray that is there, or start one for this process and end it afterwards."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import Iterator

import ray
from ray.autoscaler.sdk import request_resources

from pipelines.config import Scale
from pipelines.data_config import CPUS_PER_READ

logger = logging.getLogger(__name__)
_POLL_S = 1.0
# Readers need CPUs beside the workers'; they mostly wait, so these do not exist.
_NUM_READER_CPUS = 2


@contextlib.contextmanager
def ray_session(
    scale: Scale, *, num_runs: int = 1, dashboard: bool = False
) -> Iterator[None]:
    """Have a Ray with room for the workers of some runs at a time.

    A Ray that this process is connected to, or that RAY_ADDRESS names, is used and
    left running. Else one is started here, with its dashboard if that is wanted, and
    shut down at the end.

    Raises ValueError where the machine, or the cluster after a while, is too small.
    """
    if ray.is_initialized():
        _wait_for_room(scale, num_runs=num_runs)
        yield
        return
    on_cluster = bool(os.environ.get("RAY_ADDRESS"))
    if not on_cluster:
        _check_machine(scale, num_runs=num_runs)
    try:
        logger.info("joining Ray" if on_cluster else "starting Ray on this machine")
        ray.init(
            address=None if on_cluster else "local",
            num_cpus=None if on_cluster else (os.cpu_count() or 1) + _NUM_READER_CPUS,
            include_dashboard=None if on_cluster else dashboard,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
        _wait_for_room(scale, num_runs=num_runs)
        yield
    finally:
        ray.shutdown()


def needed(scale: Scale) -> dict[str, float]:
    """Count the resources of all workers together."""
    wanted = {"CPU": scale.world_size * scale.cpus_per_worker}
    return wanted | ({"GPU": float(scale.world_size)} if scale.use_gpu else {})


def per_worker(scale: Scale) -> dict[str, float]:
    """Give what Ray reserves for one worker."""
    return {name: total / scale.world_size for name, total in needed(scale).items()}


def room(scale: Scale) -> int:
    """Count the runs that the Ray of this process has workers' room for at a time."""
    has = ray.cluster_resources()
    if not os.environ.get("RAY_ADDRESS"):
        # Not those that are there for the readers alone.
        has["CPU"] = min(has.get("CPU", 0), os.cpu_count() or 1)
    return min(int(has.get(name, 0) // total) for name, total in needed(scale).items())


def _lacking(scale: Scale, *, num_runs: int) -> str:
    """Say what Ray lacks for the workers of some runs; nothing where it has it all."""
    has, wanted = ray.cluster_resources(), needed(scale)
    # Were all CPUs the workers', reading would wait for one for ever.
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
            f"wanted {wanted:g} CPUs for {_workers(scale, num_runs)}, came a machine "
            f"with {has}; lower {_fewer(num_runs)}--scale.num-workers or "
            "--scale.cpus-per-worker, or set RAY_ADDRESS to a cluster"
        )


def _workers(scale: Scale, num_runs: int) -> str:
    runs = f" in each of {num_runs} trials at a time" if num_runs > 1 else ""
    return f"{scale.world_size} workers{runs}"


def _fewer(num_runs: int) -> str:
    return "--num-concurrent, " if num_runs > 1 else ""


def _wait_for_room(scale: Scale, *, num_runs: int) -> None:
    """Ask the autoscaler for the workers and wait; Train alone waits for ever.

    With `min_workers` these are enough once time is up.
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
            f"wanted {short} for {_workers(scale, num_runs)} and what reads for them; "
            f"lower {_fewer(num_runs)}--scale.num-workers or --scale.cpus-per-worker, "
            "add nodes, or raise --scale.start-timeout-s"
        )
