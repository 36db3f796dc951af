"""Small synthetic images, settings that train in seconds, one local Ray for a process and an S3 server for a module."""

import hashlib
from pathlib import Path
from unittest.mock import patch

import fsspec
import pytest
import yaml

from pistoseg import storage
from pistoseg.config import ComputeConfig
from pistoseg.graph import BY_NAME
from pistoseg.local_cluster import BUCKET, S3Server
from pistoseg.phantom import write_cohort

SIZE = 64
TRAIN_STAGES = [name for name in BY_NAME if name != "label_scores"]
"""What `pistoseg train` may run beside validation images."""
NETWORK = {
    "architecture": "unet",
    "encoder": "tu-mobilenetv3_small_050",
    "weights": None,
    "decoder_attention": None,
    "batch_size": 8,
    "samples_per_epoch": 16,
    "precision": "fp32",
}
ON_LABELS = {
    "encoder": "tu-mobilenetv3_small_050",
    "weights": None,
    "output_stride": 16,
    "patch_size": SIZE,
    "batch_size": 8,
    "samples_per_epoch": 16,
    "epochs": 1,
    "precision": "fp32",
}
TINY = {
    "preset": "demo",
    "data": {"min_single_tissue": 1},
    "synthesis": {"crop_height": 16, "crop_width": 16, "mode": "stored", "count": 40},
    "preliminary": NETWORK | {"epochs": 1},
    "pseudo_masks": {"patch_size": SIZE, "grid": 16, "symmetries": 1},
    "classifier": ON_LABELS,
    "cams": {"patch_size": SIZE, "grid": 16, "symmetries": 1},
    "refiner": ON_LABELS,
    "refined_masks": {"patch_size": SIZE, "grid": 16, "symmetries": 1},
    "precise": NETWORK | {"epochs": 2, "patch_size": SIZE, "masks": "pseudo"},
    "evaluation": {"patch_size": SIZE, "symmetries": 1, "bootstrap": 20},
    # More actors than cores only take longer to start; tests of pools set their own number.
    "compute": {"device": "cpu", "workers": 2},
}


@pytest.fixture(scope="session")
def cohort(tmp_path_factory):
    """Forty training images of 64 px and four validation images of 96 px, in the published layout."""
    folder = tmp_path_factory.mktemp("cohort [1]")  # brackets are globs to careless code
    write_cohort(str(folder), training=40, validation=4, patch_size=SIZE, validation_size=96)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Path of a YAML with settings of a pipeline that runs in seconds."""
    file = tmp_path_factory.mktemp("config") / "tiny.yaml"
    file.write_text(yaml.safe_dump(TINY))
    return file


@pytest.fixture(scope="session")
def local_ray():
    """A local Ray with four CPUs on paper, so that pools of four actors run wherever the tests do.

    Networks get a thread each: with one for each of these CPUs they would wait for one another on fewer cores.
    """
    from pistoseg.stages import cluster

    with (
        patch.object(cluster, "available_cpus", return_value=4),
        patch.object(cluster, "node_threads", return_value=1),
        cluster.connected(ComputeConfig(device="cpu")),
    ):
        yield


@pytest.fixture(scope="module")
def server(tmp_path_factory, seaweedfs):
    """A SeaweedFS that was started for a module; a skip where there is none."""
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        server.make_bucket(BUCKET)
        yield server


@pytest.fixture
def s3(server, monkeypatch):
    """This process as a client of `server`; the bucket's URI."""
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    fsspec.filesystem("s3").clear_instance_cache()
    yield f"s3://{BUCKET}"
    storage.filesystem(f"s3://{BUCKET}")[0].clear_instance_cache()


def contents(folder: Path) -> dict[str, tuple[int, str]]:
    """Modification time and hash of every file below a folder, by relative name."""
    return {
        str(file.relative_to(folder)): (file.stat().st_mtime_ns, hashlib.sha256(file.read_bytes()).hexdigest())
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def committed(workspace: Path) -> dict[str, Path]:
    """Folders of the finished artifacts by stage; each stage has one at most."""
    return {file.parent.parent.name: file.parent for file in workspace.glob("*/*/manifest.json")}
