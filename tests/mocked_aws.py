"""Start the cluster of cluster.yaml in a mocked AWS, by Ray's own code.

Ray asks for key, groups and nodes, which moto then has. The commands that Ray would
send to hosts are kept instead.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import re
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import boto3
import pytest
import yaml
from moto import mock_aws
from ray.autoscaler import sdk
from ray.autoscaler._private import commands, providers
from ray.autoscaler._private.aws import config as aws_config
from ray.autoscaler._private.aws import node_provider, utils
from ray.autoscaler.v2.instance_manager.config import (
    AutoscalingConfig,
    FileConfigReader,
)
from ray.autoscaler.v2.instance_manager.node_provider import NodeProviderAdapter
from ray.autoscaler.v2.instance_manager.ray_installer import RayInstaller
from ray.core.generated import instance_manager_pb2

ROOT = Path(__file__).parent.parent
REGION = "us-east-1"
SECRET = "secret-of-this-test"
# What a host says where Ray asks; it has a GPU, and no container yet.
_ANSWERS = {
    "docker info": b"map[nvidia:{nvidia-container-runtime [] <nil>}]",
    "Config.Env": b'["HOME=/home/ray"]',
    "printenv HOME": b"/home/ray",
    "command -v docker": b"/usr/bin/docker",
    "/proc/meminfo": b"MemAvailable: 33554432 kB",
}


@dataclass
class Host:
    """Stand-in for ssh and rsync that records each command as one line."""

    lines: list[str] = field(default_factory=list)
    bootstrap: dict[str, Any] = field(default_factory=dict)
    """Configuration that the head's autoscaler gets."""
    DEVNULL = subprocess.DEVNULL

    def check_call(self, command: Sequence[str], **_: Any) -> int:
        """Record a command; all succeed."""
        self.lines.append(" ".join(command))
        for word in command:
            if command[0] == "rsync" and "/ray-bootstrap-" in word and ":" not in word:
                self.bootstrap = json.loads(Path(word).read_text())
        return 0

    def check_output(self, command: Sequence[str], **_: Any) -> bytes:
        """Record a command, and return a canned output for Ray."""
        self.check_call(command)
        line = self.lines[-1]
        return next((text for part, text in _ANSWERS.items() if part in line), b"")

    def find(self, part: str) -> int:
        """Return the index of the first line that contains `part`."""
        return next(i for i, line in enumerate(self.lines) if part in line)


@dataclass(frozen=True)
class Cluster:
    """A cluster in the mock: a head, and one worker with GPUs."""

    ec2: Any
    group: str
    filled: dict[str, Any]
    """cluster.yaml with its places filled in."""
    config: dict[str, Any]
    """The same as Ray completes it."""
    hosts: dict[str, Host]
    """Hosts by node type, with their recorded commands."""
    actions: frozenset[str]
    """AWS actions that the autoscaler called."""

    def nodes(self) -> dict[str, dict[str, Any]]:
        """List AWS's nodes by type."""
        nodes = {}
        for reservation in self.ec2.describe_instances()["Reservations"]:
            for node in reservation["Instances"]:
                node["Tags"] = {tag["Key"]: tag["Value"] for tag in node["Tags"]}
                nodes[node["Tags"]["ray-user-node-type"]] = node
        return nodes


@contextlib.contextmanager
def mocked_aws(home: Path) -> Iterator[None]:
    """Mock AWS, with a home of its own for Ray's token and the key that Ray makes."""
    with pytest.MonkeyPatch.context() as patch, mock_aws():
        patch.setenv("HOME", str(home))
        patch.setenv("AWS_ACCESS_KEY_ID", "none")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "none")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setattr(node_provider, "TAG_BATCH_DELAY", 0)
        # moto takes 2 s to list the types that AWS has.
        types = functools.cache(node_provider.list_ec2_instances)
        patch.setattr(node_provider, "list_ec2_instances", types)
        patch.chdir(ROOT)
        _forget_clients()
        token = home / ".ray" / "auth_token"
        token.parent.mkdir()
        token.write_text(SECRET)
        token.chmod(0o600)
        yield
    _forget_clients()


def start_cluster(folder: Path) -> Cluster:
    """Start the head as `ray up` does, and a worker as the head's autoscaler does."""
    ec2 = boto3.client("ec2", REGION)
    places = _make_account(ec2)
    text = (ROOT / "cluster.yaml").read_text()
    for place, value in places.items():
        text = re.sub(rf"\b{place}\b", value, text)
    filled = yaml.safe_load(text)
    config = sdk.bootstrap_config(copy.deepcopy(filled), no_config_cache=True)
    head, worker = Host(), Host()
    up(config, host=head)
    # The files of the head, where this machine has them.
    told = {**head.bootstrap, "file_mounts": filled["file_mounts"]}
    key = Path(config["auth"]["ssh_private_key"])
    Path("~/ray_bootstrap_key.pem").expanduser().write_text(key.read_text())
    path = folder / "ray_bootstrap_config.yaml"
    path.write_text(json.dumps(told))
    return Cluster(
        ec2=ec2,
        group=places["SECURITY_GROUP"],
        filled=filled,
        config=config,
        hosts={"head": head, "gpu": worker},
        actions=frozenset(_start_worker(told, path=path, host=worker)),
    )


def up(config: dict[str, Any], *, host: Host) -> None:
    """Run what `ray up` does once it knows the account."""
    commands.get_or_create_head_node(
        config,
        "cluster.yaml",
        no_restart=False,
        restart_only=False,
        yes=True,
        override_cluster_name=None,
        _runner=cast(Any, host),
    )


def provider_of(config: dict[str, Any]) -> Any:
    """Return Ray's node provider."""
    return providers._get_node_provider(config["provider"], config["cluster_name"])


def _make_account(ec2: Any) -> dict[str, str]:
    """Create what cluster.yaml requires; return its placeholders' values."""
    vpc = ec2.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
    subnet = ec2.create_subnet(VpcId=vpc, CidrBlock="10.0.0.0/24")["Subnet"]["SubnetId"]
    made = ec2.create_security_group(GroupName="sovit", Description="-", VpcId=vpc)
    group = made["GroupId"]
    everything = {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group}]}
    ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=[everything])
    iam = boto3.client("iam", REGION)
    for role in ("my-bucket-head", "my-bucket-worker"):
        iam.create_instance_profile(InstanceProfileName=role)
    return {
        "SUBNET": subnet,
        "SECURITY_GROUP": group,
        "AMI": ec2.describe_images()["Images"][0]["ImageId"],
        "BUCKET": "my-bucket",
    }


def _start_worker(told: dict[str, Any], *, path: Path, host: Host) -> set[str]:
    """Launch a worker and set it up; return the AWS actions called."""
    actions = set()
    provider = provider_of(told)
    for resource in (provider.ec2, provider.ec2_fail_fast):
        resource.meta.client.meta.events.register(
            "before-call.ec2", lambda model, **_: actions.add(f"ec2:{model.name}")
        )
    adapter = NodeProviderAdapter(provider, FileConfigReader(str(path)))
    adapter.launch({"gpu": 1}, "request")
    deadline_s = time.monotonic() + 30
    while len(nodes := adapter.get_non_terminated()) < 2:
        assert time.monotonic() < deadline_s, adapter.poll_errors()
        time.sleep(0.01)
    (node_id,) = [name for name, node in nodes.items() if node.node_type == "gpu"]
    instance = cast(Any, instance_manager_pb2).Instance(
        cloud_instance_id=node_id, instance_type="gpu"
    )
    config = AutoscalingConfig(told)
    installer = RayInstaller(provider, config, process_runner=cast(Any, host))
    installer.install_ray(instance, "10.0.0.4")
    return actions


def _forget_clients() -> None:
    for cache in (utils.resource_cache, utils.client_cache):
        cache.cache_clear()
    aws_config._get_subnets_or_die.cache_clear()
