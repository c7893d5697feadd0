"""Start a cluster on the tests' own hosts, by README's commands.

Four hosts: a laptop with the project, from which everything is typed, a head and two
workers. A store that speaks S3 listens on the laptop.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.hosts import HOME, ROOT, Host, hosts_on
from tests.waiting import wait_for

NAMES = ("laptop", "head", "worker-1", "worker-2")
STORE_PORT = 9000
SECRET = "secret-of-tests"
_MAKE_BUCKET = "import boto3; boto3.client('s3').create_bucket(Bucket='bucket')"
_BIN = f"{ROOT}/.venv/bin"
_PATH = f"{_BIN}:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(kw_only=True)
class Cluster:
    """A cluster's hosts, and the processes that run beside a test."""

    hosts: dict[str, Host]
    yaml: str
    folder: Path

    @property
    def store(self) -> str:
        """The store's address."""
        return f"http://{self.hosts['laptop'].address}:{STORE_PORT}"

    def type(self, text: str, *, timeout_s: float = 600) -> str:
        """Run a command in the project's folder on the laptop."""
        return self.hosts["laptop"].run(
            f"cd {ROOT}; {text}", timeout_s=timeout_s, **self._environment
        )

    @property
    def keys(self) -> dict[str, str]:
        """Environment variables by which programs find the store, without keys."""
        return {
            "AWS_ENDPOINT_URL": self.store,
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    @property
    def _environment(self) -> dict[str, str]:
        return {"PATH": _PATH, "PYTHONUNBUFFERED": "1"} | self.keys

    @contextlib.contextmanager
    def beside(self, text: str, *, log: str) -> Iterator[Path]:
        """Run a command on the laptop for a `with` block's duration; yield its log."""
        path = self.folder / log
        command = self.hosts["laptop"].command(
            f"cd {ROOT}; exec {text}", **self._environment
        )
        with path.open("wb") as file:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=file
            )
        try:
            yield path
        finally:
            process.kill()
            process.wait()


def readme_commands() -> list[str]:
    """Parse the commands of README's section on clusters, with continuations joined."""
    text = (ROOT / "README.md").read_text()
    section = text.partition("## On a cluster")[2].partition("\n## ")[0]
    blocks = re.findall(r"^```\n(.*?)^```$", section, flags=re.M | re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [" ".join(line.partition("  #")[0].split()) for line in lines]


def readme_command(beginning: str) -> str:
    """Return the only one of README's commands with this beginning."""
    (found,) = [line for line in readme_commands() if line.startswith(beginning)]
    return found


def edited_yaml(hosts: dict[str, Host]) -> str:
    """Edit the places of clusters/on-prem.yaml that a user edits."""
    workers = ", ".join(hosts[name].address for name in ("worker-1", "worker-2"))
    text = (ROOT / "clusters" / "on-prem.yaml").read_text()
    for placeholder, value in (
        ("HEAD_ADDRESS", hosts["head"].address),
        ("[WORKER_ADDRESS, WORKER_ADDRESS]", f"[{workers}]"),
        ("/home/USER", str(HOME)),
        ("USER", "root"),
        # The store is not Amazon's.
        ("# /root/.aws: ~/.aws", "/root/.aws: ~/.aws"),
    ):
        assert placeholder in text, placeholder
        text = text.replace(placeholder, value)
    return text


@contextlib.contextmanager
def cluster_up(folder: Path) -> Iterator[Cluster]:
    """Start the hosts, a store with a bucket, and Ray by README's commands.

    The head is up then; `wait_for_workers` waits for the others.
    """
    with hosts_on(folder, NAMES) as hosts:
        for host in hosts.values():
            # Else it would be installed, 7 GB a host.
            (host.home / "sovit").mkdir()
            (host.home / "sovit" / ".venv").symlink_to(ROOT / ".venv")
        yaml = HOME / "on-prem.yaml"
        cluster = Cluster(hosts=hosts, yaml=str(yaml), folder=folder)
        laptop = hosts["laptop"].home
        (laptop / "on-prem.yaml").write_text(edited_yaml(hosts))
        serve = f"{_BIN}/moto_server --host 0.0.0.0 --port {STORE_PORT}"
        put_keys(laptop / ".aws")
        with cluster.beside(serve, log="store.log"):
            cluster.type(readme_command("ray get-auth-token"))
            cluster.type(f'python -c "{_MAKE_BUCKET}"')
            cluster.type(with_yaml(readme_command("RAY_UP"), cluster=cluster))
            yield cluster


def put_keys(folder: Path) -> None:
    """Write the store's keys where Amazon's tools expect them."""
    folder.mkdir(mode=0o700)
    keys = f"aws_access_key_id = key-of-tests\naws_secret_access_key = {SECRET}\n"
    (folder / "credentials").write_text(f"[default]\n{keys}")
    (folder / "credentials").chmod(0o600)


def with_yaml(command: str, *, cluster: Cluster) -> str:
    """Replace the project's yaml by the edited one, and confirm prompts."""
    name = "clusters/on-prem.yaml"
    assert name in command
    return re.sub(r"\b(ray (up|down))\b", r"\1 --yes", command).replace(
        name, cluster.yaml
    )


def status(cluster: Cluster) -> str:
    """Return the head's `ray status`."""
    return cluster.hosts["head"].run("RAY_AUTH_MODE=token ray status", PATH=_PATH)


def wait_for_workers(cluster: Cluster) -> None:
    """Wait until all three hosts of the cluster are up."""
    wait_for(
        lambda: "3 local.cluster.node" in status(cluster),
        what="two workers",
        log=lambda: status(cluster),
        every_s=3,
    )
