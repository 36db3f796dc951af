"""A worker process that dies in the middle of its work changes nothing; the dearer faults are in tests/faults."""

import json
import os
import signal
import threading
from pathlib import Path

import pytest
from processes import command_line, descendants

from pistoseg import storage
from pistoseg.artifacts import Workspace
from pistoseg.config import load_config
from pistoseg.pipeline import run_pipeline

COUNT = 3000


class Killer(threading.Thread):
    """Kills the first worker process of a name that it sees once a moment has come."""

    def __init__(self, name, moment):
        super().__init__(daemon=True)
        self.name_, self.moment, self.killed, self.done = name, moment, 0, threading.Event()

    def run(self):
        while not self.done.wait(0.02):
            if self.moment():
                for pid in descendants(os.getpid()):
                    if self.name_ in command_line(pid):
                        os.kill(pid, signal.SIGKILL)
                        self.killed = pid
                        return


@pytest.fixture
def config(cohort, tiny):
    overrides = [f"data.uri={json.dumps(str(cohort))}", f"synthesis.count={COUNT}", "compute.workers=2"]
    return load_config(None, None, str(tiny), [*overrides, "tracking.enabled=false"])


def mosaics(workspace):
    (folder,) = Path(workspace.root).glob("synthesis/*/mosaics")
    return storage.read_parquet(str(folder)).sort_by("index")


def test_a_synthesis_whose_worker_is_killed_makes_the_same_mosaics(local_ray, config, tmp_path):
    whole, broken = Workspace(str(tmp_path / "whole")), Workspace(str(tmp_path / "broken"))
    run_pipeline(config, whole, ("synthesis",))
    parts = tmp_path / "broken"
    killer = Killer(b"Map(_shard)", lambda: len(list(parts.glob("synthesis/*/mosaics/part-*.parquet"))) >= 2)
    killer.start()
    run_pipeline(config, broken, ("synthesis",))
    killer.done.set()
    assert killer.killed, "the worker was to be killed in the middle"
    assert mosaics(broken).equals(mosaics(whole))
    assert mosaics(broken)["index"].to_pylist() == list(range(COUNT))
