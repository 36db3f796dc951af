"""The single-tissue images, decoded once and packed into flat arrays that processes can share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from pistoseg.errors import PistoSegError

BACKGROUND = 255
"""Fourth byte of a background pixel in a bank; a tissue pixel has its class id there."""

Background = Callable[[NDArray[np.uint8]], NDArray[np.bool_]]


@dataclass(frozen=True)
class TissueBank:
    """n single-tissue images of sizes of their own.

    A pixel is four bytes, RGB and tissue: cutting crops out moves image and mask together, and four-channel pixels
    are warped faster than three-channel ones.

    Args:
        pixels: (P, 4) uint8, the images' pixels in raster order, one image after the other: R, G, B, and the class id
            or `BACKGROUND`.
        offsets: (n,) int64, first pixel of each image.
        shapes: (n, 2) int32, height and width in px.
        labels: (n,) uint8 class id of each image.
        crop: height and width that every image has at least (px); smaller ones were padded by reflection.
        rejected: (P,) bool, true where a crop with this pixel as its top left corner is mostly background; None until
            `with_rejection`.
        rejection: the (H_p, W_p, threshold) that `rejected` was made for.
        padded: images that were smaller than `crop` and were padded.
        left_out: of each class, images smaller than half of `crop`, which padding would turn into a kaleidoscope: not
            in the bank.
    """

    pixels: NDArray[np.uint8]
    offsets: NDArray[np.int64]
    shapes: NDArray[np.int32]
    labels: NDArray[np.uint8]
    has_background: bool = False
    crop: tuple[int, int] = (1, 1)
    rejected: NDArray[np.bool_] | None = None
    rejection: tuple[int, int, float] | None = None
    padded: int = 0
    left_out: tuple[int, ...] = ()
    _runs: dict[int, NDArray[np.void]] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def from_images(
        cls,
        images: Iterable[tuple[NDArray[np.uint8], int]],
        n_classes: int,
        background: Background | None = None,
        *,
        crop: tuple[int, int] = (1, 1),
    ) -> TissueBank:
        """Pack images, one at a time: peak memory is little more than the bank's own.

        Args:
            images: (h, w, 3) uint8 RGB and its class id.
            n_classes: L; class ids are 0..L-1.
            background: gives an image's (h, w) bool mask of tissue-free pixels; None: all is tissue.
            crop: H_p and W_p. An image smaller than this is padded by reflection; one smaller than half of it is
                left out and counted in `left_out`.
        Raises:
            PistoSegError: no image is left.
        """
        pixels = bytearray()
        shapes: list[tuple[int, int]] = []
        labels: list[int] = []
        padded, left_out = 0, [0] * n_classes
        for image, label in images:
            if not 0 <= label < n_classes:
                raise ValueError(f"class id {label} is not in 0..{n_classes - 1}")
            height, width = image.shape[:2]
            if too_small(height, width, crop):
                left_out[label] += 1
                continue
            packed = _pack(image, label, background)
            down, right = max(0, crop[0] - height), max(0, crop[1] - width)
            if down or right:
                padded += 1
                packed = cv2.copyMakeBorder(packed, 0, down, 0, right, cv2.BORDER_REFLECT_101)
            pixels += packed.data.cast("B")
            shapes.append((packed.shape[0], packed.shape[1]))
            labels.append(label)
        if not labels:
            raise PistoSegError(
                f"no single-tissue image of at least half of {crop[0]}x{crop[1]} px ({sum(left_out)} are smaller)",
                remedy="add images or windows that show one tissue alone, or make synthesis.crop_height and "
                "synthesis.crop_width smaller",
            )
        sizes = np.array(shapes, np.int32)
        areas = sizes.prod(axis=1, dtype=np.int64)
        return cls(
            pixels=np.frombuffer(pixels, np.uint8).reshape(-1, 4),
            offsets=np.cumsum(areas) - areas,
            shapes=sizes,
            labels=np.array(labels, np.uint8),
            has_background=background is not None,
            crop=crop,
            padded=padded,
            left_out=tuple(left_out),
        )

    def packed(self, i: int) -> NDArray[np.uint8]:
        """Image i with its tissue: (h, w, 4) uint8 view."""
        height, width = self.shapes[i].tolist()
        start = int(self.offsets[i])
        return self.pixels[start : start + height * width].reshape(height, width, 4)

    def image(self, i: int) -> NDArray[np.uint8]:
        """Image i: (h, w, 3) uint8 RGB view."""
        return self.packed(i)[..., :3]

    def mask(self, i: int, background_id: int) -> NDArray[np.uint8]:
        """Mask of image i: (h, w) uint8, its class id where there is tissue and background_id elsewhere."""
        return tissue_mask(self.packed(i), background_id)

    def runs(self, width: int) -> NDArray[np.void]:
        """Every run of `width` successive pixels as one item, (P - width + 1,): item k starts at pixel k.

        Indexing this with the pixels at which the rows of crops start copies whole rows at once.
        """
        if width not in self._runs:
            n = len(self.pixels) - width + 1
            self._runs[width] = np.ndarray((n,), f"V{4 * width}", buffer=self.pixels, strides=(4,))
        return self._runs[width]

    def with_rejection(self, height: int, width: int, threshold: float) -> TissueBank:
        """This bank, knowing which crops have a larger share of background than the threshold.

        The pixels are shared with the original. Do it before `arrays`, so that processes share the result as well.
        Where nothing can be rejected this is the bank itself.

        Args:
            height: H_p (px).
            width: W_p (px).
            threshold: share of background, 0-1.
        """
        if not self.has_background or threshold >= 1 or self.rejection == (height, width, threshold):
            return self
        rejected = np.zeros(len(self.pixels), bool)
        for i in range(len(self)):
            packed = self.packed(i)
            background = (packed[..., 3] == BACKGROUND).astype(np.uint8)
            total = cv2.integral(background, sdepth=cv2.CV_32S)
            inside = total[height:, width:] - total[:-height, width:] - total[height:, :-width]
            inside += total[:-height, :-width]
            start = int(self.offsets[i])
            places = rejected[start : start + background.size].reshape(background.shape)
            places[: inside.shape[0], : inside.shape[1]] = inside > threshold * height * width
        return replace(self, rejected=rejected, rejection=(height, width, threshold))

    def arrays(self) -> dict[str, NDArray]:
        """The bank as arrays alone, for an object store; `from_arrays` takes them back without a copy."""
        counts = [self.has_background, *self.crop, self.padded, *self.left_out]
        shared: dict[str, NDArray] = {
            "pixels": self.pixels,
            "offsets": self.offsets,
            "shapes": self.shapes,
            "labels": self.labels,
            "counts": np.array(counts, np.int64),
        }
        if self.rejected is not None and self.rejection is not None:
            shared |= {"rejected": self.rejected, "rejection": np.array(self.rejection, np.float64)}
        return shared

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray]) -> TissueBank:
        """A bank on the (maybe read-only) arrays of another one."""
        has_background, crop_height, crop_width, padded, *left_out = arrays["counts"].tolist()
        rejection = arrays.get("rejection")
        return cls(
            pixels=arrays["pixels"],
            offsets=arrays["offsets"],
            shapes=arrays["shapes"],
            labels=arrays["labels"],
            has_background=bool(has_background),
            crop=(crop_height, crop_width),
            rejected=arrays.get("rejected"),
            rejection=None if rejection is None else (int(rejection[0]), int(rejection[1]), float(rejection[2])),
            padded=padded,
            left_out=tuple(left_out),
        )

    def __reduce__(self) -> tuple[object, ...]:
        # The cached views would be pickled as copies of the pixels.
        return (TissueBank.from_arrays, (self.arrays(),))


def too_small(height: int, width: int, crop: tuple[int, int]) -> bool:
    """Whether an image (px) is smaller than half of a crop of height x width, and so of no use for it."""
    return 2 * height < crop[0] or 2 * width < crop[1]


def tissue_mask(packed: NDArray[np.uint8], background_id: int) -> NDArray[np.uint8]:
    """Mask of RGB-and-tissue pixels.

    Args:
        packed: (h, w, 4) uint8 as in a bank.
        background_id: what a mask has where there is no tissue.
    Returns:
        (h, w) uint8.
    """
    mask = packed[..., 3].copy()
    if background_id != BACKGROUND:
        mask[mask == BACKGROUND] = background_id
    return mask


def _pack(image: NDArray[np.uint8], label: int, background: Background | None) -> NDArray[np.uint8]:
    packed = np.empty((*image.shape[:2], 4), np.uint8)
    packed[..., :3] = image
    packed[..., 3] = label
    if background is not None:
        packed[background(image), 3] = BACKGROUND
    return packed
