"""Training steps at 224 px of the networks that the paper's presets train, beside a plain loop with the same network.

The plain loop is what a user would write: fp32, NCHW, AdamW. On a CPU it is the preliminary model alone, and PyTorch's
compiler is left out: it did not finish its first UNet++ in 7 minutes. On a GPU it is all four networks, with the memory
that each loop needs and what the compiler gains and costs.

    python -m benchmarks.training
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import Options, Report
from pistoseg.config import RefinerConfig, TrainingConfig, load_config
from pistoseg.memory import keep_freed_memory
from pistoseg.models import classifier, refiner, segmentation
from pistoseg.models.inference import resolve_device, resolve_precision
from pistoseg.training.augmentation import augment
from pistoseg.training.loop import build_optimizer
from pistoseg.training.precision import autocast
from pistoseg.training.tasks import ClassificationTask, RefiningTask, SegmentationTask, Task

TIMES_PLAIN = 4.0
CPU_STEPS, GPU_STEPS = 2, 10
"""Steps of a measured call: on a GPU one alone is over before a clock of the CPU can tell much."""
SETTLING = 2
"""Unmeasured steps before: in a training, the first two get its memory and the others have it."""
CLASSES = 3
CELLS = 32
"""Height and width of the grid on which pseudo-masks and CAMs are kept."""

Batch = dict[str, Tensor]
Step = Callable[[], None]


@dataclass(frozen=True)
class Case:
    """One of the trained networks.

    Args:
        network: with random weights.
        task: its loss.
        batch: its samples, on the CPU.
    """

    network: Any
    task: Task
    batch: Batch


def benchmark(options: Options) -> Report:
    """Measure all of it."""
    report = Report("training")
    device = resolve_device("auto")
    for name in CASES if device.type == "cuda" else ("preliminary",):
        measure(report, name, options, device)
    threads = torch.get_num_threads()
    report.note(f"on {_name(device)}, {threads} threads, ours in {resolve_precision('auto', device)}")
    return report


def measure(report: Report, name: str, options: Options, device: torch.device, compiled: bool = True) -> None:
    """Add the figures of one network: images/s, how many times those of the plain loop, memory on a GPU.

    Args:
        report: receives them.
        name: key of `CASES`.
        options: sizes.
        device: where the steps run.
        compiled: whether `torch.compile` is measured as well, on a GPU.
    """
    batch_size, gpu = options.size(16, 2), device.type == "cuda"
    case = CASES[name](options, batch_size, options.size(224, 64))
    makers: dict[str, Callable[[], Step]] = {
        "plain": lambda: plain_step(case, device),
        "ours": lambda: step(case, device),
        "ours_without_augmentation": lambda: step(case, device, augmented=False),
    }
    if gpu and compiled:
        makers["ours_compiled"] = lambda: step(case, device, compiled=True)
    steps = 1 if options.tiny else GPU_STEPS if gpu else CPU_STEPS
    calls: dict[str, Step] = {}
    for variant, make in makers.items():
        began = time.perf_counter()
        calls[variant], mib = _first_call(make, device)
        if gpu:
            report.add(f"{name}_{variant}_peak_mib", mib)
        if variant == "ours_compiled":
            report.add(f"{name}_first_compiled_step_s", time.perf_counter() - began)

    @contextmanager
    def turn(variant: str) -> Iterator[None]:
        with keep_freed_memory() if variant != "plain" else nullcontext():  # for as long as a training, in ours
            for _ in range(SETTLING):
                calls[variant]()
            yield

    repeated = {variant: _repeated(call, steps) for variant, call in calls.items()}
    timings = harness.interleaved(repeated, options.size(5, 1), turn)
    for variant, timing in timings.items():
        report.add(f"{name}_{variant}_per_s", timing.per_s(batch_size * steps))
    exact = resolve_precision("auto", device) == "bf16" and not options.tiny and name == "preliminary"
    report.compare(f"{name}_times_plain", timings["ours"], timings["plain"], least=TIMES_PLAIN if exact else None)
    report.compare(f"{name}_times_plain_without_augmentation", timings["ours_without_augmentation"], timings["plain"])
    if "ours_compiled" in timings:
        report.compare(f"{name}_times_eager_compiled", timings["ours_compiled"], timings["ours"])


def _first_call(make: Callable[[], Step], device: torch.device) -> tuple[Step, float]:
    """A step that ran once, and the most memory (MiB) of a GPU that it and its network took."""
    if device.type != "cuda":
        call = make()
        call()
        return call, 0.0
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call = make()
    call()
    return call, (torch.cuda.max_memory_allocated(device) - before) / 2**20


def _repeated(call: Step, steps: int) -> Step:
    def run() -> None:
        for _ in range(steps):
            call()

    return run


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _segmentation(options: Options, count: int, side: int, encoder: str) -> Case:
    arguments = ("unet", "tu-mobilenetv3_small_050") if options.tiny else ("unetplusplus", encoder)
    network = segmentation.build(*arguments, CLASSES, None, None if options.tiny else "scse")
    task = SegmentationTask(load_config("wsss4luad").classes.tissue(), "bce", None, {})
    mask = torch.randint(0, CLASSES, (count, side, side), dtype=torch.uint8)
    return Case(network, task, {"image": _images(count, side), "mask": mask})


def _cam_network(options: Options) -> tuple[str, int]:
    return ("tu-mobilenetv3_small_050", 16) if options.tiny else ("resnet38d", 8)


def _classifier(options: Options, count: int, side: int) -> Case:
    encoder, stride = _cam_network(options)
    network = classifier.build(encoder, CLASSES, None, stride)
    task = ClassificationTask(("tumor", "stroma", "normal"), regions=1, held_out=None)
    return Case(network, task, {"image": _images(count, side), **_labels(count, side)})


def _refiner(options: Options, count: int, side: int) -> Case:
    encoder, stride = _cam_network(options)
    network = refiner.build(encoder, CLASSES, None, stride, feature_norm=False)
    maps = torch.rand(count, 2 * CLASSES, CELLS, CELLS).half()
    batch = {"image": _images(count, side), **_labels(count, side), "maps": maps}
    return Case(network, RefiningTask(CLASSES, RefinerConfig()), batch)


def _images(count: int, side: int) -> Tensor:
    return torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def _labels(count: int, side: int) -> Batch:
    """One labelled window an image, with every class."""
    regions = torch.zeros(count, side, side, dtype=torch.uint8)
    return {"regions": regions, "labels": torch.ones(count, 1, CLASSES, dtype=torch.uint8)}


CASES: Mapping[str, Callable[[Options, int, int], Case]] = {
    "preliminary": lambda options, count, side: _segmentation(options, count, side, "efficientnet-b0"),
    "precise": lambda options, count, side: _segmentation(options, count, side, "efficientnet-b3"),
    "classifier": _classifier,
    "refiner": _refiner,
}
"""The networks of the presets `wsss4luad` and `bcss-wsss`."""


def plain_step(case: Case, device: torch.device) -> Step:
    """A step of a loop as one would write it: floats made on the CPU, fp32, NCHW; trains a copy of the network."""
    network = copy.deepcopy(case.network).to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    batch = case.batch | {"image": network.normalization(case.batch["image"]).contiguous()}

    def run() -> None:
        loss = case.task.losses(network, {name: value.to(device) for name, value in batch.items()})["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()

    return run


def step(case: Case, device: torch.device, *, augmented: bool = True, compiled: bool = False) -> Step:
    """A step of `pistoseg.training.loop` without Ray around it; trains a copy of the network.

    Args:
        case: network, loss and batch.
        device: where it runs; bytes travel there, from pinned memory to a GPU, and all else is made there.
        augmented: whether the images are changed at random.
        compiled: whether the network goes through `torch.compile`.
    """
    config = TrainingConfig()
    network = copy.deepcopy(case.network).to(device=device, memory_format=torch.channels_last).train()
    optimizer = build_optimizer(network, config)
    model = torch.compile(network) if compiled else network
    bf16 = resolve_precision("auto", device) == "bf16"
    batch = {name: value.pin_memory() if device.type == "cuda" else value for name, value in case.batch.items()}

    def forward(images: Tensor, *maps: Tensor) -> Any:
        with autocast(device, bf16):
            return model(network.normalization(images), *maps)

    def run() -> None:
        moved = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
        if augmented:
            moved = augment(moved, config.augmentation, 0)
        loss = case.task.losses(forward, moved)["loss"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), config.clip_norm)
        optimizer.step()
        loss.item()

    return run


if __name__ == "__main__":
    harness.main(benchmark, __doc__)
