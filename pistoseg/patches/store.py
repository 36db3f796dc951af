"""The `patches` artifact: images at the networks' pixel size with their labelled windows, as Parquet.

images: `image` int64 id, `name`, `width` and `height` int32 (network px), `mpp` float64 (um per network px; NaN:
unknown), `png` RGB, `sha256` of the pixels. windows: `window` int64 id, `image`, `x`, `y`, `width`, `height` int32
(network px), `labels` L flags. rejected: `name`, `field`, `reason`, `remedy`.
"""

from __future__ import annotations

import copy
import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, groupby
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pistoseg import parquet, storage
from pistoseg.config import DataConfig, ScaleConfig
from pistoseg.errors import PistoSegError
from pistoseg.patches import decode
from pistoseg.patches.source import Rejection, SourceImage, Window, unfit
from pistoseg.pixels import resize_image

IMAGES_SCHEMA = pa.schema(
    [
        ("image", pa.int64()),
        ("name", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("mpp", pa.float64()),
        ("png", pa.binary()),
        ("sha256", pa.string()),
    ]
)
WINDOWS_SCHEMA = pa.schema(
    [
        ("window", pa.int64()),
        ("image", pa.int64()),
        ("x", pa.int32()),
        ("y", pa.int32()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("labels", pa.list_(pa.uint8())),
    ]
)
REJECTED_SCHEMA = pa.schema([(name, pa.string()) for name in ("name", "field", "reason", "remedy")])


def ingest(
    source: SourceImage, data: DataConfig, scale: ScaleConfig
) -> tuple[dict[str, Any] | None, list[dict[str, Any]], list[Rejection]]:
    """Read one training image and bring it to the networks' pixel size.

    Args:
        source: what was found.
        data: what is accepted.
        scale: the pixel size.
    Returns:
        The image's row (None when it is rejected), its windows' rows, and what was rejected and why.
    """
    try:
        pixels = decode.read_rgb(source.uri, source.name, data.max_pixels, data.min_size)
        height, width = pixels.shape[:2]
        factor, size = network_size(height, width, data, scale)
    except PistoSegError as error:
        return None, [], [Rejection.of(error, source.name)]
    image = resize_image(pixels, *size)
    windows: list[dict[str, Any]] = []
    rejected: list[Rejection] = []
    for number, found in enumerate(source.windows):
        window = found.resolved(width, height)
        rejection = unfit(source, window, width, height, data.min_size)
        if rejection is not None:
            rejected.append(rejection)
            continue
        windows.append(
            window_row(source.first_window + number, source.index, scaled(window, factor, size), window.labels)
        )
    if not windows:
        return None, [], rejected
    return image_row(source.index, source.name, image, scale), windows, rejected


def network_size(
    height: int, width: int, data: DataConfig, scale: ScaleConfig
) -> tuple[tuple[float, float], tuple[int, int]]:
    """How an image gets to the networks' pixel size.

    Args:
        height, width: of the image, px.
        data: what is accepted.
        scale: the pixel size.
    Returns:
        Network px per image px, and height and width in network px; (y, x) both.
    Raises:
        PistoSegError: it would be too large.
    """
    factor = (scale.fit / height, scale.fit / width) if scale.fit else (scale.factor(), scale.factor())
    size = (max(1, round(height * factor[0])), max(1, round(width * factor[1])))
    if size[0] * size[1] > data.max_pixels:
        raise PistoSegError(
            f"is {size[1]}x{size[0]} px at the networks' pixel size, more than the {data.max_pixels:,} px allowed",
            field="size",
            remedy="cut it into smaller images, raise data.max_pixels, or correct the scale section",
        )
    return factor, size


def image_row(index: int, name: str, image: NDArray[np.uint8], scale: ScaleConfig) -> dict[str, Any]:
    """A row of the images table.

    Args:
        index: the image's id.
        name: its name.
        image: (H, W, 3) uint8 RGB at the networks' pixel size.
        scale: what that size is.
    """
    return {
        "image": index,
        "name": name,
        "width": image.shape[1],
        "height": image.shape[0],
        "mpp": scale.mpp if scale.mpp and not scale.fit else math.nan,
        "png": decode.encode_png(image),
        "sha256": decode.pixel_hash(image),
    }


def window_row(window: int, image: int, box: tuple[int, int, int, int], labels: Sequence[int]) -> dict[str, Any]:
    """A row of the windows table: ids, x, y, width and height in network px, and L flags."""
    x, y, width, height = box
    return {
        "window": window,
        "image": image,
        "x": x,
        "y": y,
        "width": width,
        "height": height,
        "labels": list(labels),
    }


def scaled(window: Window, factor: tuple[float, float], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """x, y, width and height of a window after its image was resized by (y, x) factors to (height, width)."""
    top = min(size[0] - 1, round(window.y * factor[0]))
    left = min(size[1] - 1, round(window.x * factor[1]))
    bottom = min(size[0], max(top + 1, round((window.y + window.height) * factor[0])))
    right = min(size[1], max(left + 1, round((window.x + window.width) * factor[1])))
    return left, top, right - left, bottom - top


class PatchSet:
    """The images and windows of a `patches` artifact.

    Images are read when they are asked for, unless their encoded bytes are held.

    Attributes:
        table: the images, in the order of their ids.
        windows: the windows, image by image.
        labels: (windows, L) uint8 flags.

    Args:
        table: with the column `png`, or without.
        windows: as above.
        parts: without it, the files that it is in, by URI, and how many rows each has.
    """

    def __init__(self, table: pa.Table, windows: pa.Table, parts: Mapping[str, int] | None = None) -> None:
        self.table = table
        self.windows = windows
        self._parts = list((parts or {}).items())
        self._part_ends = list(accumulate(rows for _, rows in self._parts))
        flags = windows["labels"].combine_chunks()
        self.labels: NDArray[np.uint8] = np.asarray(flags.flatten()).reshape(len(flags), -1)
        self._boxes = np.stack([windows[name].to_numpy() for name in ("x", "y", "width", "height")], 1)
        ids = windows["image"].to_numpy()
        images = table["image"].to_numpy()
        self._starts = np.searchsorted(ids, images, "left")
        self._ends = np.searchsorted(ids, images, "right")

    @classmethod
    def open(cls, uri: str, *, hold: bool = False) -> PatchSet:
        """Read an artifact's folder; `PistoSegError` when no image was good enough to be in it.

        Args:
            uri: of the folder.
            hold: whether all images are read at once, for `table` to have their column `png`: encoded, they are nearly
                all of the artifact.
        """
        columns = None if hold else [name for name in IMAGES_SCHEMA.names if name != "png"]
        parts = parquet.read_parts(storage.join(uri, "images"), columns=columns)
        images = pa.concat_tables(parts.values())
        windows = parquet.read(storage.join(uri, "windows"))
        if not images.num_rows:
            raise PistoSegError(
                "every training image was rejected",
                file=storage.join(uri, "rejected.parquet"),
                remedy="`pistoseg data check` lists the reasons",
            )
        return cls(images, windows, {file: part.num_rows for file, part in parts.items()})

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def image(self, position: int) -> NDArray[np.uint8]:
        """Image at a position in `table`: (H, W, 3) uint8 RGB."""
        return next(self.images([position]))

    def images(self, positions: Iterable[int]) -> Iterator[NDArray[np.uint8]]:
        """Several of them, one after the other; neighbours are read together."""
        for png in self._encoded(positions):
            yield decode.decode_png(png)

    def _encoded(self, positions: Iterable[int]) -> Iterator[bytes]:
        if "png" in self.table.column_names:
            yield from (self.table["png"][position].as_py() for position in positions)
            return
        for number, group in groupby(positions, lambda position: bisect_right(self._part_ends, position)):
            file, rows = self._parts[number]
            start = self._part_ends[number] - rows
            yield from parquet.values(file, "png", [position - start for position in group])

    def image_labels(self) -> NDArray[np.uint8]:
        """Which classes any window of an image names: (images, L) uint8 flags."""
        return np.maximum.reduceat(self.labels, self._starts, axis=0)

    def with_labels(self, labels: NDArray[np.uint8]) -> PatchSet:
        """The same images and windows with other flags, (windows, any number of classes)."""
        other = copy.copy(self)
        other.labels = labels
        return other

    def boxes(self, position: int) -> list[tuple[int, tuple[int, int, int, int]]]:
        """The windows of the image at a position of `table`: each one's row in `windows`, and its box."""
        return [(window, self.box(window)) for window in range(self._starts[position], self._ends[position])]

    def box(self, window: int) -> tuple[int, int, int, int]:
        """Of a row of `windows`: x, y, width and height in network px."""
        x, y, width, height = self._boxes[window].tolist()
        return x, y, width, height

    def single_tissue(self) -> Iterator[tuple[NDArray[np.uint8], int]]:
        """The pixels (h, w, 3) uint8 and class id of every single-tissue window."""
        single = self.labels.sum(axis=1) == 1
        positions = np.flatnonzero(np.logical_or.reduceat(single, self._starts)).tolist()
        for position, image in zip(positions, self.images(positions), strict=True):
            for window, (x, y, width, height) in self.boxes(position):
                if single[window]:
                    yield image[y : y + height, x : x + width], int(self.labels[window].argmax())

    def allowed(self, position: int) -> NDArray[np.bool_]:
        """Which classes the labels allow at every pixel of an image.

        A pixel may be of a class that every window over it names; where their labels contradict each other, of a class
        that any of them names; where there is no window, of none.

        Returns:
            (L, H, W) bool.
        """
        height, width = (self.table[side][position].as_py() for side in ("height", "width"))
        classes = self.labels.shape[1]
        every = np.ones((classes, height, width), bool)
        some = np.zeros((classes, height, width), bool)
        for window in range(self._starts[position], self._ends[position]):
            x, y, w, h = self._boxes[window]
            flags = self.labels[window].astype(bool)[:, None, None]
            every[:, y : y + h, x : x + w] &= flags
            some[:, y : y + h, x : x + w] |= flags
        agreed = every & some
        return np.where(agreed.any(0), agreed, some)
