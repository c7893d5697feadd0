"""Decoders are chosen by the settings, and pixels follow the epoch."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any

import pytest
import torch

from pipelines.pixels.decoder import BatchDecoder, make_decoder
from pipelines.pixels.host import HostDecoder, Threads
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


@needs_dali
@pytest.mark.gpu
def test_a_gpu_gives_the_pixels_of_the_cpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    from pipelines.pixels.dali import DaliDecoder

    encoded = [jpeg(i, size=(80, 60)) for i in range(8)]
    views = rows_with(encoded).views
    for train in (True, False):
        draws = draws_for(encoded, train=train, img_size=64)
        data = dataclasses.replace(SETTINGS.data, deterministic=True)
        settings = dataclasses.replace(SETTINGS, data=data, img_size=64, train=False)
        decode = DaliDecoder(settings, batch_size=8, device=torch.device("cuda", 0))
        found: Any = decode(views, draws).cpu().float()
        wanted = decoder_of("graph")(encoded, draws).float()
        assert (found - wanted).abs().mean() < 1
        assert torch.equal(decode(views, draws).cpu().float(), found)
