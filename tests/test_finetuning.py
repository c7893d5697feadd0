"""From a checkpoint or a released file to other classes and a larger image, whole."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pipelines.checkpoints.manifest import load_model
from pipelines.checkpoints.snapshot import EMA_FILE, MODEL_FILE
from pipelines.config import Run
from pipelines.config.serialization import to_json
from pipelines.driver.fit import fit
from pipelines.train import _main
from pipelines.training.model import build_model
from sovit.architectures.vit import sinusoid_table
from tests.demo_runs import RECIPE, small_demo
from tests.small_sets import write_set
from tests.test_initial_files import official


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """Hold a run on ten classes at 32 pixels, and where its weights are."""

    run: Run
    checkpoint: Path
    weights: dict[str, Tensor]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("start")
    run = small_demo(folder, num_epochs=1, num_workers=0, token_embed="resnet")
    checkpoint = fit(run, name="start").checkpoint
    path = Path(str(checkpoint))
    return Trained(run=run, checkpoint=path, weights=load_file(path / EMA_FILE))


def tune(
    trained: Trained, start: Path, folder: Path, *options: str, name: str = "tuned"
) -> dict[str, Tensor]:
    """Fine-tune as people do, on four classes at 48 pixels; give the weights.

    The rate is a trillionth, for the classifier a hundredth.
    """
    shards = write_set(folder / "set", groups=[[16, 16]], num_classes=4)
    (folder / "run.json").write_text(to_json(trained.run))
    (folder / "recipe.py").write_text(RECIPE)
    command = f"{folder}/recipe.py:small --name {name}"
    command += f" --model.init-from {start} --model.img-size 48"
    command += f" --data.train {shards} --data.val {shards}"
    command += " --optim.num-epochs 1 --optim.warmup-epochs 0 --optim.weight-decay 0"
    command += " --optim.lr 1e-12 --optim.min-lr 0 --optim.classifier-lr-scale 1e10"
    _main([*command.split(), *options])
    return load_file(Path(trained.run.storage, name, "epoch_0001", MODEL_FILE))


def check_tuned(tuned: dict[str, Tensor], trained: Trained) -> None:
    """See that all but the classifier is what training started from."""
    torch.manual_seed(trained.run.seed)
    model = dataclasses.replace(trained.run.model, img_size=48)
    fresh = build_model(model, num_classes=4).state_dict()
    moved = ("running_mean", "running_var", "num_batches_tracked")
    assert tuned.keys() == fresh.keys()
    for name, tensor in trained.weights.items():
        if name.startswith("head.fc_"):
            # Three steps of Adam, a hundredth each at most.
            assert 1e-3 < (tuned[name] - fresh[name]).abs().max() < 0.04
        elif name == "pos_embed":
            assert torch.equal(tuned[name], sinusoid_table(10, 32))
        elif not name.endswith(moved):
            torch.testing.assert_close(tuned[name], tensor, rtol=0, atol=1e-9)


def test_a_checkpoint_is_tuned_to_other_classes_and_a_larger_image(
    trained: Trained, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="pipelines"):
        tuned = tune(trained, trained.checkpoint, tmp_path)
    check_tuned(tuned, trained)
    said = [line for line in caplog.messages if line.startswith("starting from")]
    assert said == [
        f"starting from the moving average of {trained.checkpoint}; the classifier "
        "starts fresh: it was trained for other classes"
    ]
    model, manifest = load_model(Path(trained.run.storage, "tuned", "epoch_0001"))
    assert manifest.run.optim.classifier_lr_scale == 1e10
    assert model(torch.randn(2, 3, 48, 48)).shape == (2, 4)


def test_a_released_file_is_tuned_to_other_classes_and_a_larger_image(
    trained: Trained, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, _ = load_model(trained.checkpoint)
    path = tmp_path / "So_ViT_7.pth.tar"
    torch.save({"arch": "So_vit_7", "state_dict": official(model)}, path)
    with caplog.at_level("INFO", logger="pipelines"):
        tuned = tune(trained, path, tmp_path, name="released")
    check_tuned(tuned, trained)
    said = [line for line in caplog.messages if line.startswith("starting from")]
    assert said == [
        f"starting from the weights of {path}; the classifier starts fresh: it names "
        "none of its 10 classes, and these are not the 1,000 of ImageNet-1K in the "
        "order of their WordNet ids"
    ]


def test_what_cannot_be_tuned_leaves_nothing_behind(
    trained: Trained, tmp_path: Path
) -> None:
    for option, message in (
        ("--model.img-size=40", "img_size: expected a multiple of 16"),
        ("--model.kwargs.depth=2", r"tensors missing: blocks\.1\..* and \d+ more; set"),
        (f"--model.init-from={tmp_path}/none.pth", "expected a checkpoint folder with"),
    ):
        folder = tmp_path / option.strip("-").partition("=")[0]
        with pytest.raises(ValueError, match=message):
            tune(trained, trained.checkpoint, folder, option, name="none")
        assert not Path(trained.run.storage, "none").exists()
