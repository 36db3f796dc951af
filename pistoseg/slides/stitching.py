"""The network over a whole slide: super-tiles read ahead, overlapping tiles summed, rows written as they become final.

Memory is that of a super-tile's sums and of the rows by which one band of tiles reaches into the next; neither grows
with the slide's height, and only the latter with its width.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pistoseg.memory import give_back
from pistoseg.models.inference import Predictor, likeliest
from pistoseg.models.tiling import cut_tile
from pistoseg.patches.background import BackgroundRule
from pistoseg.slides.grid import SUPER_TILE, Band, SuperTile, TilePlan
from pistoseg.slides.view import SlideView

GIVE_BACK_S = 60.0
"""After how long, at the end of a band of any slide, the kernel gets what is free in the process. Sums are of many
sizes, and where none fits into another's place a process grows: by 100 MB in five minutes. To fetch all again is
300,000 page faults for a network on tiles of 512 px."""

MAX_MARGIN = 256
"""View px that are read around a super-tile to measure bright components, at most."""


@dataclass(frozen=True)
class Work:
    """What a stitching took.

    Args:
        tiles: that went through the network.
        seconds: from the first read to the last row.
        waiting_s: of them, in which the network waited for pixels.
    """

    tiles: int = 0
    seconds: float = 0.0
    waiting_s: float = 0.0

    @property
    def waiting_share(self) -> float:
        """Share of the time in which the network waited, 0-1."""
        return self.waiting_s / self.seconds if self.seconds else 0.0


class Sink(Protocol):
    """Takes final parts of a slide's maps, in bands from the top and, in a band, from left to right."""

    def write(self, y: int, x: int, ids: NDArray[np.uint8], probabilities: NDArray[np.uint8] | None) -> None:
        """Take a part.

        Args:
            y, x: its top left corner, view px.
            ids: (h, w) uint8 class ids; 255 where no tile was.
            probabilities: (L, h, w) uint8, 255 for 1; 0 where no tile was; or None if they are not wanted.
        """

    def end_band(self, y: int, bottom: int) -> None:
        """Rows y to bottom are complete; parts of them that were not written are not looked at."""


class MaskFile:
    """A class mask in a raw file, read by rows: no more of it is in memory than what is being looked at.

    A memory map would count as memory of the process as it is read. Values are kept inverted, so that what is never
    written reads as 255, not looked at, and takes no room on the disk. Several threads may read.

    Args:
        path: local file; made if it is not there.
        height, width: px.
        first: row of the slide that is its row 0.
    """

    dtype = np.dtype(np.uint8)
    ndim = 2

    def __init__(self, path: Path, height: int, width: int, first: int = 0) -> None:
        self.path, self.shape, self.size, self.first = path, (height, width), height * width, first
        self._file = path.open("r+b" if path.exists() else "w+b")
        self._file.truncate(self.size)

    def write(self, y: int, x: int, ids: NDArray[np.uint8], probabilities: NDArray[np.uint8] | None = None) -> None:
        """Write a part, see `Sink`; y is a row of the slide."""
        inverted = ~ids
        for row, values in enumerate(inverted, y - self.first):
            self._file.seek(row * self.shape[1] + x)
            self._file.write(values.tobytes())

    def end_band(self, y: int, bottom: int) -> None:
        """See `Sink`."""

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | int | np.integer) -> NDArray[np.uint8]:
        """Rows as an array: (n, width) of a slice without steps, (width,) of a number."""
        single = not isinstance(rows, slice)
        start, stop = (int(rows), int(rows) + 1) if not isinstance(rows, slice) else rows.indices(self.shape[0])[:2]
        self._file.flush()
        data = os.pread(self._file.fileno(), max(0, stop - start) * self.shape[1], start * self.shape[1])
        values = ~np.frombuffer(data, np.uint8).reshape(-1, self.shape[1])
        return values[0] if single else values

    def close(self) -> None:
        """Close the file, which stays."""
        self._file.close()


class Stitcher:
    """A network that maps slides.

    Args:
        predictor: the network; its tile, stride, symmetries and scales.
        n_classes: L.
        background_id: written where there is no tissue.
        readers: threads that read ahead.
        background: which pixels inside the tissue are glass; None: none.
    """

    def __init__(
        self,
        predictor: Predictor,
        n_classes: int,
        background_id: int,
        readers: int = 2,
        background: BackgroundRule | None = None,
    ) -> None:
        self.predictor, self.n_classes, self.background_id = predictor, n_classes, background_id
        self.readers, self.background = readers, background
        self._given_back = time.monotonic()

    def run(
        self,
        view: SlideView,
        plan: TilePlan,
        tissue: NDArray[np.bool_],
        sink: Sink,
        *,
        bands: range | None = None,
        probabilities: bool = False,
        on_tiles: Callable[[int], None] | None = None,
    ) -> Work:
        """Map a slide, or some of its bands.

        What a pixel becomes depends neither on the bands nor on which of them are asked for: of the band above the
        first one, the tiles are computed again where it reaches into it. How the slide is cut into super-tiles decides
        only where a rule for glass has a smallest area of more than MAX_MARGIN px.

        Args:
            view: of the slide at the network's pixel size.
            plan: its tiles.
            tissue: (h, w) bool over the whole view.
            sink: takes the maps.
            bands: numbers of the bands wanted, one after the other; all by default.
            probabilities: whether the sink gets them.
            on_tiles: told how many tiles were just done.
        Returns:
            What it took.
        Raises:
            PistoSegError: a part of the slide cannot be read.
        """
        bands = range(len(plan.bands)) if bands is None else bands
        began = time.monotonic()
        start = next((item.index for item in plan.bands if item.y + item.height > plan.bands[bands.start].y), 0)
        chosen = plan.bands[start : bands.stop]
        super_tiles = [list(plan.super_tiles(band)) for band in chosen]
        canvas = _Canvas(view, tissue, sink, self.n_classes, self.background_id, probabilities)
        todo = [item for items in super_tiles for item in items]
        with _ReadAhead(view, todo, self.readers, self.background) as reads:
            deepest = max(band.y + band.height - band.final for band in plan.bands)
            planes = self.n_classes + (1 if self.background is None else 2)
            carry = torch.zeros(planes, deepest, plan.width, device=self.predictor.device)
            for band, items in zip(chosen, super_tiles, strict=True):
                wanted = canvas if band.index >= bands.start else None
                self._band(band, items, carry, reads, plan, wanted, on_tiles)
                if wanted:
                    sink.end_band(band.y, band.final)
                if time.monotonic() - self._given_back > GIVE_BACK_S:
                    give_back()
                    self._given_back = time.monotonic()
        tiles = sum(len(item.tiles) for items in super_tiles for item in items)
        return Work(tiles, time.monotonic() - began, reads.waited_s)

    def _band(
        self,
        band: Band,
        super_tiles: list[SuperTile],
        carry: Tensor,
        reads: _ReadAhead,
        plan: TilePlan,
        canvas: _Canvas | None,
        on_tiles: Callable[[int], None] | None,
    ) -> None:
        """One band, from left to right.

        Args:
            band: which.
            super_tiles: of it.
            carry: (planes, rows, width) sums of the band above in the first rows of this one: of L classes, weights,
                and, where there is a rule for glass, not 0 where it is; those of this band for the next one take
                their place.
            reads: the pixels.
            plan: of the slide.
            canvas: takes what is final; None: nothing is wanted of this band but its sums in the next one.
            on_tiles: told of finished tiles.
        """
        final = band.final - band.y
        above, below = min(carry.shape[1], band.height), band.height - final
        spill = carry.new_zeros(len(carry), band.height, 0)
        for left, stop, item in _pieces(super_tiles, plan.width):
            inherited = carry[:, :above, left:stop]
            if item is None and not inherited[self.n_classes].any():
                carry[:, :, left:stop] = 0  # glass beside the tiles of the band above
                continue  # what no tile touches
            right = stop if item is None else max(stop, min(item.x + item.width, plan.width))
            sums = carry.new_zeros(len(carry), band.height, right - left)
            sums[:, :, : spill.shape[2]] = spill
            sums[:, :above, : stop - left] += inherited
            if item is not None:
                self._add(sums, (band.y, left), item, reads.next(), plan, on_tiles)
            if canvas:
                canvas.draw(band.y, left, sums[:, :final, : stop - left])
            carry[:, :, left:stop] = 0
            carry[:, :below, left:stop] = sums[:, final:, : stop - left]
            spill = sums[:, :, stop - left :].clone()

    def _add(
        self,
        sums: Tensor,
        corner: tuple[int, int],
        item: SuperTile,
        read: _Read,
        plan: TilePlan,
        on_tiles: Callable[[int], None] | None,
    ) -> None:
        """Add the tiles of a super-tile to sums whose top left corner is at `corner`, (y, x) in view px."""
        weights, side = self.predictor.tile_weights(), plan.tile
        source = torch.from_numpy(read.pixels).to(self.predictor.device)
        if read.glass is not None:
            height, width = read.glass.shape
            top, left = item.y - corner[0], item.x - corner[1]
            glass = torch.from_numpy(read.glass).to(self.predictor.device)
            sums[-1, top : top + height, left : left + width].masked_fill_(glass, 1)
        together = max(1, self.predictor.batch_size // self.predictor.symmetries)
        for start in range(0, len(item.tiles), together):
            chosen = item.tiles[start : start + together].tolist()
            tiles = [source[y - item.y : y - item.y + side, x - item.x : x - item.x + side] for x, y in chosen]
            maps = self.predictor.tile_probabilities(torch.stack(tiles))
            for (x, y), value in zip(chosen, maps, strict=True):
                rows, columns = min(side, plan.height - y), min(side, plan.width - x)
                top, left = y - corner[0], x - corner[1]
                place, weight = sums[:, top : top + rows, left : left + columns], weights[:rows, :columns]
                place[: self.n_classes].addcmul_(value[:, :rows, :columns], weight)
                place[self.n_classes] += weight
            if on_tiles:
                on_tiles(len(chosen))


class _Canvas:
    """Turns final sums into class ids and probabilities, without tissue where there is none."""

    def __init__(
        self,
        view: SlideView,
        tissue: NDArray[np.bool_],
        sink: Sink,
        n_classes: int,
        background_id: int,
        probabilities: bool,
    ) -> None:
        self.shape, self.sink, self.n_classes = (view.height, view.width), sink, n_classes
        self.tissue, self.probabilities = tissue.astype(np.float32), probabilities
        self.without_tissue, self.unseen = (torch.tensor(value, dtype=torch.uint8) for value in (background_id, 255))

    def draw(self, y: int, x: int, sums: Tensor) -> None:
        """Hand (planes, h, w) sums at view px (x, y) over to the sink."""
        scores, weight, glass = sums[: self.n_classes], sums[self.n_classes], sums[self.n_classes + 1 :]
        seen = weight > 0
        tissue = torch.from_numpy(self._tissue(y, x, *weight.shape)).to(weight.device) & ~(glass > 0).any(0)
        ids = torch.where(seen, torch.where(tissue, likeliest(scores), self.without_tissue), self.unseen)
        maps = None
        if self.probabilities:
            shares = (scores / weight.clamp(min=1e-30) * 255).round().to(torch.uint8)
            maps = (shares * (tissue & seen)).cpu().numpy()
        self.sink.write(y, x, ids.cpu().numpy(), maps)

    def _tissue(self, y: int, x: int, height: int, width: int) -> NDArray[np.bool_]:
        """The tissue mask at the view's resolution, interpolated between its pixels' centres."""
        rows, row_share = _between(y, height, self.shape[0], self.tissue.shape[0])
        columns, column_share = _between(x, width, self.shape[1], self.tissue.shape[1])
        below = np.minimum(rows + 1, self.tissue.shape[0] - 1)
        lines = self.tissue[rows] * (1 - row_share[:, None]) + self.tissue[below] * row_share[:, None]
        beside = np.minimum(columns + 1, self.tissue.shape[1] - 1)
        values = lines[:, columns] * (1 - column_share) + lines[:, beside] * column_share
        return np.asarray(values >= 0.5)


def _between(start: int, count: int, size: int, cells: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """For px start.. of a side of `size` px: the cell whose centre comes before, and how far it is to the next one."""
    place = np.clip((np.arange(start, start + count) + 0.5) * cells / size - 0.5, 0, cells - 1)
    cell = place.astype(np.int64)
    return cell, (place - cell).astype(np.float32)


def _pieces(super_tiles: list[SuperTile], width: int) -> Iterator[tuple[int, int, SuperTile | None]]:
    """First column and end of the parts of a band that are final one after the other, each with its super-tile."""
    cursor = 0
    for number, item in enumerate(super_tiles):
        yield from _gap(cursor, item.x)
        following = super_tiles[number + 1].x if number + 1 < len(super_tiles) else width
        cursor = min(item.x + item.width, following, width)
        yield item.x, cursor, item
    yield from _gap(cursor, width)


def _gap(start: int, stop: int) -> Iterator[tuple[int, int, None]]:
    for left in range(start, stop, SUPER_TILE):
        yield left, min(left + SUPER_TILE, stop), None


class _Read(NamedTuple):
    """A super-tile.

    Args:
        pixels: (height, width, 3) uint8.
        glass: bool of those of its pixels that are in the view, so of its size at the most; None: it is not looked for.
    """

    pixels: NDArray[np.uint8]
    glass: NDArray[np.bool_] | None


class _ReadAhead:
    """Pixels of super-tiles in their order, read by threads while the network works on earlier ones.

    Args:
        view: of the slide.
        super_tiles: to read.
        readers: threads; one more super-tile than there are threads is held.
        background: which pixels are glass; None: it is not looked for.
    """

    def __init__(
        self, view: SlideView, super_tiles: list[SuperTile], readers: int, background: BackgroundRule | None
    ) -> None:
        self._view, self._todo, self._background = view, deque(super_tiles), background
        self._margin = min(background.min_area, MAX_MARGIN) if background else 0
        self._pool = ThreadPoolExecutor(readers, thread_name_prefix="slide-reader")
        self._running: deque[Future[_Read]] = deque()
        self._ahead = readers + 1
        self.waited_s = 0.0

    def __enter__(self) -> _ReadAhead:
        self._fill()
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def next(self) -> _Read:
        """The next super-tile."""
        began = time.monotonic()
        read = self._running.popleft().result()
        self.waited_s += time.monotonic() - began
        self._fill()
        return read

    def _fill(self) -> None:
        while self._todo and len(self._running) < self._ahead:
            self._running.append(self._pool.submit(self._read, self._todo.popleft()))

    def _read(self, item: SuperTile) -> _Read:
        """A super-tile; where the slide ends before it, its edge is mirrored as in any small image.

        With the margin around it, every bright component that reaches into it is measured whole, or is large enough by
        what is seen of it, so that all super-tiles find the same glass. With a rule of more than MAX_MARGIN px, one may
        miss the end of a slit that leads out of it.
        """
        left, top = max(0, item.x - self._margin), max(0, item.y - self._margin)
        right = min(item.x + item.width + self._margin, self._view.width)
        bottom = min(item.y + item.height + self._margin, self._view.height)
        around = self._view.read(left, top, right - left, bottom - top)
        inside = slice(item.y - top, item.y - top + item.height), slice(item.x - left, item.x - left + item.width)
        pixels = cut_tile(around[inside], (0, 0), (item.height, item.width))
        return _Read(pixels, self._background(around)[inside] if self._background else None)
