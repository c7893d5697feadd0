"""See what `ray job submit --working-dir .` ships: little, and all that a job needs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import subprocess
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path

import pytest
import ray
from ray.job_submission import JobSubmissionClient

ROOT = Path(__file__).parent.parent
_MOST_BYTES = 10_000_000


class _Dashboard(BaseHTTPRequestHandler):
    """Answer who submits a job, as Ray's dashboard would, and keep the package."""

    packages: list[bytes]

    def do_GET(self) -> None:
        if self.path == "/api/version":
            self._answer(200, {"version": "4", "ray_version": ray.__version__})
        else:  # no such package yet
            self._answer(404, {})

    def do_PUT(self) -> None:
        self.packages.append(self.rfile.read(int(self.headers["Content-Length"])))
        self._answer(200, {})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(200, {"job_id": "job", "submission_id": "job"})

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def _answer(self, status: int, answer: dict[str, str]) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextlib.contextmanager
def _dashboard() -> Iterator[tuple[str, list[bytes]]]:
    packages: list[bytes] = []
    handler = type("Handler", (_Dashboard,), {"packages": packages})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", packages
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _ship(folder: Path) -> zipfile.ZipFile:
    """Submit a job with a folder; give what was uploaded, and check its size."""
    with _dashboard() as (address, packages):
        client = JobSubmissionClient(address)
        client.submit_job(entrypoint="true", runtime_env={"working_dir": str(folder)})
    (package,) = packages
    assert len(package) < _MOST_BYTES
    return zipfile.ZipFile(BytesIO(package))


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """Copy what git keeps, or would: a fresh clone."""
    if not (ROOT / ".git").exists():
        pytest.skip("expected a git repository, to know what a clone has")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    for name in listed.stdout.decode().rstrip("\0").split("\0"):
        if (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def _check(names: set[str]) -> None:
    needed = {"recipes/demo.py", "recipes/imagenet.py", "pipelines/train.py"}
    needed |= {"tuning/search.py", "sovit/architectures/vit.py", "requirements.txt"}
    assert needed <= names
    rooms = {name.split("/")[0] for name in names}
    unwanted = {".git", ".venv", "tests", "docs", "benchmarks", "runs", "clusters"}
    assert not rooms & (unwanted | {"shards", ".pytest_cache", "cluster.yaml"})


def test_a_clone_ships_what_a_job_needs(clone: Path) -> None:
    package = _ship(clone)
    _check(set(package.namelist()))
    # The demo's images, whole, since the demo is what is tried first.
    folder = ROOT / "recipes" / "fashion_mnist"
    for line in (folder / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split()
        image = package.read(f"recipes/fashion_mnist/{name.lstrip('*')}")
        assert hashlib.sha256(image).hexdigest() == digest


def test_what_lies_about_stays_here(clone: Path) -> None:
    before, heap = set(_ship(clone).namelist()), bytes(20_000)
    for name in (
        ".venv/lib/python3.11/site-packages/torch/lib.so",
        ".cache/x",
        "data/images/1.jpg",
        "mlruns/0/x",
        "recipes/__pycache__/demo.pyc",
        "runs/NAME/epoch_0001/model.safetensors",
        "shards/train/train-00000-of-00001.parquet",
        "So_ViT_14.pth.tar",
        "ILSVRC2012_img_val.tar",
        "runs.db",
    ):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).write_bytes(heap)
    assert set(_ship(clone).namelist()) == before


def test_this_folder_ships_no_more_than_a_clone(clone: Path) -> None:
    here, there = _ship(ROOT).namelist(), _ship(clone).namelist()
    _check(set(here))
    assert set(here) == set(there)
