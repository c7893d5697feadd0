"""Images are answered with class names; a damaged one costs itself alone."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from pipelines.checkpoints.manifest import load_model
from pipelines.checkpoints.snapshot import save_checkpoint
from pipelines.config import Data, Model, Run
from pipelines.data.batch import Position
from pipelines.export.command import Options, export_checkpoint
from pipelines.export.images import Encoded, read_images
from pipelines.predict import _main, load_subject, predict
from pipelines.training.model import build_model
from pipelines.transforms.decoder import decode_eval
from tests.image_kinds import encode
from tests.small_runs import OPTIM
from tests.small_sets import jpeg, write_set

NAMES = {
    "n02123045": "tabby, tabby cat",
    "n01440764": "tench, Tinca tinca",
    "n07753592": "banana",
}
SETTINGS = Model(
    name="so_vit_7", img_size=32, kwargs={"depth": 1, "embed_dim": 32, "num_heads": 2}
)
DATA = Data(train="t", val="v", batch_size=8, crop_pct=0.8, mean=(0.4, 0.5, 0.6))


def write_checkpoint(folder: Path, *, classes: tuple[str, ...], data: Data) -> str:
    """Write an untrained checkpoint that tells images apart."""
    folder.mkdir()
    torch.manual_seed(0)
    model = build_model(SETTINGS, num_classes=len(classes))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    save_checkpoint(
        folder,
        run=Run(recipe="test", model=SETTINGS, data=data, optim=OPTIM),
        position=Position(),
        classes=classes,
        metrics={},
        model=model,
        ema=None,
        optimizer=None,
    )
    return str(folder)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("of") / "checkpoint"
    return write_checkpoint(folder, classes=tuple(NAMES), data=DATA)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Write five images, two in folders below, beside what is none."""
    folder = tmp_path / "photos"
    for number, name in enumerate(["a.jpg", "b.JPEG", "z/c.jpg", "z/y/d.jpg", "e.jpg"]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(jpeg(number, size=(60 + number, 45)))
    (folder / "notes.txt").write_text("of no concern")
    (folder / ".hidden.jpg").write_text("of no concern")
    return folder


def odds_of(checkpoint: str, encoded: bytes, *, data: Data = DATA) -> dict[str, float]:
    """Compute probabilities without the command."""
    model, manifest = load_model(Path(checkpoint))
    pixels = decode_eval([encoded], data=data, img_size=32)
    with torch.inference_mode():
        odds = model(pixels).softmax(-1)[0]
    return dict(zip(manifest.classes, odds.tolist(), strict=True))


def test_it_names_the_classes_of_every_image_in_a_folder(
    checkpoint: str, photos: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    kept = tmp_path / "answers.json"
    _main([checkpoint, str(photos), "--num-top", "2", "--json", str(kept)])
    said = capsys.readouterr().out
    answers = json.loads(kept.read_text())
    names = ["a.jpg", "b.JPEG", "e.jpg", "z/c.jpg", "z/y/d.jpg"]
    assert [answer["image"] for answer in answers] == [str(photos / n) for n in names]
    firsts = []
    for answer in answers:
        wanted = odds_of(checkpoint, Path(answer["image"]).read_bytes())
        order = sorted(wanted, key=lambda label: -wanted[label])[:2]
        assert [top["class"] for top in answer["top"]] == order
        assert [top["name"] for top in answer["top"]] == [NAMES[name] for name in order]
        found = [top["probability"] for top in answer["top"]]
        assert found == pytest.approx([wanted[label] for label in order], rel=1e-4)
        line = f"{100 * found[0]:6.2f} %  {order[0]}  {NAMES[order[0]]}"
        assert f"{answer['image']}\n  {line}\n" in said
        firsts.append(found[0])
    assert max(firsts) - min(firsts) > 0.01  # no answer would do for another image


def test_a_damaged_image_costs_that_image(
    checkpoint: str,
    photos: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    whole = photos / "a.jpg"
    cut, text, gone = photos / "cut.jpg", photos / "text.png", photos / "gone.jpg"
    cut.write_bytes(whole.read_bytes()[:-40])
    text.write_text("not an image")
    paths = [str(path) for path in (cut, whole, text, gone, photos / "e.jpg")]
    with caplog.at_level("WARNING"), pytest.raises(SystemExit) as caught:
        _main([checkpoint, *paths, "--json", "-"])
    assert caught.value.code == 1
    said = capsys.readouterr()
    assert said.err == "sovit-predict: 3 of 5 images left out\n"
    answers = json.loads(said.out)
    assert [answer["image"] for answer in answers] == paths
    assert ["top" in answer for answer in answers] == [False, True, False, False, True]
    assert answers[3]["reason"] == "there is no such file"
    for answer in answers:
        named = f"{answer['image']} left out: {answer.get('reason')}" in caplog.text
        assert named == ("reason" in answer)


def test_shards_are_answered_by_their_keys_in_their_order(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = write_set(tmp_path / "shards", groups=[[20, 17], [30]], size=(40, 33))
    _main([checkpoint, shards, "--num-top", "1", "--json", "-"])
    answers = json.loads(capsys.readouterr().out)
    assert [answer["image"] for answer in answers] == [f"k{i}" for i in range(67)]
    for number in (0, 36, 66):  # from every batch of 32
        wanted = odds_of(checkpoint, jpeg(number, size=(40, 33)))
        (top,) = answers[number]["top"]
        assert wanted[top["class"]] == max(wanted.values())
        assert top["probability"] == pytest.approx(max(wanted.values()), rel=1e-4)


def test_an_exported_folder_answers_as_its_checkpoint(
    tmp_path: Path, photos: Path
) -> None:
    """With the mirrored image too, where evaluation takes it; plain names stay."""
    data = dataclasses.replace(
        DATA, eval_mirror=True, eval_interpolation="bilinear", exif="rotate"
    )
    turned = Image.Exif()
    turned[0x0112] = 6
    lying = encode(np.asarray(Image.open(photos / "a.jpg")), "JPEG", exif=turned)
    (photos / "d.jpg").write_bytes(lying)
    address = write_checkpoint(tmp_path / "c", classes=("a", "b", "c"), data=data)
    out = tmp_path / "exported"
    export_checkpoint(Options(checkpoint=address, out=str(out), formats=("timm",)))
    images = [
        Encoded(name=path.name, content=path.read_bytes())
        for path in sorted(photos.glob("[a-z].jpg"))
    ]
    wanted = list(predict(load_subject(address), images))
    assert list(predict(load_subject(str(out)), images)) == wanted
    assert load_subject(str(out)).data.exif == "rotate"
    assert all(len(answer.top) == 3 for answer in wanted)
    model, _ = load_model(tmp_path / "c")
    pixels = decode_eval([image.content for image in images], data=data, img_size=32)
    with torch.inference_mode():
        odds = ((model(pixels) + model(pixels.flip(-1))) / 2).softmax(-1)
    for answer, row in zip(wanted, odds.tolist(), strict=True):
        found = dict(answer.top)
        assert [found[label] for label in "abc"] == pytest.approx(row, rel=1e-4)
    with pytest.raises(ValueError, match="expected auto for an exported folder"):
        load_subject(str(out), weights="raw")


def test_an_exported_folder_does_not_choose_what_else_is_read(
    checkpoint: str, tmp_path: Path
) -> None:
    out = tmp_path / "exported"
    export_checkpoint(Options(checkpoint=checkpoint, out=str(out), formats=("timm",)))
    file = out / "config.json"
    config = json.loads(file.read_text())
    config["model_args"]["checkpoint_path"] = str(tmp_path / "elsewhere.pth")
    config["model_args"]["pretrained"] = True
    file.write_text(json.dumps(config))
    assert load_subject(str(out)).classes == tuple(NAMES)


@pytest.mark.parametrize("damage", ["config", "classes", "network", "weights", "none"])
def test_a_damaged_export_is_refused(
    checkpoint: str, tmp_path: Path, damage: str
) -> None:
    out = tmp_path / "exported"
    export_checkpoint(Options(checkpoint=checkpoint, out=str(out), formats=("timm",)))
    file, weights = out / "config.json", out / "model.safetensors"
    config: dict[str, Any] = json.loads(file.read_text())
    match = r"config\.json: expected a model's configuration"
    if damage == "config":
        del config["pretrained_cfg"]["mean"]
    elif damage == "classes":
        config["label_names"].pop()
    elif damage == "network":
        config["model_args"]["depth"] = 2
        match = r"model\.safetensors: expected the weights of so_vit_7"
    elif damage == "weights":
        weights.write_bytes(weights.read_bytes()[:-100])
        match = "expected safetensors"
    else:
        weights.unlink()
        match = r"expected model\.safetensors in"
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=match):
        load_subject(str(out))


def test_what_cannot_be_answered_is_said_in_one_line(
    checkpoint: str, photos: Path
) -> None:
    with pytest.raises(ValueError, match="expected images"):
        _main([checkpoint])
    with pytest.raises(ValueError, match="num_top of at least 1"):
        _main([checkpoint, str(photos), "--num-top", "0"])
    with pytest.raises(ValueError, match="expected a checkpoint"):
        _main([str(photos), str(photos)])
    empty = photos / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="got a folder without"):
        _main([checkpoint, str(empty)])
    if not torch.cuda.is_available():
        with pytest.raises(
            ValueError, match="expected a GPU for --device, got a machine"
        ):
            _main([checkpoint, str(photos), "--device", "cuda"])


def test_no_picture_of_a_folder_is_dropped_in_silence(
    photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("f.jfif", "g.mpo", "h.HEIC", "i.avif", "j.gif", "k.pbm", "l.tiff"):
        (photos / name).write_bytes(jpeg(1))
    (photos / "more.TXT").write_text("of no concern")
    (photos / "README").write_text("of no concern")
    (photos / "labels.parquet").write_bytes(b"no shards here")
    with caplog.at_level("INFO"):
        found = [image.name for image in read_images([str(photos)])]
    wanted = "a.jpg b.JPEG e.jpg f.jfif g.mpo h.HEIC i.avif j.gif k.pbm l.tiff"
    assert found[:10] == [str(photos / name) for name in wanted.split()]
    assert len(found) == 12
    assert "2 .txt, 1 without a suffix, 1 .parquet" in caplog.text


def test_links_are_followed_once_and_never_in_a_circle(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = [image.name for image in read_images([str(photos)])]
    (photos / "z" / "up").symlink_to(photos)
    (photos / "z" / "y" / "self").symlink_to(photos / "z" / "y")
    other = tmp_path / "other"
    other.mkdir()
    (other / "o.jpg").write_bytes(jpeg(9))
    (photos / "zz").symlink_to(other)
    with caplog.at_level("INFO"):
        found = [image.name for image in read_images([str(photos)])]
    assert found == [*plain, str(photos / "zz" / "o.jpg")]
    assert caplog.text.count("is a link to a folder above it") == 2


@pytest.mark.parametrize("is_safe", [True, False])
def test_a_folder_that_timm_saved_answers_too(
    is_safe: bool, tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model: Any = timm.create_model("test_resnet", num_classes=3).eval()
    plain, named = tmp_path / "plain", tmp_path / "named"
    timm.models.save_for_hf(model, str(plain), safe_serialization=is_safe)
    labels = {"x": "an ex", "y": "a why", "2": "two"}
    about = {"label_names": {"0": "x", "1": "y"}, "label_descriptions": labels}
    timm.models.save_for_hf(model, str(named), about, safe_serialization=is_safe)
    image = Encoded(name="a", content=(photos / "a.jpg").read_bytes())
    subject = load_subject(str(plain))
    pixels = decode_eval([image.content], data=subject.data, img_size=160)
    with torch.inference_mode():
        odds = model(pixels).softmax(-1)[0].tolist()
    (answer,) = predict(subject, [image])
    assert dict(answer.top) == pytest.approx(dict(zip("012", odds, strict=True)))
    _main([str(named), str(photos / "a.jpg")])
    said = capsys.readouterr().out
    for label, share in zip(labels, odds, strict=True):
        assert f"{100 * share:6.2f} %  {label}  {labels[label]}" in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"crop_mode": "squash"}, "crop_mode 'squash'"),
        ({"interpolation": "lanczos"}, "interpolation 'lanczos'"),
        ({"input_size": (3, 160, 96)}, "is not 3 x a square"),
    ],
)
def test_images_that_are_prepared_otherwise_are_refused(
    change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    model = timm.create_model("test_resnet", num_classes=3)
    timm.models.save_for_hf(model, str(tmp_path), data_config=change)
    with pytest.raises(ValueError, match=said) as caught:
        load_subject(str(tmp_path))
    assert str(tmp_path / "config.json") in str(caught.value)
