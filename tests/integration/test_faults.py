"""A worker that dies and a disk that is full, in the middle of a run; the dearer faults are in tests/faults."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
import ray
from processes import Killer

from pistoseg import parquet
from pistoseg.actors import TRIES
from pistoseg.artifacts import Workspace
from pistoseg.config import load_config
from pistoseg.errors import PistoSegError
from pistoseg.pipeline import run_pipeline
from pistoseg.progress import Progress
from pistoseg.stages.sharding import part_name, run_shards

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers can't import a test module

COUNT = 6000


@pytest.fixture
def config(cohort, tiny):
    overrides = [f"data.uri={json.dumps(str(cohort))}", f"synthesis.count={COUNT}", "compute.workers=2"]
    return load_config(None, None, str(tiny), [*overrides, "tracking.enabled=false"])


def unshared(script):
    """A shell script with mounts of its own."""
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script]
    return subprocess.run(command, capture_output=True, text=True)


def mosaics(workspace):
    (folder,) = Path(workspace.root).glob("synthesis/*/mosaics")
    return parquet.read(str(folder)).sort_by("index")


def test_a_synthesis_whose_worker_is_killed_makes_the_same_mosaics(local_ray, config, tmp_path):
    whole, broken = Workspace(str(tmp_path / "whole")), Workspace(str(tmp_path / "broken"))
    run_pipeline(config, whole, ("synthesis",))
    parts = tmp_path / "broken"
    with Killer(b"Map(_shard)", lambda: len(list(parts.glob("synthesis/*/mosaics/part-*.parquet"))) >= 2) as killer:
        run_pipeline(config, broken, ("synthesis",))
    assert killer.killed, "the worker was to be killed in the middle"
    assert mosaics(broken).equals(mosaics(whole))
    assert mosaics(broken)["index"].to_pylist() == list(range(COUNT))


class Dies:
    """Ends its process at the shard of one image, as the kernel does where memory is short; the others are done."""

    def __init__(self, log):
        self.log = Path(log)

    def __call__(self, number, shard, part):
        if shard == ["large.png"]:
            with self.log.open("a") as file:
                file.write("died\n")
            os.kill(os.getpid(), signal.SIGKILL)
        parquet.write(pa.table({"number": [number]}), part)


def test_an_image_at_which_every_worker_dies_ends_the_stage_and_is_named(local_ray, tmp_path):
    parts, log = tmp_path / "parts", tmp_path / "log"
    with pytest.raises(PistoSegError, match=r"a worker process died, or its node, at work on large\.png\.") as caught:
        run_shards(
            Dies,
            {"log": str(log)},
            [["small.png"], ["large.png"], ["last.png"]],
            str(parts),
            actors=1,
            resources={"num_cpus": 1},
            progress=Progress(),
            names=lambda shard: shard,
        )
    assert "memory" in caught.value.remedy
    assert caught.value.file == str(parts)
    assert log.read_text().count("died") == TRIES
    assert [part.name for part in parts.iterdir()] == [part_name(0)]


@pytest.mark.processes
def test_a_run_whose_disk_is_full_says_so_and_goes_on_when_there_is_room(tiny, cohort, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if unshared(f"mount -t tmpfs -o size=1m tmpfs {shlex.quote(str(disk))}").returncode:
        pytest.skip("this system lets nobody mount a disk of their own")
    options = ["--config", str(tiny), "--data", str(cohort), "--workspace", str(disk / "runs")]
    options += ["--set", f"synthesis.count={COUNT}", "--set", "tracking.enabled=false"]
    run = shlex.join([sys.executable, "-m", "pistoseg", "synthesize", *options])
    parts = f"{shlex.quote(str(disk))}/runs/synthesis/*/mosaics/part-*"
    done = unshared(
        f"mount -t tmpfs -o size=6m tmpfs {shlex.quote(str(disk))} && {run}; echo exit $?; sha1sum {parts};"
        f"mount -o remount,size=500m {shlex.quote(str(disk))} && {run}; echo exit $?; sha1sum {parts}"
    )
    assert re.findall(r"^exit (\d)$", done.stdout, re.M) == ["2", "0"], done.stdout + done.stderr
    assert "no space is left on the disk. Remedy: make room" in done.stderr
    assert "Traceback" not in done.stderr
    first, second = (set(re.findall(r"^[0-9a-f]{40} .*$", text, re.M)) for text in done.stdout.split("exit")[1:])
    assert first, "some mosaics were to be there when the disk was full"
    assert first < second, "what was there was to be kept"
