"""Read every cluster file as Ray would, and see that its doors are shut.

Those that name a cluster are for `ray up`: cluster.yaml and some in clusters/, where a
new one is found by itself.
"""

from __future__ import annotations

import copy
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parent.parent
FILES = sorted([ROOT / "cluster.yaml", *(ROOT / "clusters").glob("*.yaml")])
LAUNCHED = [path for path in FILES if "\ncluster_name: " in path.read_text()]
_PLACES = re.compile(
    r"\b(AMI|BUCKET|SUBNET|SECURITY_GROUP|ACCOUNT|REGISTRY|USER|(HEAD|WORKER)_ADDRESS)\b"
)
_START = re.compile(r"\bray start\b")

IMAGE = ROOT / "clusters" / "Dockerfile"

by_name = pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
by_name_or_image = pytest.mark.parametrize(
    "path", [*FILES, IMAGE], ids=lambda path: path.name
)
launched = pytest.mark.parametrize("path", LAUNCHED, ids=lambda path: path.name)


def _documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def _config(path: Path) -> dict[str, Any]:
    """Fill in what a file leaves out, as `ray up` does."""
    (config,) = _documents(path)
    return prepare_config(config)


def _commands(config: Mapping[str, Any]) -> list[str]:
    return [
        command
        for name, commands in config.items()
        if name.endswith("_commands")
        for command in commands
    ]


def _values(node: Any, *, key: str) -> Iterator[Any]:
    """Find what stands under a key, anywhere below."""
    if isinstance(node, dict):
        yield from (value for name, value in node.items() if name == key)
    below = node.values() if isinstance(node, dict) else node
    if isinstance(node, dict | list):
        for value in below:
            yield from _values(value, key=key)


def test_there_is_a_file_for_each_way() -> None:
    assert {"cluster.yaml", "on-prem.yaml"} <= {path.name for path in LAUNCHED}
    assert "kuberay.yaml" in {path.name for path in FILES}


@launched
def test_ray_up_takes_it(path: Path) -> None:
    validate_config(_config(path))


@launched
@pytest.mark.parametrize("part", ["", "auth"])
def test_ray_up_refuses_a_field_it_does_not_know(path: Path, part: str) -> None:
    config = copy.deepcopy(_config(path))
    (config[part] if part else config)["unknown"] = 1
    with pytest.raises(jsonschema.ValidationError, match="unknown"):
        validate_config(config)


@launched
def test_every_start_asks_for_the_token(path: Path) -> None:
    config = _config(path)
    starts = [command for command in _commands(config) if _START.search(command)]
    assert len(starts) == 2
    for command in starts:
        assert re.search(r"export [^;]*RAY_AUTH_MODE=token.*; *ray start", command)
    (token,) = [to for to, at in config["file_mounts"].items() if at.endswith("_token")]
    assert token.endswith("/.ray/auth_token")
    assert "chmod 600 ~/.ray/auth_token" in config["setup_commands"]


@launched
def test_the_head_takes_no_work_and_stops_jobs_gently(path: Path) -> None:
    config = _config(path)
    (start,) = [
        command for command in _commands(config) if "ray start --head" in command
    ]
    types = config["available_node_types"]
    resources = types[config["head_node_type"]]["resources"]
    assert resources == {"CPU": 0} or "--num-cpus=0 --num-gpus=0" in start
    assert "RAY_JOB_STOP_WAIT_TIME_S=180" in start
    assert "MLFLOW_TRACKING_URI=http://127.0.0.1:5000" in start


@launched
def test_commands_are_shell(path: Path) -> None:
    for command in _commands(_config(path)):
        # Ray puts brackets around them.
        subprocess.run(["bash", "-n", "-c", f"({command})"], check=True)
        assert "ulimit" not in command


@by_name
def test_nothing_listens_beyond_loopback(path: Path) -> None:
    text = path.read_text()
    hosts = re.findall(r"(?:--|dashboard-)host[ =:]+[\"']?([^\s\"']+)", text)
    assert hosts or "mlflow server" not in text
    assert set(hosts) <= {"127.0.0.1"}
    assert "0.0.0.0" not in text
    assert "::/0" not in text


@by_name_or_image
def test_images_are_pinned_to_our_ray(path: Path) -> None:
    documents = [] if path == IMAGE else _documents(path)
    images = {
        image
        for key in ("image", "head_image", "worker_image")
        for image in _values(documents, key=key)
    }
    images |= set(re.findall(r"rayproject/ray\S*", path.read_text()))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (pin,) = [
        need.partition("==")[2].removesuffix(".*")
        for need in extras["optional-dependencies"]["train"]
        if need.startswith("ray[")
    ]
    assert ray.__version__.startswith(f"{pin}.")
    assert all(f"{ray.__version__}-py311" in image for image in images), images
    assert set(_values(documents, key="rayVersion")) <= {ray.__version__}
    assert images or path.name not in ("cluster.yaml", "kuberay.yaml", IMAGE.name)


@by_name_or_image
def test_pins_are_those_that_are_tested(path: Path) -> None:
    pins = (ROOT / "requirements-dev.txt").read_text().splitlines()
    for package in re.findall(r"\b[a-z0-9]+==[0-9.]+\b", path.read_text()):
        assert package in pins


@by_name
def test_what_is_to_be_filled_in_is_marked(path: Path) -> None:
    """Each place is marked beside it, or in the comment above its block."""
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines):
        if line.lstrip().startswith("#") or not _PLACES.search(line):
            continue
        block = number
        while not re.search(r"#|>-$", lines[block]):
            block -= 1
        above = lines[block - 1] if lines[block].endswith(">-") else ""
        assert "EDIT" in line + above, line


def test_the_image_is_made_of_what_is_committed(tmp_path: Path) -> None:
    """Run the Dockerfile's steps, but its base and its packages of gigabytes."""
    context, root = tmp_path / "context", tmp_path / "root"
    for folder in (context, root / "tmp"):
        folder.mkdir(parents=True)
    archive = subprocess.run(
        ["git", "archive", "HEAD"], cwd=ROOT, check=True, capture_output=True
    )
    subprocess.run(["tar", "-x"], cwd=context, input=archive.stdout, check=True)
    steps = [line.split() for line in IMAGE.read_text().splitlines() if line]
    for step, *words in (words for words in steps if words[0] in ("COPY", "RUN")):
        if step == "COPY":
            what, where = (word for word in words if not word.startswith("--"))
            subprocess.run(["cp", "-r", context / what, f"{root}{where}"], check=True)
        elif "--no-deps" in words:
            text = " ".join(words).replace("/tmp/", f"{root}/tmp/")
            text = text.replace("--system", f"--target {root}/installed")
            path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
            subprocess.run(
                ["bash", "-ec", text], check=True, env={**os.environ, "PATH": path}
            )
    for package in ("sovit", "pipelines", "recipes", "tuning"):
        assert (root / "installed" / package / "__init__.py").is_file()
    assert (root / "tmp" / "requirements.txt").is_file()
    assert not (root / "tmp" / "sovit").exists()


def test_mlflow_is_started_once(tmp_path: Path) -> None:
    """Run what cluster.yaml starts it with twice, with a server that only waits."""
    (command,) = [
        command
        for command in _config(ROOT / "cluster.yaml")["head_start_ray_commands"]
        if "mlflow server" in command
    ]
    (tmp_path / "mlflow").mkdir()
    (tmp_path / "bin").mkdir()
    server, started = tmp_path / "bin" / "mlflow", tmp_path / "started"
    server.write_text(f"#!/bin/sh\necho $PPID $$ $* >> {started}\nexec sleep 60\n")
    server.chmod(0o755)
    environment = {
        **os.environ,
        "HOME": str(tmp_path),
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
    }
    try:
        for _ in range(2):
            subprocess.run(["bash", "-c", f"({command})"], env=environment, check=True)
            deadline_s = time.monotonic() + 20
            while not started.exists():
                assert time.monotonic() < deadline_s
                time.sleep(0.02)
        time.sleep(0.5)  # a second one would be there by now
        (line,) = started.read_text().splitlines()
        assert "--host 127.0.0.1 --port 5000" in line
        assert "--artifacts-destination s3://BUCKET/mlflow" in line
    finally:
        for line in started.read_text().splitlines() if started.exists() else ():
            for pid in line.split()[:2]:
                os.kill(int(pid), signal.SIGKILL)
