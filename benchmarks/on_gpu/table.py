"""Draw what all stages told as one table of text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.on_gpu.runner import Outcome

_MAX_TEXT = 100


def table(outcomes: Mapping[str, Outcome]) -> str:
    """A block for each stage: a line a case, and what it printed where it failed."""
    return "\n".join(_block(name, outcome) for name, outcome in outcomes.items())


def _block(name: str, outcome: Outcome) -> str:
    why = f": {outcome.why}" if outcome.why else ""
    lines = [f"== {name}  {outcome.state}{why}  ({outcome.seconds:.1f} s)"]
    width = max(map(len, outcome.cases), default=0)
    lines += [
        f"  {case:<{width}}  {_shown(found)}" for case, found in outcome.cases.items()
    ]
    lines += [f"  {case}  FAILED  {error}" for case, error in outcome.errors.items()]
    if outcome.missing:
        lines.append(f"  not measured: {'; '.join(outcome.missing)}")
    lines += [f"  | {line}" for line in outcome.last_lines]
    return "\n".join(lines)


def _shown(found: Mapping[str, Any]) -> str:
    return "  ".join(
        f"{name} {_value(value)}" for name, value in found.items() if name != "seconds"
    )


def _value(value: Any) -> str:
    """A figure with four digits; within a mapping or a list each by itself."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, Mapping):
        return " ".join(f"{name}={_value(of)}" for name, of in value.items())
    text = ", ".join(map(_value, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}..."
