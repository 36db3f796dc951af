"""Ray's side of one slide: the actor that segments it, or a share of it."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import tempfile
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray

from pistoseg import storage
from pistoseg.actors import exit_in_time
from pistoseg.errors import PistoSegError, explained
from pistoseg.memory import keep_freed_memory
from pistoseg.models import bundle
from pistoseg.slides import results
from pistoseg.slides.grid import TilePlan
from pistoseg.slides.job import Clock, segment_slide, start_record, write_slide
from pistoseg.slides.network import SlideNetwork, SlideSettings
from pistoseg.slides.source import SlideEntry
from pistoseg.slides.stitching import MaskFile, Work
from pistoseg.stages.slide_board import TileCount
from pistoseg.stages.slide_images import node_cache

MAX_BEGUN = 2
"""How often a slide is begun in one run: one that kills its worker twice is given up."""
PARTS = ".parts"
"""Folder of the output for shares of slides that several workers map; empty when they are done."""


@dataclass(frozen=True)
class SlideTask:
    """A slide, or a share of one.

    Args:
        entry: the slide.
        attempts: which try of the slide it is.
        part, parts: which share of how many.
    """

    entry: SlideEntry
    attempts: int = 1
    part: int = 0
    parts: int = 1

    def to_json(self) -> str:
        """As it travels in a dataset."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> SlideTask:
        """The inverse of `to_json`."""
        value = json.loads(text)
        return cls(**value | {"entry": SlideEntry(**value["entry"])})


class SlideWorker:
    """A network of one actor; two slides may be in it, one under the network, one being fetched or written.

    Args:
        model: URI of the bundle.
        settings: of all slides.
        out: URI of the output.
        device: where the network runs.
        threads: of the network on a CPU.
        readers: threads that read ahead.
        cache_gb: size of the node's cache of slides; None: half of what the disk has left.
        board: the actor.
    """

    def __init__(
        self,
        model: str,
        settings: SlideSettings,
        out: str,
        device: str,
        threads: int,
        readers: int,
        cache_gb: float | None,
        board: Any,
    ) -> None:
        import torch

        exit_in_time()
        self._memory = ExitStack()
        self._memory.enter_context(keep_freed_memory())  # of one slide for the next; the stitcher gives it back

        def load() -> SlideNetwork:
            torch.set_num_threads(threads)
            segmenter = bundle.load(model, None if device == "auto" else device)
            writer = ThreadPoolExecutor(1, initializer=give_way) if segmenter.device.type == "cpu" else None
            return SlideNetwork(segmenter, settings, readers, mapper, writer)

        # Every thread that asks OpenMP for work gets a team of threads of its own. With more of them in a process than
        # CPUs, a team no longer waits awake for its next work: it slept a tenth of the time. So one thread does all
        # that a network does here, from its first forward pass, when it is loaded.
        mapper = ThreadPoolExecutor(1)
        self.network = mapper.submit(load).result()
        self.out, self.cache_gb, self.board = out, cache_gb, board

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Segment the slide or share of a row; `record` is slide.json's, or empty while other shares are not done."""
        task = SlideTask.from_json(row["task"])
        slide_id = task.entry.slide_id
        clock = Clock()
        try:
            begun = ray.get(self.board.begin.remote(slide_id, task.part))
            if begun > MAX_BEGUN:
                raise PistoSegError(
                    f"the worker process died {MAX_BEGUN} times at it or at the slide beside it",
                    file=task.entry.uri,
                    remedy="give the workers more memory, or a smaller --batch-size",
                )
            record = self._whole(task) if task.parts == 1 else self._share(task, clock)
        except Exception as error:  # a bad slide is a row, whatever is wrong with it; the others go on
            record = self._failed(task, error, clock)
        if record:
            ray.get(self.board.end.remote(slide_id))
        return {"slide_id": slide_id, "record": json.dumps(record) if record else ""}

    def _whole(self, task: SlideTask) -> dict[str, Any]:
        entry, tiles = task.entry, TileCount(self.board, task.entry.slide_id, 0)
        result = segment_slide(
            self.network,
            entry,
            self.out,
            cache=node_cache(entry.uri, self.cache_gb),
            attempts=task.attempts,
            on_plan=lambda planned: self.board.plan.remote(entry.slide_id, planned),
            on_tiles=tiles,
        )
        tiles.send()
        return {**result.record, "areas": result.areas}

    def _share(self, task: SlideTask, clock: Clock) -> dict[str, Any] | None:
        """Map some bands of a slide; whoever maps the last ones puts them together and writes the results."""
        entry, board = task.entry, self.board
        if ray.get(board.given_up.remote(entry.slide_id)):
            return None
        made_from = self.network.made_from(entry)
        with self.network.prepared(entry, node_cache(entry.uri, self.cache_gb)) as slide:
            clock.lap("prepare")
            board.plan.remote(entry.slide_id, slide.plan.n_tiles)
            bands = share_of_bands(slide.plan, task.part, task.parts)
            work = Work()
            with tempfile.TemporaryDirectory(prefix="pistoseg-share-") as folder:
                if bands:
                    first, bottom = slide.plan.bands[bands.start].y, slide.plan.bands[bands.stop - 1].final
                    mask = MaskFile(Path(folder) / "mask", bottom - first, slide.view.width, first)
                    tiles = TileCount(board, entry.slide_id, task.part)
                    work = self.network.map(
                        slide, mask, bands=bands, on_begin=lambda: clock.lap("queue"), on_tiles=tiles
                    )
                    tiles.send()
                    mask.close()
                    _store(Path(folder) / "mask", self._share_uri(task, task.part))
            clock.lap("network")
            works = ray.get(board.share_done.remote(entry.slide_id, task.part, task.parts, asdict(work)))
            if works is None:
                return None
            with results.published(results.slide_folder(self.out, entry.slide_id)) as (folder_, scratch):
                for part in range(task.parts):
                    if share_of_bands(slide.plan, part, task.parts):
                        _append(self._share_uri(task, part), scratch / "mask")
                whole = MaskFile(scratch / "mask", slide.view.height, slide.view.width)
                took = Work(
                    *(sum(item[key] for item in works) for key in ("tiles", "seconds", "waiting_s")),
                )
                record = write_slide(
                    self.network, slide, whole, folder_, took, made_from, task.attempts, clock, workers=task.parts
                )
                whole.close()
        storage.remove_tree(storage.join(self.out, PARTS, entry.slide_id))
        return record

    def _share_uri(self, task: SlideTask, part: int) -> str:
        return storage.join(self.out, PARTS, task.entry.slide_id, f"{part}-of-{task.parts}.gz")

    def _failed(self, task: SlideTask, error: Exception, clock: Clock) -> dict[str, Any] | None:
        """The record of a slide that could not be segmented; what an earlier run made of it goes."""
        entry = task.entry
        if not ray.get(self.board.give_up.remote(entry.slide_id)):
            return None
        try:
            made_from = self.network.made_from(entry)
        except Exception:  # it is not even there
            made_from = {}
        known = explained(error)
        record = start_record(entry, made_from, task.attempts, clock.started) | {
            "status": "failed",
            "reason": str(known or f"{type(error).__name__}: {error}"),
            "traceback": "".join(traceback.format_exception(error)),
            "seconds": clock.total(),
            "model": self.network.model,
            "settings": self.network.decisive,
        }
        try:
            with results.published(results.slide_folder(self.out, entry.slide_id)) as (folder, _):
                results.write_record(folder, record)
        except Exception as second:  # of the output: the summary at least says it
            record["reason"] += f" (and slide.json can't be written: {second})"
        return record


def give_way() -> None:
    """Let the calling thread run only where a CPU has nothing else to do, on Linux.

    The threads of a network go in step: one that shares its CPU holds all of them up. A slide's results have the time
    of the next slide to be written in; when the network waits for them, the CPUs are theirs.
    """
    if hasattr(os, "SCHED_IDLE"):
        with suppress(OSError):  # a sandbox may forbid it
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def share_of_bands(plan: TilePlan, part: int, parts: int) -> range:
    """The bands of a share of a slide: one after the other, about as many tiles in every share; some may be empty."""
    total, before, owners = max(1, plan.n_tiles), 0, []
    for band in plan.bands:
        owners.append(min(parts - 1, (2 * before + band.n_tiles) * parts // (2 * total)))
        before += band.n_tiles
    first = sum(owner < part for owner in owners)
    return range(first, first + owners.count(part))


def _store(path: Path, uri: str) -> None:
    with path.open("rb") as source, storage.open_file(uri, "wb") as file, gzip.open(file, "wb", 1) as target:
        shutil.copyfileobj(source, target, 2**22)


def _append(uri: str, path: Path) -> None:
    with storage.open_file(uri) as file, gzip.open(file, "rb") as source, path.open("ab") as target:
        shutil.copyfileobj(source, target, 2**22)
