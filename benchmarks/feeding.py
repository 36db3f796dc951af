"""Training through Ray beside a bare PyTorch loop on tensors in memory: speed, and the time spent waiting for mosaics.

python -m benchmarks.feeding --data DATA
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from benchmarks import harness, material
from benchmarks.harness import Options, Report
from benchmarks.mosaics import source_of
from benchmarks.training import Case, step
from pistoseg.config import AugmentationConfig, ComputeConfig, TrainingConfig
from pistoseg.memory import keep_freed_memory
from pistoseg.models import segmentation
from pistoseg.models.segmentation import SegmentationNetwork
from pistoseg.training.samples import fresh_mosaics
from pistoseg.training.tasks import SegmentationTask

SHARE_OF_BARE, WAITING = 0.95, 0.02
NODE_PER_S, NODE_CORES = 2000.0, 16


def benchmark(options: Options) -> Report:
    """Measure all of it."""
    import ray

    from pistoseg.stages import cluster
    from pistoseg.training.stream import SampleSource

    report = Report("feeding")
    item = material.mosaics(options)[0]
    item = replace(item, config=_sized(item.config, options))
    synthesis = item.config.synthesis
    with cluster.connected(ComputeConfig(device="auto")):
        shared = source_of(item)
        source = SampleSource(fresh_mosaics, ray.put(shared), synthesis.count, (synthesis.height, synthesis.width))
        cores = cluster.available_cpus()
        rate = _stream(source, cores, options)
        report.add("stream_per_s", rate)
        report.add("stream_per_core_s", rate / cores, least=NODE_PER_S / NODE_CORES)
        config = TrainingConfig(
            epochs=3,
            batch_size=options.size(8, 4),
            samples_per_epoch=options.size(128, 8),
            keep="last",
            augmentation=AugmentationConfig(),
        )
        task = SegmentationTask(item.config.classes.tissue(), "bce", None)
        bare, rows, ours, shares = [_bare(shared, task, config, options)], [], [], []
        for _ in range(options.size(3, 1)):
            # The first epoch also warms the network up, as the bare loop did before it was timed.
            warm = _through_ray(source, task, config, options)[1:]
            bare.append(_bare(shared, task, config, options))
            rows += warm
            ours.append(statistics.median(row["images_per_s"] for row in warm))
            shares.append(ours[-1] / statistics.mean(bare[-2:]))
    report.add("loop_through_ray_per_s", statistics.median(ours))
    report.add("loop_bare_per_s", statistics.median(bare))
    report.add("loop_share_of_bare", statistics.median(shares), least=SHARE_OF_BARE)
    report.add("waiting_share", statistics.mean(row["waiting_share"] for row in rows), most=WAITING)
    return report


def _sized(config: Any, options: Options) -> Any:
    """Smaller mosaics for a run that only shows that it runs."""
    if not options.tiny:
        return config
    return config.model_copy(update={"synthesis": config.synthesis.model_copy(update={"n_h": 2, "n_w": 2})})


def _network(options: Options, classes: int) -> SegmentationNetwork:
    """The fastest of the presets' networks: the hardest one to feed."""
    encoder = "tu-mobilenetv3_small_050" if options.tiny else "tu-tf_efficientnet_lite0"
    torch.manual_seed(0)
    return segmentation.build("unet", encoder, classes, None, None)


def _stream(source: Any, actors: int, options: Options) -> float:
    """Mosaics in a second that reach a consumer who does nothing with them."""
    from pistoseg.training.stream import sample_dataset

    count = options.size(6000, 64)  # several blocks an actor
    batches = iter(sample_dataset(source, 0, 1, count, actors).iter_torch_batches(batch_size=16, prefetch_batches=2))
    next(batches)
    began, seen = time.perf_counter(), 0
    for batch in batches:
        seen += len(batch["index"])
    return seen / (time.perf_counter() - began)


def _bare(shared: dict[str, Any], task: SegmentationTask, config: TrainingConfig, options: Options) -> float:
    """Images in a second of the same steps on batches that are in memory."""
    from pistoseg.models.inference import resolve_device
    from pistoseg.stages import cluster

    threads = torch.get_num_threads()
    torch.set_num_threads(options.size(cluster.node_threads(), 1))
    synthesizer = fresh_mosaics(shared)
    pairs = [synthesizer.sample(0, index) for index in range(config.batch_size)]
    images, masks = (torch.from_numpy(np.stack(items)) for items in zip(*pairs, strict=True))
    network = _network(options, len(task.classes))
    run = step(Case(network, task, {"image": images, "mask": masks}), resolve_device("auto"))
    steps = (config.samples_per_epoch or config.batch_size) // config.batch_size
    with keep_freed_memory():  # as a training does
        for _ in range(options.size(2, 1)):
            run()
        began = time.perf_counter()
        for _ in range(steps):
            run()
        took = time.perf_counter() - began
    torch.set_num_threads(threads)
    return steps * config.batch_size / took


def _through_ray(
    source: Any, task: SegmentationTask, config: TrainingConfig, options: Options
) -> list[dict[str, float]]:
    """The epochs of a training as `pistoseg train` runs it, without validation."""
    from pistoseg.stages import cluster
    from pistoseg.training.trainer import train

    resources = cluster.training_resources(ComputeConfig(device="auto"))
    resources["threads"] = options.size(resources["threads"], 1)
    with tempfile.TemporaryDirectory() as folder:
        trained = train(
            _network(options, len(task.classes)),
            source,
            task,
            config,
            ComputeConfig(device="auto"),
            folder=folder,
            seed=0,
            on_step=lambda done, total, note: None,
            on_epoch=lambda row: None,
            **resources,
        )
    return trained.history


if __name__ == "__main__":
    harness.main(benchmark, __doc__)
