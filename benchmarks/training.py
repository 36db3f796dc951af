"""A training step of UNet++ on efficientnet-b0 at 224 px, beside a plain loop with the same network.

The plain loop is what a user would write: fp32, NCHW, AdamW. PyTorch's compiler is left out on CPUs, where it did not
finish its first UNet++ in 7 minutes; on a GPU it is measured as well.

    python -m benchmarks.training
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import Options, Report
from pistoseg.config import TrainingConfig
from pistoseg.models import segmentation
from pistoseg.models.inference import resolve_device, resolve_precision
from pistoseg.models.losses import segmentation_loss
from pistoseg.models.segmentation import SegmentationNetwork
from pistoseg.training.augmentation import augment
from pistoseg.training.loop import build_optimizer

TIMES_PLAIN = 4.0
CLASSES = 3


def benchmark(options: Options) -> Report:
    """Measure all of it."""
    report = Report("training")
    device = resolve_device("auto")
    batch_size, side = options.size(16, 2), options.size(224, 64)
    network = _network(options)
    batch = _batch(batch_size, side)
    calls: dict[str, Callable[[], object]] = {
        "plain": plain_step(copy.deepcopy(network), batch, device),
        "ours": step(copy.deepcopy(network), batch, device),
        "ours_without_augmentation": step(copy.deepcopy(network), batch, device, augmented=False),
    }
    if device.type == "cuda":
        calls["ours_compiled"] = step(copy.deepcopy(network), batch, device, compiled=True)
    timings = harness.interleaved(calls, options.size(3, 1))
    for name, timing in timings.items():
        report.add(f"train_{name}_per_s", timing.per_s(batch_size))
    exact = resolve_precision("auto", device) == "bf16" and not options.tiny
    report.compare("train_times_plain", timings["ours"], timings["plain"], least=TIMES_PLAIN if exact else None)
    report.compare("train_times_plain_without_augmentation", timings["ours_without_augmentation"], timings["plain"])
    report.note(f"on {device}, {torch.get_num_threads()} threads, {resolve_precision('auto', device)}")
    return report


def _network(options: Options) -> SegmentationNetwork:
    if options.tiny:
        return segmentation.build("unet", "tu-mobilenetv3_small_050", CLASSES, None, None)
    return segmentation.build("unetplusplus", "efficientnet-b0", CLASSES, None, "scse")


def _batch(count: int, side: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=generator)
    mask = torch.randint(0, CLASSES, (count, side, side), dtype=torch.uint8, generator=generator)
    return {"image": image, "mask": mask}


def plain_step(network: SegmentationNetwork, batch: dict[str, Tensor], device: torch.device) -> Callable[[], None]:
    """A step of a loop as one would write it: floats made on the CPU, fp32, NCHW."""
    network.to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    images = network.normalization(batch["image"]).contiguous()

    def run() -> None:
        loss = segmentation_loss(network(images.to(device)), batch["mask"].to(device), "bce", network.n_classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()

    return run


def step(
    network: SegmentationNetwork,
    batch: dict[str, Tensor],
    device: torch.device,
    *,
    augmented: bool = True,
    compiled: bool = False,
) -> Callable[[], None]:
    """A step of `pistoseg.training.loop` without Ray around it.

    Args:
        network: trained in place.
        batch: `image` and `mask`.
        device: where it runs; bytes travel there, from pinned memory to a GPU, and all else is made there.
        augmented: whether the images are changed at random.
        compiled: whether the network goes through `torch.compile`.
    """
    config = TrainingConfig()
    network.to(device=device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = build_optimizer(network, config)
    model = torch.compile(network) if compiled else network
    bf16 = resolve_precision("auto", device) == "bf16"
    if device.type == "cuda":
        batch = {name: value.pin_memory() for name, value in batch.items()}

    def run() -> None:
        moved = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
        if augmented:
            moved = augment(moved, config.augmentation, 0)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = model(network.normalization(moved["image"]))
        loss = segmentation_loss(logits.float(), moved["mask"], "bce", network.n_classes)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), config.clip_norm)
        optimizer.step()
        loss.item()

    return run


if __name__ == "__main__":
    harness.main(benchmark, __doc__)
