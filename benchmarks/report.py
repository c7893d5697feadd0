"""Show what the rounds gave: as a table, as JSON, as a picture."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.sets import labelled_images
from benchmarks.timing import Round, Spread, ratios, spread
from benchmarks.waiting import Waiting
from benchmarks.work import Work

OURS = "ours"
_PACKAGES = (
    "mosaicml-streaming",
    "numpy",
    "nvidia-dali-cuda130",
    "pillow",
    "pyarrow",
    "ray",
    "timm",
    "torch",
    "torchvision",
    "webdataset",
)
Rounds = Mapping[str, Sequence[Round]]


def rates(rounds: Rounds) -> dict[str, Spread]:
    """Give every loader's images a second."""
    return {
        name: spread([found.images_per_s for found in of_loader])
        for name, of_loader in rounds.items()
    }


def ours_to_others(rounds: Rounds) -> dict[str, Spread]:
    """Give our rate as a multiple of every other's; none where ours did not run."""
    if OURS not in rounds:
        return {}
    ours = [found.images_per_s for found in rounds[OURS]]
    return {
        name: ratios(ours, [found.images_per_s for found in of_loader])
        for name, of_loader in rounds.items()
        if name != OURS
    }


def table(rounds: Rounds) -> str:
    """Draw the table, the fastest loader first."""
    compared = ours_to_others(rounds)
    lines = [
        f"{'':<24}{'images/s':>22}{'images/CPU-s':>14}{'first batch':>13}"
        f"{'ours is':>24}"
    ]
    of_loaders = rates(rounds)
    for name in sorted(rounds, key=lambda name: -of_loaders[name].median):
        per_cpu_s = statistics.median(found.images_per_cpu_s for found in rounds[name])
        first_s = statistics.median(found.first_batch_s for found in rounds[name])
        factor = f"{_show(compared[name], '.2f')} x" if name in compared else ""
        lines.append(
            f"{name:<24}{_show(of_loaders[name], '.0f'):>22}{per_cpu_s:>14.0f}"
            f"{first_s:>11.1f} s{factor:>24}"
        )
    others = [found.other_cores for of_loader in rounds.values() for found in of_loader]
    lines.append(
        f"meanwhile the rest of the machine was busy on {statistics.median(others):.2f}"
        f" cores, at most {max(others):.2f}"
    )
    return "\n".join(lines)


def _show(values: Spread, form: str) -> str:
    return f"{values.median:{form}} [{values.low:{form}}..{values.high:{form}}]"


def waiting_text(waiting: Waiting) -> str:
    """Say in some lines how long a training waited."""
    lines = [f"{waiting.model} on {waiting.device}, trained on what ours gives:"]
    lines += [
        f"  epoch {epoch}: {rate:,.0f} images/s, {share:.2%} of the time waiting"
        for epoch, (rate, share) in enumerate(
            zip(waiting.images_per_s, waiting.waiting_share, strict=True)
        )
    ]
    gaps = ", ".join(f"{1000 * gap_s:.1f}" for gap_s in waiting.between_epochs_s)
    lines.append(f"  between epochs: {gaps} ms of waiting")
    lines.append(f"  first batch after {waiting.first_batch_s:.1f} s")
    lines.append(f"  peak memory {waiting.peak_bytes / 2**20:,.0f} MiB")
    return "\n".join(lines)


def as_json(rounds: Rounds) -> dict[str, Any]:
    """Give all rounds, and what the table shows of them."""
    of_loaders, compared = rates(rounds), ours_to_others(rounds)
    return {
        name: {
            "images_per_s": asdict(of_loaders[name]),
            "images_per_cpu_s": asdict(
                spread([found.images_per_cpu_s for found in of_loader])
            ),
            "first_batch_s": asdict(
                spread([found.first_batch_s for found in of_loader])
            ),
            "ours_to_this": asdict(compared[name]) if name in compared else None,
            "rounds": [asdict(found) for found in of_loader],
        }
        for name, of_loader in rounds.items()
    }


def machine() -> dict[str, Any]:
    """Describe the machine and the versions of what ran on it."""
    versions: dict[str, str] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    on_gpu = torch.cuda.is_available()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": cpu_name(Path("/proc/cpuinfo").read_text()),
        "num_cpus": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "versions": versions,
    }


def cpu_name(cpuinfo: str) -> str:
    """Find the processor's name in /proc/cpuinfo, which not all architectures give."""
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return found.group(1) if found else platform.machine()


def images_of(work: Work) -> dict[str, float]:
    """Count the images and their mean size."""
    sizes = [path.stat().st_size for path, _ in labelled_images(work.folder / "images")]
    return {"num_images": len(sizes), "mean_bytes": statistics.mean(sizes)}


def plot(rounds: Rounds, *, title: str, path: Path) -> None:
    """Draw the rates as bars, slowest to fastest, with lowest and highest round."""
    from matplotlib.figure import Figure

    of_loaders = rates(rounds)
    names = sorted(of_loaders, key=lambda name: of_loaders[name].median)
    found = [of_loaders[name] for name in names]
    medians = [item.median for item in found]
    errors = [
        [item.median - item.low for item in found],
        [item.high - item.median for item in found],
    ]
    figure = Figure(figsize=(8, 0.4 * len(names) + 1.2), layout="constrained")
    axes = figure.subplots()
    colours = ["tab:orange" if name == OURS else "tab:blue" for name in names]
    axes.barh(names, medians, xerr=errors, color=colours, capsize=3)
    axes.set_xlabel("images a second: median, lowest and highest round")
    axes.set_title(title, fontsize="small")
    figure.savefig(path, dpi=150)
