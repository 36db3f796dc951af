"""Images with their true masks, as the `validation` stage keeps them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pistoseg import parquet, storage
from pistoseg.patches.decode import decode_ids, decode_png

FOLDER = "images"


@dataclass(frozen=True)
class MaskedImage:
    """An image and its mask at its own pixel size.

    Args:
        name: relative to the data set.
        image: (H, W, 3) uint8 RGB.
        mask: (H, W) uint8 class ids; background and `IGNORE_ID` are not scored.
    """

    name: str
    image: NDArray[np.uint8]
    mask: NDArray[np.uint8]


class MaskedImages:
    """The images of a `validation` artifact; encoded bytes are held, pixels are made on demand."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self._rows = rows

    @classmethod
    def open(cls, uri: str) -> MaskedImages:
        """Read an artifact's folder; it may hold no images."""
        folder = storage.join(uri, FOLDER)
        return cls(parquet.read(folder).to_pylist() if storage.list_dir(folder) else [])

    def __len__(self) -> int:
        return len(self._rows)

    def shard(self, rank: int, world: int) -> MaskedImages:
        """Every world-th image, from the rank-th on."""
        return MaskedImages(self._rows[rank::world])

    def __getitem__(self, position: int) -> MaskedImage:
        row = self._rows[position]
        return MaskedImage(row["name"], decode_png(row["image"]), decode_ids(row["mask"]))

    def __iter__(self) -> Iterator[MaskedImage]:
        return (self[position] for position in range(len(self)))
