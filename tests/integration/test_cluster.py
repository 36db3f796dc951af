"""Three Ray nodes and an S3 server: whole jobs through `ray job submit`, with the results of one node."""

import io
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from conftest import NETWORK, TINY, TRAIN_STAGES
from processes import STUCK_S

from pistoseg.local_cluster import BUCKET
from pistoseg.phantom import write_slide

pytestmark = pytest.mark.processes
RUNS = ("three", "one")
NODES = 3
RAY = str(Path(sys.executable).with_name("ray"))
ONE_NODE = """
import sys
from pistoseg import commands
from pistoseg.artifacts import Workspace
from pistoseg.config import ComputeConfig, load_config
from pistoseg.pipeline import run_pipeline
from pistoseg.stages import cluster
config, data, bundle, slides, out = sys.argv[1:]
cluster.available_cpus = lambda: 2
with cluster.connected(ComputeConfig(device="cpu")):
    settings = load_config(None, None, config, [f"data.uri={data}", "compute.workers=2"])
    run_pipeline(settings, Workspace(out + "/runs"), ("pseudo_masks",))
    options = {"mpp": 1.0, "stride": None, "symmetries": 1, "batch_size": None, "probabilities": False}
    sys.exit(commands.segment(bundle, slides, out + "/slides", workspace=out, settings=options, device="cpu"))
"""


class Cluster:
    """`pistoseg cluster local`, and a client of it.

    Args:
        folder: of its bucket, log and variables.
        temporary: an empty one with a short name, as on a machine where no Ray has run yet.
    """

    def __init__(self, folder, temporary):
        self.folder, self.env_file = folder, folder / "env.sh"
        command = [sys.executable, "-m", "pistoseg", "cluster", "local", "--nodes", str(NODES)]
        self.log = folder / "cluster.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, "--folder", str(folder / "buckets"), "--env-file", str(self.env_file)],
                stdout=log,
                stderr=log,
                env=os.environ | {"TMPDIR": temporary},
            )
        deadline = time.monotonic() + STUCK_S
        while not self.env_file.exists():
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline, "the cluster did not start"
            time.sleep(0.2)
        lines = self.env_file.read_text().splitlines()
        self.variables = dict(shlex.split(line.removeprefix("export "))[0].split("=", 1) for line in lines)
        self.environment = os.environ | self.variables | {"PYTHONPATH": str(Path(__file__).parents[2])}

    def files(self):
        import s3fs

        keys = {"key": "AWS_ACCESS_KEY_ID", "secret": "AWS_SECRET_ACCESS_KEY", "endpoint_url": "AWS_ENDPOINT_URL"}
        return s3fs.S3FileSystem(**{name: self.variables[key] for name, key in keys.items()}, use_listings_cache=False)

    def submit(self, *arguments, cwd):
        """`ray job submit` of a verb, as a user would."""
        command = [RAY, "job", "submit", "--working-dir", str(cwd), "--", sys.executable, "-m", "pistoseg", *arguments]
        job = subprocess.run(
            command, env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=STUCK_S, check=False
        )
        assert job.returncode == 0, job.stdout[-4000:] + job.stderr[-2000:]
        return job.stdout

    def stop(self):
        # Where the tests run in the background, shells have told them and all that they start to ignore Ctrl-C.
        ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        self.process.send_signal(signal.SIGTERM if ignored else signal.SIGINT)
        assert self.process.wait(timeout=STUCK_S) == 0, self.log.read_text()[-3000:]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, seaweedfs):
    with tempfile.TemporaryDirectory(prefix="p-", dir="/tmp", ignore_cleanup_errors=True) as temporary:
        cluster = Cluster(tmp_path_factory.mktemp("cluster"), temporary)
        yield cluster
        cluster.stop()
    assert not cluster.env_file.exists(), "the keys go with the cluster"


@pytest.fixture(scope="module")
def finished(cluster, cohort, tmp_path_factory):
    """A training and a segmentation that were submitted to three nodes, and the same from one node's Ray."""
    folder = tmp_path_factory.mktemp("job")
    settings = TINY | {
        "synthesis": TINY["synthesis"] | {"count": 600},
        "precise": NETWORK | {"epochs": 1, "patch_size": 64, "masks": "pseudo"},
        "compute": {"device": "cpu", "workers": NODES},
        "tracking": {"enabled": False},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings))
    files = cluster.files()
    for file in cohort.rglob("*.png"):
        files.pipe_file(f"{BUCKET}/cohort/{file.relative_to(cohort)}", file.read_bytes())
    for number in range(3):
        slide = folder / "slide.tif"
        write_slide(str(slide), str(folder / "mask.tif"), seed=number, size=(700, 600), mpp=1.0)
        files.pipe_file(f"{BUCKET}/slides/{number} [a].tif", slide.read_bytes())
        slide.unlink()
    data, slides = f"s3://{BUCKET}/cohort", f"s3://{BUCKET}/slides"
    said = cluster.submit(
        "train", "--config", "tiny.yaml", "--data", data, "--workspace", f"s3://{BUCKET}/three/runs", cwd=folder
    )
    (model,) = files.glob(f"{BUCKET}/three/runs/precise/*/bundle")
    # The networks are trained once: two trainings may differ in a last bit, and then the masks would.
    for name in files.find(f"{BUCKET}/three/runs/preliminary"):
        files.pipe_file(name.replace("/three/", "/one/", 1), files.cat_file(name))
    alone = {key: value for key, value in cluster.environment.items() if not key.startswith("RAY_")}
    alone["RAY_worker_niceness"] = "0"  # see conftest.py
    arguments = [str(folder / "tiny.yaml"), data, f"s3://{model}", slides, f"s3://{BUCKET}/one"]
    log = folder / "one.log"
    with log.open("w") as file:
        command = [sys.executable, "-c", ONE_NODE, *arguments]
        one = subprocess.Popen(command, env=alone, cwd=folder, stdout=subprocess.DEVNULL, stderr=file)
    try:
        options = ["--mpp", "1", "--symmetries", "1", "--device", "cpu", "--workspace", str(folder)]
        out = f"s3://{BUCKET}/three/slides"
        cluster.submit("segment", "--model", f"s3://{model}", "--slides", slides, "--out", out, *options, cwd=folder)
        assert one.wait(STUCK_S) == 0, log.read_text()[-4000:]
    finally:
        one.kill()
    return files, said, log.read_text()


def test_a_submitted_training_runs_on_three_nodes_from_bucket_to_bucket(finished):
    files, said, _ = finished
    manifests = files.glob(f"{BUCKET}/three/runs/*/*/manifest.json")
    needed = set(TRAIN_STAGES) - {"classifier", "subcategories", "cams", "refiner", "refined_masks"}
    assert {name.split("/")[-3] for name in manifests} == needed
    assert "Scoring the precise model: done" in said
    assert not [name for name in files.find(f"{BUCKET}/three/runs") if "/ray_train/" in name]


def test_no_key_is_in_a_log_a_manifest_or_a_result(cluster, finished):
    files, said, _ = finished
    secret, token = cluster.variables["AWS_SECRET_ACCESS_KEY"], cluster.variables["RAY_AUTH_TOKEN"]
    assert cluster.env_file.stat().st_mode & 0o777 == 0o600
    texts = [said, cluster.log.read_text()]
    texts += [
        files.cat_file(name).decode() for name in files.find(f"{BUCKET}/three") if name.endswith((".json", ".md"))
    ]
    assert not [text for text in texts if secret in text or token in text]


def test_mosaics_and_pseudo_masks_are_those_of_one_node(finished):
    files, _, said_by_one = finished
    assert "Training the preliminary model: up to date, reused" in said_by_one
    for stage, folder in (("synthesis", "mosaics"), ("pseudo_masks", "masks")):
        three, one = (
            sorted(files.glob(f"{BUCKET}/{run}/runs/{stage}/*/{folder}/*.parquet")) for run in ("three", "one")
        )
        assert [name.split("/three/")[1] for name in three] == [name.split("/one/")[1] for name in one] != []
        for names in zip(three, one, strict=True):
            tables = [pq.read_table(io.BytesIO(files.cat_file(name))) for name in names]
            assert tables[0].equals(tables[1]), f"{stage} differs"


def test_segmented_slides_are_those_of_one_node(finished):
    files, _, _ = finished
    for number in range(3):
        for name in ("mask.tif", "regions.geojson", "areas.json", "overview.png"):
            three, one = (files.cat_file(f"{BUCKET}/{run}/slides/slides/{number} _a_/{name}") for run in RUNS)
            assert three == one, name
    records = [
        json.loads(files.cat_file(name)) for name in files.find(f"{BUCKET}/three/slides") if "slide.json" in name
    ]
    assert [record["status"] for record in records] == ["completed"] * 3
