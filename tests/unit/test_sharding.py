"""A process at which Ray's tasks keep what they built for a stage, from shard to shard."""

import json
import os
import subprocess
import sys

import pytest
from processes import wait_for

from pistoseg.stages import sharding


class Network:
    """A worker that counts its shards."""

    built = 0

    def __init__(self):
        Network.built += 1

    def __call__(self, number, shard, part):
        pass


@pytest.fixture
def shard(monkeypatch, tmp_path):
    """Does a shard of a stage in this process."""
    monkeypatch.setattr(sharding, "_at_hand", None)
    monkeypatch.setattr(Network, "built", 0)

    def do(stage):
        row = sharding._shard({"number": 0, "shard": json.dumps([0])}, stage, Network, {}, str(tmp_path), None, False)
        assert row == {"number": 0, "problem": "", "away": False}

    yield do
    sharding._idle.cancel()


def test_a_network_is_kept_from_shard_to_shard_of_a_stage(shard):
    for stage in ("first", "first", "second"):
        shard(stage)
    assert Network.built == 2
    assert sharding._at_hand[0] == "second"


def test_a_network_goes_when_its_stage_has_ended_and_comes_back_for_a_late_shard(shard, monkeypatch):
    monkeypatch.setattr(sharding, "IDLE_S", 0)
    shard("first")
    wait_for(lambda: sharding._at_hand is None)
    shard("first")
    assert Network.built == 2


def test_a_gpu_that_ray_counts_and_torch_does_not_see_ends_the_stage_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sharding, "exit_in_time", lambda: None)
    result = sharding._ShardWorker(Network, {}, str(tmp_path), 1, True)({"number": 0, "shard": json.dumps([0])})
    assert result["away"]
    assert "torch sees none" in json.loads(result["problem"])["reason"]


def test_ray_is_told_before_it_is_imported_how_often_it_may_end_a_task_for_memory():
    code = "import pistoseg, os, sys; assert 'ray' not in sys.modules; print(os.environ['RAY_task_oom_retries'])"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    for given, expected in (({}, "8"), ({"RAY_task_oom_retries": "3"}, "3")):
        run = subprocess.run([sys.executable, "-c", code], env=environment | given, capture_output=True, text=True)
        assert run.stdout.strip() == expected, run.stderr
