"""What the readers of layouts hand on: images with labelled windows, and what was refused."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from pistoseg.errors import PistoSegError, UnavailableError

WHOLE = -1
"""Width and height of a window that covers its image, whose size is not known before it is decoded."""


@dataclass(frozen=True)
class Window:
    """A rectangle with an image-level label, in px of the upright image; of a slide, in level-0 px.

    Args:
        x: left edge.
        y: top edge.
        width: px, or WHOLE.
        height: px, or WHOLE.
        labels: one flag (0 or 1) per class.
        row: line of the table that it was read from, counted from 1; 0 for labels in names.
    """

    x: int
    y: int
    width: int
    height: int
    labels: tuple[int, ...]
    row: int = 0

    @classmethod
    def whole(cls, labels: list[int] | tuple[int, ...]) -> Window:
        """A window that covers its image, whatever its size."""
        return cls(0, 0, WHOLE, WHOLE, tuple(labels))

    def resolved(self, width: int, height: int) -> Window:
        """The same window with its size filled in for an image of width x height px."""
        if self.width != WHOLE:
            return self
        return Window(0, 0, width, height, self.labels, self.row)


@dataclass(frozen=True)
class SourceImage:
    """A training image that was found but not read yet.

    Args:
        name: its path below the training folder; unique.
        uri: where to read it.
        windows: at least one; a whole-image label is `Window.whole`.
        index: its position among all images found: the `image` id of the artifact.
        first_window: position of its first window among all windows: ids count up from here.
    """

    name: str
    uri: str
    windows: tuple[Window, ...]
    index: int = 0
    first_window: int = 0


def readable(name: str) -> str:
    """A file's name as text that can be written: what of it is not UTF-8 becomes `\\xe4`."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def require_utf8(name: str) -> None:
    """Raise `PistoSegError` for a file's name that is not UTF-8: no table can hold it."""
    written = readable(name)
    if written != name:
        raise PistoSegError("is not UTF-8", file=written, field="name", remedy="rename it in UTF-8, e.g. with convmv")


@dataclass(frozen=True)
class Rejection:
    """An image or a table row that is not used: a row of rejected.parquet."""

    name: str
    field: str
    reason: str
    remedy: str

    @classmethod
    def of(cls, error: PistoSegError, name: str | None = None) -> Rejection:
        """From an error, under another name where given; raises one that is no fault of the image."""
        if isinstance(error, UnavailableError):
            raise error
        return cls(name or error.file or "", error.field or "", error.reason, error.remedy or "")


def unfit(source: SourceImage, window: Window, width: int, height: int, min_size: int) -> Rejection | None:
    """Why a window can't be trained on, or None.

    Args:
        source: its image.
        window: with its size filled in.
        width, height: of the image, px.
        min_size: the smallest side that images, and so windows of them, may have, px.
    """
    place = f"row {window.row} ({source.name})" if window.row else source.name
    size = f"{window.width}x{window.height} px"
    if window.x + window.width > width or window.y + window.height > height:
        return Rejection(
            place,
            "window",
            f"x {window.x}, y {window.y}, {size} reaches beyond its image of {width}x{height}",
            "give windows in px of the image, from its top left corner",
        )
    if min(window.width, window.height) < min_size:
        return Rejection(
            place, "size", f"is {size}, smaller than {min_size} px", "give larger windows, or lower data.min_size"
        )
    return None


def count_unread(sources: Iterable[SourceImage | SlideSource], rejected: Iterable[str]) -> int:
    """How many images, or slides whose windows are not known, can't be read at all.

    Args:
        sources: all that were found.
        rejected: names of the rejections: a source's own where all of it is refused.
    """
    names = set(rejected)
    return sum(source.name in names for source in sources)


def too_many_bad(counts: dict[str, int], limit: float) -> str | None:
    """What is wrong where more than a share of the images, or of the windows, is bad; None where it is less.

    Args:
        counts: `rejected` and `windows` (that are good); of artifacts made before these were counted not `found`, the
            images or slides, and `unread`, those of them that can't be read, whose windows `rejected` counts as one.
        limit: `data.max_rejected`.
    """
    refused, total = counts["rejected"], counts["rejected"] + counts["windows"]
    unread, found = counts.get("unread", 0), counts.get("found", 0)
    if refused > limit * total:
        bad = f"{refused} of {total} images or windows are bad"
    elif unread > limit * found:
        bad = f"{unread} of {found} images or slides can't be read"
    else:
        return None
    return f"{bad}, more than data.max_rejected ({limit:.0%}) allows"


@dataclass(frozen=True)
class Listing:
    """The training images of a folder, in the order of their names.

    Args:
        images: with ids filled in.
        rejected: images and table rows that cannot be used.
        layout: `table`, `folders` or `flags`.
    """

    images: list[SourceImage]
    rejected: list[Rejection]
    layout: str


@dataclass(frozen=True)
class SlideSource:
    """A slide whose windows are training images, each by itself; it was not opened yet.

    Args:
        name: as the manifest writes it.
        uri: where it is.
        mpp: micrometres per level-0 px as the manifest has it; None to read it from the slide.
        windows: in level-0 px; empty where they are to be cut from annotations.
        annotations: URI of the GeoJSON from which they are cut, or None.
        first: the `image` and `window` id of its first window; ids count up from here.
    """

    name: str
    uri: str
    mpp: float | None = None
    windows: tuple[Window, ...] = ()
    annotations: str | None = None
    first: int = 0

    def image_name(self, window: Window) -> str:
        """Name of the training image that a window becomes."""
        return f"{self.name}/{window.x}-{window.y}-{window.width}x{window.height}"


@dataclass(frozen=True)
class SlideListing:
    """The slides of a manifest, in the order of their names.

    Args:
        slides: with their ids filled in.
        rejected: rows that cannot be used.
    """

    slides: list[SlideSource]
    rejected: list[Rejection]

    @property
    def layout(self) -> str:
        """What reports call it."""
        return "slides"


@dataclass(frozen=True)
class EvaluationPair:
    """An image with its ground truth.

    Args:
        name: the stem that they share.
        image_uri: the image.
        mask_uri: class ids; None where the mask is missing.
        background_uri: WSSS4LUAD's background mask, not zero where there is no tissue.
    """

    name: str
    image_uri: str
    mask_uri: str | None
    background_uri: str | None = None


@dataclass(frozen=True)
class EvaluationListing:
    """Images with masks, and what is missing.

    Args:
        pairs: every image, in the order of their names; without a mask where there is none.
        missing_images: names of masks whose image is not there: the ground truth is then incomplete.
        missing_masks: names of images without a mask.
        folder: URI of what has the folders of the images and masks.
    """

    pairs: list[EvaluationPair]
    missing_images: list[str] = field(default_factory=list)
    missing_masks: list[str] = field(default_factory=list)
    folder: str = ""

    @property
    def scored(self) -> list[EvaluationPair]:
        """The pairs that have a mask."""
        return [pair for pair in self.pairs if pair.mask_uri is not None]
