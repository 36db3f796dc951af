"""`pistoseg segment`: a collection of slides over a pool of networks, resumed by running it again."""

from __future__ import annotations

import posixpath
import time
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import ray
import torch

from pistoseg import storage
from pistoseg.claims import Claim
from pistoseg.config import ComputeConfig
from pistoseg.errors import PistoSegError, UnavailableError
from pistoseg.models import bundle
from pistoseg.outputs.summary import SlideRow, sheet_of_overviews, write_summary
from pistoseg.patches.decode import read_rgb
from pistoseg.patches.source import readable
from pistoseg.progress import Progress
from pistoseg.redaction import redact
from pistoseg.slides import results
from pistoseg.slides.network import SlideNetwork, SlideSettings
from pistoseg.slides.resolution import MAX_MPP, MIN_MPP, check_mpp
from pistoseg.slides.source import SlideEntry, list_slides
from pistoseg.stages import cluster, placement
from pistoseg.stages.slide_images import node_cache
from pistoseg.stages.slide_pool import SlidePool
from pistoseg.stages.slide_progress import SlideProgress
from pistoseg.stages.slide_worker import ASKED, PARTS, Share, SlideTask, SlideWorker, write_failure
from pistoseg.tracking import StageRun

LISTING_THREADS = 16
SAMPLE = 16
"""Slides that a dry run opens; the others are assumed to be like them."""
FOLDERS = 100
"""Local ones with slides in which nodes look for a file; the others are assumed to be like them."""
SHEET = 24

Item = TypeVar("Item")


@dataclass(frozen=True)
class SlideRun:
    """What a run was asked for.

    Args:
        model: URI of a bundle.
        slides: a slide, folder, prefix, pattern or manifest.
        out: URI of the output.
        settings: how slides are segmented.
        slide_mpp: um per level-0 px of the slides of which no manifest gives it; None: as each says itself.
        workers: networks at a time; None: one a GPU, or one a node without GPUs.
        limit: slides to do at the most, of the fewest tries first.
        only_failed: only do slides that have failed before.
        device: `auto`, `cpu` or `cuda`.
        cache_gb: size of each node's cache of slides; None: as `node_cache` says.
        wait_for_nodes: how long to wait for an autoscaler to start nodes for the workers (s); 0: there is none.
    """

    model: str
    slides: str
    out: str
    settings: SlideSettings
    slide_mpp: float | None = None
    workers: int | None = None
    limit: int | None = None
    only_failed: bool = False
    device: str = "auto"
    cache_gb: float | None = None
    wait_for_nodes: int = 0


@dataclass(frozen=True)
class Plan:
    """What a run will do.

    Args:
        network: the model, on this machine.
        todo: slides to segment, and which try of each it is; those of the fewest tries come first.
        done: slides that are up to date, and what slide.json says, with `areas`.
        left: slides that this run leaves alone: over the limit, or not failed.
        kept: ids of those to segment whose masks stay, as only other outlines are wanted.
    """

    network: SlideNetwork
    todo: list[tuple[SlideEntry, int]]
    done: list[tuple[SlideEntry, dict[str, Any]]]
    left: int
    kept: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Estimate:
    """What a dry run finds.

    Args:
        tiles: of all slides to do.
        tiles_per_s: of one network on this machine; None where there is no tile to do.
        seconds: that a run takes.
        unreadable: rows of those that would fail, and why.
        sampled: slides that were opened for it.
    """

    tiles: int
    tiles_per_s: float | None
    seconds: float
    unreadable: list[SlideRow]
    sampled: int


def plan(run: SlideRun) -> Plan:
    """Find the slides and compare them with what is there already; no slide is opened.

    Raises:
        PistoSegError: no slides, no model, settings that do not fit, results of other slides with the same ids, or a
            storage that does not say what is there.
    """
    if run.slide_mpp is not None:
        check_mpp(run.slide_mpp, "--slide-mpp", f"give um per px of the slides, {MIN_MPP:g} to {MAX_MPP:g}")
    network = SlideNetwork(bundle.load(run.model, "cpu"), run.settings)

    def owner(slide_id: str) -> str | None:
        return (results.read_record(run.out, slide_id) or {}).get("slide")

    def look(entry: SlideEntry) -> tuple[dict[str, Any] | None, dict[str, str], bool]:
        is_kept = False
        record = results.read_record(run.out, entry.slide_id)
        try:
            made_from = network.made_from(entry)
        except UnavailableError:  # which is wrong with all of them
            raise
        except PistoSegError:  # segmenting it says what is wrong with it
            made_from = {}
        if record is not None and results.is_current(record, made_from):
            whole = results.is_whole(run.out, entry.slide_id, probabilities=run.settings.probabilities)
            areas = results.read_areas(run.out, entry.slide_id) if whole else None
            if areas is None:  # somebody deleted or damaged a part
                record = results.read_record(run.out, entry.slide_id, results.FAILURE)
            else:
                record = {**record, "areas": areas}
        elif record is not None and record.get("status") == "completed":
            results.refuse_another(run.out, entry.slide_id, entry.uri, made_from)
            if results.has_same_mask(record, made_from) and results.is_complete(run.out, entry.slide_id):
                is_kept = results.is_whole(run.out, entry.slide_id, probabilities=run.settings.probabilities)
            record = results.read_record(run.out, entry.slide_id, results.FAILURE) or record
        return record, made_from, is_kept

    with ThreadPoolExecutor(LISTING_THREADS) as pool:
        listed = list_slides(run.slides, lambda names: list(pool.map(owner, names)))
        entries = [replace(entry, mpp=entry.mpp or run.slide_mpp) for entry in listed]
        looks = list(pool.map(look, entries))
    wanted: list[tuple[SlideEntry, int]] = []
    done: list[tuple[SlideEntry, dict[str, Any]]] = []
    left, kept = 0, set[str]()
    for entry, (record, made_from, is_kept) in zip(entries, looks, strict=True):
        failed = record is not None and record.get("status") == "failed"
        if record is not None and results.is_current(record, made_from):
            done.append((entry, record))
        elif run.only_failed and not failed:
            left += 1
        else:
            again = record if record and failed and record.get("made_from") == made_from else None
            wanted.append((entry, again["attempts"] + 1 if again else 1))
            kept |= {entry.slide_id} if is_kept else set()
    wanted.sort(key=lambda item: item[1])  # or a limit would never get past slides that keep failing
    todo = wanted[: run.limit]
    kept &= {entry.slide_id for entry, _ in todo}
    return Plan(network, todo, done, left + len(wanted) - len(todo), frozenset(kept))


def estimate(run: SlideRun, found: Plan) -> Estimate:
    """Tiles and time of the network, from some of the slides and the speed of a few tiles on this machine."""
    network, todo = found.network, [entry for entry, _ in found.todo if entry.slide_id not in found.kept]
    sample = _spread(todo, SAMPLE)
    tiles, unreadable = [], []
    for entry in sample:
        try:
            with network.prepared(entry, node_cache(entry.uri, run.cache_gb)) as slide:
                tiles.append(slide.plan.n_tiles)
        except PistoSegError as error:
            unreadable.append(_row(entry, {"reason": str(error)}, "failed"))
    total = round(sum(tiles) / len(sample) * len(todo)) if sample else 0
    if not total:
        return Estimate(0, None, 0.0, unreadable, len(sample))
    speed = _speed(bundle.load(run.model, None if run.device == "auto" else run.device), run.settings)
    return Estimate(total, speed, total / speed / (run.workers or 1), unreadable, len(sample))


def _speed(segmenter: bundle.Segmenter, settings: SlideSettings) -> float:
    """Tiles in a second."""
    predictor = SlideNetwork(segmenter, settings).predictor
    count = max(1, predictor.batch_size // predictor.symmetries)
    tiles = torch.randint(0, 256, (count, predictor.tile, predictor.tile, 3), dtype=torch.uint8)
    predictor.tile_probabilities(tiles)
    began = time.monotonic()
    for _ in range(2):
        predictor.tile_probabilities(tiles).cpu()
    return 2 * count / (time.monotonic() - began)


def segment(
    run: SlideRun, found: Plan, progress: Progress, tracked: StageRun, claim: Claim | None = None
) -> dict[str, Any]:
    """Segment what a plan says; a slide that fails is a row, and the others go on.

    Args:
        run: what was asked.
        found: of `plan`.
        progress: told slides and tiles.
        tracked: of MLflow.
        claim: of the folder of results, if others may want it.
    Returns:
        What run.json says.
    Raises:
        PistoSegError: another run has taken the folder over.
    """
    began = time.monotonic()
    rows = [_row(entry, record, "skipped") for entry, record in found.done]
    if found.todo:
        compute = ComputeConfig.model_validate({"device": run.device, "wait_for_nodes": run.wait_for_nodes})
        with cluster.connected(compute), progress.stage(f"Segmenting {len(found.todo)} slides"):
            placement.check_networks(compute, run.workers or 1, progress.say)
            placement.check_shared(run.out, {"--model": run.model, **_on_disks(found.todo)})
            with closing(_records(run, found, compute, progress)) as records:
                for record in records:
                    if claim is not None:
                        with suppress(OSError, UnavailableError):  # for whoever wants to take it over, too
                            claim.check()
                    _say(record, progress)
                    rows.append(_row(_entry_of(record), record, record["status"]))
        with suppress(OSError, PistoSegError):  # what is left takes room and harms nothing
            storage.remove_tree(storage.join(run.out, PARTS))
    seconds = time.monotonic() - began
    worked = sum(row.status != "skipped" for row in rows)
    facts = {
        "model": found.network.model,
        "slides_from": run.slides,
        "slide_mpp": run.slide_mpp,
        "settings": found.network.decisive,
        "workers": run.workers,
        "limit": run.limit,
        "only_failed": run.only_failed,
        "seconds": round(seconds, 1),
        "slides_per_hour": round(3600 * worked / seconds, 2) if found.todo else None,
        "left_out": found.left,
    }
    record = write_summary(run.out, rows, found.network.classes, facts)
    _track(run.out, rows, record, tracked)
    return record


def _on_disks(todo: Sequence[tuple[SlideEntry, int]]) -> dict[str, str]:
    """A slide or tissue mask that is there of each local folder, by what it is: any node may have to open them."""
    files: dict[str, tuple[str, str]] = {}
    for entry, _ in todo:
        for what, uri in (("slide", entry.uri), ("tissue mask of", entry.tissue_mask)):
            folder = posixpath.dirname(uri or "")
            if uri and storage.is_local(uri) and folder not in files and storage.exists(uri):
                files[folder] = f"{what} {entry.slide_id}", uri
    return dict(_spread(list(files.values()), FOLDERS))


def _spread(items: Sequence[Item], most: int) -> list[Item]:
    """All of them, or so many at even distances."""
    count = min(most, len(items))
    return [items[number * len(items) // count] for number in range(count)]


def _say(record: Mapping[str, Any], progress: Progress) -> None:
    done = "outlines drawn anew" if _keeps_mask(record) else f"{record.get('tiles', 0):,} tiles"
    what = f"{done} in {record['seconds']} s" if record["status"] == "completed" else "failed"
    text = f"slide {record['slide_id']}: {'; '.join(filter(None, (what, record['reason'])))}"
    fields = {key: record.get(key) for key in ("slide", "status", "reason", "tiles", "seconds", "attempts")}
    progress.event("slide", text, slide_id=record["slide_id"], **fields)


def _keeps_mask(record: Mapping[str, Any]) -> bool:
    return bool(record.get("mask", {}).get("kept"))


def _records(run: SlideRun, found: Plan, compute: ComputeConfig, progress: Progress) -> Generator[dict[str, Any]]:
    """Records of the slides as they are done."""
    actors, resources, threads, readers = _pool(run, compute)
    tasks = _tasks(found, actors, share=not run.settings.probabilities)
    actors = min(actors, len(tasks))
    together = 2 if len(tasks) > actors else 1  # the next slide is fetched while the network is at one
    # As a training's: a network that has a GPU set aside for it must not run beside it where torch does not see it.
    device = "cuda" if "num_gpus" in resources else run.device
    arguments = (run.model, run.settings, run.out, device, threads, readers, run.cache_gb)
    actor = ray.remote(concurrency_groups={ASKED: 1})(SlideWorker).options(
        max_concurrency=together,
        scheduling_strategy="SPREAD",  # each node has its own disk, and its own way to the bucket
        **resources,
    )
    pool = SlidePool(lambda: actor.remote(*arguments), actors, together, tasks, progress.say)
    so_far = SlideProgress(len(found.todo), progress.update)
    shares: dict[str, list[Share]] = {}
    failed: set[str] = set()  # of shared slides

    def tell(task: SlideTask, planned: int, done: int) -> None:
        so_far.see(task.entry.slide_id, task.part, planned, done)

    for task, result in pool.results(tell):
        slide_id = task.entry.slide_id
        if slide_id in failed:
            continue  # by another share
        if isinstance(result, Share):
            mapped = shares.setdefault(slide_id, [])
            mapped.append(result)
            if len(mapped) == task.parts:
                pool.add_first(replace(task, part=0, shares=tuple(shares.pop(slide_id))))
            continue
        if isinstance(result, Exception):
            result = write_failure(found.network, run.out, task, result)
            if task.parts > 1:
                failed.add(slide_id)
                pool.drop(slide_id)
        so_far.end(slide_id, 0 if _keeps_mask(result) else result.get("tiles"))
        yield result


def _pool(run: SlideRun, compute: ComputeConfig) -> tuple[int, dict[str, float], int, int]:
    """Actors, what each gets of a node, threads of its network on a CPU, and its threads that read."""
    networks, resources = cluster.network_pool(compute)
    actors = run.workers or networks
    per_network = -(-actors // networks)  # more workers than networks share a GPU, or a node's CPUs
    cpus = cluster.node_threads()
    if "num_gpus" in resources:
        share = {"num_gpus": 1 / per_network, "num_cpus": 1.0}
        on_node = max(1, per_network * networks // max(1, sum(1 for node in ray.nodes() if node["Alive"])))
    else:
        whole, part = divmod(resources["num_cpus"], per_network)
        share = {"num_cpus": whole or part / per_network}  # more networks than CPUs would wait for one for ever
        on_node = per_network
    # Ray keeps a CPU of a node free, which its networks need not do: what else runs there is mostly idle.
    return actors, share, max(1, cpus // per_network), max(1, min(8, cpus // on_node))


def _tasks(found: Plan, actors: int, share: bool) -> list[SlideTask]:
    """A task a slide; where there are fewer slides than actors, several actors share each one that is mapped."""
    parts = max(1, actors // max(1, len(found.todo) - len(found.kept))) if share else 1
    tasks = []
    for entry, attempts in found.todo:
        if entry.slide_id in found.kept:
            tasks.append(SlideTask(entry, attempts, keep_mask=True))
        else:
            tasks += [SlideTask(entry, attempts, part, parts) for part in range(parts)]
    return tasks


def _entry_of(record: Mapping[str, Any]) -> SlideEntry:
    return SlideEntry(record["slide_id"], record["slide"])


def _row(entry: SlideEntry, record: Mapping[str, Any], status: Any) -> SlideRow:
    known = ("reason", "attempts", "started", "seconds", "mpp", "mpp_source", "width", "height", "tiles", "areas")
    values = {key: record[key] for key in known if key in record}
    return SlideRow(entry.slide_id, readable(redact(entry.uri)), status, **values)


def _track(out: str, rows: Sequence[SlideRow], record: Mapping[str, Any], tracked: StageRun) -> None:
    """Give MLflow the numbers, the summary and a sheet of overviews."""
    counts, cohort = record["slides"], record["cohort"]
    tracked.metrics({f"slides_{status}": count for status, count in counts.items()})
    if record["slides_per_hour"]:
        tracked.metrics({"slides_per_hour": record["slides_per_hour"]})
    tracked.metrics({"tissue_mm2": cohort["tissue_mm2"]})
    for measure in ("mm2", "share"):
        tracked.metrics({f"{measure}/{name}": part[measure] for name, part in cohort["classes"].items()})
    if tracked.client is None:
        return
    for name in ("summary.md", "summary.csv", "run.json"):
        tracked.file(name, storage.read_bytes(storage.join(out, name)))
    shown = sorted(row.slide_id for row in rows if row.areas is not None)
    pictures = []
    for slide_id in _spread(shown, SHEET):
        with suppress(PistoSegError):  # deleted meanwhile, damaged, or can't be read
            pictures.append(read_rgb(storage.join(results.slide_folder(out, slide_id), "overview.png")))
    if pictures:
        tracked.file("overviews.png", sheet_of_overviews(pictures))
