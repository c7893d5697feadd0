"""See what `ray up cluster.yaml` starts in a mocked AWS, and who may enter."""

from __future__ import annotations

import copy
import json
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import boto3
import pytest
from ray.autoscaler import sdk

from tests.mocked_aws import (
    REGION,
    SECRET,
    Cluster,
    Host,
    mocked_aws,
    provider_of,
    start_cluster,
    up,
)

_EVERYBODY = {"0.0.0.0/0", "::/0"}
_ROLES = {"head": "head", "gpu": "train"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Share one cluster: it takes seconds."""
    with mocked_aws(tmp_path_factory.mktemp("home")):
        yield start_cluster(tmp_path_factory.mktemp("head"))


def _open_rules(ec2: Any, groups: Sequence[str]) -> list[dict[str, Any]]:
    """List the rules by which anybody may enter."""
    found = ec2.describe_security_groups(GroupIds=groups)["SecurityGroups"]
    return [
        rule
        for group in found
        for rule in group["IpPermissions"]
        if _EVERYBODY & {source["CidrIp"] for source in rule["IpRanges"]}
        or _EVERYBODY & {source["CidrIpv6"] for source in rule["Ipv6Ranges"]}
    ]


def _actions(policy: dict[str, Any]) -> set[str]:
    allowed = [statement["Action"] for statement in policy["Statement"]]
    lists = [[action] if isinstance(action, str) else action for action in allowed]
    return set().union(*lists)


def test_head_and_worker_are_what_was_asked_for(cluster: Cluster) -> None:
    nodes = cluster.nodes()
    assert set(nodes) == {"head", "gpu"}
    assert nodes["head"]["InstanceType"] == "m6i.2xlarge"
    assert nodes["gpu"]["InstanceType"] == "g5.12xlarge"
    assert "InstanceLifecycle" not in nodes["head"]
    assert nodes["gpu"]["InstanceLifecycle"] == "spot"
    for kind, role in (("head", "my-bucket-head"), ("gpu", "my-bucket-worker")):
        assert nodes[kind]["IamInstanceProfile"]["Arn"].endswith(f"/{role}")
        assert nodes[kind]["Tags"]["ray-cluster-name"] == "sovit"
        assert nodes[kind]["Tags"]["project"] == "sovit"
        assert nodes[kind]["Tags"]["ray-node-status"] == "up-to-date"


def test_nobody_outside_reaches_a_node(cluster: Cluster) -> None:
    for node in cluster.nodes().values():
        assert not node.get("PublicIpAddress")
        (interface,) = node["NetworkInterfaces"]
        assert not interface.get("Association")
        assert [group["GroupId"] for group in interface["Groups"]] == [cluster.group]
        subnets = cluster.ec2.describe_subnets(SubnetIds=[node["SubnetId"]])["Subnets"]
        assert not subnets[0]["MapPublicIpOnLaunch"]
    assert not _open_rules(cluster.ec2, [cluster.group])


def test_a_group_that_ray_makes_would_be_open(cluster: Cluster) -> None:
    """Why cluster.yaml names a group, and what the test above would find."""
    config = copy.deepcopy(cluster.filled)
    for node_type in config["available_node_types"].values():
        (interface,) = node_type["node_config"].pop("NetworkInterfaces")
        node_type["node_config"]["SubnetIds"] = [interface["SubnetId"]]
    config["provider"]["security_group"] = {"GroupName": "made-by-ray"}
    made = sdk.bootstrap_config(config, no_config_cache=True)
    groups = made["available_node_types"]["head"]["node_config"]["SecurityGroupIds"]
    (rule,) = _open_rules(cluster.ec2, groups)
    assert rule["FromPort"] == 22


def test_a_group_that_is_not_there_is_refused(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    config = copy.deepcopy(cluster.filled)
    for node_type in config["available_node_types"].values():
        node_type["node_config"]["NetworkInterfaces"][0]["Groups"] = ["sg-0"]
    with pytest.raises(AssertionError):
        sdk.bootstrap_config(config, no_config_cache=True)
    assert "Failed to detect a security group" in capsys.readouterr().err


def test_disks_are_encrypted_and_credentials_need_a_session(cluster: Cluster) -> None:
    for node in cluster.nodes().values():
        assert node["MetadataOptions"]["HttpTokens"] == "required"
        assert node["MetadataOptions"]["HttpPutResponseHopLimit"] == 1
        disks = [disk["Ebs"]["VolumeId"] for disk in node["BlockDeviceMappings"]]
        (volume,) = cluster.ec2.describe_volumes(VolumeIds=disks)["Volumes"]
        assert volume["Encrypted"]
        assert volume["Tags"] == [{"Key": "project", "Value": "sovit"}]


def test_workers_offer_what_their_type_has_and_the_head_nothing(
    cluster: Cluster,
) -> None:
    types = cluster.config["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0}
    assert (types["gpu"]["resources"]["CPU"], types["gpu"]["resources"]["GPU"]) == (
        48,
        4,
    )
    assert types["data"]["resources"]["CPU"] == 32
    assert types["data"]["max_workers"] == 0
    assert types["data"]["labels"] == {"role": "data"}


def test_the_key_is_private(cluster: Cluster) -> None:
    key = Path(cluster.config["auth"]["ssh_private_key"])
    assert key.name == "sovit.pem"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert {node["KeyName"] for node in cluster.nodes().values()} == {"sovit"}


@pytest.mark.parametrize("kind", ["head", "gpu"])
def test_a_host_is_closed_before_ray_starts_on_it(cluster: Cluster, kind: str) -> None:
    host = cluster.hosts[kind]
    container, start = host.find("(docker run "), host.find("ray start --")
    run = host.lines[container]
    assert " -e RAY_AUTH_MODE=token " in run
    assert " --runtime=nvidia " in run
    assert "/home/ray/.ray/auth_token:/home/ray/.ray/auth_token " in run
    assert host.find("chmod 700 /tmp/ray_tmp_mount") < container
    assert container < host.find("chmod 600 /home/ray/.ray/auth_token") < start
    assert "export RAY_AUTH_MODE=token" in host.lines[start]
    assert f'"role":"{_ROLES[kind]}"' in host.lines[start]
    assert not [line for line in host.lines if SECRET in line or "0.0.0.0" in line]


def test_ssh_takes_the_session_manager_to_the_head_alone(cluster: Cluster) -> None:
    head, worker = (
        [line for line in cluster.hosts[kind].lines if line.startswith("ssh ")]
        for kind in ("head", "gpu")
    )
    nodes = cluster.nodes()
    proxy = f"ProxyCommand=aws ssm start-session --region {REGION} --target %h"
    assert all(proxy in line for line in head)
    assert all(f"@{nodes['head']['InstanceId']} " in line for line in head)
    assert all("ProxyCommand" not in line for line in worker)
    assert all(f"@{nodes['gpu']['PrivateIpAddress']} " in line for line in worker)


def test_the_head_is_stopped_and_comes_back_with_its_disk(cluster: Cluster) -> None:
    before, provider = cluster.nodes()["head"], provider_of(cluster.config)
    provider.non_terminated_nodes({})
    provider.terminate_nodes([before["InstanceId"]])  # what `ray down` does
    assert cluster.nodes()["head"]["State"]["Name"] == "stopped"
    again = Host()
    up(cluster.config, host=again)
    head = cluster.nodes()["head"]
    assert head["State"]["Name"] == "running"
    assert head["InstanceId"] == before["InstanceId"]
    assert again.find("(docker run ") < again.find("ray start --head")


def test_the_roles_may_do_what_is_asked_and_no_more(cluster: Cluster) -> None:
    policies = cluster.filled["metadata"]
    for name, policy in policies.items():
        # moto refuses a document that AWS would refuse.
        boto3.client("iam", REGION).create_policy(
            PolicyName=name, PolicyDocument=json.dumps(policy)
        )
    head, worker = (_actions(policies[f"{kind}_policy"]) for kind in ("head", "worker"))
    assert all(action.startswith("s3:") for action in worker)
    # The autoscaler also ends nodes, and starts those again that were stopped.
    ends = {"ec2:StartInstances", "ec2:StopInstances", "ec2:TerminateInstances"}
    assert head == worker | cluster.actions | ends | {"iam:PassRole"}
    (role,) = [
        statement["Resource"]
        for statement in policies["head_policy"]["Statement"]
        if statement["Action"] == "iam:PassRole"
    ]
    profile = cluster.nodes()["gpu"]["IamInstanceProfile"]["Arn"]
    assert role.split("/")[-1] == profile.split("/")[-1]
