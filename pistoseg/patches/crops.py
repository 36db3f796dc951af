"""Windows of slides as training images: cut out at the networks' pixel size.

How a slide is opened is handed in: `slides` builds on this package's decoder, so this package does not build on it.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pistoseg.classes import TissueClasses
from pistoseg.config import DataConfig, ScaleConfig
from pistoseg.errors import PistoSegError, RefusedError, UnavailableError, suggestion
from pistoseg.patches.annotations import BACKGROUND, read_annotations
from pistoseg.patches.source import Rejection, SlideSource, Window
from pistoseg.patches.store import image_row, window_row
from pistoseg.patches.windows import Cut, cut_windows
from pistoseg.pixels import resize_image


class Slide(Protocol):
    """What `pistoseg.slides.reader.SlideReader` has to say about a slide."""

    @property
    def width(self) -> int:
        """Level-0 px."""

    @property
    def height(self) -> int:
        """Level-0 px."""

    @property
    def bounds(self) -> tuple[int, int, int, int] | None:
        """x, y, width and height of what was scanned, level-0 px; QuPath's (0, 0) is at this x, y."""


class SlideAtScale(Protocol):
    """A slide at the networks' pixel size: `pistoseg.slides.view.SlideView`."""

    @property
    def reader(self) -> Slide:
        """The slide."""

    @property
    def width(self) -> int:
        """Network px."""

    @property
    def height(self) -> int:
        """Network px."""

    @property
    def scale_x(self) -> float:
        """Level-0 px per network px."""

    @property
    def scale_y(self) -> float:
        """Level-0 px per network px."""

    def read(self, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        """(height, width, 3) uint8 of a part in network px; `PistoSegError` when it cannot be read."""


_OVERLAP = 0.01  # hand-drawn borders cross a little
Opener = Callable[[str, float | None], AbstractContextManager[SlideAtScale]]
"""Opens a slide by its URI and the mpp that the user gave; `PistoSegError` when it cannot be read."""


def network_mpp(scale: ScaleConfig) -> float:
    """The pixel size at which slides are read; `PistoSegError` where the config has none."""
    if scale.mpp is None:
        raise PistoSegError(
            "is not set, and windows of slides are read at the networks' pixel size",
            field="scale.mpp",
            remedy="set it in um per px, e.g. --set scale.mpp=0.5",
        )
    return scale.mpp


@dataclass(frozen=True)
class Crop:
    """A window as an image.

    Args:
        number: its place among the windows of its `SlideSource`.
        window: in level-0 px.
        pixels: (H, W, 3) uint8 RGB at the networks' pixel size.
    """

    number: int
    window: Window
    pixels: NDArray[np.uint8]


@dataclass(frozen=True)
class CutNote:
    """What cutting windows out of a slide's annotations gave, for the stage's summary.

    Args:
        slide: its name.
        windows: that were cut.
        partly: windows left out because they are partly unannotated.
        unknown: polygons by class names that are not in the config.
        unclassified: polygons without a class.
        overlap: share of the annotated area that has several classes.
    """

    slide: str
    windows: int
    partly: int
    unknown: dict[str, int]
    unclassified: int
    overlap: float


def note_lines(notes: list[CutNote], classes: TissueClasses) -> list[str]:
    """What is odd about the annotations of slides, in sentences."""
    lines, known = [], " or ".join(dict.fromkeys((*classes.names, BACKGROUND)))
    partly, unclassified = (sum(getattr(note, key) for note in notes) for key in ("partly", "unclassified"))
    if partly:
        lines.append(f"{partly} windows were left out: they are partly unannotated")
    for name, count in sum((Counter(note.unknown) for note in notes), Counter[str]()).most_common():
        slides = [note.slide for note in notes if name in note.unknown]
        lines.append(
            f"{count} polygons are of {name!r}, which is no class of the config, in {len(slides)} slides, "
            f"e.g. {slides[0]}: left out with what they lie on{suggestion(name, classes.names)}; name them {known} in "
            "QuPath, add the class to the config, or take the class off those that only frame others"
        )
    if unclassified:
        lines.append(f"{unclassified} polygons have no class")
    for found, text in (
        ([note.slide for note in notes if note.overlap > _OVERLAP], "have annotations of several classes on one place"),
        ([note.slide for note in notes if not note.windows], "gave no window"),
    ):
        if found:
            lines.append(f"{len(found)} slides {text}, e.g. {found[0]}")
    return lines


@dataclass
class SlideRows:
    """What a slide adds to the `patches` artifact beside its images; see `pistoseg.patches.store`."""

    windows: list[dict[str, Any]] = field(default_factory=list)
    rejected: list[Rejection] = field(default_factory=list)
    notes: list[CutNote] = field(default_factory=list)


def ingest_slide(
    source: SlideSource,
    opener: Opener,
    classes: TissueClasses,
    data: DataConfig,
    scale: ScaleConfig,
    add: Callable[[dict[str, Any]], None],
) -> SlideRows:
    """Read the windows of a slide as images of their own, each with one window over all of it.

    Args:
        source: with windows, or with annotations to cut them from.
        opener: opens the slide at the networks' pixel size.
        classes: the L classes.
        data: limits on images, and how windows are cut from annotations.
        scale: the networks' pixel size.
        add: takes the row of each image as soon as it is read, as a slide may give gigabytes of them.
    """
    rows = SlideRows()
    for item in crops(source, opener, classes, data):
        if isinstance(item, Rejection):
            rows.rejected.append(item)
        elif isinstance(item, CutNote):
            rows.notes.append(item)
        else:
            number = source.first + item.number
            pixels = resize_image(item.pixels, scale.fit, scale.fit) if scale.fit else item.pixels
            height, width = pixels.shape[:2]
            add(image_row(number, source.image_name(item.window), pixels, scale))
            rows.windows.append(window_row(number, number, (0, 0, width, height), item.window.labels))
    return rows


def crops(
    source: SlideSource, opener: Opener, classes: TissueClasses, data: DataConfig
) -> Iterator[Crop | Rejection | CutNote]:
    """Cut out the windows of a slide; the slide is opened once, and again only after a part of it could not be read.

    Args:
        source: with windows, or with annotations to cut them from.
        opener: opens the slide at the networks' pixel size.
        classes: the L classes.
        data: limits on images, and how windows are cut from annotations.
    Yields:
        A crop or the reason why there is none for every window, in their order; what cutting gave where windows are
        cut. A slide that cannot be opened rejects all its windows, or itself where they are not known.
    """
    waiting: deque[tuple[int, Window]] | None = deque(enumerate(source.windows)) if source.windows else None
    while waiting is None or waiting:
        with ExitStack() as stack:
            try:
                view = stack.enter_context(opener(source.uri, source.mpp))
                if waiting is None:
                    windows, note = annotated_windows(source, view, classes, data)
                    waiting = deque(enumerate(windows))
                    yield note
            except PistoSegError as error:
                yield from _rejected(source, [window for _, window in waiting or ()], error)
                return
            while waiting:
                number, window = waiting.popleft()
                refused = _unfit(source, window, view, data)
                if refused is not None:
                    yield refused
                    continue
                try:
                    pixels = view.read(*_place(window, view))
                except PistoSegError as error:
                    yield from _rejected(source, [window], error)
                    break  # after an error, OpenSlide refuses everything else as well
                yield Crop(number, window, pixels)


def annotated_windows(
    source: SlideSource, view: SlideAtScale, classes: TissueClasses, data: DataConfig
) -> tuple[tuple[Window, ...], CutNote]:
    """Cut the windows of a slide from its GeoJSON.

    QuPath's coordinates begin where the scanned part of a slide does, which some formats put inside of level 0.

    Raises:
        PistoSegError: the GeoJSON cannot be read.
    """
    assert source.annotations is not None
    annotations = read_annotations(source.annotations, classes)
    slide = view.reader
    x, y = slide.bounds[:2] if slide.bounds else (0, 0)
    scale = (view.scale_x, view.scale_y)
    cut: Cut = cut_windows(annotations.moved(x, y), slide.width, slide.height, scale, len(classes), data)
    unknown = dict(annotations.unknown)
    note = CutNote(source.name, len(cut.windows), cut.partly, unknown, annotations.unclassified, cut.overlap)
    return cut.windows, note


def _rejected(source: SlideSource, windows: list[Window], error: PistoSegError) -> list[Rejection]:
    """One for each window, or for the slide where its windows are not known; raises what is no fault of the slide."""
    if isinstance(error, RefusedError):
        raise UnavailableError(error.reason, file=error.file, remedy=error.remedy) from error
    reason = error.reason if error.file in (None, source.uri) else f"{error.file} {error.reason}"
    names = [_label(source, window) for window in windows] or [source.name]
    first = replace(Rejection.of(error), field=error.field or "slide", reason=reason)
    if isinstance(error.__cause__, FileNotFoundError) and error.file == source.uri != source.name:
        at = f" {source.uri.removesuffix(source.name)}" if source.uri.endswith(f"/{source.name}") else ""
        first = replace(
            first, remedy=f"relative paths start at the manifest's folder{at}: keep it there, or write absolute paths"
        )
    return [replace(first, name=name) for name in names]


def _label(source: SlideSource, window: Window) -> str:
    name = source.image_name(window)
    return f"row {window.row} ({name})" if window.row else name


def _unfit(source: SlideSource, window: Window, view: SlideAtScale, data: DataConfig) -> Rejection | None:
    """Why a window cannot be an image, or None."""
    slide, name = view.reader, _label(source, window)
    if window.x + window.width > slide.width or window.y + window.height > slide.height:
        return Rejection(
            name,
            "window",
            f"x {window.x}, y {window.y}, {window.width}x{window.height} px reaches beyond its slide of "
            f"{slide.width}x{slide.height}",
            "give windows in level-0 px of the slide, from its top left corner",
        )
    _, _, width, height = _place(window, view)
    if width * height > data.max_pixels:
        limit = f"more than the {data.max_pixels:,} px allowed"
        return Rejection(
            name,
            "size",
            f"is {width}x{height} px at the networks' pixel size, {limit}",
            "cut smaller windows, raise data.max_pixels, or correct the mpp",
        )
    if min(width, height) < data.min_size:
        return Rejection(
            name,
            "size",
            f"is {width}x{height} px at the networks' pixel size, smaller than {data.min_size} px",
            "cut larger windows, lower data.min_size, or correct the mpp",
        )
    return None


def _place(window: Window, view: SlideAtScale) -> tuple[int, int, int, int]:
    """x, y, width and height of a window in whole network px."""
    width, height = max(1, round(window.width / view.scale_x)), max(1, round(window.height / view.scale_y))
    x, y = round(window.x / view.scale_x), round(window.y / view.scale_y)
    return max(0, min(x, view.width - width)), max(0, min(y, view.height - height)), width, height
