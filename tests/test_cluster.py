"""README's section on clusters, typed word for word on four hosts of the tests' own.

One host is turned off while a job trains, and on again; the job is stopped, and
submitted again. The tests share the cluster, one after another; the last takes it down.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipelines.driver.prometheus import GAUGES
from pipelines.worker.audit_log import trained
from recipes.demo import demo
from tests.cluster import (
    Cluster,
    cluster_up,
    readme_command,
    readme_commands,
    wait_for_workers,
    with_yaml,
)
from tests.hosts import HOME, lacking
from tests.waiting import wait_for

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(bool(lacking()), reason=lacking() or "hosts can be made"),
]
NUM_IMAGES = {"train": 1500, "val": 200}
KEYS = "keys"
# Epochs of some ten seconds, more than there is time for. Two workers do not fit one
# host of two CPUs, and half a CPU is left to read.
SMALLER = (
    "--model.kwargs.depth 1 --model.kwargs.embed-dim 32 "
    "--optim.num-epochs 1000 --data.batch-size 20 "
    "--data.eval-batch-size 40 --data.shuffle-rows 200 --log-every-steps 5 "
    "--checkpoint-every-steps 20 --scale.cpus-per-worker 1.5 "
    f"--scale.resize-every-s 10 --audit-log {HOME}/{KEYS}"
)
BOTH = r"2 workers on worker-1: 1, worker-2: 1; from step {}\n"
# A lost process group's end is waited for 30 seconds otherwise.
SOONER = {"TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5"}
# A call to the server of Ray's client, with a token or without.
KNOCK = """
import sys, grpc
address, *token = sys.argv[1:]
call = grpc.insecure_channel(address).unary_unary("/ray.rpc.RayletDriver/ClusterInfo")
try:
    words = [("authorization", f"Bearer {word}") for word in token]
    call(b"", timeout=30, metadata=words)
    print("let in")
except grpc.RpcError as error:
    print(error.code().name)
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Have a cluster, a bucket with shards, and a tunnel to the head."""
    with cluster_up(tmp_path_factory.mktemp("cluster")) as cluster:
        put_photos(cluster.hosts["laptop"].home / "photos")
        for command in readme_commands():
            if command.startswith("sovit-shards"):
                cluster.type(command)
        wait_for_workers(cluster)
        tunnel = with_yaml(readme_command("ray exec"), cluster=cluster)
        with cluster.beside(tunnel, log="tunnel.log") as log:
            wait_for(
                lambda: "HTTP" in cluster.type("curl -sI 127.0.0.1:8265 || true"),
                what="the tunnel",
                log=log.read_text,
                every_s=0.5,
            )
            yield cluster


def put_photos(folder: Path) -> None:
    """Write the first images of the demo as a folder for each class."""
    for split, num_images in NUM_IMAGES.items():
        origin = Path(getattr(demo().data, split))
        classes = json.loads((origin / "classes.json").read_text())
        shards = [pq.read_table(path) for path in sorted(origin.glob("*.parquet"))]
        rows = [row for shard in shards for row in shard.to_pylist()][:num_images]
        assert len(rows) == num_images
        for row in rows:
            place = folder / split / classes[row["label"]].replace("/", "-")
            place.mkdir(parents=True, exist_ok=True)
            (place / Path(row["key"]).name).write_bytes(row["image"])


def test_nobody_gets_in_without_the_token(cluster: Cluster) -> None:
    """Through the tunnel or past it: the job API, the dashboard, GCS, Ray's client."""
    jobs = "curl -s -o /dev/null -w %{http_code} 127.0.0.1:8265/api/jobs/"
    post = f'{jobs} -H content-type:application/json -d \'{{"entrypoint": "id"}}\''
    right = '-H "Authorization: Bearer $(cat ~/.ray/auth_token)"'
    assert cluster.type(jobs) == "401"
    assert cluster.type(post) == "401"
    assert cluster.type(f"{jobs} -H 'Authorization: Bearer {'0' * 64}'") == "403"
    assert cluster.type(f"{jobs} {right}") == "200"

    head = cluster.hosts["head"].address
    for port in (8265, 5000):
        assert cluster.type(f"curl -s {head}:{port} || echo refused") == "refused\n"
    away = "mv ~/.ray/auth_token ~/.ray/away; {}; mv ~/.ray/away ~/.ray/auth_token"
    status = f"ray status --address={head}:6379 2>&1"
    assert "InvalidAuthToken" in cluster.type(away.format(status))
    (cluster.hosts["laptop"].home / "knock.py").write_text(KNOCK)
    knock = f"python ~/knock.py {head}:10001"
    assert cluster.type(knock).strip() == "UNAUTHENTICATED"
    assert (
        cluster.type(f"{knock} $(cat ~/.ray/auth_token)").strip() != "UNAUTHENTICATED"
    )
    for host in cluster.hosts.values():
        assert host.run("find ~/.ray -name auth_token -perm /077") == "", host.name


@pytest.mark.parametrize("name", ["head", "worker-1", "worker-2"])
def test_beyond_loopback_only_ray_and_sshd_listen(cluster: Cluster, name: str) -> None:
    said = cluster.hosts[name].run("ss -ltnpH")
    pattern = r"^LISTEN +\d+ +\d+ +(\S+):(\d+) .*?pid=(\d+)"
    listeners = re.findall(pattern, said, re.MULTILINE)
    assert len(listeners) > 3
    for address, port, pid in listeners:
        if not address.startswith(("127.", "[::1]", "[::ffff:127.")):
            command = cluster.hosts[name].run(f"tr '\\0' ' ' < /proc/{pid}/cmdline")
            assert re.search(r"^sshd|/ray/|^ray::|-m ray\.", command), (port, command)


@pytest.fixture
def tell(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Give what prints a line past pytest, with the seconds since the test began."""
    start_s = time.monotonic()

    def tell(line: str) -> None:
        with capsys.disabled():
            print(f"\n{time.monotonic() - start_s:4.0f} s  {line[:100]}", end="")

    return tell


class Job:
    """Be README's job, submitted as the number-th try; see what it says."""

    def __init__(
        self, cluster: Cluster, *, number: int, tell: Callable[[str], None]
    ) -> None:
        self.cluster, self.tell = cluster, tell
        self.name = f"first-{number}"
        command = readme_command("ray job submit").replace("first-1", self.name)
        variables = json.dumps({"env_vars": cluster.keys | SOONER})
        script = cluster.hosts["laptop"].home / f"{self.name}.sh"
        script.write_text(
            f"{readme_command('export RAY_API')}\nvariables='{variables}'\n"
            + command.replace(" -- ", ' --runtime-env-json "$variables" -- ')
            + f" {SMALLER}\n"
        )
        self.script = f"bash {HOME}/{script.name}"
        self.log = cluster.folder / f"{self.name}.log"

    def says(self, pattern: str, *, after: int = 0, seconds: float = 1500) -> re.Match:
        """Wait until it says something, after a place in its log."""
        found: list[re.Match[str]] = []

        def is_said() -> bool:
            text = self.log.read_text(errors="replace")
            found.extend(re.compile(pattern).finditer(text, after))
            return bool(found)

        wait_for(
            is_said, what=pattern, log=self.log.read_text, seconds=seconds, every_s=0.5
        )
        self.tell(f"{self.name}: {found[0][0].strip()}")
        return found[0]

    def stop(self) -> int:
        """Stop it as README does; give the step that its run can go on from."""
        export = readme_command("export RAY_API")
        stop = readme_command("ray job stop").replace("first-1", self.name)
        said = self.cluster.type(f"{export}; {stop}", timeout_s=600)
        assert "was stopped" in said
        self.says(r"ended by SIGTERM after a checkpoint; go on with .*--resume first")
        steps = re.findall(r"^step (\d+)/", self.log.read_text(), flags=re.M)
        return int(steps[-1])


def test_a_job_trains_on_two_hosts_and_is_stopped(
    cluster: Cluster, tell: Callable[[str], None]
) -> None:
    job = Job(cluster, number=1, tell=tell)
    with cluster.beside(job.script, log=job.log.name):
        job.says(BOTH.format("0"))
        job.says(r"epoch 1/1000")
        check_gauges(cluster)
        job.stop()
    check_epochs(cluster)
    check_mlflow(cluster)


@pytest.mark.slow
def test_a_job_outlives_a_host_and_its_own_end(
    cluster: Cluster, tell: Callable[[str], None]
) -> None:
    """Two hosts, one, two again; stopped, submitted again: every epoch is exact."""
    lost = cluster.hosts["worker-2"]
    job = Job(cluster, number=2, tell=tell)
    with cluster.beside(job.script, log=job.log.name):
        at = 0
        for _ in range(6):  # of five steps each, so past a checkpoint
            at = job.says(r"step \d+/", after=at).end()
        lost.turn_off()
        tell(f"{lost.name} is turned off")
        at = job.says(r"worker \d failed: .*\n", after=at).end()
        found = job.says(r"1 worker on worker-1: 1; from step (\d+)\n", after=at)
        assert int(found[1]) >= 20
        lost.turn_on()
        tell(f"{lost.name} is turned on")
        found = job.says(BOTH.format(r"(\d+)"), after=found.end())
        assert int(found[1]) >= 20
        job.says(r"epoch \d+/1000", after=found.end())
        step = job.stop()

    again = Job(cluster, number=3, tell=tell)
    with cluster.beside(again.script, log=again.log.name):
        found = again.says(r"2 workers on .*; from step (\d+)\n")
        assert int(found[1]) == step
        again.says(r"step \d+/", after=found.end())
        again.stop()
    num_epochs = check_epochs(cluster)
    tell(f"{num_epochs} epochs, each of {NUM_IMAGES['train']} images once\n")
    check_mlflow(cluster)


def check_gauges(cluster: Cluster) -> None:
    """Prometheus finds all our gauges where Ray says that it should look."""
    found = r"grep -o '[0-9.]*:[0-9]*' /tmp/ray/prom_metrics_service_discovery.json"
    ask = f"for at in $({found}); do curl -s $at/metrics; done"

    def lacking_gauges() -> set[str]:
        said = cluster.hosts["head"].run(ask)
        pattern = r'^ray_(sovit_\w+)\{.*run="first".*\} [\d.e+-]+$'
        return GAUGES.keys() - set(re.findall(pattern, said, re.MULTILINE))

    wait_for(
        lambda: not lacking_gauges(),
        what="the gauges",
        log=lambda: f"without {lacking_gauges()}",
        every_s=2,
    )


def check_epochs(cluster: Cluster) -> int:
    """Each epoch that ended was trained on every image once; count them."""
    merged = cluster.folder / KEYS
    merged.mkdir(exist_ok=True)
    for name in ("worker-1", "worker-2"):
        files = list((cluster.hosts[name].home / KEYS).glob("*.csv"))
        assert files
        for file in files:
            shutil.copy(file, merged)
    found = trained(merged)
    num_epochs = found[-1].epoch  # the last one was cut off
    assert num_epochs >= 1
    for epoch in range(num_epochs):
        rows = sorted(item.row for item in found if item.epoch == epoch)
        assert rows == list(range(NUM_IMAGES["train"]))
    return num_epochs


def check_mlflow(cluster: Cluster) -> None:
    """One run, at the tunnel's end, with every epoch that ended; no secret in it."""
    url = "http://127.0.0.1:5000/api/2.0/mlflow/runs/search"
    body = '{"experiment_ids": ["1"]}'
    said = cluster.type(f"curl -s {url} -H content-type:application/json -d '{body}'")
    (run,) = json.loads(said)["runs"]
    assert run["info"]["run_name"] == "first"
    assert run["info"]["status"] == "KILLED"
    metrics = {item["key"]: item["value"] for item in run["data"]["metrics"]}
    assert metrics["epoch"] >= 1
    assert metrics["train/checkpoint_s"] > 0


def test_it_is_taken_down(cluster: Cluster) -> None:
    cluster.type(with_yaml(readme_command("ray down"), cluster=cluster))
    # Those of the workers end by themselves, a minute after.
    assert "raylet" not in cluster.hosts["head"].run("ps ax")
