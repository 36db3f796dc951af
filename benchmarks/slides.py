"""A slide: reading alone, as OpenSlide does and as we do, the network alone, both together, a collection through Ray,
and the loop a user would write.

The loop is plain: OpenSlide, a read for every tile, fp32, one tile after the other into sums of the whole slide. Where
TIATOOLBOX_PYTHON names a Python that has TIAToolbox, that is measured too; `tiatoolbox_slide.py` says how to make one.

    python -m benchmarks.slides --data DATA
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks import harness, material
from benchmarks.harness import Options, Report
from pistoseg.memory import keep_freed_memory
from pistoseg.models import bundle
from pistoseg.slides.cache import SlideCache
from pistoseg.slides.job import segment_slide
from pistoseg.slides.network import Prepared, SlideNetwork, SlideSettings
from pistoseg.slides.reader import SlideReader, open_slide
from pistoseg.slides.source import SlideEntry
from pistoseg.slides.stitching import MaskFile
from pistoseg.slides.vendor import OpenSlideReader
from pistoseg.slides.view import SlideView
from pistoseg.stages.slides import SlideRun

SHARE_OF_SLOWER, OUTPUT_SHARE = 0.9, 0.1
RUNNING_S, ALONE_BATCHES = 6.0, 4
"""How long a batch goes on before it is stopped again, and what the network does alone meanwhile."""
TOOLBOX = "TIATOOLBOX_PYTHON"


def benchmark(options: Options) -> Report:
    """Measure all of it."""
    report = Report("slides")
    side, encoder = (64, "tu-mobilenetv3_small_050") if options.tiny else (224, "tu-tf_efficientnet_lite0")
    with material.slide(options) as path, tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with open_slide(path) as opened:
            settings = SlideSettings(mpp=opened.mpp_x, symmetries=1)  # as those beside it predict
        model = options.model or material.save_bundle(
            folder, options, architecture="unet", encoder=encoder, patch_size=side
        )
        network = SlideNetwork(bundle.load(model), settings)
        cache = SlideCache(str(folder / "cache"), 1 << 30)
        entry = SlideEntry("slide", str(path))
        with network.prepared(entry, cache) as slide:
            _parts(network, slide, cache, folder, options, report)
        for name in ("first", "second"):  # the first slide of a process also imports what writes results
            record = segment_slide(network, entry, str(folder / name), cache=cache).record
        seconds = record["seconds_of"]
        for name in ("prepare", "network", "write"):
            report.add(f"slide_{name}_s", seconds[name])
        limit = OUTPUT_SHARE if options.model else None  # to outline the noise of random weights takes far longer
        report.add("slide_write_share", seconds["write"] / record["seconds"], most=limit)
        _tiatoolbox(network, model, path, folder, report)
        if not options.tiny:
            _collection("collection", model, settings, path, folder / "once", 10, report)
            if bundle.load(model).predictor().symmetries > 1:  # which is what `segment` does unless told otherwise
                own = replace(settings, symmetries=None)
                _collection("collection_all_symmetries", model, own, path, folder / "all", 3, report)
    predictor, weights = network.predictor, "trained" if options.model else "random"
    report.note(f"{record['tiles']} tiles of {predictor.tile} px, step {predictor.stride} px, {weights} weights")
    report.note(f"on {record['device']}, {record['precision']}")
    return report


def _parts(
    network: SlideNetwork, slide: Prepared, cache: SlideCache, folder: Path, options: Options, report: Report
) -> None:
    """Reading, network, both, and the plain loop, in turn; what reads opens the slide anew and has nothing decoded."""
    plan, predictor = slide.plan, network.predictor
    super_tiles = [item for band in plan.bands for item in plan.super_tiles(band)]
    corners = [corner for item in super_tiles for corner in item.tiles.tolist()]
    few = min(len(corners), options.size(48, 4))
    path, tile = slide.entry.uri, predictor.tile
    pixels = slide.view.read(*corners[0], tile, tile)
    batch = torch.from_numpy(np.stack([pixels] * predictor.batch_size))
    mask = MaskFile(folder / "mask", slide.view.height, slide.view.width)

    def read(reader: SlideReader) -> None:
        with reader, ThreadPoolExecutor(network.stitcher.readers) as pool:
            view = SlideView(reader, network.mpp)
            list(pool.map(lambda item: view.read(item.x, item.y, item.width, item.height), super_tiles))

    def together() -> None:
        with network.prepared(slide.entry, cache) as opened:
            network.map(opened, mask)

    def alone() -> None:
        with keep_freed_memory():
            for _ in range(0, few, len(batch)):
                predictor.tile_probabilities(batch).cpu()

    plain = PlainLoop(network, slide)
    calls: dict[str, Callable[[], Any]] = {
        "read": lambda: read(open_slide(path)),
        "read_openslide": lambda: read(OpenSlideReader(path, None, path)),
        "network": alone,
        "together": together,
        "plain_loop": lambda: plain.run(corners[:few]),
    }
    counts = {"plain_loop": few} | dict.fromkeys(("read", "read_openslide", "together"), len(corners))
    counts["network"] = -(-few // len(batch)) * len(batch)
    timings = harness.interleaved(calls, options.size(3, 1))
    rates = {name: timing.per_s(counts[name]) for name, timing in timings.items()}
    for name, rate in rates.items():
        report.add(f"tiles_{name}_per_s", rate)
    report.compare("read_times_openslide", timings["read"], timings["read_openslide"])
    slower = min(rates["read"], rates["network"])
    report.add("together_share_of_slower", rates["together"] / slower, least=None if options.tiny else SHARE_OF_SLOWER)
    each = counts["together"] / counts["plain_loop"]
    report.compare("together_times_plain_loop", timings["together"], timings["plain_loop"], counts=each)
    mask.close()


class PlainLoop:
    """What one would write: read, normalise, predict, add up.

    Args:
        network: whose model is used, in fp32.
        slide: opened; its file is read with OpenSlide, or as the project does where OpenSlide can't.
    """

    def __init__(self, network: SlideNetwork, slide: Prepared) -> None:
        self.model, self.normalization = network.predictor.model, network.predictor.normalization
        self.tile, self.device, self.view = network.predictor.tile, network.predictor.device, slide.view
        self.sums = np.zeros((len(network.classes), slide.view.height, slide.view.width), np.float32)
        self.opened: Any = None
        if slide.view.scale_x == 1:
            import openslide

            self.opened = openslide.OpenSlide(slide.entry.uri)

    def run(self, corners: list[list[int]]) -> None:
        """Map these tiles."""
        self.model.eval()
        with torch.inference_mode():
            for x, y in corners:
                pixels = self._read(x, y)
                maps = (
                    self.model(self.normalization(pixels[None], self.device).contiguous()).softmax(1)[0].cpu().numpy()
                )
                part = self.sums[:, y : y + self.tile, x : x + self.tile]
                part += maps[:, : part.shape[1], : part.shape[2]]

    def _read(self, x: int, y: int) -> np.ndarray:
        if self.opened is None:
            return self.view.read(x, y, self.tile, self.tile)
        return np.array(self.opened.read_region((x, y), 0, (self.tile, self.tile)).convert("RGB"))


def _tiatoolbox(network: SlideNetwork, model: str, path: Path, folder: Path, report: Report) -> None:
    """A slide from file to results beside TIAToolbox: same network, tiles and step, no tile left out, two runs each."""
    python = os.environ.get(TOOLBOX)
    if not python:
        report.note(f"not compared with TIAToolbox: {TOOLBOX} names no Python that has it")
        return
    cache, everything = SlideCache(str(folder / "cache"), 1 << 30), folder / "everything.png"
    with network.prepared(SlideEntry("slide", str(path)), cache) as slide:
        Image.new("L", (slide.view.width, slide.view.height), 255).save(everything)
    entry = SlideEntry("every-tile", str(path), tissue_mask=str(everything))
    asked = {
        "bundle": model,
        "slide": str(path),
        "tile": network.predictor.tile,
        "stride": network.predictor.stride,
        "batch_size": network.predictor.batch_size,
        "device": str(network.predictor.device),
        "threads": torch.get_num_threads(),
        "repeats": 2,
    }
    ours = [segment_slide(network, entry, str(folder / "first"), cache=cache).record]
    found = {}
    for workers in (0, os.cpu_count() or 1):  # reading in the process itself, and in one process a core
        command = [
            python,
            str(Path(__file__).with_name("tiatoolbox_slide.py")),
            json.dumps(asked | {"workers": workers}),
        ]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            report.note(f"not compared with TIAToolbox: {python} ended with {done.returncode}, see above")
            return
        found[workers] = json.loads(done.stdout.splitlines()[-1])
        report.add(f"tiatoolbox_{workers}_workers_s", statistics.mean(found[workers]["seconds"]))
    ours.append(segment_slide(network, entry, str(folder / "second"), cache=cache).record)
    seconds = statistics.mean(record["seconds"] for record in ours)
    report.add("segment_slide_s", seconds)
    report.add("segment_slide_tiles", ours[0]["tiles"])
    report.add("tiatoolbox_tiles", found[0]["tiles"])
    report.note(f"TIAToolbox on {found[0]['device']}, fp32")
    fastest = min(statistics.mean(item["seconds"]) for item in found.values())
    report.add("segment_slide_times_tiatoolbox", fastest / seconds)


def _collection(
    name: str, model: str, settings: SlideSettings, path: Path, folder: Path, copies: int, report: Report
) -> None:
    """A batch of copies of a slide through Ray, stopped every few seconds to measure the network alone.

    So both have the same machine, whatever else it does. What counts is the time from the end of the first slide to
    that of the last but one: no start, and always a slide under the network while another one is written.
    """
    slides, out = folder / "slides", folder / "out"
    slides.mkdir(parents=True)
    for copy in range(copies):
        shutil.copy(path, slides / f"{copy}{path.suffix}")
    alone = _network_alone(model, settings)
    batch = get_context("spawn").Process(target=_segment, args=(SlideRun(model, str(slides), str(out), settings),))
    began = time.time()
    batch.start()
    pauses: list[tuple[float, float]] = []
    rates: list[float] = []
    while batch.is_alive() and len(ends := _ends(out)) < copies - 1:
        if not ends:
            time.sleep(0.1)
            continue
        with _stopped(batch.pid or 0):
            pause = time.time()
            rates.append(alone())
            pauses.append((pause, time.time()))
        time.sleep(RUNNING_S)
    batch.join()
    if batch.exitcode:
        raise RuntimeError(f"the batch ended with {batch.exitcode}, see above")
    ends = _ends(out)
    first, last = ends[0], ends[-2]
    running = last - first - sum(min(stop, last) - start for start, stop in pauses if start < last)
    record = json.loads((out / "slides" / "0" / "slide.json").read_text())
    if record["status"] != "completed":
        raise RuntimeError(f"the batch's slides failed: {record['reason']}")
    rate, network = (copies - 2) * record["tiles"] / running, statistics.mean(rates)
    report.add(f"{name}_tiles_per_s", rate)
    report.add(f"{name}_network_alone_tiles_per_s", network)
    report.add(f"{name}_share_of_network", rate / network, least=SHARE_OF_SLOWER)
    report.add(f"{name}_first_slide_s", first - began)


def _segment(run: SlideRun) -> None:
    """What `pistoseg segment` does, without MLflow, in a Ray of its own."""
    from rich.console import Console

    from pistoseg.config import ComputeConfig
    from pistoseg.progress import Progress
    from pistoseg.stages import cluster, slides
    from pistoseg.tracking import StageRun

    with cluster.connected(ComputeConfig(device="auto")):
        slides.segment(run, slides.plan(run), Progress(Console(quiet=True)), StageRun())


def _ends(out: Path) -> list[float]:
    """When slides were done, in order (s since the epoch)."""
    return sorted(record.stat().st_mtime for record in out.glob("slides/*/slide.json"))


@contextmanager
def _stopped(pid: int) -> Iterator[None]:
    """A process and all that it started stand still for the block."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    chosen = [pid]
    for process in chosen:  # which grows as it is gone through
        chosen += [child for child, parent in parents.items() if parent == process]
    try:
        for process in chosen:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGSTOP)
        yield
    finally:
        for process in chosen:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGCONT)


def _network_alone(model: str, settings: SlideSettings) -> Callable[[], float]:
    """What measures tiles in a second of the network with the threads that it has in a local Ray."""
    from pistoseg.stages import cluster

    predictor = SlideNetwork(bundle.load(model), settings).predictor
    count = max(1, predictor.batch_size // predictor.symmetries)
    tiles = torch.randint(0, 256, (count, predictor.tile, predictor.tile, 3), dtype=torch.uint8)

    def measure() -> float:
        threads = torch.get_num_threads()
        torch.set_num_threads(cluster.available_cpus())
        with keep_freed_memory():
            predictor.tile_probabilities(tiles)  # fetches the memory
            began = time.perf_counter()
            for _ in range(ALONE_BATCHES):
                predictor.tile_probabilities(tiles).cpu()
            rate = ALONE_BATCHES * count / (time.perf_counter() - began)
        torch.set_num_threads(threads)
        return rate

    return measure


if __name__ == "__main__":
    harness.main(benchmark, __doc__)
