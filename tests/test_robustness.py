"""Robustness: scores by hand, and a checkpoint measured end to end."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models import AlexNet_Weights

from pipelines import evaluate
from pipelines.checkpoints.snapshot import save_checkpoint
from pipelines.config import Augment, Data, Model, PixelSettings, Run
from pipelines.data.batch import Position
from pipelines.evaluate import Options, evaluate_checkpoint
from pipelines.robustness.corruptions import CORRUPTIONS, Corruption, corrupt
from pipelines.robustness.options import Robustness
from pipelines.robustness.perturbations import NOISES, Perturbation, frames
from pipelines.robustness.scores import (
    ALEXNET_CLEAN_ERROR,
    ALEXNET_ERRORS,
    corruption_scores,
    flip_scores,
)
from pipelines.training.model import build_model
from pipelines.transforms.decoder import decode_eval
from pipelines.transforms.normalize import Levels
from tests.small_runs import small_run
from tests.small_sets import jpeg, write_set

IMG_SIZE = 32
NUM_IMAGES, BAD_ROW = 24, 5
SIZE = (60, 44)
CLASSES = ("c0", "c1", "c2")
VIT = Model(
    name="test_vit",
    img_size=IMG_SIZE,
    kwargs={"img_size": IMG_SIZE, "patch_size": 4, "depth": 2, "embed_dim": 32},
)
AUGMIX_ALEXNET = [
    *(88.6428, 89.4468, 92.2640, 81.9880, 82.6268, 78.5948, 79.8360, 86.6816),
    *(82.6572, 81.9324, 56.4592, 85.3204, 64.6056, 71.7840, 60.6500),
]
ASKED = Robustness(
    corruptions=("gaussian_noise", "zoom_blur"),
    severities=(1, 5),
    perturbations=("shot_noise", "scale"),
    num_frames=8,
)


def test_alexnet_is_100_percent_of_itself() -> None:
    found = corruption_scores(ALEXNET_ERRORS, clean_error=ALEXNET_CLEAN_ERROR)
    assert found["mce"] == pytest.approx(100)
    assert found["relative_mce"] == pytest.approx(100)
    means = {name: np.mean(list(of.values())) for name, of in ALEXNET_ERRORS.items()}
    assert tuple(means) == CORRUPTIONS
    assert found["mean_error"] == pytest.approx(np.mean(list(means.values())))
    # The means that AugMix's published evaluation has, to 0.01 for our rounding.
    assert [*means.values()] == pytest.approx(AUGMIX_ALEXNET, abs=0.01)
    # The weights that the authors took, by what torchvision says of them.
    stated = AlexNet_Weights.IMAGENET1K_V1.meta["_metrics"]["ImageNet-1K"]["acc@1"]
    assert round(100 - stated, 1) == ALEXNET_CLEAN_ERROR


def test_scores_by_hand() -> None:
    # AlexNet: fog 67.47 and 94.50 at 1 and 5, brightness 45.14 and 72.44.
    errors: Any = {"fog": {1: 30.0, 5: 50.0}, "brightness": {1: 20.0, 5: 40.0}}
    found = corruption_scores(errors, clean_error=15.0)
    assert found["mean_error"] == pytest.approx(35)
    fog, bright = 80 / (67.47 + 94.50), 60 / (45.14 + 72.44)
    assert found["mce"] == pytest.approx(100 * (fog + bright) / 2)
    fog, bright = 50 / (67.47 + 94.50 - 87), 30 / (45.14 + 72.44 - 87)
    assert found["relative_mce"] == pytest.approx(100 * (fog + bright) / 2)
    flips: Any = {"tilt": 6.0, "snow": 2.0}
    assert flip_scores(flips) == {"mfp": 4.0}
    reference: Any = {"tilt": 12.0, "snow": 8.0, "scale": 1.0}
    assert flip_scores(flips, reference=reference)["mfr"] == pytest.approx(37.5)
    assert flip_scores(flips, reference=flips)["mfr"] == pytest.approx(100)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=(pytest.mark.gpu, needs_gpu))]
)
@pytest.mark.parametrize("std", [(0.229, 0.224, 0.225), (1.0, 0.5, 0.01)])
def test_levels_come_back_bit_for_bit(
    std: tuple[float, float, float], device: str
) -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    pixels = np.concatenate([levels, levels[:, ::-1], levels[:, :, ::-1]], axis=3)
    settings = PixelSettings(
        data=Data(train="", val="", batch_size=1, std=std),
        augment=Augment(),
        img_size=16,
        seed=0,
        train=False,
    )
    between = Levels(settings, device=torch.device(device), num_threads=1)
    images = between.normalized(pixels)
    mean = torch.tensor(settings.data.mean)
    wanted = (torch.from_numpy(pixels) / 255 - mean) / torch.tensor(std)
    torch.testing.assert_close(images.cpu(), wanted.permute(0, 3, 1, 2))
    found = between.of(images)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, pixels)
    assert torch.equal(between.normalized(found), images)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Written:
    """Hold a small set with one bad image, and a checkpoint over it."""

    run: Run
    checkpoint: str
    model: nn.Module

    def options(self, *, batch_size: int = 10, **asked: Any) -> Options:
        robustness = dataclasses.replace(ASKED, **asked)
        return Options(
            checkpoint=self.checkpoint,
            shards=self.run.data.val,
            batch_size=batch_size,
            decoder="torch",
            num_decode_threads=2,
            device="cpu",
            robustness=robustness,
        )


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    folder: Path = tmp_path_factory.mktemp("robustness")

    def image(number: int, *, size: tuple[int, int]) -> bytes:
        whole = jpeg(number, size=size)
        return whole[:-40] if number == BAD_ROW else whole

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("tests.small_sets.jpeg", image)
        address = write_set(folder / "set", groups=[[10, 7], [7]], size=SIZE)
    run = small_run(address, model=VIT)
    run = dataclasses.replace(
        run, data=dataclasses.replace(run.data, max_bad_share=0.1)
    )
    torch.manual_seed(0)
    model = build_model(VIT, num_classes=len(CLASSES)).eval()
    with torch.no_grad():
        # Untrained, it would give all images one class.
        model.get_submodule("head").bias -= model(clean(run)).mean(dim=0)
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir()
    save_checkpoint(
        checkpoint,
        run=run,
        position=Position(epoch=1, step=1),
        classes=CLASSES,
        metrics={},
        model=model,
        ema=None,
        optimizer=None,
    )
    return Written(run=run, checkpoint=str(checkpoint), model=model)


ROWS = [row for row in range(NUM_IMAGES) if row != BAD_ROW]
LABELS = torch.tensor(ROWS) % len(CLASSES)


def clean(run: Run, *, img_size: int = IMG_SIZE, **data: Any) -> Tensor:
    """Decode the good images as evaluation does, by other means than its supply."""
    return decode_eval(
        [jpeg(row, size=SIZE) for row in ROWS],
        data=dataclasses.replace(run.data, **data),
        img_size=img_size,
    )


def pixels_of(images: Tensor, run: Run) -> np.ndarray:
    mean, std = torch.tensor(run.data.mean), torch.tensor(run.data.std)
    values = images.permute(0, 2, 3, 1) * std + mean
    return (255 * values).round().to(torch.uint8).numpy()


def predicted(written: Written, pixels: list[np.ndarray]) -> Tensor:
    mean, std = torch.tensor(written.run.data.mean), torch.tensor(written.run.data.std)
    images = (torch.from_numpy(np.stack(pixels)) / 255 - mean) / std
    with torch.no_grad():
        return written.model(images.permute(0, 3, 1, 2)).argmax(dim=1)


@pytest.fixture(scope="module")
def result(written: Written) -> dict[str, Any]:
    return evaluate_checkpoint(written.options())


def test_the_clean_result_is_the_one_without(
    written: Written, result: dict[str, Any]
) -> None:
    plain = evaluate_checkpoint(
        dataclasses.replace(written.options(), robustness=Robustness())
    )
    assert plain["num_images"] == NUM_IMAGES - 1
    assert plain["num_bad"] == 1
    assert plain == {name: result[name] for name in plain}
    assert set(result) - set(plain) == {"corruptions", "perturbations"}


def test_errors_are_of_the_corrupted_crops(
    written: Written, result: dict[str, Any]
) -> None:
    pixels = pixels_of(clean(written.run), written.run)
    errors = result["corruptions"]["errors"]
    wanted: dict[Corruption, dict[int, float]] = {}
    for corruption, severity in itertools.product(ASKED.corruptions or (), (1, 5)):
        changed = [
            corrupt(image, corruption=corruption, severity=severity, seed=0, row_id=row)
            for image, row in zip(pixels, ROWS, strict=True)
        ]
        wrong = predicted(written, changed) != LABELS
        wanted.setdefault(corruption, {})[severity] = 100 * float(wrong.float().mean())
    assert {name: pytest.approx(of) for name, of in wanted.items()} == errors
    assert len({error for of in wanted.values() for error in of.values()}) > 1
    scores = corruption_scores(errors, clean_error=100 - result["top1"])
    assert scores == {name: result["corruptions"][name] for name in scores}


def test_flips_are_of_frames_from_beyond_the_crop(
    written: Written, result: dict[str, Any]
) -> None:
    # 32 / 0.875 is 36.57: evaluation resizes to 36 and crops.
    images = clean(written.run, img_size=36, crop_pct=1.0)
    pixels = pixels_of(images, written.run)
    inner = pixels_of(clean(written.run), written.run)
    np.testing.assert_array_equal(pixels[:, 2:-2, 2:-2], inner)
    flips = result["perturbations"]["flips"]
    names: tuple[Perturbation, ...] = ASKED.perturbations or ()
    for name in names:
        sequences = [
            list(
                frames(
                    image,
                    perturbation=name,
                    img_size=IMG_SIZE,
                    num_frames=8,
                    seed=0,
                    row_id=row,
                )
            )
            for image, row in zip(pixels, ROWS, strict=True)
        ]
        shown = [
            predicted(written, [frame[at] for frame in sequences]) for at in range(8)
        ]
        before = [shown[0]] * 7 if name in NOISES else shown[:7]
        flipped = [
            (a != b).float().mean() for a, b in zip(before, shown[1:], strict=True)
        ]
        assert flips[name] == pytest.approx(100 * float(torch.stack(flipped).mean()))
    assert flips["scale"] > 0
    assert result["perturbations"]["mfp"] == pytest.approx(np.mean([*flips.values()]))


def test_nothing_depends_on_the_batch_or_what_else_is_asked(
    written: Written, result: dict[str, Any]
) -> None:
    other = evaluate_checkpoint(
        written.options(batch_size=23, corruptions=("zoom_blur",), severities=(5, 5))
    )
    assert other["perturbations"] == result["perturbations"]
    of_zoom = result["corruptions"]["errors"]["zoom_blur"]
    assert other["corruptions"]["errors"] == {"zoom_blur": {5: of_zoom[5]}}
    stored = evaluate_checkpoint(
        written.options(corruption_jpeg=5, perturbations=None, corruption_seed=9)
    )
    assert "perturbations" not in stored
    assert stored["corruptions"]["errors"] != result["corruptions"]["errors"]


def test_the_command_prints_a_table_and_keeps_it(
    written: Written, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept, plot = tmp_path / "result.json", tmp_path / "errors.png"
    arguments = [written.checkpoint, written.run.data.val, "--json", str(kept)]
    arguments += ["--decoder", "torch", "--device", "cpu", "--num-frames", "2"]
    arguments += ["--perturbations", "scale", "--plot", str(plot)]
    evaluate._main([*arguments, "--corruptions", "fog", "--severities", "2", "4"])
    said = capsys.readouterr().out
    result = json.loads(kept.read_text())
    fog = result["corruptions"]["errors"]["fog"]
    mean = (fog["2"] + fog["4"]) / 2
    row = ["fog", *(f"{value:.2f}" for value in (fog["2"], fog["4"], mean))]
    assert row in [line.split() for line in said.splitlines()]
    assert f"mCE {result['corruptions']['mce']:.2f} %" in said
    assert "on these 3 classes only the mean error says something" in said
    flips = result["perturbations"]["flips"]["scale"]
    assert ["scale", "2", f"{flips:.3f}"] in [
        line.split() for line in said.splitlines()
    ]
    assert plot.read_bytes().startswith(b"\x89PNG")
    # Held against itself, where it flips at all.
    result["perturbations"]["flips"]["scale"] = 8 * (flips or 1)
    kept.write_text(json.dumps(result))
    evaluate._main([*arguments[:-2], "--json", "", "--flip-reference", str(kept)])
    assert f"mFR {12.5 if flips else 0:.2f} %" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"severities": (0, 1)}, "from 1 to 5, got"),
        ({"severities": ()}, "from 1 to 5, got"),
        ({"num_frames": 1}, "at least 2 frames"),
        ({"corruption_jpeg": 100}, "quality from 1 to 95"),
        ({"corruptions": None, "perturbations": None, "plot": "a.png"}, "to draw"),
    ],
)
def test_what_can_not_be_measured_is_refused(asked: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(ASKED, **asked)


def test_what_lacks_is_said_before_the_work(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = tmp_path / "wrong.json"
    for content in ("{}", "[1]", "no json"):
        wrong.write_text(content)
        with pytest.raises(ValueError, match="set --flip-reference"):
            evaluate_checkpoint(written.options(flip_reference=str(wrong)))
    wrong.write_text(json.dumps({"perturbations": {"flips": {"scale": 1, "tilt": 2}}}))
    with pytest.raises(ValueError, match="without any of shot_noise"):
        evaluate_checkpoint(written.options(flip_reference=str(wrong)))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"scipy, .* extra 'robustness'"):
        evaluate_checkpoint(written.options())
