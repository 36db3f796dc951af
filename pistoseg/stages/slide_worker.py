"""Ray's side of one slide: the actor that segments it, or a share of it."""

from __future__ import annotations

import gzip
import os
import shutil
import sys
import threading
import traceback
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import astuple, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import ray

from pistoseg import storage
from pistoseg.actors import exit_in_time
from pistoseg.errors import PistoSegError, RefusedError, UnavailableError, below, explained
from pistoseg.memory import keep_freed_memory
from pistoseg.models import bundle
from pistoseg.patches.source import readable
from pistoseg.redaction import redact
from pistoseg.slides import results
from pistoseg.slides.cache import SlideCache
from pistoseg.slides.grid import TilePlan
from pistoseg.slides.job import Clock, segment_slide, start_record, write_slide
from pistoseg.slides.network import SlideNetwork, SlideSettings
from pistoseg.slides.scratch import scratch_folder
from pistoseg.slides.source import SlideEntry
from pistoseg.slides.stitching import MaskFile, Work
from pistoseg.stages import cluster
from pistoseg.stages.slide_images import node_cache

DAY_S = 86400.0
"""How long a worker waits for room: its next slide is wanted as soon as its network is at one, for hours on CPUs."""
ASKED = "asked"
"""Ray's name for the threads that answer while slides are in work."""
NICER, NICEST = 10, 19
"""By how much the thread of a slide's results is nicer than its process, and the nicest that Linux knows."""
PARTS = ".parts"
"""Folder of the output for shares of slides that several workers map; empty when they are done."""


@dataclass(frozen=True)
class Share:
    """A share of a slide that is mapped.

    Args:
        work: what it took.
        made_from: of the slide before it was opened, as `SlideNetwork.made_from` has it.
    """

    work: Work
    made_from: Mapping[str, str] = field(hash=False)


@dataclass(frozen=True)
class SlideTask:
    """A slide, or a share of one.

    Args:
        entry: the slide.
        attempts: which try of the slide it is.
        part, parts: which share of how many.
        shares: all of them, where they are to be put together.
        keep_mask: whether only outlines are to be drawn anew, see `segment_slide`.
    """

    entry: SlideEntry
    attempts: int = 1
    part: int = 0
    parts: int = 1
    shares: tuple[Share, ...] = ()
    keep_mask: bool = False


class SlideWorker:
    """A network of one actor; two slides may be in it, one under the network, one being fetched or written.

    Args:
        model: URI of the bundle.
        settings: of all slides.
        out: URI of the output.
        device: where the network runs: `auto`, `cpu`, or `cuda` with a GPU of Ray's.
        threads: of the network on a CPU.
        readers: threads that read ahead.
        cache_gb: size of the node's cache of slides; None: as `node_cache` says.
    """

    network: SlideNetwork

    def __init__(
        self,
        model: str,
        settings: SlideSettings,
        out: str,
        device: str,
        threads: int,
        readers: int,
        cache_gb: float | None,
    ) -> None:
        exit_in_time()
        self.model, self.settings, self.out, self.device = model, settings, out, device
        self.threads, self.readers, self.cache_gb = threads, readers, cache_gb
        self._memory = ExitStack()
        self._at: dict[SlideTask, tuple[int, int]] = {}

    def load(self) -> None:
        """Load the model, before anything else.

        Raises:
            PistoSegError: it can't be.
        """
        import torch

        if self.device == "cuda":
            cluster.require_cuda()
        self._memory.enter_context(keep_freed_memory())  # of one slide for the next; the stitcher gives it back

        def load() -> SlideNetwork:
            torch.set_num_threads(self.threads)
            segmenter = bundle.load(self.model, None if self.device == "auto" else self.device)
            writer = ThreadPoolExecutor(1, initializer=give_way) if segmenter.device.type == "cpu" else None
            return SlideNetwork(segmenter, self.settings, self.readers, mapper, writer)

        # Every thread that asks OpenMP for work gets a team of threads of its own. With more of them in a process than
        # CPUs, a team no longer waits awake for its next work: it slept a tenth of the time. So one thread does all
        # that a network does here, from its first forward pass, when it is loaded.
        mapper = ThreadPoolExecutor(1)
        self.network = mapper.submit(load).result()

    def segment(self, task: SlideTask) -> dict[str, Any] | Share:
        """Do a task; what is wrong with a whole slide is a record too, whatever it is.

        Returns:
            What slide.json says, and `areas`; of a share, what it is.

        Raises:
            Exception: what is wrong with a share, or with shares that are put together.
        """
        try:
            if task.shares:
                return self._join(task)
            return self._whole(task) if task.parts == 1 else self._share(task)
        finally:
            self._at.pop(task, None)

    @ray.method(concurrency_group=ASKED)
    def progress(self) -> dict[SlideTask, tuple[int, int]]:
        """Of the tasks in work: tiles of the whole slide, and how many of them this one has done."""
        return dict(self._at)

    def _cache(self, entry: SlideEntry) -> SlideCache:
        return node_cache(entry.uri, self.cache_gb, DAY_S)

    def _plan(self, task: SlideTask, tiles: int) -> None:
        self._at[task] = tiles, 0

    def _count(self, task: SlideTask, tiles: int) -> None:
        planned, done = self._at[task]
        self._at[task] = planned, done + tiles

    def _whole(self, task: SlideTask) -> dict[str, Any]:
        entry, clock = task.entry, Clock()
        try:
            result = segment_slide(
                self.network,
                entry,
                self.out,
                cache=self._cache(entry),
                attempts=task.attempts,
                keep_mask=task.keep_mask,
                on_plan=partial(self._plan, task),
                on_tiles=partial(self._count, task),
            )
        except Exception as error:  # whatever is wrong with it, the others go on
            return write_failure(self.network, self.out, task, error, clock)
        return {**result.record, "areas": result.areas}

    def _share(self, task: SlideTask) -> Share:
        """Map some bands of a slide."""
        entry = task.entry
        made_from = self.network.made_from(entry)
        with self.network.prepared(entry, self._cache(entry)) as slide:
            self._plan(task, slide.plan.n_tiles)
            bands = share_of_bands(slide.plan, task.part, task.parts)
            if not bands:
                return Share(Work(), made_from)
            first, bottom = slide.plan.bands[bands.start].y, slide.plan.bands[bands.stop - 1].final
            with scratch_folder() as folder:
                mask = MaskFile(folder / "mask", bottom - first, slide.view.width, first)
                work = self.network.map(slide, mask, bands=bands, on_tiles=partial(self._count, task))
                mask.close()
                _store(folder / "mask", self._share_uri(task, task.part))
        return Share(work, made_from)

    def _join(self, task: SlideTask) -> dict[str, Any]:
        """Put the shares of a slide together and write its results."""
        entry, works = task.entry, [share.work for share in task.shares]
        clock = Clock({"network": max(work.seconds for work in works)})
        made_from, folder = self.network.made_from(entry), results.slide_folder(self.out, entry.slide_id)
        if any(share.made_from != made_from for share in task.shares):
            raise PistoSegError(
                "was replaced while it was segmented", file=entry.uri, remedy="run again when it stays as it is"
            )
        with (
            results.published(folder) as (target, scratch),
            self.network.prepared(entry, self._cache(entry)) as slide,
        ):
            clock.lap("prepare")
            for part in range(task.parts):
                if share_of_bands(slide.plan, part, task.parts):
                    _append(self._share_uri(task, part), scratch / "mask")
            mask = MaskFile(scratch / "mask", slide.view.height, slide.view.width)
            took = Work(*(sum(values) for values in zip(*map(astuple, works), strict=True)))
            record = write_slide(
                self.network, slide, mask, target, took, made_from, task.attempts, clock, workers=task.parts
            )
            mask.close()
        with suppress(OSError, PistoSegError):  # the slide is done; what is left takes room and harms nothing
            storage.remove_tree(storage.join(self.out, PARTS, entry.slide_id))
        return record

    def _share_uri(self, task: SlideTask, part: int) -> str:
        return storage.join(self.out, PARTS, task.entry.slide_id, f"{part}-of-{task.parts}.gz")


def write_failure(
    network: SlideNetwork, out: str, task: SlideTask, error: Exception, clock: Clock | None = None
) -> dict[str, Any]:
    """Write slide.json of a slide that could not be segmented, in place of what an earlier run made of it.

    Complete results stay unless the error says that the slide is what is wrong, and not a disk or memory that is full,
    a storage that is away or refuses it, or nobody knows what. The failure is written beside them, and `--only-failed`
    finds it.

    Args:
        network: of the run.
        out: URI of the output.
        task: the slide, or any share of it.
        error: why.
        clock: of the try.

    Returns:
        What slide.json says, or would say.
    """
    entry, clock = task.entry, clock or Clock()
    try:
        made_from = network.made_from(entry)
    except Exception:  # it is not even there
        made_from = {}
    known, first = explained(error), next(below(error))  # Ray's own text of an error is a traceback
    record = start_record(entry, made_from, task.attempts, clock.started) | {
        "status": "failed",
        "reason": readable(redact(str(known or f"{type(first).__name__}: {first}"))),  # for the summary too
        "traceback": "".join(traceback.format_exception(error)),
        "seconds": clock.total(),
        "model": network.model,
        "settings": network.decisive,
    }
    try:
        replaces = made_from and known is not None and _is_about(known, entry)  # else this try says less
        if not replaces and results.is_complete(out, entry.slide_id):
            results.write_failure(out, entry.slide_id, record)
        else:
            with results.published(results.slide_folder(out, entry.slide_id)) as (folder, _):
                results.write_record(folder, record)
    except Exception as second:  # of the output: the summary at least says it
        record["reason"] += redact(f" (and slide.json can't be written: {second})")
    return record


def _is_about(error: PistoSegError, entry: SlideEntry) -> bool:
    """Whether an error names a slide as what is wrong."""
    return error.file == redact(entry.uri) and not isinstance(error, UnavailableError | RefusedError)


def give_way() -> None:
    """Let the calling thread run mostly where a CPU has nothing else to do, on Linux.

    The threads of a network go in step: one that shares its CPU holds all of them up. A slide's results have the time
    of the next slide to be written in; when the network waits for them, the CPUs are theirs. They get a tenth of what a
    network's thread gets: by ten steps of niceness, or by the idle policy where a process has not as many left, as
    Ray's workers. The idle policy alone would give them next to nothing beside processes that are not nice.
    """
    if sys.platform != "linux":  # elsewhere a thread has no niceness of its own
        return
    thread = threading.get_native_id()
    nicer = os.getpriority(os.PRIO_PROCESS, thread) + NICER
    with suppress(OSError):  # a sandbox may forbid it
        if nicer <= NICEST:
            os.setpriority(os.PRIO_PROCESS, thread, nicer)
        else:
            os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))


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
