"""Training samples of the CAM network and the refiner: crops with the labelled windows that lie in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pistoseg.classes import IGNORE_ID
from pistoseg.patches.decode import decode_png
from pistoseg.patches.store import PatchSet
from pistoseg.synthesis import address_rng
from pistoseg.training.samples import EpochOrder, PixelCache, crop_mirrored

Sample = tuple[NDArray[Any], ...]


def labelled_source(
    patches: PatchSet,
    size: int,
    regions: int,
    seed: int,
    keep: NDArray[np.bool_] | None = None,
    maps: Sequence[pa.Table] | None = None,
    grid: int | None = None,
) -> dict[str, Any]:
    """What `LabelledCrops` needs; goes to the object store once, where the actors of a node share it.

    An epoch takes one sample for each window, `len(result["labels"])`.

    Args:
        patches: the training images and their labelled windows.
        size: side of a crop, px.
        regions: R, windows in a crop at most; up to 255.
        seed: of order, places and choice.
        keep: (images,) which images are used; None: all.
        maps: tables whose rows belong to the images (all of them, kept or not), with columns `grid_height`,
            `grid_width` and `maps`, the bytes of (C, grid_height, grid_width) float16 in C order. The tables may differ
            in C and in their grids; a sample has their channels one after the other. Tables, as the artifacts hold
            them, because actors read Arrow's bytes where they lie in the object store.
        grid: side g of the maps of a sample.
    Raises:
        ValueError: no window is left.
    """
    assert 0 < regions < IGNORE_ID + 1, regions
    assert (maps is None) == (grid is None), "maps and grid go together"
    assert all(table.num_rows == len(patches) for table in maps or []), "a row of maps for each image"
    rows = np.searchsorted(patches.table["image"].to_numpy(), patches.windows["image"].to_numpy())
    used = np.ones(len(rows), bool) if keep is None else np.asarray(keep, bool)[rows]
    if not used.any():
        raise ValueError("no labelled window is left: `keep` leaves all images out")
    columns = {name: patches.windows[name].to_numpy()[used] for name in ("x", "y", "width", "height")}
    starts = np.stack([columns["y"], columns["x"]], 1).astype(np.int64)
    shared = {
        "images": patches.table.select(["png"]),
        "rows": rows[used],
        "starts": starts,
        "ends": starts + np.stack([columns["height"], columns["width"]], 1),
        "labels": patches.labels[used],
        "size": size,
        "regions": regions,
        "seed": seed,
    }
    if maps is not None:
        shared |= {"maps": [table.select(["grid_height", "grid_width", "maps"]) for table in maps], "grid": grid}
    return shared


class LabelledCrops:
    """Crops of real images, with the labelled windows in them as numbered regions.

    An epoch uses every window once, in an order drawn from (seed, epoch). The crop contains its window (along a side
    that is longer than the crop: lies inside of it), which is region 0; other windows that lie wholly inside the crop
    join in random order while they overlap none of the regions so far. The window lies in a random corner of the crop
    if others then have room beside it, else anywhere. Padding belongs to no region. Everything is drawn from (seed,
    epoch, index) alone.

    Args:
        shared: of `labelled_source`.
    """

    def __init__(self, shared: dict[str, Any]) -> None:
        self.rows, self.labels = shared["rows"], shared["labels"]
        self.starts, self.ends = shared["starts"], shared["ends"]  # (windows, 2) y and x, px
        self.size, self.regions, self.seed = shared["size"], shared["regions"], shared["seed"]
        self._png = shared["images"]["png"]
        self._cache = PixelCache(lambda row: (decode_png(self._png[row].as_py()),))
        self._order = EpochOrder(np.arange(len(self.rows)), self.seed)
        self._maps = [_Maps(table, self.size, shared["grid"]) for table in shared.get("maps", [])]

    def __len__(self) -> int:
        return len(self.rows)

    def window(self, epoch: int, index: int) -> int:
        """Which of the source's windows is region 0 of a sample; without `keep`, its row in the patches' windows."""
        return self._order.row(epoch, index)

    def sample(self, epoch: int, index: int) -> Sample:
        """One crop of S = size px.

        Returns:
            image (S, S, 3) uint8; regions (S, S) uint8, the number of the window that a pixel lies in, 255 in none;
            labels (R, L) uint8 flags of the windows, 255 where there is no further one; with maps also (C, g, g)
            float16, resampled bilinearly.
        """
        window = self.window(epoch, index)
        row = int(self.rows[window])
        (image,) = self._cache[row]
        rng = address_rng(self.seed, epoch, index)
        corner, windows = self._place(window, np.array(image.shape[:2]), rng)
        regions = np.full((self.size, self.size), IGNORE_ID, np.uint8)
        labels = np.full((self.regions, self.labels.shape[1]), IGNORE_ID, np.uint8)
        for number, chosen in enumerate(windows):
            (top, left), (bottom, right) = (edge[chosen] - corner for edge in (self.starts, self.ends))
            regions[max(top, 0) : bottom, max(left, 0) : right] = number
            labels[number] = self.labels[chosen]
        top, left = corner.tolist()
        crop = crop_mirrored(image, top, left, self.size)
        if not self._maps:
            return crop, regions, labels
        maps = np.concatenate([maps.crop(row, corner, image.shape[:2]) for maps in self._maps])
        return crop, regions, labels, maps

    def _place(
        self, window: int, sides: NDArray[np.int64], rng: np.random.Generator
    ) -> tuple[NDArray[np.int64], list[int]]:
        """Where the crop begins (y, x) in an image of the given sides, and the windows that are its regions."""
        start, end = self.starts[window], self.ends[window] - self.size
        room = np.maximum(sides - self.size, 0)
        low, high = np.maximum(np.minimum(start, end), 0), np.minimum(np.maximum(start, end), room)
        # In a corner of the crop the window leaves the others the most room: of 112 px windows every 56 px, a 224 px
        # crop holds 3.2 on average, and 1.2 when it lies anywhere.
        swap = rng.random(2) < 0.5
        first, second = np.where(swap, (end, start), (start, end))
        corner = np.clip(np.where((first >= 0) & (first <= room), first, second), low, high)
        windows = self._windows(window, corner, rng)
        if len(windows) == 1:
            corner = rng.integers(low, high, endpoint=True)
            windows = self._windows(window, corner, rng)
        return corner, windows

    def _windows(self, window: int, corner: NDArray[np.int64], rng: np.random.Generator) -> list[int]:
        """The crop's own window and up to R-1 others of its image that lie inside, without overlap."""
        first, last = np.searchsorted(self.rows, (self.rows[window], self.rows[window] + 1))
        starts, ends = self.starts[first:last], self.ends[first:last]
        inside = (starts >= corner).all(1) & (ends <= corner + self.size).all(1)
        others = rng.permutation(np.flatnonzero(inside))
        chosen = [window - int(first)]
        while len(chosen) < self.regions:
            apart = (starts[others] >= ends[chosen[-1]]) | (ends[others] <= starts[chosen[-1]])
            others = others[apart.any(1)]
            if not len(others):
                break
            chosen.append(int(others[0]))
        return [int(first) + number for number in chosen]


class _Maps:
    """A table of map stacks, one for each image on a grid of its own, resampled to crops."""

    def __init__(self, table: pa.Table, size: int, grid: int) -> None:
        self.heights, self.widths = (table[name].to_numpy() for name in ("grid_height", "grid_width"))
        self.maps = table["maps"]
        self.size = size
        self.centres = (np.arange(grid) + 0.5) * (size / grid)

    def crop(self, row: int, corner: NDArray[np.int64], sides: tuple[int, ...]) -> NDArray[np.float16]:
        """(C, g, g) of the crop that begins at corner (y, x; px) in an image of the given height and width (px)."""
        cells = int(self.heights[row]), int(self.widths[row])
        stack = np.frombuffer(self.maps[row].as_buffer(), np.float16).reshape(-1, *cells)
        (top, bottom, down), (left, right, across) = (
            self._taps(start, side, count) for start, side, count in zip(corner, sides, cells, strict=True)
        )
        lines = []
        for line in (top, bottom):
            first, second = (stack[:, line[:, None], column].astype(np.float32) for column in (left, right))
            lines.append(_between(first, second, across))
        return _between(lines[0], lines[1], down[:, None]).astype(np.float16)

    def _taps(self, start: int, side: int, cells: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.float32]]:
        """The two cells of a stack's side that each cell of the crop lies between, and how near to the second it is."""
        place = (start + self.centres) % (2 * side)
        place = np.minimum(place, 2 * side - place)  # mirrored beyond the image's end, as its pixels are
        position = np.clip(place * (cells / side) - 0.5, 0, cells - 1)
        first = position.astype(np.int64)
        return first, np.minimum(first + 1, cells - 1), (position - first).astype(np.float32)


def _between(first: NDArray[np.float32], second: NDArray[np.float32], share: NDArray[np.float32]) -> NDArray[Any]:
    return first + (second - first) * share
