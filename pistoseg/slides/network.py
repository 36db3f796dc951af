"""A model that segments slides: opens them at its pixel size, maps them, and writes what its maps come to."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from pistoseg.classes import TissueClasses
from pistoseg.errors import PistoSegError
from pistoseg.memory import keep_freed_memory
from pistoseg.models.inference import Predictor
from pistoseg.outputs.areas import count_classes, slide_areas
from pistoseg.outputs.mask_pyramid import write_mask
from pistoseg.outputs.overview import downsample_mask, write_overview
from pistoseg.outputs.probabilities import ProbabilityWriter
from pistoseg.outputs.regions import RegionsReport, ToLevel0, write_regions
from pistoseg.patches.background import check_background
from pistoseg.slides import files, results
from pistoseg.slides.cache import SlideCache
from pistoseg.slides.grid import TilePlan
from pistoseg.slides.reader import SlideReader, open_slide
from pistoseg.slides.resolution import MAX_MPP, MIN_MPP, check_mpp
from pistoseg.slides.source import SlideEntry
from pistoseg.slides.stitching import MaskFile, Stitcher, Work
from pistoseg.slides.tissue import TISSUE_MPP, read_tissue_mask, tissue_mask
from pistoseg.slides.view import SlideView

if TYPE_CHECKING:
    from pistoseg.models.bundle import Segmenter

OVERVIEW_PIXELS = 1800
"""Longer side of the picture from which the overview is drawn, at most: twice what it shows."""
NO_TISSUE = "no tissue was found"
MASK_VERSION = 1
"""Of the code that makes masks; raised when it makes others, which slides that are done then get."""
MIN_AREAS_UM2 = (100.0, 50.0, 25.0)
"""Smallest regions of the outlines where none is given, um2: the first that leaves the areas of the classes as they
are, but for gaps that are closed, else the last. That is about a cell: what is smaller is noise, each speck of which
would be an object in QuPath."""


@dataclass(frozen=True)
class SlideSettings:
    """How slides are segmented; None: as the bundle says.

    Args:
        mpp: micrometres per network px, which are those of the model's training images; a slide's own is its entry's.
        stride: step between tiles, network px; None: the bundle's, at most half a tile.
        symmetries: averaged: 1, 2 or 8.
        batch_size: tiles in a forward pass; symmetric copies count.
        probabilities: whether probabilities.zarr is written.
        tolerance_um: of the outlines' simplification.
        min_area_um2: smaller regions are given to their neighbours in the outlines; the mask, and the areas that are
            measured on it, keep them. None: the first of MIN_AREAS_UM2 with which the outlines of a slide keep the
            areas of the classes, but for gaps that are closed.
        background: which pixels inside the tissue are glass: those that the model's training left out, or none.
    """

    mpp: float | None = None
    stride: int | None = None
    symmetries: int | None = None
    batch_size: int | None = None
    probabilities: bool = False
    tolerance_um: float = 2.0
    min_area_um2: float | None = None
    background: Literal["model", "none"] = "model"


@dataclass(frozen=True)
class Prepared:
    """An open slide of which it is known what there is to do.

    Args:
        entry: as it was listed.
        reader: the open slide.
        view: of it at the network's pixel size.
        tissue: (h, w) bool over the whole slide.
        plan: its tiles.
    """

    entry: SlideEntry
    reader: SlideReader
    view: SlideView
    tissue: NDArray[np.bool_]
    plan: TilePlan


class SlideNetwork:
    """A model that segments slides, one after the other.

    Args:
        segmenter: the model.
        settings: of all slides.
        readers: threads that read ahead of the network.
        mapper: where the network runs; None: in the thread that asks for it.
        writer: where the results of a slide are made; None: in the thread that asks for them.
    Attributes:
        remark: what is to be said of every slide of a model that works at another pixel size than it was trained at;
            empty where it does not.
    Raises:
        PistoSegError: the pixel size of the model is unknown or none of a microscope, or a setting is out of range.
    """

    def __init__(
        self,
        segmenter: Segmenter,
        settings: SlideSettings,
        readers: int = 2,
        mapper: Executor | None = None,
        writer: Executor | None = None,
    ) -> None:
        _check(settings)
        self.settings, self.classes = settings, segmenter.classes
        self.mapper, self.writer = mapper, writer
        self.model = {"uri": segmenter.uri, "fingerprint": segmenter.fingerprint}
        trained = segmenter.info["scale"]["mpp"]
        mpp = trained if settings.mpp is None else settings.mpp
        if mpp is None:
            raise PistoSegError(
                "the model does not say the pixel size that it was trained at",
                file=segmenter.uri,
                field="mpp",
                remedy="give --mpp (in Python mpp=), the micrometres per pixel of its training images "
                "(0.25 at 40x, 0.5 at 20x)",
            )
        remedy = (
            "give --mpp (in Python mpp=), the micrometres per pixel of the model's training images, "
            f"{MIN_MPP:g} to {MAX_MPP:g}"
        )
        check_mpp(mpp, segmenter.uri if settings.mpp is None else None, remedy)
        self.mpp = float(mpp)
        other = trained is not None and trained != mpp
        self.remark = f"segmented at {mpp:g} um per px, and the model was trained at {trained:g}" if other else ""
        self.predictor = _predictor(segmenter, settings)
        self.background = segmenter.background if settings.background == "model" else None
        self.stitcher = Stitcher(
            self.predictor, len(self.classes), self.classes.background_id, readers, self.background
        )

    @property
    def decisive(self) -> dict[str, Any]:
        """The settings that decide on the result, with the bundle's filled in."""
        return {
            "mpp": self.mpp,
            "tile": self.predictor.tile,
            "stride": self.predictor.stride,
            "symmetries": self.predictor.symmetries,
            "scales": list(self.predictor.scales),
            "probabilities": self.settings.probabilities,
            "tolerance_um": self.settings.tolerance_um,
            "min_area_um2": self.settings.min_area_um2,
            "background": asdict(self.background) if self.background else None,
        }

    def made_from(self, entry: SlideEntry) -> dict[str, str]:
        """What a slide's result depends on: its etag, the model and the settings, the user's for this slide included.

        Those of the outlines are apart, for these can be drawn anew on a mask that is there. Whether probabilities are
        written is not among them: they are there or not.

        Raises:
            PistoSegError: the slide or its tissue mask does not exist.
        """
        mask = files.etag(entry.tissue_mask) if entry.tissue_mask else None
        settings = self.decisive | {"slide_mpp": entry.mpp, "tissue_mask": mask, "version": MASK_VERSION}
        del settings["probabilities"]
        outlines = {key: settings.pop(key) for key in ("tolerance_um", "min_area_um2")}
        return {
            "etag": files.etag(entry.uri),
            "model": self.model["fingerprint"],
            "settings": results.settings_fingerprint(settings),
            "outlines": results.settings_fingerprint(outlines),
        }

    @contextmanager
    def prepared(self, entry: SlideEntry, cache: SlideCache) -> Iterator[Prepared]:
        """A slide while the context is open: fetched, opened, with its tissue and tiles.

        Args:
            entry: the slide.
            cache: for slides in object storage.
        Raises:
            PistoSegError: it cannot be fetched, opened or read, or nothing says its pixel size.
        """
        with cache.get(entry.uri) as path, open_slide(path, entry.mpp, entry.uri) as reader:
            small = SlideView(reader, max(TISSUE_MPP, reader.mpp_x, reader.mpp_y))
            if entry.tissue_mask:
                tissue = read_tissue_mask(entry.tissue_mask, (small.height, small.width))
            else:
                tissue = tissue_mask(small.thumbnail(), small.mpp_x)
            view = SlideView(reader, self.mpp)
            plan = TilePlan(view.width, view.height, self.predictor.tile, self.predictor.stride, tissue)
            yield Prepared(entry, reader, view, tissue, plan)

    def map(
        self,
        slide: Prepared,
        mask: MaskFile,
        *,
        bands: range | None = None,
        probabilities: Path | None = None,
        on_begin: Callable[[], None] | None = None,
        on_tiles: Callable[[int], None] | None = None,
    ) -> Work:
        """Run the network over a slide, or some bands of it.

        Args:
            slide: opened.
            mask: takes the class ids of these rows.
            bands: which; all by default.
            probabilities: where these are written, of a whole slide only.
            on_begin: called when the network has come to the slide.
            on_tiles: told how many tiles were just done.
        """

        def run() -> Work:
            if on_begin:
                on_begin()
            return self._map(slide, mask, bands, probabilities, on_tiles)

        return self.mapper.submit(run).result() if self.mapper else run()

    def _map(
        self,
        slide: Prepared,
        mask: MaskFile,
        bands: range | None,
        probabilities: Path | None,
        on_tiles: Callable[[int], None] | None,
    ) -> Work:
        with keep_freed_memory():
            if probabilities is None:
                return self.stitcher.run(slide.view, slide.plan, slide.tissue, mask, bands=bands, on_tiles=on_tiles)
            writer = ProbabilityWriter(
                probabilities, len(self.classes), slide.view.height, slide.view.width, self.mpp, self.classes
            )
            sink = _WithProbabilities(mask, writer, len(self.classes))
            work = self.stitcher.run(slide.view, slide.plan, slide.tissue, sink, probabilities=True, on_tiles=on_tiles)
            writer.close()
            return work

    def write(self, slide: Prepared, mask: MaskFile, folder: Path) -> tuple[dict[str, Any], RegionsReport]:
        """Write mask.tif, regions.geojson, areas.json and overview.png of a mapped slide into a local folder.

        Returns:
            Areas, and what was outlined.
        """
        if self.writer:
            return self.writer.submit(self._write, slide, mask, folder).result()
        return self._write(slide, mask, folder)

    def _write(self, slide: Prepared, mask: MaskFile, folder: Path) -> tuple[dict[str, Any], RegionsReport]:
        ids = cast("NDArray[np.uint8]", mask)  # which it is to all that read it by rows
        areas = slide_areas(count_classes(ids), self.mpp, self.classes)
        (folder / "areas.json").write_text(json.dumps(areas, indent=2) + "\n", encoding="utf-8")
        with ThreadPoolExecutor(1) as beside:
            others: list[Future[Any]] = [
                beside.submit(_draw_overview, folder / "overview.png", slide, ids, self.classes, areas),
                beside.submit(write_mask, folder / "mask.tif", ids, self.classes, self.mpp),
            ]
            regions = self._outline(folder / "regions.geojson", slide, ids)
            for other in others:
                other.result()
        return areas, regions

    def _outline(self, path: Path, slide: Prepared, mask: NDArray[np.uint8]) -> RegionsReport:
        x, y = regions_origin(slide.reader)
        given = self.settings.min_area_um2
        return write_regions(
            path,
            mask,
            self.classes,
            to_level0=ToLevel0(slide.view.scale_x, slide.view.scale_y, -x, -y),
            mpp=self.mpp,
            tolerance=self.settings.tolerance_um,
            min_area=MIN_AREAS_UM2 if given is None else given,
        )


def regions_origin(reader: SlideReader) -> tuple[int, int]:
    """The level-0 px that is (0, 0) in regions.geojson: QuPath opens a slide with bounds at their corner."""
    bounds = reader.bounds
    return (0, 0) if bounds is None else bounds[:2]


def _check(settings: SlideSettings) -> None:
    """Refuse what no other part looks at."""
    for name in ("tolerance_um", "min_area_um2"):
        value = getattr(settings, name)
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise PistoSegError(f"{value:g} is out of range", field=name, remedy="give 0 or a positive number")
    check_background(settings.background)
    if settings.batch_size is not None and settings.batch_size < 1:
        raise PistoSegError(f"{settings.batch_size} is out of range", field="batch_size", remedy="give at least 1")


def _predictor(segmenter: Segmenter, settings: SlideSettings) -> Predictor:
    """The bundle's predictor for a slide: Gaussian weights, probabilities averaged, and tiles that overlap by half.

    A bundle may have been scored with less overlap, which on a slide shows as straight edges between tiles.
    """
    given = {"stride": settings.stride, "symmetries": settings.symmetries, "batch_size": settings.batch_size}
    chosen = {key: value for key, value in given.items() if value is not None}
    always = {"window": "gaussian", "average": "probabilities"}
    try:
        predictor = segmenter.predictor(**chosen, **always)
        if settings.stride is None and predictor.stride > predictor.tile // 2:
            predictor = segmenter.predictor(**chosen, **always, stride=max(1, predictor.tile // 2))
    except ValueError as error:
        raise PistoSegError(str(error), field="settings", remedy="see `pistoseg segment --help`") from error
    return predictor


class _WithProbabilities:
    """A sink for class ids and probabilities."""

    def __init__(self, mask: MaskFile, writer: ProbabilityWriter, n_classes: int) -> None:
        self.mask, self.writer, self.n_classes = mask, writer, n_classes
        self.parts: list[tuple[int, NDArray[np.uint8]]] = []

    def write(self, y: int, x: int, ids: NDArray[np.uint8], probabilities: NDArray[np.uint8] | None) -> None:
        """Take a part."""
        assert probabilities is not None
        self.mask.write(y, x, ids)
        self.parts.append((x, probabilities))

    def end_band(self, y: int, bottom: int) -> None:
        """Write the band's probabilities."""
        band = np.zeros((self.n_classes, bottom - y, self.mask.shape[1]), np.uint8)
        for x, part in self.parts:
            band[:, :, x : x + part.shape[2]] = part
        self.parts.clear()
        self.writer.write(y, band)


def _draw_overview(
    path: Path, slide: Prepared, mask: NDArray[np.uint8], classes: TissueClasses, areas: dict[str, Any]
) -> None:
    reader = slide.reader
    longer, finest = max(reader.width * reader.mpp_x, reader.height * reader.mpp_y), max(reader.mpp_x, reader.mpp_y)
    # Whole numbers of px become one: their mean is much quicker than that of parts of px.
    small = SlideView(reader, finest * math.ceil(longer / finest / OVERVIEW_PIXELS))
    factor = max(1.0, min(mask.shape[0] / small.height, mask.shape[1] / small.width))
    write_overview(
        path,
        small.thumbnail(),
        downsample_mask(mask, factor),
        classes,
        areas,
        small.mpp_x,
        title=slide.entry.slide_id,
        note="" if slide.plan.n_tiles else NO_TISSUE,
    )
