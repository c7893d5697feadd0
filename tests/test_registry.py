"""Each run's model becomes a version under its recipe, and `best` names the best."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import mlflow
import pandas as pd
import pytest
import torch
from mlflow import MlflowClient

from pipelines import tracking
from pipelines.checkpoints.manifest import load_model
from pipelines.checkpoints.snapshot import save_checkpoint
from pipelines.data.batch import Position
from pipelines.data.shard_set import read_shard_set
from pipelines.driver.mlflow_run import log_model
from pipelines.storage.path import StoragePath
from pipelines.tracking import registry
from pipelines.tracking.registry import BEST, register_model, registered_name
from pipelines.training.model import build_model
from pipelines.transforms.decoder import decode_eval
from pipelines.worker.job import Job, Trained
from tests.small_runs import SO_VIT, small_run
from tests.small_sets import jpeg, write_set

RECIPE = "imagenet.so_vit_7"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Store:
    """Hold an MLflow store with a run."""

    uri: str
    run_id: str
    client: MlflowClient

    def tried(self, top1: float, *, name: str = "recipe") -> str:
        """Register a model that was logged without files; give its version's number."""
        run = self.client.get_run(self.run_id)
        model = self.client.create_logged_model(run.info.experiment_id, name="model")
        address = register_model(
            self.uri, model.model_uri, name=name, run_id=self.run_id, top1=top1
        )
        return address.removeprefix(f"models:/{name}/")

    def best(self, name: str = "recipe") -> str:
        """Give the number of the version that `best` names."""
        version = self.client.get_model_version_by_alias(name, BEST).version
        return str(version)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Store:
    uri = f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"
    run_id = tracking.open_run(uri, experiment="models", name="a", params={}, tags={})
    return Store(uri=uri, run_id=run_id, client=MlflowClient(uri))


@pytest.fixture
def store(shared: Store) -> Store:
    """Let the store be read, and clear the name that most tests use."""
    for found in shared.client.search_registered_models("name='recipe'"):
        shared.client.delete_registered_model(found.name)
    return shared


def test_a_runs_model_is_loaded_as_the_best_of_its_recipe(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = write_set(tmp_path / "set", groups=[[5]], size=(40, 33))
    run = dataclasses.replace(small_run(address, model=SO_VIT), recipe=RECIPE)
    shards = read_shard_set(address)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    torch.manual_seed(0)
    save_checkpoint(
        folder,
        run=run,
        position=Position(epoch=3),
        classes=shards.classes,
        metrics={},
        model=build_model(SO_VIT, num_classes=3),
        ema=None,
        optimizer=None,
    )
    trained = Trained(metrics={"val/top1": 61.5}, checkpoint=StoragePath(str(folder)))
    job = Job(
        run=run,
        train_shards=shards,
        val_shards=shards,
        held_out=(),
        tracking_uri=store.uri,
        mlflow_run_id=store.run_id,
    )
    # The store is said, not taken from the environment, until the model is loaded.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/other.db")
    log_model(trained, job=job)
    (version,) = store.client.search_model_versions(f"name='{RECIPE}'")
    assert version.run_id == store.run_id
    assert version.tags == {"run_id": store.run_id, "val/top1": "61.5"}

    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    model = mlflow.pyfunc.load_model(f"models:/{RECIPE}@best")
    images = [jpeg(number, size=(50, 41)) for number in range(3)]
    found = model.predict(pd.DataFrame({"image": images}))
    pixels = decode_eval(images, data=run.data, img_size=32)
    with torch.inference_mode():
        odds = load_model(folder)[0](pixels).softmax(-1)
    wanted = [shards.classes[place] for place in odds.argmax(-1)]
    assert list(found["label"]) == wanted
    assert list(found["score"]) == pytest.approx(odds.amax(-1).tolist(), rel=1e-4)


def test_best_is_the_highest_number(store: Store) -> None:
    """As texts 9.5 would be above 71.25, and 100.0 below."""
    seen = []
    for top1 in (9.5, 71.25, 71.0, 100.0):
        version = store.tried(top1)
        seen.append((version, store.best()))
    assert seen == [("1", "1"), ("2", "2"), ("3", "2"), ("4", "4")]


def test_a_tie_keeps_the_older(store: Store) -> None:
    for _ in range(12):  # the tenth comes before the second where texts are compared
        store.tried(50.0)
    assert store.best() == "1"


def test_nan_never_is_the_best(store: Store) -> None:
    store.tried(math.nan)
    with pytest.raises(mlflow.MlflowException, match="alias best not found"):
        store.best()
    store.tried(0.5)
    store.tried(math.nan)
    store.tried(math.inf)
    assert store.best() == "2"
    assert len(store.client.search_model_versions("name='recipe'")) == 4


def test_it_is_chosen_among_all_that_are_there(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On several pages, with tags that people wrote and versions that they deleted."""
    monkeypatch.setattr(registry, "_VERSIONS_AT_ONCE", 2)
    for top1 in (70.0, 90.0, 60.0, 80.0):
        store.tried(top1)
    store.client.delete_model_version("recipe", "2")
    store.client.set_model_version_tag("recipe", "4", "val/top1", "good")
    store.client.delete_model_version_tag("recipe", "3", "val/top1")
    store.tried(65.0)
    assert store.best() == "1"


def test_another_run_at_the_same_time_is_seen(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It registers a better one after this one has looked and before it has set."""
    store.tried(50.0)
    others = iter([80.0])
    set_alias = MlflowClient.set_registered_model_alias

    def later(client: MlflowClient, name: str, alias: str, version: str) -> None:
        for top1 in others:
            store.tried(top1)
        set_alias(client, name, alias, version)

    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", later)
    assert store.tried(60.0) == "2"
    assert store.best() == "3"


@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        ("imagenet.so_vit_14", "imagenet.so_vit_14"),
        ("my/file.py:run", "my_file.py_run"),
        ("it's ä=1%", "it_s __1_"),
        ("../up", "_up"),
        ("..", "model"),
        ("a" * 300, "a" * 200),
    ],
)
def test_every_recipe_has_a_name_that_mlflow_takes(
    store: Store, recipe: str, name: str
) -> None:
    assert registered_name(recipe) == name
    assert store.tried(1.0, name=recipe).endswith("1")
    assert store.best(name) == "1"


def test_nothing_of_mlflow_stops_a_training(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def register(uri: str, address: str) -> str:
        return register_model(uri, address, name="recipe", run_id="r", top1=1.0)

    assert register(store.uri, "") == ""  # the model was not logged
    assert caplog.text == ""
    assert register(store.uri, "models:/m-none") == ""
    assert "training goes on, no version of model recipe" in caplog.text
    caplog.clear()
    (tmp_path / "file").touch()
    assert register(f"sqlite:///{tmp_path}/file/mlflow.db", "models:/m-none") == ""
    assert "training goes on, no version of model recipe" in caplog.text
