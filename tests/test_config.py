"""Runs as dataclasses: refused when built, and the same after JSON."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import sovit
from pipelines.config import (
    Augment,
    Data,
    Model,
    Optim,
    Probe,
    Run,
    Scale,
    Schedule,
)
from pipelines.config.serialization import flat_params, from_json, to_json

MODEL = Model(
    name="so_vit_7", pooling=sovit.Pooling(reduced_dim=(24, 12)), kwargs={"depth": 4}
)
DATA = Data(train="t", val="v", batch_size=64)
OPTIM = Optim(lr=1e-3, num_epochs=10)
AUGMENT = Augment()
RANDOM = Augment(auto_augment="rand-m9-mstd0.5-inc1")
RUN = Run(recipe="r", model=MODEL, data=DATA, optim=OPTIM)

BAD = [
    (MODEL, "img_size", 0),
    (MODEL, "drop_path_rate", 1.0),
    (MODEL, "drop_path_rate", float("nan")),
    (MODEL, "init_triangle", "lower"),
    *((DATA, name, 0) for name in ("batch_size", "eval_batch_size", "shuffle_rows")),
    (DATA, "num_decode_threads", 0),
    (DATA, "num_prefetch_batches", 0),
    (AUGMENT, "crop_scale", (0.0, 1.0)),
    (AUGMENT, "crop_scale", (0.5, 0.4)),
    (AUGMENT, "crop_scale", (0.5, 1.1)),
    (AUGMENT, "crop_ratio", (2.0, 1.0)),
    (DATA, "crop_pct", 0.0),
    (DATA, "crop_pct", 1.01),
    (AUGMENT, "hflip", 1.5),
    (AUGMENT, "color_jitter", 1.5),
    (RANDOM, "color_jitter", 0.4),
    (AUGMENT, "re_prob", -0.1),
    (AUGMENT, "re_count", 0),
    (AUGMENT, "num_repeats", 0),
    (DATA, "std", (0.2, 0.0, 0.2)),
    (DATA, "hw_decoder_load", 1.5),
    (DATA, "max_bad_share", -0.5),
    (DATA, "read_ahead_mb", 0),
    (DATA, "reader_label", "role"),
    (OPTIM, "lr", 0.0),
    (OPTIM, "lr", float("nan")),
    (OPTIM, "num_epochs", 0),
    (OPTIM, "cooldown_epochs", -1),
    (OPTIM, "warmup_epochs", 11),
    (OPTIM, "warmup_lr", -1e-6),
    (OPTIM, "min_lr", -1.0),
    (OPTIM, "betas", (0.9, 1.0)),
    (OPTIM, "eps", 0.0),
    (OPTIM, "num_accumulation", 0),
    (OPTIM, "label_smoothing", 1.0),
    (OPTIM, "mixup", -0.1),
    (OPTIM, "cutmix", -0.1),
    (OPTIM, "mix_switch", 2.0),
    (OPTIM, "ema_decay", 1.0),
    (OPTIM, "weight_decay", -1.0),
    (OPTIM, "clip_grad_norm", -1.0),
    (OPTIM, "momentum", 1.0),
    (OPTIM, "classifier_lr_scale", 0.0),
    (OPTIM, "layer_decay", 0.0),
    (OPTIM, "layer_decay", 1.1),
    (Probe(), "every_steps", -1),
    (Probe(), "min_step_size", 76.0),
    (Probe(), "num_step_sizes", 1),
    (RUN.data, "num_readers", 0),
    (Scale(), "num_workers", -1),
    (Scale(), "cpus_per_worker", 0.0),
    (Scale(), "max_failures", -1),
    (RUN, "log_every_steps", 0),
    (RUN, "num_checkpoints_to_keep", 0),
    (RUN, "checkpoint_every_steps", -1),
    (RUN, "audit_log", "s3://bucket/keys"),
    (RUN, "checkpoint_every_minutes", -1.0),
]


@pytest.mark.parametrize(
    ("good", "name", "value"), BAD, ids=[f"{name}={value}" for _, name, value in BAD]
)
def test_a_bad_value_is_refused_by_name(good: Any, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=r"expected .* got .*; set --") as caught:
        dataclasses.replace(good, **{name: value})
    message = str(caught.value)
    assert f"{name}: expected" in message
    assert repr(value) in message
    assert name.replace("_", "-") in message


def test_a_process_that_trains_alone_has_the_whole_batch() -> None:
    alone = dataclasses.replace(RUN, scale=Scale(num_workers=0))
    one = dataclasses.replace(RUN, scale=Scale(num_workers=1))
    assert alone.micro_batch_size == one.micro_batch_size
    assert (alone.scale.is_local, one.scale.is_local) == (True, False)


def test_repeats_must_fit_a_batch_and_a_policy_be_one() -> None:
    with pytest.raises(ValueError, match=r"--augment\.num-repeats"):
        dataclasses.replace(RUN, augment=Augment(num_repeats=3))
    with pytest.raises(ValueError, match="rand-m9"):
        Augment(auto_augment="randy-m9")


def test_workers_need_images_to_share() -> None:
    for num_workers, num_accumulation in ((33, 1), (11, 3)):
        scale = Scale(num_workers=num_workers)
        optim = dataclasses.replace(OPTIM, num_accumulation=num_accumulation)
        with pytest.raises(ValueError, match=r"--data\.batch-size"):
            dataclasses.replace(RUN, scale=scale, optim=optim)
    data = dataclasses.replace(DATA, eval_batch_size=3)
    with pytest.raises(ValueError, match=r"--data\.eval-batch-size"):
        dataclasses.replace(RUN, data=data, scale=Scale(num_workers=4))


@given(
    batch_size=st.integers(1, 300), num_workers=st.integers(1, 8), num=st.integers(1, 4)
)
def test_a_micro_batch_holds_the_largest_share(
    batch_size: int, num_workers: int, num: int
) -> None:
    if batch_size < 2 * num * num_workers:
        return
    run = dataclasses.replace(
        RUN,
        data=dataclasses.replace(DATA, batch_size=batch_size),
        optim=dataclasses.replace(OPTIM, num_accumulation=num),
        scale=Scale(num_workers=num_workers),
    )
    assert run.micro_batch_size * num * num_workers >= batch_size
    assert (
        run.micro_batch_size - 1
    ) * num * num_workers < batch_size + num_workers * num


def test_fewer_workers_take_more_micro_batches_of_the_same_size() -> None:
    data = dataclasses.replace(DATA, batch_size=64)
    optim = dataclasses.replace(OPTIM, num_accumulation=2)
    run = dataclasses.replace(RUN, data=data, optim=optim, scale=Scale(num_workers=8))
    assert run.micro_batch_size == 4
    assert [run.num_micro(num) for num in (8, 7, 4, 2, 1)] == [2, 3, 4, 8, 16]


def test_epochs_add_up() -> None:
    assert dataclasses.replace(OPTIM, cooldown_epochs=3).total_epochs == 13


@pytest.mark.parametrize("pooling", [None, MODEL.pooling])
def test_a_run_comes_back_from_json(pooling: sovit.Pooling | None) -> None:
    model = dataclasses.replace(MODEL, pooling=pooling, kwargs={"a": 1, "b": "x"})
    run = dataclasses.replace(
        RUN,
        model=model,
        data=dataclasses.replace(DATA, reader_label="role=data"),
        augment=dataclasses.replace(AUGMENT, crop_scale=(0.25, 0.75)),
        optim=dataclasses.replace(
            OPTIM,
            betas=(0.8, 0.9),
            lr=1 / 3,
            schedule=Schedule(kind="step", milestones=(30.0, 60.0), gamma=0.2),
        ),
        probe=Probe(every_steps=500, min_step_size=0.045, stem="bn1"),
        scale=Scale(num_workers=3, use_gpu=True),
        published_top1=82.3,
    )
    again = from_json(to_json(run))
    assert again == run
    assert to_json(again) == to_json(run)


def test_json_of_before_schedules_probes_and_mirrors_is_read() -> None:
    raw = json.loads(to_json(RUN))
    for name in ("schedule", "optimizer", "momentum", "decay_all"):
        del raw["optim"][name]
    del raw["optim"]["classifier_lr_scale"], raw["model"]["init_from"]
    del raw["data"]["eval_mirror"], raw["probe"]
    assert from_json(json.dumps(raw)) == RUN


def test_json_with_fields_by_their_former_names_is_read() -> None:
    validation = dataclasses.replace(RUN.validation, asynchronous=True)
    run = dataclasses.replace(RUN, audit_log="keys", validation=validation)
    raw = json.loads(to_json(run))
    raw["key_log"] = raw.pop("audit_log")
    raw["validation"]["beside"] = raw["validation"].pop("asynchronous")
    assert from_json(json.dumps(raw)) == run


@pytest.mark.parametrize(("flag", "load"), [(True, 0.0), (False, 0.65)])
def test_json_of_before_pixels_were_deterministic_is_read(
    flag: bool, load: float
) -> None:
    raw = json.loads(to_json(RUN))
    assert RUN.data.hw_decoder_load == 0
    raw["data"] |= {"deterministic": flag, "hw_decoder_load": 0.65}
    assert from_json(json.dumps(raw)).data == dataclasses.replace(
        RUN.data, hw_decoder_load=load
    )


def test_json_of_another_version_is_refused() -> None:
    raw = json.loads(to_json(RUN))
    unknown = raw | {"data": raw["data"] | {"colour": 1}}
    missing = {name: value for name, value in raw.items() if name != "model"}
    for changed in (unknown, missing, raw | {"model": None}, []):
        with pytest.raises(ValueError, match="with the version that wrote it"):
            from_json(json.dumps(changed))
    bad = raw | {"seed": 1, "log_every_steps": 0}
    with pytest.raises(ValueError, match="log_every_steps"):
        from_json(json.dumps(bad))


def test_flat_names_put_the_pooling_first() -> None:
    flat = flat_params(RUN)
    assert flat["pooling.reduced_dim"] == (24, 12)
    assert flat["model.name"] == "so_vit_7"
    assert flat["model.kwargs.depth"] == 4
    assert flat["optim.lr"] == 1e-3
    assert flat["recipe"] == "r"
    assert not any(isinstance(value, dict) for value in flat.values())
    bare = dataclasses.replace(RUN, model=dataclasses.replace(MODEL, pooling=None))
    assert flat_params(bare)["pooling"] is None
