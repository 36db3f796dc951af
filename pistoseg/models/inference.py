"""The one tiling and stitching: a network over images of any size, by overlapping tiles, symmetries and scales."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from pistoseg.models.segmentation import Normalization
from pistoseg.models.tiling import MULTIPLE, cut_tile, turn, turn_back, unzoomed, zoomed
from pistoseg.pixels import resize_image, tile_starts

Image = NDArray[np.uint8]
Maps = NDArray[np.float32]
Result = TypeVar("Result")

SYMMETRIES = {
    1: [(0, False)],
    2: [(0, False), (0, True)],
    8: [(turn, flip) for turn in range(4) for flip in (False, True)],
}
"""Quarter turns and horizontal flips that are averaged, by their number."""


def resolve_device(device: str | torch.device | None = None) -> torch.device:
    """The device of a name; `auto` and None mean CUDA where there is one, else the CPU."""
    if device is None or device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def resolve_precision(precision: str, device: torch.device) -> str:
    """`bf16` or `fp32` for `auto`: bf16 autocast where the device's hardware computes in it."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp32"
    # oneDNN "supports" bf16 on any AVX512 and takes twice as long as in fp32 where there are no instructions for it.
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return "bf16" if any(has for name, has in capabilities.items() if name.endswith("bf16")) else "fp32"


def window_weights(height: int, width: int, kind: str) -> Tensor:
    """Weight of a tile's pixels where tiles overlap.

    Args:
        height, width: of the tile (px).
        kind: `mean` for equal weights; `gaussian` for a bell of sigma 1/8 of each side, whose peak is 1 and whose
            values that vanish in float32 are raised to the smallest one left.
    Returns:
        (height, width) float32, positive.
    """
    if kind == "mean":
        return torch.ones(height, width)
    if kind != "gaussian":
        raise ValueError(f"unknown window {kind!r}; use mean or gaussian")
    weights = _bell(height).unsqueeze(1) * _bell(width)
    return weights.clamp(min=float(weights[weights > 0].min()))


def _bell(size: int) -> Tensor:
    offset = (torch.arange(size, dtype=torch.float32) - (size - 1) / 2) / (size / 8)
    bell = torch.exp(-0.5 * offset**2)
    return bell / bell.max()


def likeliest(maps: Tensor) -> Tensor:
    """The class of the highest value of (L, h, w) maps, the first of equals: (h, w) uint8."""
    return maps.max(0).indices.to(torch.uint8)  # on CPUs some 20 times as fast as `argmax` over the first dimension


def resize_maps(maps: Tensor, height: int, width: int) -> Tensor:
    """Bilinear resize of (L, h, w) float maps to (L, height, width), with antialiasing when it shrinks."""
    size = (height, width)
    return F.interpolate(maps.unsqueeze(0), size=size, mode="bilinear", antialias=True, align_corners=False)[0]


@dataclass
class _Output:
    """The maps of one image, at its own size, summed over the scales that are finished."""

    index: int
    size: tuple[int, int]
    total: Tensor | float = 0.0
    scales: int = 0


@dataclass
class _Job:
    """One image at one scale: its tiles as they come in, weighted and summed."""

    output: _Output
    image: Image
    tile: tuple[int, int]
    origins: list[tuple[int, int]]
    companion: Maps | None = None
    total: Tensor | None = None
    weight: Tensor | None = None
    done: int = 0


class Predictor:
    """A network that segments images of any size.

    An image smaller than a tile is one smaller tile, padded to a multiple of 32 px. Tiles of several images share a
    forward pass.

    Args:
        model: (N, 3, H, W) float -> (N, L, H, W) logits; with companions, (N, K, H, W) float is its second argument.
            It is moved to the device; its training mode is given back.
        normalization: of the model's input.
        tile: height and width of a tile (network px).
        stride: step between tiles (network px).
        symmetries: averaged over: 1 for none, 2 for the horizontal flip, 8 for flips and quarter turns (D4).
        scales: zoom factors of the image; maps are averaged over them at the image's own size.
        window: weight in overlaps, `gaussian` or `mean`.
        device: `auto` or None, `cpu`, `cuda`, `cuda:1`...
        precision: `fp32`, `bf16`, or `auto` for bf16 where the device computes in it.
        batch_size: images in a forward pass; symmetric copies count.
        average: what tiles and symmetries average before the scales do: `probabilities` or `logits`.
    """

    def __init__(
        self,
        model: nn.Module,
        normalization: Normalization,
        *,
        tile: int = 224,
        stride: int = 112,
        symmetries: int = 1,
        scales: Sequence[float] = (1.0,),
        window: str = "gaussian",
        device: str | torch.device | None = None,
        precision: str = "auto",
        batch_size: int = 8,
        average: str = "probabilities",
    ) -> None:
        if symmetries not in SYMMETRIES:
            raise ValueError(f"symmetries is {symmetries}; use 1, 2 or 8")
        if not 0 < stride <= tile:
            raise ValueError(f"stride is {stride}; it must be positive and at most tile ({tile})")
        if not scales or min(scales) <= 0:
            raise ValueError(f"scales are {tuple(scales)}; give at least one positive factor")
        if average not in ("probabilities", "logits"):
            raise ValueError(f"unknown average {average!r}; use probabilities or logits")
        window_weights(1, 1, window)
        self.device = resolve_device(device)
        self.model = model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.normalization = normalization
        self.tile, self.stride = tile, stride
        self.symmetries, self.scales, self.window = symmetries, tuple(scales), window
        self.batch_size, self.average = batch_size, average
        self.bf16 = resolve_precision(precision, self.device) == "bf16"
        self._weights: dict[tuple[int, int], Tensor] = {}

    def logits(self, image: Image, factor: float = 1.0) -> Maps:
        """Class logits of one image, averaged over tiles, symmetries and scales.

        Args:
            image: (H, W, 3) uint8.
            factor: network px per image px; the image is resized by it and the maps are brought back.
        Returns:
            (L, H, W) float32.
        """
        return self.logits_many([image], factor)[0]

    def probabilities(self, image: Image, factor: float = 1.0) -> Maps:
        """Class probabilities of one image, (L, H, W) float32 that sum to 1 over classes; arguments as in `logits`."""
        return self.probabilities_many([image], factor)[0]

    def predict(self, image: Image, factor: float = 1.0) -> NDArray[np.uint8]:
        """The likeliest class of every pixel, (H, W) uint8 in 0..L-1; arguments as in `logits`."""
        return self.predict_many([image], factor)[0]

    def logits_many(
        self, images: Sequence[Image], factor: float = 1.0, companions: Sequence[Maps] | None = None
    ) -> list[Maps]:
        """`logits` of several images; their tiles share forward passes.

        Args:
            images: (H, W, 3) uint8 each.
            factor: as in `logits`.
            companions: (K, h, w) float32 maps for each image, of any h and w, that the model takes as its second
                argument. They are resized to the image at every scale, and cut, padded and turned as it is.
        Returns:
            (L, H, W) float32 each.
        """
        return self.logits_each(images, lambda _, maps: maps, factor, companions)

    def logits_each(
        self,
        images: Sequence[Image],
        finish: Callable[[int, Maps], Result],
        factor: float = 1.0,
        companions: Sequence[Maps] | None = None,
    ) -> list[Result]:
        """`logits_many` for who needs no image's maps any more once something is made of them: many together are large.

        Args:
            images, factor, companions: as in `logits_many`.
            finish: gets an image's number and its logits, (L, H, W) float32, as soon as its last tile is done.
        Returns:
            What `finish` made of each image.
        """
        return self._run(
            images,
            factor,
            softmax_tiles=False,
            softmax_scales=False,
            finish=lambda index, maps: finish(index, _to_numpy(maps)),
            companions=companions,
        )

    def probabilities_many(self, images: Sequence[Image], factor: float = 1.0) -> list[Maps]:
        """`probabilities` of several images; their tiles share forward passes."""
        return self._probable(images, factor, _to_numpy)

    def predict_many(self, images: Sequence[Image], factor: float = 1.0) -> list[NDArray[np.uint8]]:
        """`predict` of several images; their tiles share forward passes and only class ids are kept."""
        return self._probable(images, factor, _to_ids)

    def tiles(self, tiles: Tensor | NDArray[np.uint8], softmax: bool) -> Tensor:
        """Maps of a batch of equal tiles, averaged over the symmetries.

        Args:
            tiles: (N, h, w, 3) uint8, of any h and w.
            softmax: average probabilities instead of logits.
        Returns:
            (N, L, h, w) float32 on the device.
        """
        with self._inference():
            return self._symmetric(self.normalization(tiles, self.device), softmax)

    def tile_probabilities(self, tiles: Tensor | NDArray[np.uint8]) -> Tensor:
        """Class probabilities of equal tiles, averaged over scales and symmetries, for who stitches a slide of them.

        A tile is zoomed by itself: at a scale below 1 the network sees no more of what is around it.

        Args:
            tiles: (N, h, w, 3) uint8, of any h and w.
        Returns:
            (N, L, h, w) float32 on the device.
        """
        total: Tensor | None = None
        with self._inference():
            pixels = self.normalization(tiles, self.device)
            for scale in self.scales:
                maps = unzoomed(self._symmetric(zoomed(pixels, scale), softmax=True), pixels.shape[2:], scale)
                total = maps if total is None else maps + total
            assert total is not None
            return total if len(self.scales) == 1 else total / len(self.scales)

    def tile_weights(self) -> Tensor:
        """Weight of a tile's pixels where tiles overlap, (tile, tile) float32 on the device."""
        return self._window((self.tile, self.tile))

    def _probable(self, images: Sequence[Image], factor: float, finish: Callable[[Tensor], Result]) -> list[Result]:
        by_tile = self.average == "probabilities"
        return self._run(
            images, factor, softmax_tiles=by_tile, softmax_scales=not by_tile, finish=lambda _, maps: finish(maps)
        )

    def _run(
        self,
        images: Sequence[Image],
        factor: float,
        softmax_tiles: bool,
        softmax_scales: bool,
        finish: Callable[[int, Tensor], Result],
        companions: Sequence[Maps] | None = None,
    ) -> list[Result]:
        """Fill batches with tiles of one shape, whichever images they are from; finish an image with its last tile."""
        results: dict[int, Result] = {}
        waiting: dict[tuple[int, int], list[tuple[_Job, tuple[int, int]]]] = {}
        room = max(1, self.batch_size // self.symmetries)
        beside_images = [None] * len(images) if companions is None else companions

        def flush(shape: tuple[int, int]) -> None:
            batch = waiting.pop(shape)
            pixels = np.stack([cut_tile(job.image, origin, shape) for job, origin in batch])
            beside = [cut_tile(job.companion, origin, shape) for job, origin in batch if job.companion is not None]
            maps = torch.from_numpy(np.stack(beside)).permute(0, 3, 1, 2).to(self.device) if beside else None
            values = self._symmetric(self.normalization(pixels, self.device), softmax_tiles, maps)
            for (job, origin), value in zip(batch, values, strict=True):
                self._add(job, origin, value)
                if job.done == len(job.origins):
                    output = self._add_scale(job, softmax_scales)
                    if output.scales == len(self.scales):
                        assert isinstance(output.total, Tensor)
                        results[output.index] = finish(output.index, output.total / output.scales)

        with self._inference():
            for index, (image, maps) in enumerate(zip(images, beside_images, strict=True)):
                for job in self._jobs(index, _checked(image), factor, maps):
                    for origin in job.origins:
                        waiting.setdefault(job.tile, []).append((job, origin))
                        if len(waiting[job.tile]) == room:
                            flush(job.tile)
            for shape in list(waiting):
                flush(shape)
        return [results[index] for index in range(len(images))]

    def _jobs(self, index: int, image: Image, factor: float, companion: Maps | None) -> Iterator[_Job]:
        height, width = image.shape[:2]
        output = _Output(index, (height, width))
        for scale in self.scales:
            rows, columns = (max(1, round(side * factor * scale)) for side in (height, width))
            tile = (_tile_side(rows, self.tile), _tile_side(columns, self.tile))
            origins = [
                (y, x)
                for y in tile_starts(rows, tile[0], self.stride)
                for x in tile_starts(columns, tile[1], self.stride)
            ]
            yield _Job(output, resize_image(image, rows, columns), tile, origins, _beside(companion, rows, columns))

    def _add(self, job: _Job, origin: tuple[int, int], value: Tensor) -> None:
        """Add a tile's maps (L, h, w) to its image's, weighted; padding is cut off."""
        height, width = job.image.shape[:2]
        job.done += 1
        if len(job.origins) == 1:
            job.total = value[:, :height, :width]
            return
        if job.total is None or job.weight is None:
            job.total = torch.zeros(value.shape[0], height, width, device=self.device)
            job.weight = torch.zeros(height, width, device=self.device)
        y, x = origin
        rows, columns = min(job.tile[0], height - y), min(job.tile[1], width - x)
        weights = self._window(job.tile)[:rows, :columns]
        job.total[:, y : y + rows, x : x + columns].addcmul_(value[:, :rows, :columns], weights)
        job.weight[y : y + rows, x : x + columns] += weights

    def _add_scale(self, job: _Job, softmax: bool) -> _Output:
        """Add the maps of a finished scale to its image's, at the image's own size."""
        assert job.total is not None
        value = job.total if job.weight is None else job.total.div_(job.weight)
        job.total = job.weight = None
        if softmax:
            value = value.softmax(0)
        if value.shape[1:] != job.output.size:
            value = resize_maps(value, *job.output.size)
        job.output.total = value + job.output.total
        job.output.scales += 1
        return job.output

    def _window(self, shape: tuple[int, int]) -> Tensor:
        if shape not in self._weights:
            self._weights[shape] = window_weights(*shape, self.window).to(self.device)
        return self._weights[shape]

    def _symmetric(self, tiles: Tensor, softmax: bool, companions: Tensor | None = None) -> Tensor:
        """Maps (N, L, h, w) of normalised tiles (N, 3, h, w), averaged over the symmetries."""
        variants = SYMMETRIES[self.symmetries]
        if self.bf16 and companions is None:
            tiles = tiles.bfloat16()  # as autocast's first convolution would, but before they are turned
        if tiles.shape[2] != tiles.shape[3] and len(variants) > 1:
            groups = [[v for v in variants if v[0] % 2 == odd] for odd in (0, 1)]  # a quarter turn changes the shape
        else:
            groups = [variants]
        total: Tensor | float = 0.0
        for group in groups:
            together = max(1, self.batch_size // len(tiles))
            for chunk in (group[start : start + together] for start in range(0, len(group), together)):
                batch = torch.cat([turn(tiles, *variant) for variant in chunk])
                beside = None if companions is None else torch.cat([turn(companions, *variant) for variant in chunk])
                for variant, maps in zip(chunk, self._forward(batch, softmax, beside).chunk(len(chunk)), strict=True):
                    total = turn_back(maps, *variant) + total
        assert isinstance(total, Tensor)
        return total / len(variants)

    def _forward(self, batch: Tensor, softmax: bool, companions: Tensor | None) -> Tensor:
        batch = batch.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            logits = self.model(batch) if companions is None else self.model(batch, companions)
        return logits.float().softmax(1) if softmax else logits.float()

    @contextmanager
    def _inference(self) -> Iterator[None]:
        training = self.model.training
        self.model.eval()
        try:
            with torch.inference_mode():
                yield
        finally:
            self.model.train(training)


def _tile_side(size: int, tile: int) -> int:
    return tile if size >= tile else min(tile, math.ceil(size / MULTIPLE) * MULTIPLE)


def _beside(companion: Maps | None, rows: int, columns: int) -> Maps | None:
    """Companions (K, h, w) at the size of their image, (rows, columns, K) float32."""
    if companion is None:
        return None
    if companion.ndim != 3 or companion.dtype != np.float32 or 0 in companion.shape:
        raise ValueError(f"companions must be (K, h, w) float32, not {companion.shape} {companion.dtype}")
    maps: Maps = resize_maps(torch.from_numpy(companion), rows, columns).permute(1, 2, 0).numpy()
    return maps


def _checked(image: Image) -> Image:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
        raise ValueError(f"an image must be (H, W, 3) uint8, not {image.shape} {image.dtype}")
    return image


def _to_ids(maps: Tensor) -> NDArray[np.uint8]:
    result: NDArray[np.uint8] = likeliest(maps).cpu().numpy()
    return result


def _to_numpy(maps: Tensor) -> Maps:
    result: Maps = maps.cpu().numpy()
    return result
