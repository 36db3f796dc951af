"""What the networks of the paper's presets take on a CPU: batches of 16 images of 224 px, UNet++ on EfficientNet-b0 and
-b3, ResNet38d as CAM network and with the refiner's attention.

Steps are those of `benchmarks.training`, augmentation included; each network has a process of its own, whose largest
memory is therefore the network's. On 2 cores without bf16 instructions they took up to 6 GB and 17 minutes together
(bf16 emulated), so that `make bench` leaves them out.

    python -m benchmarks.full_size
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import torch

from benchmarks import harness
from benchmarks.harness import Options, Report, Timing
from benchmarks.training import CASES, step
from pistoseg.models.inference import resolve_precision

BATCH = 16
STEPS = 2


def benchmark(options: Options) -> Report:
    """Measure all four, one after the other."""
    report = Report("full_size")
    spawned = multiprocessing.get_context("spawn")
    for name in CASES:
        with ProcessPoolExecutor(1, mp_context=spawned) as process:
            timing, idle_mib, peak_mib = process.submit(measure, name, options).result()
        report.add(f"{name}_per_s", timing.per_s(options.size(BATCH, 2)))
        report.add(f"{name}_per_cpu_s", timing.per_cpu_s(options.size(BATCH, 2)))
        report.add(f"{name}_peak_mib", peak_mib)
        report.add(f"{name}_peak_above_idle_mib", peak_mib - idle_mib)
    report.note(f"{torch.get_num_threads()} threads, {resolve_precision('auto', torch.device('cpu'))}")
    return report


def measure(name: str, options: Options) -> tuple[Timing, float, float]:
    """Train a network for a few steps; the first one, which allocates, is not timed.

    Args:
        name: key of `CASES`.
        options: sizes.
    Returns:
        Seconds of the steps, memory (MiB) of this process before the network was built and at most.
    """
    idle = harness.peak_mib()
    run = step(CASES[name](options, options.size(BATCH, 2), options.size(224, 64)), torch.device("cpu"))
    timing = harness.interleaved({name: run}, options.size(STEPS, 1))[name]
    return timing, idle, harness.peak_mib()


if __name__ == "__main__":
    harness.main(benchmark, __doc__)
