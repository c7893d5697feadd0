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
# say so. `pipelines.cli.command` needs tyro.

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.on_gpu.runner import Outcome, run_stage, warm_up
from benchmarks.on_gpu.stages import PART_LIMITS_S, STAGES, Setting, Stage
from benchmarks.result_file import write_result

_PROG = "benchmarks.on_gpu"
_MAX_LOG_BYTES = 1 << 20
_MAX_TEXT = 100


def parse_options(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; exits with status 2 and a line where it is wrong."""
    names = [stage.name for stage in STAGES]
    parser = argparse.ArgumentParser(
        prog=_PROG,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--part", choices=("a", "b", "all"), default="all")
    add("--only", nargs="+", default=names, choices=names, help="these stages alone")
    add("--out", type=Path, default=Path("on_gpu"), help="folder, by default on_gpu")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--tiny", action="store_true", help="smallest sizes, to try the script itself")
    add("--limit-s", type=float, help="seconds in all; by default 430 for a, 200 for b")
    found = parser.parse_args(arguments)
    if found.limit_s is not None and not found.limit_s > 0:
        parser.error(f"expected --limit-s above 0, got {found.limit_s}")
    return found


def stages_of(options: argparse.Namespace) -> list[Stage]:
    """List the stages to run, in order."""
    chosen = [stage for stage in STAGES if stage.name in options.only]
    return [stage for stage in chosen if options.part in ("all", stage.part)]


def run(options: argparse.Namespace) -> dict[str, Outcome]:
    """Run the stages; write their outcomes to OUT, and return them."""
    stages, out = stages_of(options), options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    outcomes = {stage.name: Outcome() for stage in stages}
    shown = {**vars(options), "out": str(options.out)}
    about: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "options": shown}

    def save() -> None:
        found = {name: dataclasses.asdict(one) for name, one in outcomes.items()}
        missing = [name for name, one in outcomes.items() if not one.is_whole]
        write_result(out / "results.json", {**about, "stages": found}, missing=missing)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:
        setting = Setting(
            device=options.device, tiny=options.tiny, work=Path(work), out=out
        )
        parts = {stage.part for stage in stages}
        parts_s = sum(s for part, s in PART_LIMITS_S.items() if part in parts)
        limit_s = options.limit_s or setting.patience * parts_s
        until_s = time.monotonic() + limit_s
        (out / "log.txt").write_text("")
        save()
        about["imports_s"] = warm_up()
        for stage in stages:
            outcome = outcomes[stage.name]
            run_stage(
                stage, setting=setting, until_s=until_s, outcome=outcome, save=save
            )
            print(_head(stage.name, outcome), flush=True)
            _keep_log(setting.work / f"{stage.name}.log", out / "log.txt")
    return outcomes


def _keep_log(log: Path, out: Path) -> None:
    """Append the end of a stage's output to the one log that is kept."""
    content = log.read_bytes()[-_MAX_LOG_BYTES:] if log.exists() else b""
    with out.open("ab") as file:
        file.write(f"==== {log.stem}\n".encode() + content + b"\n")


def table(outcomes: Mapping[str, Outcome]) -> str:
    """Format a block per stage: a line per case, and its output if it failed."""
    lines = []
    for name, outcome in outcomes.items():
        width = max(map(len, outcome.cases), default=0)
        lines.append(f"== {_head(name, outcome)}")
        for case, found in outcome.cases.items():
            figures = [f"{of} {_shown(value)}" for of, value in found.items()]
            lines.append(f"  {case:<{width}}  {'  '.join(figures)}")
        lines += [f"  {case}  FAILED  {why}" for case, why in outcome.errors.items()]
        if outcome.missing:
            lines.append(f"  not measured: {'; '.join(outcome.missing)}")
        lines += [f"  | {line}" for line in outcome.last_lines]
    return "\n".join(lines)


def _head(name: str, outcome: Outcome) -> str:
    why = f": {outcome.why}" if outcome.why else ""
    return f"{name}  {outcome.state}{why}  ({outcome.seconds:.1f} s)"


def _shown(value: Any) -> str:
    """Format figures with four digits, also within a mapping or a list."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, Mapping):
        return " ".join(f"{name}={_shown(of)}" for name, of in value.items())
    text = ", ".join(map(_shown, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}..."


def main(arguments: Sequence[str]) -> int:
    """Run the command; return 1 if a stage failed or timed out, else 0."""
    options = parse_options(arguments)
    outcomes = run(options)
    text = table(outcomes)
    print(text)
    (options.out / "table.txt").write_text(text + "\n")
    bad = [name for name, one in outcomes.items() if one.is_bad]
    if bad:
        print(f"{_PROG}: did not end well: {', '.join(bad)}", file=sys.stderr)
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
