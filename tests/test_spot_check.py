"""The check before a training: small sets whole, of large ones a sample."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.data.shard_set import read_shard_set
from pipelines.driver.spot_check import spot_check
from tests.small_sets import write_set


def test_a_small_set_is_read_whole(tmp_path: Path) -> None:
    shards = read_shard_set(write_set(tmp_path / "set", groups=[[3, 4], [], [5]]))
    assert spot_check(shards) == 3


def test_of_a_large_set_a_sample_is_read(tmp_path: Path) -> None:
    groups = [[2] * 20, [2] * 20]
    shards = read_shard_set(write_set(tmp_path / "set", groups=groups))
    assert 0 < spot_check(shards, max_bytes=1) < 40


def test_damage_is_named(tmp_path: Path) -> None:
    shards = read_shard_set(write_set(tmp_path / "set", groups=[[3], [4], [5]]))
    path = Path(shards.groups.paths[1])
    content = path.read_bytes()
    path.write_bytes(content[:4] + bytes(60) + content[64:])
    with pytest.raises(ValueError, match=path.name):
        spot_check(shards)
