"""Write docs/evidence.md and its figures from the file of results alone."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.evidence.figures import draw_claims, draw_curves, draw_differences
from benchmarks.evidence.intervals import NO_PAIR, Difference, rank_text
from benchmarks.evidence.plan import RATE_SEED, Plan
from benchmarks.evidence.results import Entries
from benchmarks.evidence.rows import Row, rows_of

PAGE = "evidence.md"
CLAIMS = "evidence.png"
_INTRODUCTION = """\
# Evidence

Do second-order heads help on natural photographs, at a size that a laptop trains?
Written by `python -m benchmarks.evidence --report` from
`benchmarks/results/evidence.json`, where each training is a line; not to be edited.

Photographs are parts of CIFAR-10 (JPEG, recompressed at a quality of about 75: not to
be compared with published accuracies to the tenth) and of tf_flowers. Trainings are
short and small: they show what a head does for a small network early on, not what it
does at ImageNet's size. Published figures of that size are in `recipes/`.

Everything but the head is the same within a plan. Top-1 is that of the last epoch's
weights, in percent of the held-out photographs: mean and sample deviation over the
seeds. A difference is the mean over the seeds that both have, in points. Its interval
is the 95 % one by Student's t, for that difference alone: of twenty such intervals one
is expected to miss. An interval that holds 0 is called "no difference shown". Learning
rates are chosen among the candidates by seed {seed}, which is not counted: what each
reached stands in brackets. Runs that diverged or failed are in the tables.
"""


def write_page(plans: Iterable[Plan], entries: Entries, *, docs: Path) -> None:
    """Write the page and its figures into a folder."""
    sections, claims = [_INTRODUCTION.format(seed=RATE_SEED)], []
    for plan in plans:
        rows = rows_of(plan, entries)
        if not any(row.entries or row.tried for row in rows):
            sections.append(f"## {plan.title}\n\nNot measured yet (`{plan.name}`).\n")
            continue
        sections.append(_section(plan, rows, docs=docs))
        claims += [
            (plan, row) for row in rows if row.difference and _is_main(plan, row)
        ]
    if claims:
        draw_claims(docs / CLAIMS, claims)
        figure = f"![Differences to the baselines, with intervals]({CLAIMS})\n"
        sections.insert(1, figure)
    (docs / PAGE).write_text("\n".join(sections))


def _is_main(plan: Plan, row: Row) -> bool:
    most = max(arm.num_seeds for arm in plan.arms.values())
    return row.num_wanted == most


def _section(plan: Plan, rows: Sequence[Row], *, docs: Path) -> str:
    parts = [f"## {plan.title}", plan.about, _settings(plan)]
    parts.append(_table(rows, has_mce=bool(plan.num_corrupted)))
    file = f"evidence_{plan.name}.png"
    if any(row.difference for row in rows):
        draw_differences(docs / file, rows)
        parts.append(f"![{plan.title}: differences with intervals]({file})")
    file = f"evidence_{plan.name}_curves.png"
    if plan.curves and draw_curves(docs / file, rows, metrics=plan.curves):
        parts.append(f"![{plan.title}: the course of the training]({file})")
    if plan.tokens_of:
        ranked = [
            (it["head_top1"], it["top1"])
            for row in rows
            for it in row.entries.values()
            if "head_top1" in it
        ]
        parts.append(rank_text([one for one, _ in ranked], [it for _, it in ranked]))
    parts.append(_cost(rows))
    return "\n\n".join(parts) + "\n"


def _settings(plan: Plan) -> str:
    run = plan.run(next(iter(plan.arms)))
    images, optim, augment = plan.images, run.optim, run.augment
    num_epochs = sorted({plan.run(arm).optim.num_epochs for arm in plan.arms})
    epochs = ", ".join(map(str, num_epochs))
    rates = ", ".join(f"{rate:g}" for rate in plan.rates)
    return (
        f"`{plan.name}`: {_count(images.num_train)} training photographs of "
        f"`{images.name}`, {_count(images.num_val)} held out, {run.model.img_size} "
        f"pixels; {epochs} epochs in batches of {run.data.batch_size}, "
        f"{optim.optimizer}, weight decay {optim.weight_decay:g}, label smoothing "
        f"{optim.label_smoothing:g}, schedule {optim.schedule.kind}, warm-up of "
        f"{optim.warmup_epochs:g} epochs; crops from {augment.crop_scale[0]:.0%} of "
        "the area and flips; float32, no moving average. Rates tried: "
        f"{rates}."
    )


def _count(number: int | None) -> str:
    return "all" if number is None else f"{number:,}"


def _table(rows: Sequence[Row], *, has_mce: bool) -> str:
    names = ["head", "parameters", "rate", "seeds", "top-1 %", "compared with"]
    names += ["difference", "95 % interval", "shown"]
    names += ["mCE less 100", "its interval", "shown"] if has_mce else []
    lines = [names, ["---"] * len(names)]
    for row in rows:
        params = next(
            (
                f"{it['num_params']:,}"
                for it in row.entries.values()
                if "num_params" in it
            ),
            "-",
        )
        cells = [row.arm, params, _rate(row), row.seeds_text, row.top1_text]
        cells += [row.against or "-", *_compared(row.difference, row=row)]
        lines.append(cells + (_compared(row.mce, row=row) if has_mce else []))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _rate(row: Row) -> str:
    rate = "-" if row.rate is None else f"{row.rate:g}"
    tried = [
        f"{rate:g}: " + (f"{it['top1']:.2f}" if "top1" in it else it["status"])
        for rate, it in row.tried.items()
    ]
    return f"{rate} ({', '.join(tried)})" if tried else rate


def _compared(found: Difference | None, *, row: Row) -> list[str]:
    if not row.against:
        return ["-", "-", "-"]
    if found is None:
        return ["-", "-", NO_PAIR]
    return [f"{found.mean:+.2f}", found.interval, found.verdict]


def _cost(rows: Sequence[Row]) -> str:
    found = [it for row in rows for it in row.entries.values()]
    tried = [it for row in rows for it in row.tried.values()]
    seconds = statistics.median(it["cpu_seconds"] for it in (*found, *tried))
    dates = sorted({it["date"] for it in (*found, *tried)})
    cpus = ", ".join(sorted({it["cpu"] for it in (*found, *tried)}))
    wanted = sum(row.num_wanted for row in rows)
    return (
        f"{len(found)} of {wanted} counted trainings and {len(tried)} for the rates; "
        f"{cpus}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}, median "
        f"{seconds:.0f} CPU seconds each."
    )
