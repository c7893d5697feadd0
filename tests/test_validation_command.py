"""A checkpoint's weights on several sets, by sovit-eval and beside a training."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipelines.checkpoints.snapshot import save_checkpoint
from pipelines.config import Scale, Validation
from pipelines.data.batch import Position
from pipelines.data.shard_set import CLASSES_FILE, read_shard_set
from pipelines.evaluate import Options, _main, evaluate_checkpoint
from pipelines.evaluation.checkpoint import measure_checkpoint, named
from pipelines.evaluation.held_out import held_out, held_out_of
from pipelines.evaluation.measure import EvaluationResult, Score
from pipelines.robustness.options import Robustness
from pipelines.training.model import build_model
from pipelines.transforms.rows import BadImage
from tests.small_runs import CPU, PLAIN_VIT, small_run
from tests.small_sets import write_set

NUM_ROWS = 24
CLASSES = ("c0", "c1", "c2")


@dataclass(frozen=True, kw_only=True)
class Written:
    """Hold addresses: of a checkpoint with an average, sets for it, ReaL labels."""

    checkpoint: str
    val: str
    some: str
    """Of two of the three classes."""
    real: str

    def options(self, **settings: Any) -> Options:
        given: dict[str, Any] = {"checkpoint": self.checkpoint, "shards": self.val}
        given |= {"batch_size": 10, "decoder": "torch", "device": "cpu"}
        return Options(num_decode_threads=1, **(given | settings))


def change_column(address: str, name: str, values: list[Any]) -> None:
    """Write a set of one file anew, with other values in a column."""
    (path,) = Path(address).glob("*.parquet")
    table = pq.read_table(path)
    place = table.schema.get_field_index(name)
    pq.write_table(table.set_column(place, name, pa.array(values)), path)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    folder = tmp_path_factory.mktemp("command")
    val = write_set(folder / "val", groups=[[10, 14]])
    keys = [f"ILSVRC2012_val_{NUM_ROWS - row:08d}.JPEG" for row in range(NUM_ROWS)]
    change_column(val, "key", keys)
    real = folder / "real.json"
    lists = [[row % 3, 2] if row % 4 else [] for row in range(NUM_ROWS)]
    real.write_text(json.dumps(lists[::-1]))
    run = dataclasses.replace(
        small_run(val), scale=Scale(num_workers=4), validation=Validation(num_worst=5)
    )
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(build_model(PLAIN_VIT, num_classes=3).eval())
    checkpoint = folder / "epoch_0002"
    checkpoint.mkdir()
    save_checkpoint(
        checkpoint,
        run=run,
        position=Position(epoch=2, step=8),
        classes=CLASSES,
        metrics={},
        model=models[0],
        ema=models[1],
        optimizer=None,
    )
    some = write_set(folder / "some", groups=[[9]], num_classes=2)
    return Written(checkpoint=str(checkpoint), val=val, some=some, real=str(real))


@pytest.fixture(scope="module")
def plain(written: Written) -> dict[str, dict[str, Any]]:
    """Give what each of the weights comes to alone."""
    return {
        weights: evaluate_checkpoint(written.options(weights=weights))
        for weights in ("ema", "raw")
    }


def test_both_weights_and_further_sets_are_as_alone(
    written: Written, plain: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    report = tmp_path / "report"
    asked = written.options(
        weights="both",
        real_labels=written.real,
        also=(f"some={written.some}",),
        report=str(report),
    )
    found = evaluate_checkpoint(asked)
    alone = evaluate_checkpoint(written.options(shards=written.some))
    raw = found.pop("raw")
    assert found.pop("also")["some"].items() >= alone.items()
    for values, wanted in ((found, plain["ema"]), (raw, plain["raw"])):
        assert values.pop("num_real") == NUM_ROWS - 6
        assert values.pop("real_top1") > 0
        assert values == wanted
    assert found["loss"] != raw["loss"]
    files = {"per_class.csv", "confusion.png", "worst.csv", "worst.png"}
    for folder in (report, report / "some"):
        assert {path.name for path in folder.iterdir() if path.is_file()} == files
    lines = (report / "worst.csv").read_text().splitlines()
    assert len(lines) == 1 + 5
    assert all(line.startswith("ILSVRC2012_val_") for line in lines[1:])
    assert (report / "some" / "per_class.csv").read_text().count("\n") == 1 + 2


def test_a_checkpoint_beside_its_training_comes_to_the_same(
    written: Written, plain: dict[str, dict[str, Any]]
) -> None:
    """In batches of one worker's share: 2 of 8 images."""
    sets = held_out_of(
        Validation(also=(f"some={written.some}",)),
        val=read_shard_set(written.val),
        classes=CLASSES,
    )
    found = measure_checkpoint(
        Path(written.checkpoint), sets=sets, weights="both", device=CPU
    )
    assert found.position == Position(epoch=2, step=8)
    for prefix, weights in (("val", "ema"), ("val_raw", "raw")):
        for name in ("loss", "top1", "top5"):
            value = found.metrics[f"{prefix}/{name}"]
            assert value == pytest.approx(plain[weights][name], rel=1e-5)
    assert found.metrics["val/num_images"] == NUM_ROWS
    assert found.metrics["val/bad_images"] == 0
    assert found.metrics["val_some/num_images"] == 9
    assert {"val_some/top1", "val_some_raw/top1"} <= found.metrics.keys()
    assert all(type(value) in (int, float) for value in found.metrics.values())
    report = found.reports["val_some"]
    assert report.worst.keys[int(report.worst.row_ids[0])].startswith("k")
    one = measure_checkpoint(
        Path(written.checkpoint), sets=sets[:1], weights="average", device=CPU
    )
    wanted = {n: v for n, v in found.metrics.items() if n.startswith("val/")}
    assert one.metrics == wanted


def test_bad_images_are_told_with_their_set(written: Written, tmp_path: Path) -> None:
    address = write_set(tmp_path / "set", groups=[[120]])
    (path,) = Path(address).glob("*.parquet")
    images = pq.read_table(path)["image"].to_pylist()
    change_column(address, "image", [images[0][:-40], *images[1:]])
    told: dict[str, list[BadImage]] = {"v2": []}
    one = held_out(read_shard_set(address), classes=CLASSES, name="v2")
    found = measure_checkpoint(
        Path(written.checkpoint),
        sets=[one],
        weights="average",
        device=CPU,
        on_bad=lambda held_out: told[held_out.name].extend,
    )
    assert [image.key for image in told["v2"]] == ["k0"]
    assert found.metrics["val_v2/bad_images"] == 1


def test_corruptions_too_are_judged_among_the_sets_classes(
    written: Written, tmp_path: Path
) -> None:
    """By numbers in another order, as by the names that the images carry beside it."""
    labels = [0] * 8 + [1] * 3 + [2]
    named_so = write_set(tmp_path / "names", groups=[[12]])
    change_column(named_so, "label", [(2, 0, 1)[label] for label in labels])
    numbered = write_set(tmp_path / "numbers", groups=[[12]])
    change_column(numbered, "label", labels)
    (Path(numbered) / CLASSES_FILE).write_text('["2", "0", "1"]')
    asked = Robustness(corruptions=("brightness",), severities=(1,))
    by_name, by_number = (
        evaluate_checkpoint(written.options(shards=address, robustness=asked))
        for address in (named_so, numbered)
    )
    assert by_name == by_number


def test_the_command_says_all_by_name(
    written: Written, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "result.json"
    arguments = [written.checkpoint, written.val, "--json", str(kept)]
    arguments += ["--decoder", "torch", "--device", "cpu", "--weights", "both"]
    arguments += ["--also", f"v2={written.some}", f"a={written.some}"]
    _main([*arguments, "--real-labels", written.real])
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(kept.read_text())
    assert lines[0].startswith(f"top-1 {result['top1']:.2f} %  top-5 100.00 %")
    assert lines[1] == f"ReaL top-1 {result['real_top1']:.2f} % of 18 images"
    begins = [line.partition(" top-1")[0] for line in lines]
    named_lines = ["raw weights:", "raw weights: ReaL"]
    named_lines += ["v2:", "v2: raw weights:", "a:", "a: raw weights:"]
    assert begins[2:] == named_lines
    assert f"{result['also']['v2']['raw']['top1']:.2f} %" in lines[5]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"also": ("v2",)}, "expected sets as NAME=SHARDS, .* got 'v2'; set --also"),
        ({"also": ("v2=/none/such",)}, "expected a folder of shards"),
        ({"real_labels": "/none/real.json"}, r"real\.json"),
    ],
)
def test_what_can_not_be_used_is_said(
    written: Written, asked: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        evaluate_checkpoint(written.options(**asked))


def test_keys_that_can_not_be_read_do_not_end_a_training(
    written: Written, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shards = read_shard_set(write_set(tmp_path / "set", groups=[[9]], num_classes=3))
    one = held_out(shards, classes=CLASSES)
    found = measure_checkpoint(
        Path(written.checkpoint), sets=[one], weights="average", device=CPU
    )
    (path,) = Path(shards.address).glob("*.parquet")
    path.unlink()
    again = named(found.outcomes["val"], shards=shards)
    assert "go by their rows" in caplog.text
    assert again.report is found.outcomes["val"].report
    score = Score(loss=1.0, top1=0.0, top5=0.0, num_images=1, num_bad=0)
    bare = EvaluationResult(scores={"raw": score})
    assert named(bare, shards=shards) == bare
