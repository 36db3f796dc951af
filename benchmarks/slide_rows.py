"""What a run over many slides costs its driver: `pistoseg segment` with the network replaced by a stub.

    python -m benchmarks.slide_rows                              1,000 and 10,000 slides, then 100,000
    python -m benchmarks.slide_rows --rows 1000 --out rows.json
    python -m benchmarks.slide_rows --rows 40 --workers 20 --seconds 30     20 workers that are asked how far they are

Listing, planning, the pool of workers, their records, the summary: everything is what a real run does, but each worker
returns the record of a finished slide at once, or after `--seconds`. Each size runs in a process of its own, whose peak
memory and CPU time (`cpu_s`, the driver's alone) are measured; the other times are the clock's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import harness

COLUMNS = ("rows", "plan_s", "first_row_s", "rows_s", "rows_per_s", "summary_s", "cpu_s", "peak_mb", "kb_per_row")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 10_000, 100_000], metavar="N")
    parser.add_argument("--out", metavar="FILE", help="the same as JSON")
    parser.add_argument("--workers", type=int, default=2, metavar="N")
    parser.add_argument("--seconds", type=float, default=0.0, metavar="S", help="that a slide takes")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        StubWorker.seconds = options.seconds  # which travels to Ray with the class
        print(json.dumps(measure(options.measure, options.workers)))
        return 0
    found: list[dict[str, float]] = []
    print("  ".join(f"{name:>11}" for name in COLUMNS))
    for rows in options.rows:
        command = [sys.executable, "-m", "benchmarks.slide_rows", "--measure", str(rows)]
        command += ["--workers", str(options.workers), "--seconds", str(options.seconds)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        row = json.loads(done.stdout.splitlines()[-1])
        small = found[0] if found else None
        grown = (row["peak_mb"] - small["peak_mb"]) / (row["rows"] - small["rows"]) * 1024 if small else 0.0
        found.append(row | {"kb_per_row": round(grown, 1)})
        print("  ".join(f"{found[-1][name]:>11}" for name in COLUMNS), flush=True)
        if options.out:
            Path(options.out).write_text(json.dumps(found, indent=1))
    return 0


class StubWorker:
    """Takes the place of `SlideWorker`: the record of a slide, out of nothing."""

    seconds = 0.0

    def __init__(self, *arguments: Any) -> None:
        self.at: dict[Any, tuple[int, int]] = {}

    def load(self) -> None:
        """Make what all records have."""
        import numpy as np

        from pistoseg.outputs.areas import slide_areas
        from pistoseg.outputs.summary import versions
        from pistoseg.phantom import PHANTOM_CLASSES

        counts = np.zeros(256, np.int64)
        counts[:5] = 1_000_000
        self.areas = slide_areas(counts, 2.0, PHANTOM_CLASSES)
        self.versions = versions()

    def segment(self, task: Any) -> dict[str, Any]:
        """The record."""
        from pistoseg.slides.job import start_record

        self.at[task] = 1000, 500
        time.sleep(self.seconds)
        del self.at[task]
        record = start_record(task.entry, {"etag": "0" * 32}, 1, "2026-01-01T00:00:00Z")
        facts = {"mpp": 0.25, "mpp_source": "openslide", "width": 100_000, "height": 80_000, "tiles": 1000}
        record |= facts | {"status": "completed", "reason": "", "seconds": 1.0, "versions": self.versions}
        return record | {"areas": self.areas}

    def progress(self) -> dict[Any, tuple[int, int]]:
        """All are half done."""
        return dict(self.at)


def measure(rows: int, workers: int) -> dict[str, float]:
    """One run in this process."""
    import torch

    from pistoseg.config import ComputeConfig
    from pistoseg.models import bundle, segmentation
    from pistoseg.phantom import PHANTOM_CLASSES
    from pistoseg.progress import Progress
    from pistoseg.slides.network import SlideSettings
    from pistoseg.stages import cluster
    from pistoseg.stages import slides as stage
    from pistoseg.tracking import StageRun

    torch.set_num_threads(1)
    stage.SlideWorker = StubWorker  # type: ignore[misc,assignment]
    with tempfile.TemporaryDirectory() as name, open(os.devnull, "w") as quiet:
        folder = Path(name)
        network = segmentation.build("unet", "tu-mobilenetv3_small_050", len(PHANTOM_CLASSES), None, None)
        evaluation = {"tile": 128, "stride": 96, "scales": (1.0,), "symmetries": 1, "batch_size": 8}
        scale = {"mpp": 2.0, "source_mpp": 2.0}
        model = str(folder / "bundle")
        bundle.save(model, network, classes=PHANTOM_CLASSES, patch_size=64, scale=scale, evaluation=evaluation)
        (folder / "slides").mkdir()
        for number in range(rows):
            (folder / "slides" / f"{number:06d}.svs").touch()
        run = stage.SlideRun(
            model, str(folder / "slides"), str(folder / "out"), SlideSettings(), workers=workers, device="cpu"
        )
        with cluster.connected(ComputeConfig(device="cpu")):
            started, worked = time.monotonic(), time.process_time()
            found = stage.plan(run)
            planned = time.monotonic()
            arrivals, records = [], stage._records

            def watched(*arguments: Any) -> Any:
                for record in records(*arguments):
                    arrivals.append(time.monotonic())
                    yield record

            stage._records = watched
            from rich.console import Console

            stage.segment(run, found, Progress(Console(file=quiet)), StageRun())
            ended, worked = time.monotonic(), time.process_time() - worked
    assert len(arrivals) == rows
    return {
        "rows": rows,
        "plan_s": round(planned - started, 1),
        "first_row_s": round(arrivals[0] - planned, 1),
        "rows_s": round(arrivals[-1] - arrivals[0], 1),
        "rows_per_s": round((rows - 1) / max(arrivals[-1] - arrivals[0], 1e-9), 1),  # without the start of the workers
        "summary_s": round(ended - arrivals[-1], 1),
        "cpu_s": round(worked, 1),
        "peak_mb": round(harness.peak_mib()),
    }


if __name__ == "__main__":
    sys.exit(main())
