"""Large slides from file to results, one after the other: tiles in a second, writing, memory of the process.

Drawn slides of 0.25 um are mapped at 0.5 um, each in a process of its own, whose largest memory is therefore the
slide's. Drawing takes longer than all else (a minute for 8,000 x 8,000 px), so that slides stay in the folder of
results and are used again, and `make bench` leaves this out.

    python -m benchmarks.large_slides --model demo/precise/1f0c.../bundle
"""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import harness, material
from benchmarks.harness import Options, Report
from pistoseg.models import bundle
from pistoseg.phantom.slides import write_slide
from pistoseg.slides.cache import SlideCache
from pistoseg.slides.job import segment_slide
from pistoseg.slides.network import SlideNetwork, SlideSettings
from pistoseg.slides.source import SlideEntry

SIDES = (5_000, 10_000, 20_000)
SLIDE_MPP, NETWORK_MPP = 0.25, 0.5


def benchmark(options: Options) -> Report:
    """Measure all of it."""
    report = Report("large_slides")
    folder = options.out / "large_slides"
    folder.mkdir(parents=True, exist_ok=True)
    model = options.model or material.save_bundle(
        folder, options, architecture="unet", encoder="tu-mobilenetv3_small_050", patch_size=options.size(224, 64)
    )
    os.environ.setdefault("MALLOC_ARENA_MAX", "1")  # as where `segment` runs on a cluster
    spawned = multiprocessing.get_context("spawn")
    for side in (512,) if options.tiny else SIDES:
        path = _drawn(folder, side)
        with ProcessPoolExecutor(1, mp_context=spawned) as process:
            record, peak_mib = process.submit(measure, path, model, folder / f"out-{side}").result()
        report.add(f"side_{side}_tiles", record["tiles"])
        report.add(f"side_{side}_tiles_per_s", record["tiles"] / record["seconds_of"]["network"])
        report.add(f"side_{side}_write_s", record["seconds_of"]["write"])
        report.add(f"side_{side}_s", record["seconds"])
        report.add(f"side_{side}_peak_mib", peak_mib)
    report.note(f"on {record['device']}, {record['precision']}, {'trained' if options.model else 'random'} weights")
    return report


def _drawn(folder: Path, side: int) -> Path:
    path, mask = (folder / f"{name}-{side}.tiff" for name in ("slide", "mask"))
    if not mask.exists():  # which is written last
        write_slide(str(path), str(mask), seed=1, size=(side, side), mpp=SLIDE_MPP)
    return path


def measure(path: Path, model: str, out: Path) -> tuple[dict[str, Any], float]:
    """What slide.json says of a slide, each tile predicted once, and the largest memory of this process, MiB."""
    network = SlideNetwork(bundle.load(model), SlideSettings(mpp=NETWORK_MPP, symmetries=1))
    record = segment_slide(
        network, SlideEntry("slide", str(path)), str(out), cache=SlideCache(str(out / "cache"), 1 << 30)
    )
    return record.record, harness.peak_mib()


if __name__ == "__main__":
    harness.main(benchmark, __doc__)
