"""Time and memory against the number of training images, mosaics, slides, and the size of a slide: CSV and plots.

Each point is measured in a process of its own, whose peak of memory is its alone. The exponent that is reported is the
slope between the two largest sizes on a log-log plot: 1 is linear growth, 0 none.

    python -m benchmarks.growth
"""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks import harness
from benchmarks.harness import Options, Report

MARGIN = 0.35
"""How far an exponent may be above what is expected before it counts as bent."""


@dataclass(frozen=True)
class Curve:
    """What grows.

    Args:
        label: of the axis.
        sizes: that are measured.
        tiny: sizes that only show that it runs.
        time: expected exponent of the time.
        memory: of the memory above the smallest size's; None: not looked at.
        why: where that growth comes from, and what bends first.
    """

    label: str
    sizes: tuple[int, ...]
    tiny: tuple[int, ...]
    time: float
    memory: float | None
    why: str


CURVES = {
    "images": Curve(
        "training images (rows of metadata)", (1_000, 10_000, 100_000, 1_000_000), (50, 100), 1, 1,
        "linear: each row is read, checked and sampled once an epoch; memory bends first, as each process that needs "
        "the tables holds them",
    ),
    "mosaics": Curve(
        "mosaics", (200, 800, 3_200), (2, 4), 1, 0,
        "linear in time, none in memory: a mosaic is made, handed over and forgotten",
    ),
    "slides": Curve(
        "slides of a manifest", (100, 1_000, 10_000), (5, 10), 1, 1,
        "linear: a row each; listing a slide looks at its file, so that on slow storage its latency bends first",
    ),
    "slide_px": Curve(
        "side of a slide (px)", (2_048, 4_096, 8_192, 16_384), (512, 1_024), 2, 1,
        "time is that of the area; memory that of the rows by which one band of tiles reaches into the next",
    ),
}  # fmt: skip


def benchmark(options: Options) -> Report:
    """Measure all curves."""
    report = Report("growth")
    rows: list[dict[str, float | str]] = []
    for name, curve in CURVES.items():
        points = [_point(name, size, options) for size in (curve.tiny if options.tiny else curve.sizes)]
        rows += [{"curve": name, "size": size, "seconds": seconds, "mib": mib} for size, seconds, mib in points]
        (before, short, lower), (last, long, upper) = points[-2:]
        growth = math.log(last / before)
        report.add(f"{name}_largest_s", long)
        report.add(f"{name}_largest_mib", upper)
        limit = None if options.tiny else curve.time + MARGIN
        report.add(f"{name}_time_exponent", math.log(long / short) / growth, most=limit)
        if curve.memory is not None:
            base = points[0][2]
            step = max(upper - base, 1.0) / max(lower - base, 1.0)
            # Growth of less than 1/50 a step is the allocator's.
            steady = upper < 1.02 * lower
            exponent = 0.0 if steady else math.log(step) / growth
            report.add(f"{name}_memory_exponent", exponent, most=None if options.tiny else curve.memory + MARGIN)
        report.note(f"{name}: {curve.why}")
    _write(rows, options.out)
    return report


def _point(name: str, size: int, options: Options) -> tuple[int, float, float]:
    """Size, seconds and MiB at the peak, in a new process."""
    if options.tiny:
        return size, *_measure(name, size)
    command = [sys.executable, "-m", "benchmarks.growth", "--point", name, str(size)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    seconds, mib = json.loads(done.stdout.strip().splitlines()[-1])
    return size, seconds, mib


def images(size: int) -> Callable[[], object]:
    """The tables of a `patches` artifact: written, opened, ordered for an epoch, drawn from."""
    import pyarrow as pa

    from pistoseg import parquet, storage
    from pistoseg.config import ScaleConfig
    from pistoseg.patches.store import IMAGES_SCHEMA, WINDOWS_SCHEMA, PatchSet, image_row, window_row
    from pistoseg.stages.masks import image_shards
    from pistoseg.synthesis.sampling import Addresses, ImageSampler, Numbers
    from pistoseg.training.samples import EpochOrder, crop_rows, rare_class_weights

    row = image_row(0, "patch.png", np.zeros((8, 8, 3), np.uint8), ScaleConfig())
    part = min(size, 10_000)

    def run() -> object:
        with tempfile.TemporaryDirectory() as folder:
            for first in range(0, size, part):
                ids = range(first, min(first + part, size))
                name = f"part-{first // part:05d}.parquet"
                table = pa.Table.from_pylist([row | {"image": i, "name": f"patch-{i}.png"} for i in ids], IMAGES_SCHEMA)
                windows = [window_row(i, i, (0, 0, 8, 8), [int(i % 3 == c) for c in range(3)]) for i in ids]
                parquet.write(table, storage.join(folder, "images", name))
                flags = pa.Table.from_pylist(windows, WINDOWS_SCHEMA)
                parquet.write(flags, storage.join(folder, "windows", name))
            patches = PatchSet.open(folder, hold=True)
        labels = patches.image_labels()
        shards = image_shards(patches.table)
        order = EpochOrder(crop_rows(np.full(size, 64), 8, rare_class_weights(labels)), 0)
        sampler = ImageSampler(labels.argmax(1).astype(np.uint8), ["a", "b", "c"], "balanced")
        return len(shards), order.row(0, size // 2), sampler.draw(Numbers(Addresses(0), 0, range(1)), 100)

    return run


def mosaics(size: int) -> Callable[[], object]:
    """That many mosaics of one bank."""
    from benchmarks import material
    from benchmarks.mosaics import source_of
    from pistoseg.training.samples import fresh_mosaics

    synthesizer = fresh_mosaics(source_of(material.mosaics(Options(None, Path(), tiny=True))[0]))

    def run() -> object:
        for index in range(size):
            synthesizer.sample(0, index)
        return None

    return run


def slides(size: int) -> Callable[[], object]:
    """A manifest of that many slides, listed, and its summary written."""
    from pistoseg.classes import TissueClasses
    from pistoseg.outputs.summary import SlideRow, write_summary
    from pistoseg.phantom import PHANTOM_CLASSES
    from pistoseg.slides.source import list_slides

    classes: TissueClasses = PHANTOM_CLASSES

    def run() -> object:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "one.tif").write_bytes(b"II*\0")
            manifest = Path(folder) / "slides.csv"
            lines = [f"{folder}/one.tif,slide-{number}" for number in range(size)]
            manifest.write_text("\n".join(["slide,slide_id", *lines]) + "\n", encoding="utf-8")
            entries = list_slides(str(manifest))
            rows = [SlideRow(entry.slide_id, entry.uri, "failed", reason="not looked at") for entry in entries]
            return write_summary(folder, rows, classes, {})

    return run


def slide_px(size: int) -> Callable[[], object]:
    """A square slide of that side, through a network that costs nothing: what is left is reading and stitching."""
    import torch
    from torch import nn

    from pistoseg.models.inference import Predictor
    from pistoseg.models.segmentation import Normalization
    from pistoseg.slides.grid import TilePlan
    from pistoseg.slides.reader import SlideReader
    from pistoseg.slides.stitching import MaskFile, Stitcher
    from pistoseg.slides.view import SlideView

    torch.set_num_threads(1)

    class Drawn(SlideReader):
        """A slide that is drawn as it is read."""

        def __init__(self) -> None:
            super().__init__("drawn", [(size, size)], {}, 0.5)

        def _read(self, x: int, y: int, width: int, height: int, level: int) -> np.ndarray:
            return np.full((height, width, 3), 200, np.uint8)

        def close(self) -> None:
            """Nothing is open."""

    predictor = Predictor(nn.Conv2d(3, 3, 1), Normalization(), tile=512, stride=384, precision="fp32", batch_size=1)

    def run() -> object:
        view, tissue = SlideView(Drawn(), None), np.ones((64, 64), bool)
        with tempfile.TemporaryDirectory() as folder:
            mask = MaskFile(Path(folder) / "mask", size, size)
            return Stitcher(predictor, 3, 3, 1).run(view, TilePlan(size, size, 512, 384, tissue), tissue, mask)

    return run


POINTS: dict[str, Callable[[int], Callable[[], object]]] = {
    "images": images,
    "mosaics": mosaics,
    "slides": slides,
    "slide_px": slide_px,
}


def _write(rows: list[dict[str, float | str]], out: Path) -> None:
    """Write growth.csv, and growth.png where matplotlib is installed."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "growth.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["curve", "size", "seconds", "mib"])
        writer.writeheader()
        writer.writerows(rows)
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(CURVES), figsize=(4 * len(CURVES), 7), squeeze=False)
    for column, (name, curve) in enumerate(CURVES.items()):
        points = [row for row in rows if row["curve"] == name]
        sizes = [float(row["size"]) for row in points]
        for line, (key, unit, exponent) in enumerate((("seconds", "s", curve.time), ("mib", "MiB", None))):
            values = [float(row[key]) for row in points]
            axis = axes[line][column]
            axis.plot(sizes, values, "o-", label="measured")
            if exponent is not None:
                axis.plot(
                    sizes, [values[-1] * (s / sizes[-1]) ** exponent for s in sizes], "--", label=f"size^{exponent:g}"
                )
                axis.set_yscale("log")
            else:
                axis.set_ylim(0, 1.1 * max(values))
            axis.set_xscale("log")
            axis.set_xticks(sizes, [f"{size:,.0f}" for size in sizes])
            axis.minorticks_off()
            axis.set_xlabel(curve.label)
            axis.set_ylabel(unit)
            axis.legend()
    figure.tight_layout()
    figure.savefig(out / "growth.png", dpi=110)


def _measure(name: str, size: int) -> tuple[float, float]:
    """Seconds and MiB of one point."""
    run = POINTS[name](size)
    began = time.perf_counter()
    run()
    return time.perf_counter() - began, harness.peak_mib()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--point"]:
        print(json.dumps(_measure(sys.argv[2], int(sys.argv[3]))))
    else:
        harness.main(benchmark, __doc__)
