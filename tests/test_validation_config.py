"""What a run says of its validation: refused when built, and the same after JSON."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from pipelines.cli.command import parse
from pipelines.config import Run, Scale, Validation
from pipelines.config.overrides import change_fields, differing
from pipelines.config.serialization import flat_params, from_json, to_json
from recipes.demo import demo

ALSO = ("v2=s3://bucket/v2", "a=shards/a=b")


def test_a_runs_validation_comes_back_from_json_and_older_runs_have_none() -> None:
    wanted = Validation(
        every_epochs=3, asynchronous=True, real_labels="r.json", also=ALSO
    )
    run = dataclasses.replace(demo(), validation=wanted)
    assert from_json(to_json(run)) == run
    assert flat_params(run)["validation.also"] == ALSO
    raw = json.loads(to_json(demo()))
    del raw["validation"]
    assert from_json(json.dumps(raw)) == demo()


def test_it_is_set_by_flags_and_by_names() -> None:
    arguments = ["--validation.also", *ALSO, "--validation.weights", "average"]
    run = parse(Run, default=demo(), arguments=arguments, prog="sovit-train")
    assert run.validation == Validation(weights="average", also=ALSO)
    changed = change_fields(demo(), {"validation.num_worst": 3})
    assert differing(demo(), changed) == {"validation.num_worst": 3}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("every_epochs", 0),
        ("num_gpus", -1.0),
        ("num_cpus", 0.0),
        ("num_worst", -1),
        ("num_worst", 257),
        *(("also", also) for also in (("x",), ("=x",), ("a=",), ("a=x", "a=y"))),
        *(("also", also) for also in (("raw=x",), ("v2_raw=x",), ("a/b=x",))),
    ],
)
def test_a_bad_value_is_refused_by_name(name: str, value: Any) -> None:
    option = f"--validation.{name.replace('_', '-')}"
    with pytest.raises(ValueError, match=f"expected .* got .*; set {option}"):
        Validation(**{name: value})


def test_a_run_in_one_process_has_nothing_to_evaluate_beside() -> None:
    beside = Validation(asynchronous=True)
    alone = Scale(num_workers=0)
    with pytest.raises(ValueError, match=r"leave out --validation\.asynchronous"):
        dataclasses.replace(demo(), validation=beside, scale=alone)
    assert dataclasses.replace(demo(), validation=beside).validation.asynchronous


def test_the_last_epoch_is_always_evaluated() -> None:
    every = Validation(every_epochs=3)
    due = [epoch for epoch in range(1, 9) if every.is_due(epoch, num_epochs=8)]
    assert due == [3, 6, 8]


def test_paths_are_moved_and_names_stay() -> None:
    wanted = Validation(real_labels="real.json", also=("v2=v2", "a=x/a=b"))
    moved = wanted.moved(lambda path: f"/data/{path}")
    assert moved.real_labels == "/data/real.json"
    assert moved.also_at == {"v2": "/data/v2", "a": "/data/x/a=b"}
    assert Validation().moved(lambda path: f"/data/{path}") == Validation()
