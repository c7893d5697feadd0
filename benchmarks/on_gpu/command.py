"""Measure on a GPU, in stages, within a time limit: all that one decides about.

    python -m benchmarks.on_gpu --out results
    python -m benchmarks.on_gpu --only steps compiled
    python -m benchmarks.on_gpu --device cpu --tiny

Part a needs no Ray; part b is Ray with one worker that is killed. Each stage is a
process with a time limit; results.json is written after each case, so that whatever
ends this leaves what was measured. On a CPU every stage takes the same path.

OUT gets results.json, table.txt, profile.txt and log.txt.
"""

# Nothing but the standard library: this has to run where packages are missing, and
# say so. `pipelines.cli` needs tyro.

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.on_gpu.runner import Outcome, run_stage, warm_up
from benchmarks.on_gpu.setting import Setting
from benchmarks.on_gpu.stages import PART_LIMITS_S, STAGES, Stage
from benchmarks.on_gpu.table import table
from benchmarks.result_file import write_result

_PROG = "benchmarks.on_gpu"
RESULTS, TABLE, LOG = "results.json", "table.txt", "log.txt"
_MAX_LOG_BYTES = 1 << 20
_BAD = ("failed", "out of time")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured, where, and how long that may take."""

    part: Literal["a", "b", "all"] = "all"
    only: tuple[str, ...] = ()
    out: Path = Path("on_gpu")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    tiny: bool = False
    limit_s: float | None = None

    @property
    def stages(self) -> list[Stage]:
        """The stages to run, in their order."""
        if self.only:
            return [stage for stage in STAGES if stage.name in self.only]
        return [stage for stage in STAGES if self.part in ("all", stage.part)]


def parse_options(arguments: Sequence[str]) -> Options:
    """Parse the command line; exits with status 2 and a line where it is wrong."""
    parser = argparse.ArgumentParser(
        prog=_PROG,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--part", choices=("a", "b", "all"), default="all")
    parser.add_argument(
        "--only",
        nargs="+",
        default=(),
        metavar="STAGE",
        choices=[stage.name for stage in STAGES],
        help=f"these stages alone: {', '.join(stage.name for stage in STAGES)}",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("on_gpu"), help="folder, by default on_gpu"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--tiny", action="store_true", help="smallest sizes, to try the script itself"
    )
    parser.add_argument(
        "--limit-s",
        type=float,
        help="seconds for all stages together; by default 430 for part a, 200 for b",
    )
    found = parser.parse_args(arguments)
    if found.limit_s is not None and not found.limit_s > 0:
        parser.error(f"expected --limit-s above 0, got {found.limit_s}")
    return Options(**{**vars(found), "only": tuple(found.only)})


def run(options: Options) -> dict[str, Outcome]:
    """Run the stages; what they told is in OUT, and comes back."""
    stages = options.stages
    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    outcomes = {stage.name: Outcome() for stage in stages}
    shown = {**dataclasses.asdict(options), "out": str(options.out)}
    about: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "options": shown}

    def save() -> None:
        found = {name: dataclasses.asdict(one) for name, one in outcomes.items()}
        missing = [
            name
            for name, one in outcomes.items()
            if one.state in ("waiting", "running") or one.missing
        ]
        write_result(out / RESULTS, {**about, "stages": found}, missing=missing)

    parts = {stage.part for stage in stages}
    limits_s = [limit_s for part, limit_s in PART_LIMITS_S.items() if part in parts]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:
        setting = Setting(
            device=options.device, tiny=options.tiny, work=Path(work), out=out
        )
        limit_s = options.limit_s or setting.patience * sum(limits_s)
        until_s = time.monotonic() + limit_s
        (out / LOG).write_text("")
        save()
        about["imports_s"] = warm_up()
        for stage in stages:
            outcome = outcomes[stage.name]
            run_stage(
                stage, setting=setting, until_s=until_s, outcome=outcome, save=save
            )
            print(f"{stage.name}: {_line(outcome)}", flush=True)
            _keep_log(setting.work / f"{stage.name}.log", out / LOG)
    return outcomes


def _line(outcome: Outcome) -> str:
    """One line for a stage that ended."""
    why = f", {outcome.why}" if outcome.why else ""
    return f"{outcome.state}{why}; {len(outcome.cases)} cases, {outcome.seconds:.1f} s"


def _keep_log(log: Path, out: Path) -> None:
    """Append the end of a stage's output to the one log that is kept."""
    if not log.exists():
        return
    content = log.read_bytes()[-_MAX_LOG_BYTES:]
    with out.open("ab") as file:
        file.write(f"==== {log.stem}\n".encode() + content + b"\n")


def main(arguments: Sequence[str]) -> int:
    """Run the command: 1 where a stage failed or its time ended, else 0."""
    options = parse_options(arguments)
    outcomes = run(options)
    text = table(outcomes)
    print(text)
    (options.out / TABLE).write_text(text + "\n")
    bad = [name for name, one in outcomes.items() if one.state in _BAD]
    if bad:
        print(f"{_PROG}: did not end well: {', '.join(bad)}", file=sys.stderr)
    return int(bool(bad))
