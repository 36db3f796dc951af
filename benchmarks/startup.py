"""Start-up: the command line, the import, and what a stage costs on a Ray that runs already.

python -m benchmarks.startup
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import Options, Report

HELP_S, IMPORT_S, OVER_RAY = 0.3, 0.1, 1.25


def benchmark(options: Options) -> Report:
    """Measure all of it."""
    report = Report("startup")
    python = sys.executable
    repeats = options.size(11, 1)
    seconds = {
        "python": _median([python, "-c", "pass"], repeats),
        "help": _median([python, "-m", "pistoseg", "--help"], repeats),
        "import": _median([python, "-c", "import pistoseg"], repeats),
    }
    report.add("help_s", seconds["help"], most=None if options.tiny else HELP_S)
    report.add("import_s", seconds["import"] - seconds["python"], most=None if options.tiny else IMPORT_S)
    report.add("bare_python_s", seconds["python"])
    _stages(options, report)
    return report


def _median(command: list[str], repeats: int) -> float:
    took = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        took.append(time.perf_counter() - began)
    return statistics.median(took[1:])


def _stages(options: Options, report: Report) -> None:
    """Fixed cost of a sharded stage and of a training, each beside the least that Ray itself needs for it."""
    import ray

    from pistoseg.config import ComputeConfig
    from pistoseg.stages import cluster

    began = time.perf_counter()
    with cluster.connected(ComputeConfig(device="cpu")):
        report.add("ray_start_s", time.perf_counter() - began)
        ray.get(ray.remote(num_cpus=0.1)(lambda: None).remote())
        repeats = options.size(5, 1)
        stage, bare = _alternate(_stage, _bare_tasks, repeats)
        report.add("stage_fixed_s", stage)
        report.add("stage_fixed_ray_s", bare)
        report.add("stage_fixed_over_ray", stage / bare, most=None if options.tiny else OVER_RAY)
        if options.tiny:
            return
        report.add(
            "stage_fixed_actors_s", statistics.median(harness.interleaved({"pool": _bare_pool}, repeats)["pool"].wall)
        )
        report.note("a stage's shards are tasks, in processes that Ray has at hand; an actor pool starts its own")
        training, bare = _alternate(_training, _bare_training, 3)
        report.add("training_fixed_s", training)
        report.add("training_fixed_ray_s", bare)
        report.add("training_fixed_over_ray", training / bare, most=OVER_RAY)
        report.note("both trainings are fed by an actor and keep a checkpoint; the bare one has no network")


def _alternate(first: Callable[[], None], second: Callable[[], None], repeats: int) -> tuple[float, float]:
    timings = harness.interleaved({"first": first, "second": second}, repeats)
    return statistics.median(timings["first"].wall), statistics.median(timings["second"].wall)


class Nothing:
    """A worker of a stage that has nothing to do."""

    def __call__(self, number: int, shard: list[int], part: str) -> None:
        """Do nothing."""


def _stage() -> None:
    from rich.console import Console

    from pistoseg.progress import Progress
    from pistoseg.stages import sharding

    with tempfile.TemporaryDirectory() as folder:
        sharding.run_shards(
            Nothing,
            {},
            [[0], [1]],
            folder,
            actors=2,
            resources={"num_cpus": 0.5},
            progress=Progress(Console(quiet=True)),
        )


class _Identity:
    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return row


def _bare_tasks() -> None:
    import ray

    list(_rows().map(lambda row: row, compute=ray.data.TaskPoolStrategy(2), num_cpus=0.5).iter_rows())


def _rows() -> Any:
    import ray

    return ray.data.from_items([{"number": 0}, {"number": 1}], override_num_blocks=2)


def _bare_pool() -> None:
    import ray

    list(_rows().map(_Identity, compute=ray.data.ActorPoolStrategy(size=2), num_cpus=0.5).iter_rows())


def _training() -> None:
    import numpy as np
    import ray

    from pistoseg.classes import TissueClasses
    from pistoseg.config import ComputeConfig, TrainingConfig
    from pistoseg.models import segmentation
    from pistoseg.stages import cluster
    from pistoseg.training.stream import SampleSource
    from pistoseg.training.tasks import SegmentationTask
    from pistoseg.training.trainer import train

    network = segmentation.build("unet", "tu-mobilenetv3_small_050", 2, None, None)
    classes = TissueClasses.from_json(
        {"classes": [{"name": name, "color": [1, 2, number]} for number, name in enumerate("ab")], "background_id": 2}
    )
    sample = (np.zeros((32, 32, 3), np.uint8), np.zeros((32, 32), np.uint8))
    with tempfile.TemporaryDirectory() as folder:
        train(
            network,
            SampleSource(_Same, ray.put(sample), 4, (32, 32)),
            SegmentationTask(classes, "bce", None),
            TrainingConfig(epochs=1, batch_size=4, samples_per_epoch=4, keep="last"),
            ComputeConfig(device="cpu"),
            folder=folder,
            seed=0,
            on_step=lambda done, total, note: None,
            on_epoch=lambda row: None,
            **cluster.training_resources(ComputeConfig(device="cpu")),
        )


class _Same:
    def __init__(self, sample: Any) -> None:
        self.arrays = sample

    def sample(self, epoch: int, index: int) -> Any:
        return self.arrays


def _bare_training() -> None:
    import ray.train
    from ray.train.torch import TorchTrainer

    with tempfile.TemporaryDirectory() as folder:
        TorchTrainer(
            _bare_loop,
            train_loop_config={},
            scaling_config=ray.train.ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
            run_config=ray.train.RunConfig(name="bare", storage_path=folder),
            datasets={
                "train": ray.data.from_items([{"number": 0}]).map(
                    _Identity, compute=ray.data.ActorPoolStrategy(size=1), num_cpus=0.1
                )
            },
        ).fit()


def _bare_loop(arguments: dict[str, Any]) -> None:
    import ray.train

    rows = list(ray.train.get_dataset_shard("train").iter_rows())
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "rows").write_text(str(rows))
        ray.train.report({"done": 1}, checkpoint=ray.train.Checkpoint.from_directory(folder))


if __name__ == "__main__":
    harness.main(benchmark, __doc__)
