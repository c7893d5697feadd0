"""Make checkpoints that are exported, and read what docs/using.md says of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor

from pipelines.checkpoints.manifest import load_model
from pipelines.checkpoints.snapshot import save_checkpoint
from pipelines.config import Data, Model, Run
from pipelines.data.batch import Position
from pipelines.export.command import Options, export_checkpoint
from pipelines.training.model import build_model
from pipelines.transforms.decoder import decode_eval
from tests.small_runs import OPTIM

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/using.md").read_text()
TINY: Mapping[str, Any] = MappingProxyType(
    {"depth": 1, "embed_dim": 32, "num_heads": 2}
)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A run and its last checkpoint."""

    run: Run
    checkpoint: Path

    def logits(self, pixels: Tensor, *, ema: bool = True) -> Tensor:
        """Compute the logits of the checkpoint's own model, without any export."""
        model, _ = load_model(self.checkpoint, ema=ema)
        with torch.inference_mode():
            return model(pixels)

    def pixels(self, *encoded: bytes) -> Tensor:
        """Decode images as evaluation does."""
        size = self.run.model.img_size
        return decode_eval(encoded, data=self.run.data, img_size=size)


def untrained(folder: Path, settings: Model, *, noise: float = 0.1) -> Trained:
    """Write a checkpoint of three classes whose logits differ between images."""
    folder.mkdir()
    torch.manual_seed(0)
    model = build_model(settings, num_classes=3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=noise)
    data = Data(train="t", val="v", batch_size=8, crop_pct=0.8, mean=(0.4, 0.5, 0.6))
    run = Run(recipe="test", model=settings, data=data, optim=OPTIM)
    save_checkpoint(
        folder,
        run=run,
        position=Position(epoch=1, step=9),
        classes=("a", "b", "c"),
        metrics={"val/top1": float("nan"), "loss": 1.5},
        model=model,
        ema=None,
        optimizer=None,
    )
    return Trained(run=run, checkpoint=folder)


def refused(subject: Trained, out: Path, match: str, **settings: Any) -> None:
    options = Options(checkpoint=str(subject.checkpoint), out=str(out), **settings)
    before = sorted(out.parent.iterdir())
    with pytest.raises(ValueError, match=match) as caught:
        export_checkpoint(options)
    assert "\n" not in str(caught.value)
    assert sorted(out.parent.iterdir()) == before


def blocks(heading: str) -> list[str]:
    """Return the Python blocks below a heading of docs/using.md."""
    part = re.split(r"\n##", PAGE.partition(f"\n{heading}\n")[2])[0]
    return re.findall(r"```python\n(.*?)```", part, re.DOTALL)
