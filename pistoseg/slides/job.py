"""One slide, from its file to its folder of results."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pistoseg import storage
from pistoseg.errors import PistoSegError, RefusedError, UnavailableError
from pistoseg.outputs.mask_pyramid import read_mask
from pistoseg.outputs.summary import versions
from pistoseg.slides import results
from pistoseg.slides.cache import SlideCache
from pistoseg.slides.ids import wrong_id
from pistoseg.slides.network import MIN_AREAS_UM2, NO_TISSUE, Prepared, SlideNetwork, SlideSettings, regions_origin
from pistoseg.slides.resolution import MAX_MPP, MIN_MPP, resolve_mpp
from pistoseg.slides.scratch import scratch_folder
from pistoseg.slides.source import SlideEntry, list_slides
from pistoseg.slides.stitching import MaskFile, Work

if TYPE_CHECKING:
    from pistoseg.models.bundle import Segmenter
    from pistoseg.outputs.regions import RegionsReport

MADE_BY = ("tiles_per_s", "workers", "waiting_share", "device", "precision", "versions")
"""What slide.json says of the making of a mask, which later outlines on it leave."""
ALL_GLASS = "all its tissue is lighter than what the model's training took for glass (background in model.json)"
COARSE = 1.5
"""A slide whose pixels are so much larger than the model's is segmented with a remark."""
SAME_MPP = 0.05
"""A given pixel size may differ so much from the slide's own, which scanners round, without a remark."""


@dataclass(frozen=True)
class SlideResult:
    """A segmented slide.

    Args:
        folder: URI of its results.
        record: what slide.json says.
        areas: what areas.json says.
    """

    folder: str
    record: dict[str, Any]
    areas: dict[str, Any]


def segment_one(
    segmenter: Segmenter,
    slide: str,
    out: str,
    *,
    slide_id: str | None = None,
    slide_mpp: float | None = None,
    tissue_mask: str | None = None,
    readers: int = 2,
    **settings: Any,
) -> SlideResult:
    """What `Segmenter.segment_slide` does, see there."""
    problem = wrong_id(slide_id) if slide_id else None
    if problem:  # a folder of results is replaced, so it must be nothing else
        raise PistoSegError(problem[0], field="slide_id", remedy=problem[1])
    entries = list_slides(slide)
    if len(entries) != 1:
        raise PistoSegError(f"holds {len(entries)} slides", file=slide, remedy="name one of them")
    entry = entries[0]
    entry = replace(
        entry,
        slide_id=slide_id or entry.slide_id,
        mpp=entry.mpp if slide_mpp is None else slide_mpp,
        tissue_mask=storage.absolute(tissue_mask) if tissue_mask else entry.tissue_mask,
    )
    network = SlideNetwork(segmenter, SlideSettings(**settings), readers)
    results.refuse_another(storage.absolute(out), entry.slide_id, entry.uri, network.made_from(entry))
    with scratch_folder() as folder:
        cache = SlideCache(folder, shutil.disk_usage(folder).free)
        try:
            return segment_slide(network, entry, storage.absolute(out), cache=cache)
        except PistoSegError as error:
            if error.field != "mpp" or error.file != entry.uri:
                raise
            remedy = f"give um per level-0 px, {MIN_MPP:g} to {MAX_MPP:g}, as slide_mpp"  # not by a manifest's column
            raise PistoSegError(error.reason, file=error.file, field="slide_mpp", remedy=remedy) from error


def segment_slide(
    network: SlideNetwork,
    entry: SlideEntry,
    out: str,
    *,
    cache: SlideCache,
    attempts: int = 1,
    keep_mask: bool = False,
    on_plan: Callable[[int], None] | None = None,
    on_tiles: Callable[[int], None] | None = None,
) -> SlideResult:
    """Segment one slide into `out/slides/<slide_id>/`, which appears whole or not at all.

    Args:
        network: the model.
        entry: the slide.
        out: URI of the run's output.
        cache: for slides in object storage.
        attempts: which try of this slide it is, for the record.
        keep_mask: whether a mask that is there, and is what would be made, takes the network's place.
        on_plan: told the number of tiles before the first one.
        on_tiles: told how many tiles were just done.
    Raises:
        PistoSegError: the slide cannot be read; nothing of it stays.
    """
    clock, target = Clock(), results.slide_folder(out, entry.slide_id)
    made_from = network.made_from(entry)
    # The slide first: one that can't be opened leaves no folder behind.
    with network.prepared(entry, cache) as slide, results.published(target) as (folder, scratch):
        clock.lap("prepare")
        earlier = _earlier(out, entry, made_from, network) if keep_mask else None
        mask, work = _kept_mask(slide, target, scratch) if earlier else None, Work()
        if mask is None:
            earlier = None
            if on_plan:
                on_plan(slide.plan.n_tiles)
            mask = MaskFile(scratch / "mask", slide.view.height, slide.view.width)
            zarr = folder / results.PROBABILITIES if network.settings.probabilities else None
            work = network.map(slide, mask, probabilities=zarr, on_begin=lambda: clock.lap("queue"), on_tiles=on_tiles)
            clock.lap("network")
        elif earlier:
            earlier = {**earlier, "settings": {"probabilities": results.carry_probabilities(target, folder)}}
            clock.lap("mask")
        record = write_slide(network, slide, mask, folder, work, made_from, attempts, clock, earlier=earlier)
        mask.close()
    areas = record.pop("areas")
    return SlideResult(target, record, areas)


def _earlier(out: str, entry: SlideEntry, made_from: Mapping[str, str], network: SlideNetwork) -> dict[str, Any] | None:
    """slide.json of results whose mask, and probabilities if these are wanted, are what would be made."""
    record = results.read_record(out, entry.slide_id)
    if not results.has_same_mask(record, made_from):
        return None
    return record if results.is_whole(out, entry.slide_id, probabilities=network.settings.probabilities) else None


def _kept_mask(slide: Prepared, target: str, scratch: Path) -> MaskFile | None:
    """The mask of earlier results in a file of its own; None where it is damaged."""
    uri = storage.join(target, "mask.tif")
    file = storage.local_path(uri)
    mask = MaskFile(scratch / "kept", slide.view.height, slide.view.width)
    try:
        if file is None:
            file = scratch / "mask.tif"
            with storage.open_file(uri) as source, file.open("wb") as copy:
                shutil.copyfileobj(source, copy, 2**22)
        for y, x, ids in read_mask(file, mask.shape):
            mask.write(y, x, ids)
    except (FileNotFoundError, PistoSegError) as error:
        mask.close()
        if isinstance(error, UnavailableError | RefusedError):
            raise
        return None
    return mask


def write_slide(
    network: SlideNetwork,
    slide: Prepared,
    mask: MaskFile,
    folder: Path,
    work: Work,
    made_from: Mapping[str, str],
    attempts: int,
    clock: Clock,
    workers: int = 1,
    earlier: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write all results of a mapped slide, slide.json last; returns its record and `areas`.

    `earlier` is slide.json of the results whose mask it is, if the network was not run for it.
    """
    areas, regions = network.write(slide, mask, folder)
    clock.lap("write")
    record = {
        **start_record(slide.entry, made_from, attempts, clock.started),
        "status": "completed",
        "reason": _remark(slide, areas, regions, network),
        "seconds": clock.total(),
        "seconds_of": clock.laps,
        "mpp": slide.reader.mpp_x,
        "mpp_y": slide.reader.mpp_y,
        "mpp_source": slide.reader.mpp_source,
        "width": slide.reader.width,
        "height": slide.reader.height,
        "vendor": slide.reader.vendor,
        "mask": {"width": slide.view.width, "height": slide.view.height, "mpp": network.mpp, "kept": bool(earlier)},
        "regions": {
            "polygons": regions.polygons,
            "origin_level0": list(regions_origin(slide.reader)),
            "tolerance_um": regions.tolerance_um,
            "min_area_um2": regions.min_area_um2,
        },
        "tiles": slide.plan.n_tiles,
        "tiles_of_the_whole_slide": slide.plan.n_all_tiles,
        "tiles_per_s": round(work.tiles / work.seconds, 2) if work.seconds else None,
        "workers": workers,
        "waiting_share": round(work.waiting_share, 4),
        "model": network.model,
        "settings": network.decisive,
        "device": str(network.predictor.device),
        "precision": "bf16" if network.predictor.bf16 else "fp32",
        "versions": versions(),
    }
    if earlier:
        record |= {key: earlier.get(key) for key in MADE_BY}
        record["settings"] = network.decisive | earlier["settings"]
    results.write_record(folder, record)
    return {**record, "areas": areas}


def start_record(entry: SlideEntry, made_from: Mapping[str, str], attempts: int, started: str) -> dict[str, Any]:
    """What slide.json says of any slide, whatever becomes of it."""
    return {
        "slide_id": entry.slide_id,
        "slide": entry.uri,
        "attempts": attempts,
        "started": started,
        "made_from": dict(made_from),
    }


class Clock:
    """Seconds of the parts of a job.

    Args:
        before: what others took for earlier parts of it.

    Attributes:
        started: UTC, ISO 8601.
        laps: seconds by part.
    """

    def __init__(self, before: Mapping[str, float] | None = None) -> None:
        self.laps = {name: round(seconds, 2) for name, seconds in (before or {}).items()}
        earlier = sum(self.laps.values())
        self.started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - earlier))
        self._last = time.monotonic()
        self._began = self._last - earlier

    def lap(self, name: str) -> None:
        """A part ends."""
        now = time.monotonic()
        self.laps[name] = round(now - self._last, 2)
        self._last = now

    def total(self) -> float:
        """Seconds since the beginning."""
        return round(time.monotonic() - self._began, 2)


def _remark(slide: Prepared, areas: Mapping[str, Any], regions: RegionsReport, network: SlideNetwork) -> str:
    remarks = [network.remark] if network.remark else []
    if not areas["tissue_um2"]:
        remarks.append(ALL_GLASS if slide.plan.n_tiles and network.background else NO_TISSUE)
    if slide.reader.mpp_source == "objective-power":
        remarks.append(f"its pixel size, {slide.reader.mpp_x:g} um, is a guess from the objective's power")
    if slide.reader.mpp_source == "given":
        with suppress(PistoSegError):  # it says none
            own = resolve_mpp(slide.reader.properties, None, slide.entry.uri)
            is_guess = own.source == "objective-power"
            if not is_guess and not math.isclose(own.mpp_x, slide.reader.mpp_x, rel_tol=SAME_MPP):
                remarks.append(f"its pixels are taken to be {slide.reader.mpp_x:g} um, and it says {own.mpp_x:g}")
    coarsest = max(slide.reader.mpp_x, slide.reader.mpp_y)
    if coarsest > COARSE * network.mpp:
        remarks.append(f"its pixels, {coarsest:g} um, are larger than the model's, {network.mpp:g} um")
    if network.settings.min_area_um2 is None and regions.min_area_um2 < MIN_AREAS_UM2[0]:
        dropped = sum(regions.dropped_um2[name] for name in network.classes.names) / areas["tissue_um2"]
        remarks.append(
            f"specks: its outlines leave out regions below {regions.min_area_um2:g} um2, not below "
            f"{MIN_AREAS_UM2[0]:g}; {100 * dropped:.1f} % of its tissue is in them (areas.json counts all)"
        )
    return "; ".join(remarks)
