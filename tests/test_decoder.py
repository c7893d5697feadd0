"""Decoders are chosen by the settings, and pixels follow the epoch."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any

import pytest
import torch

from pipelines.data.prefetch import taken_ahead
from pipelines.hardware.device import has_gpu, is_gpu
from pipelines.transforms.cpu import HostDecoder, Threads
from pipelines.transforms.decoder import BatchDecoder, make_decoder
from pipelines.transforms.fault_isolation import SafeDecoder
from pipelines.transforms.sampling import draw
from tests.odd_images import GOOD, bad_images, odd_images
from tests.small_sets import jpeg
from tests.test_dali import decoder_of, draws_for, needs_dali
from tests.test_salvage import CPU, SETTINGS, rows_with, settings_of


def test_dali_that_is_asked_for_and_missing_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--data\.decoder torch"):
        make_decoder(settings_of("dali"), batch_size=8, device=CPU)
    assert isinstance(make_decoder(SETTINGS, batch_size=8, device=CPU), HostDecoder)


def test_training_follows_the_epoch_and_evaluation_does_not() -> None:
    rows = rows_with([jpeg(i, size=(80, 60)) for i in range(4)])
    for train in (True, False):
        settings = dataclasses.replace(SETTINGS, train=train)
        decode = BatchDecoder(settings, num_rows=4, device=CPU)
        seen = [decode(rows, epoch).images.clone() for epoch in (0, 1, 0)]
        assert torch.equal(seen[0], seen[2])
        assert torch.equal(seen[0], seen[1]) != train


def test_memory_is_lent_again_only_when_nobody_looks_at_it() -> None:
    decode = BatchDecoder(settings_of("torch"), num_rows=2, device=CPU)
    rows = rows_with([jpeg(1, size=(80, 60))] * 2)
    first = decode(rows, 0).images
    view, address, kept = first[1:, :1], first.data_ptr(), first.clone()
    second = decode(rows, 1).images
    assert second.data_ptr() != address
    del first
    assert decode(rows, 2).images.data_ptr() not in (address, second.data_ptr())
    assert torch.equal(view, kept[1:, :1])
    del view
    assert decode(rows, 3).images.data_ptr() == address


@pytest.mark.parametrize("num_threads", [1, 3])
def test_threads_do_every_place_once_and_raise(num_threads: int) -> None:
    seen: list[int] = []
    threads = Threads(num_threads)
    threads.each(seen.append, num=50)
    assert sorted(seen) == list(range(50))

    def fail(at: int) -> None:
        if at == 33:
            raise KeyError(at)

    with pytest.raises(KeyError, match="33"):
        threads.each(fail, num=50)
    threads.each(fail, num=20)


DEVICES = [CPU, pytest.param(torch.device("cuda", 0), marks=pytest.mark.gpu)]
EVAL = dataclasses.replace(SETTINGS, img_size=64, train=False)


def graph_on(device: torch.device) -> Any:
    """Give what a GPU runs, on a device."""
    if is_gpu(device) and not has_gpu():
        pytest.skip("needs a CUDA device")
    from pipelines.transforms.dali import DaliDecoder

    return DaliDecoder(EVAL, batch_size=8, device=device)


@needs_dali
@pytest.mark.parametrize("device", DEVICES)
def test_a_gpu_gives_the_pixels_of_the_cpu(device: torch.device) -> None:
    encoded = [jpeg(i, size=(80, 60)) for i in range(8)]
    views = rows_with(encoded).views
    for train in (True, False):
        draws = draws_for(encoded, train=train, img_size=64)
        decode = graph_on(device)
        found: Any = decode(views, draws).cpu().float()
        wanted = decoder_of("dali")(encoded, draws).float()
        assert (found - wanted).abs().mean() < 1
        assert torch.equal(decode(views, draws).cpu().float(), found)


@needs_dali
@pytest.mark.parametrize("device", DEVICES)
def test_a_gpus_pixels_do_not_depend_on_the_batch(device: torch.device) -> None:
    encoded = [jpeg(i, size=(80 + 9 * i, 60)) for i in range(24)]
    views = rows_with(encoded).views
    draws = draws_for(encoded, train=True, img_size=64)
    decode = graph_on(device)
    found: dict[int, torch.Tensor] = {}
    for order, num in ((range(24), 8), (range(23, -1, -1), 5), (range(24), 1)):
        for start in range(0, 24, num):
            rows = list(order[start : start + num])
            pixels = decode([views[at] for at in rows], draws.take(rows)).cpu()
            for at, image in zip(rows, pixels, strict=True):
                assert torch.equal(found.setdefault(at, image), image)


@needs_dali
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["bad", "odd"])
def test_a_gpu_finds_the_images_that_the_cpu_finds(
    device: torch.device, kind: str
) -> None:
    """Two batches on their way, a damaged or an odd image in each."""
    images = bad_images() if kind == "bad" else odd_images()
    graph = graph_on(device)
    decode = SafeDecoder(graph.start)
    batches = [
        rows_with([GOOD, image, GOOD], first_id=10 * at)
        for at, image in enumerate(images.values())
    ]
    started = (
        decode.start(rows, draw(rows, settings=EVAL, epoch=0)) for rows in batches
    )
    ahead = taken_ahead(started, num_ahead=graph.num_ahead)
    salvaged = {name: one() for name, one in zip(images, ahead, strict=True)}
    reasons = {name: list(one.reasons) for name, one in salvaged.items()}
    assert reasons == dict.fromkeys(images, [1] if kind == "bad" else [])
    good: list[Any] = []
    for one in salvaged.values():
        assert one.pixels is not None
        good += [one.pixels[0], one.pixels[-1]]
    assert all(torch.equal(image, good[0]) for image in good)
