"""Breaks what breaks on clusters, in the middle of each stage, and prints what came of it.

    python tests/faults/inject.py                          every fault in every stage: an hour and a half on two cores
    python tests/faults/inject.py --fault worker node --stage synthesis
    python tests/faults/inject.py --out faults.md

Everything is started here: three Ray nodes, an S3 server, a synthetic cohort and slides in it; nothing else on the
machine is touched. A run that a fault ends is started again with the same command, as its user would. The last column
compares mosaics, pseudo-masks, trials or slide masks with those of an undisturbed run, byte for byte.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq
import torch
import yaml
from fsspec.implementations.local import LocalFileSystem

from pistoseg.local_cluster import BUCKET, RayNodes, S3Server
from pistoseg.models import bundle, segmentation
from pistoseg.phantom import PHANTOM_CLASSES, write_cohort, write_slide

sys.path.extend([str(Path(__file__).parents[1] / "integration"), str(Path(__file__).parents[1])])
from conftest import NETWORK, TINY  # the settings of the integration tests
from processes import command_line, descendants, wait_for

WAIT_S = 600
DOWN_S = 60
DISK_MB, FILLER = 400, "filler"
MOUNTS = "PISTOSEG_FAULTS_MOUNTS"
"""Set where this process may mount disks: in a namespace of its own."""
FAULTS = {
    "worker": "a worker process gets SIGKILL",
    "node": "a node's raylet and workers get SIGKILL",
    "driver": "the driver gets SIGKILL",
    "store": "the object store holds 80 MB",
    "s3": f"the S3 server is away for {DOWN_S} s",
    "mlflow": "the tracking server refuses connections",
    "disk": "the disk of workspace and results gets full",
}
STAGES = ("synthesis", "preliminary", "pseudo_masks", "search", "segmentation")
PIPELINE = """
import sys
from pistoseg.artifacts import Workspace
from pistoseg.config import load_config
from pistoseg.errors import PistoSegError
from pistoseg.pipeline import run_pipeline
from pistoseg.stages import cluster, masks
masks.SHARD_PIXELS = 1 << 16  # otherwise so few images are one shard, on one node
config, data, workspace, target = sys.argv[1:]
settings = load_config(None, None, config, [f"data.uri={data}"])
try:
    with cluster.connected(settings.compute):
        run_pipeline(settings, Workspace(workspace), (target,))
except PistoSegError as error:
    sys.exit(f"pistoseg: {error}")
"""
SAYS = {"synthesis": "Making mosaics ...", "preliminary": "Training the preliminary model ...",
        "pseudo_masks": "Making pseudo-masks ...", "search": "trial 0: ", "segmentation": "Segmenting "}  # fmt: skip
WORKERS = {"synthesis": b"Map(_shard)", "preliminary": b"RayTrainWorker", "pseudo_masks": b"Map(_shard)",
           "search": b"RayTrainWorker", "segmentation": b"SlideWorker"}  # fmt: skip
RESULTS = {
    "synthesis": "runs/synthesis/*/mosaics/*.parquet",
    "preliminary": "runs/pseudo_masks/*/masks/*.parquet",
    "pseudo_masks": "runs/pseudo_masks/*/masks/*.parquet",
    "search": "runs/search/faults/trials/*.json",
    "segmentation": "slides/slides/*/mask.tif",
}
SPACE = {"parameters": {"precise.lr": {"values": [1e-3, 1e-4]}, "precise.lr_decay": {"values": [0.9, 0.5]}}}


@dataclass
class Row:
    """A line of the table."""

    fault: str
    stage: str
    happened: str
    result: str
    seconds: float


@dataclass
class Bench:
    """What all runs share: a folder, the S3 server with data in it, and the undisturbed results."""

    folder: Path
    s3: S3Server
    disk: Path
    wanted: dict[str, dict[str, str]] = field(default_factory=dict)
    bundle: str = ""

    def place(self, name: str) -> str:
        """Where a run leaves what it makes: in the bucket, or on the small disk where that is to be filled."""
        return str(self.disk / name) if name.startswith("disk-") else f"s3://{BUCKET}/{name}"

    def files(self):
        """The bucket's file system."""
        import s3fs

        given = self.s3.environment()
        keys = {"key": given["AWS_ACCESS_KEY_ID"], "secret": given["AWS_SECRET_ACCESS_KEY"]}
        return s3fs.S3FileSystem(
            **keys, endpoint_url=self.s3.endpoint, use_listings_cache=False, skip_instance_cache=True
        )

    def system(self, place: str):
        """That of a place: the bucket's, or the machine's own."""
        return self.files() if place.startswith("s3:") else LocalFileSystem(auto_mkdir=True)

    def nodes(self, store: int = 200 << 20) -> RayNodes:
        """Three of them, with so many bytes in the object store of each."""
        return RayNodes(3, 2, store, self.s3.environment())

    def command(self, stage: str, name: str) -> list[str]:
        place = self.place(name)
        if stage == "segmentation":
            verb = [
                "segment",
                "--model",
                self.bundle,
                "--slides",
                f"s3://{BUCKET}/data/slides",
                "--out",
                f"{place}/slides",
            ]
            options = ["--mpp", "1", "--symmetries", "2", "--device", "cpu", "--workspace", str(self.folder / name)]
            return [sys.executable, "-m", "pistoseg", *verb, *options]
        if stage == "search":
            verb = ["search", "--space", str(self.folder / "space.yaml"), "--config", str(self.folder / "search.yaml")]
            options = ["--data", f"s3://{BUCKET}/data/cohort", "--workspace", f"{place}/runs", "--name", "faults"]
            options += ["--algorithm", "grid", "--pruning", "none", "--confirm-seeds", "0", "--parallel", "1"]
            return [sys.executable, "-m", "pistoseg", *verb, *options]
        config, target = str(self.folder / "tiny.yaml"), "synthesis" if stage == "synthesis" else "pseudo_masks"
        return [sys.executable, "-c", PIPELINE, config, f"s3://{BUCKET}/data/cohort", f"{place}/runs", target]

    def results(self, stage: str, name: str) -> dict[str, str]:
        """Hash of every result's content by name."""
        place, found = self.place(name), {}
        files = self.system(place)
        for item in files.glob(f"{place}/{RESULTS[stage]}"):
            data = files.cat_file(item)
            if item.endswith(".parquet"):
                data = repr(pq.read_table(io.BytesIO(data)).to_pylist()).encode()
            elif item.endswith(".json"):
                trial = json.loads(data)
                data = repr([trial[key] for key in ("overrides", "state", "value", "artifacts")]).encode()
            found[item.split(f"/{name}/", 1)[1]] = hashlib.sha256(data).hexdigest()
        return found

    def copy(self, stage: str, name: str) -> None:
        """A stage's artifacts of the undisturbed run, for another one."""
        source, files = f"{BUCKET}/undisturbed/runs/{stage}", self.files()
        found = files.find(source)
        for item in found:
            if any(other.startswith(f"{item.rstrip('/')}/") for other in found if other != item):
                continue  # SeaweedFS lists folders, too
            target = f"{self.place(name)}/runs/{stage}{item.removeprefix(source)}"
            self.system(target).pipe_file(target, files.cat_file(item))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fault", nargs="+", choices=tuple(FAULTS), default=list(FAULTS))
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--out", metavar="FILE", help="also write the table there")
    options = parser.parse_args()
    mounted = "disk" in options.fault
    if mounted and MOUNTS not in os.environ:
        command = ["unshare", "--user", "--map-root-user", "--mount", sys.executable, *sys.argv]
        os.execvpe(command[0], command, os.environ | {MOUNTS: "1"})
    rows: list[Row] = []
    with (
        tempfile.TemporaryDirectory(prefix="pistoseg-faults-") as name,
        small_disk(Path(name) / "disk", mounted) as disk,
        S3Server(Path(name) / "s3") as s3,
    ):
        bench = Bench(Path(name), s3, disk)
        prepare(bench, options.stage)
        for fault in options.fault:
            for stage in options.stage:
                rows.append(inject(bench, fault, stage))
                print(line(rows[-1]), flush=True)
    text = (
        "| fault | during | what happened | result | s |\n|---|---|---|---|---|\n" + "\n".join(map(line, rows)) + "\n"
    )
    print("\n" + text)
    if options.out:
        Path(options.out).write_text(text)
    return 0 if all(row.result == "equal" for row in rows) else 1


def line(row: Row) -> str:
    """A row of the table."""
    return f"| {FAULTS[row.fault]} | {row.stage} | {row.happened} | {row.result} | {row.seconds:.0f} |"


def prepare(bench: Bench, stages: list[str]) -> None:
    """Data, and the results of runs that nothing disturbs."""
    settings = TINY | {
        "synthesis": TINY["synthesis"] | {"count": 3000},
        "preliminary": NETWORK | {"epochs": 4, "samples_per_epoch": 64},
        "compute": {"device": "cpu"},
    }
    (bench.folder / "tiny.yaml").write_text(yaml.safe_dump(settings))
    own = {
        "synthesis": settings["synthesis"] | {"mode": "streamed"},
        "precise": NETWORK | {"epochs": 2, "patch_size": 64},
    }
    own["precise"] |= {"masks": "synthesized"}
    (bench.folder / "search.yaml").write_text(yaml.safe_dump(settings | own))
    (bench.folder / "space.yaml").write_text(yaml.safe_dump(SPACE))
    bench.s3.make_bucket(BUCKET)
    files = bench.files()
    cohort = bench.folder / "cohort"
    write_cohort(str(cohort), training=160, validation=4, patch_size=64, validation_size=96)
    for file in cohort.rglob("*.png"):
        files.pipe_file(f"{BUCKET}/data/cohort/{file.relative_to(cohort)}", file.read_bytes())
    for number in range(4):
        slide = bench.folder / "slide.tif"
        write_slide(str(slide), str(bench.folder / "mask.tif"), seed=number, size=(900, 900), mpp=1.0)
        files.pipe_file(f"{BUCKET}/data/slides/{number}.tif", slide.read_bytes())
    torch.manual_seed(0)
    network = segmentation.build("unet", "tu-mobilenetv3_small_050", len(PHANTOM_CLASSES), None, None)
    evaluation = {"tile": 128, "stride": 96, "scales": (1.0,), "symmetries": 1, "batch_size": 8}
    bundle.save(
        str(bench.folder / "bundle"), network, classes=PHANTOM_CLASSES, patch_size=64, scale={}, evaluation=evaluation
    )
    for file in (bench.folder / "bundle").iterdir():
        files.pipe_file(f"{BUCKET}/data/bundle/{file.name}", file.read_bytes())
    bench.bundle = f"s3://{BUCKET}/data/bundle"
    longest = [stage for stage in ("pseudo_masks", "preliminary", "synthesis") if stage in stages][:1]
    with bench.nodes() as nodes:
        for stage in [*longest, *(name for name in ("search", "segmentation") if name in stages)]:
            run(bench, nodes, stage, "undisturbed")
    bench.wanted = {stage: bench.results(stage, "undisturbed") for stage in stages}


def start(bench: Bench, nodes: RayNodes, stage: str, name: str, log: Path, **more: str) -> subprocess.Popen[bytes]:
    environment = os.environ | nodes.environment() | {"MLFLOW_TRACKING_URI": f"sqlite:///{bench.folder / 'mlflow.db'}"}
    with log.open("ab") as file:
        return subprocess.Popen(
            bench.command(stage, name), env=environment | more, stdout=file, stderr=file, cwd=bench.folder
        )


def run(bench: Bench, nodes: RayNodes, stage: str, name: str) -> None:
    log = bench.folder / f"{name}-{stage}.log"
    process = start(bench, nodes, stage, name, log)
    if process.wait(WAIT_S):
        raise RuntimeError(log.read_text()[-4000:])


def inject(bench: Bench, fault: str, stage: str) -> Row:
    """One fault in one stage, on nodes of its own."""
    name, began = f"{fault}-{stage}", time.monotonic()
    log = bench.folder / f"{name}.log"
    if stage == "pseudo_masks":  # drawn by the network of the undisturbed run
        for before in ("patches", "validation", "synthesis", "preliminary"):
            bench.copy(before, name)
    more = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"} if fault == "mlflow" else {}
    with bench.nodes(*[80 << 20] if fault == "store" else []) as nodes:
        process = start(bench, nodes, stage, name, log, **more)
        wait_for(lambda: SAYS[stage] in log.read_text() or process.poll() is not None, WAIT_S)
        missed = strike(bench, fault, stage, process)
        happened = outcome(process, log)
        (bench.disk / FILLER).unlink(missing_ok=True)  # somebody makes room
        for _ in range(2):
            if happened == "went on":
                break
            process = start(bench, nodes, stage, name, log)
            again = outcome(process, log)
            if again == "went on":
                happened += ", finished when run again"
                break
            happened += f", again: {again}"
    found = bench.results(stage, name)
    wanted = bench.wanted[stage]
    differs = [item for item in wanted if found.get(item) != wanted[item]]
    result = missed or ("equal" if not differs else f"{len(differs)} of {len(wanted)} differ")
    return Row(fault, stage, happened, result, time.monotonic() - began)


def strike(bench: Bench, fault: str, stage: str, process: subprocess.Popen[bytes]) -> str:
    """Do it in the middle of the stage; returns why that was not possible, or nothing."""

    def ended() -> bool:
        return process.poll() is not None

    # The head has room for a small training: of a search's trial, the other nodes make the samples.
    part = b"ray::Map" if (fault, stage) == ("node", "search") else WORKERS[stage]

    def victims() -> list[int]:
        # A task of Ray has its name only while it runs. The first raylet is the head's: without it there is no cluster.
        if fault == "worker":
            return named(part)[:1]
        raylets = sorted(named(b"raylet/raylet"))[1:]
        return [pid for pid in raylets if any(part in command_line(below) for below in descendants(pid))][:1]

    def killed() -> bool:
        found = victims()
        for pid in (pid for victim in found for pid in [*descendants(victim), victim]):
            kill(pid)
        return bool(found)

    if fault in ("worker", "node"):
        wait_for(lambda: bool(named(part)) or ended(), WAIT_S)
        time.sleep(1)
        with suppress(TimeoutError):
            wait_for(lambda: ended() or killed(), 60)
            return "not broken: the stage had ended" if ended() else ""
        return "not broken: no worker there"
    if fault == "driver":
        time.sleep(2)
        process.kill()
        return "" if process.wait() == -signal.SIGKILL else "not broken: the stage had ended"
    if fault == "s3":
        time.sleep(1)
        late = ended()
        bench.s3.stop()
        time.sleep(DOWN_S)
        bench.s3.start()
        return "not broken: the stage had ended" if late else ""
    if fault == "disk":
        full(bench.disk)
        return "not broken: the stage had ended" if ended() else ""
    return ""  # it was there from the start


def full(disk: Path) -> None:
    """Write until nothing more fits."""
    with (disk / FILLER).open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(1 << 20))


@contextmanager
def small_disk(folder: Path, mounted: bool) -> Iterator[Path]:
    """A folder for workspaces and results; a small disk of its own where that is to be filled."""
    folder.mkdir()
    if mounted:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def outcome(process: subprocess.Popen[bytes], log: Path) -> str:
    try:
        code = process.wait(WAIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return f"hung for {WAIT_S} s"
    if code == 0:
        return "went on"
    if code == -signal.SIGKILL:
        return "ended"
    last = [text for text in log.read_text().splitlines() if text.strip()][-1]
    return f"exit {code}: {last.replace(f'{log.parent}/', '')[:240]}".replace("|", "/")


def named(part: bytes) -> list[int]:
    """Processes below this one whose command line holds that."""
    return [pid for pid in descendants(os.getpid()) if part in command_line(pid)]


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
