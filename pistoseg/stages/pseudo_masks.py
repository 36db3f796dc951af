"""Pseudo-masks: what the preliminary model sees in the real training images, held against their image-level labels."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pistoseg import storage
from pistoseg.classes import IGNORE_ID
from pistoseg.config import Config
from pistoseg.models import bundle
from pistoseg.outputs.pictures import Panel, sheet
from pistoseg.patches.background import background_mask
from pistoseg.patches.decode import encode_mask
from pistoseg.patches.store import PatchSet
from pistoseg.pipeline import StageContext
from pistoseg.stages import cluster

SHARD_PIXELS = 16 << 20
PICTURES = 12
SCHEMA = pa.schema(
    [
        ("image", pa.int64()),
        ("name", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("grid_height", pa.int32()),
        ("grid_width", pa.int32()),
        ("logits", pa.binary()),
        ("png", pa.binary()),
    ]
)


def run(context: StageContext) -> dict[str, Any]:
    """Write `masks/`: per training image its logits on a grid and its pseudo-mask.

    Columns: `image` id, `name`, `height`, `width` (network px), `grid_height`, `grid_width`, `logits` (float16 of shape
    (L, grid_height, grid_width), C order) and `png`, the mask (class ids; background; 255 where no label allows any).
    """
    config = context.config
    patches = context.inputs["patches"]
    table = PatchSet.open(patches.uri).table
    actors, resources = cluster.network_pool(config.compute)
    cluster.run_shards(
        _Predict,
        {
            "config": config,
            "patches": patches.uri,
            "model": context.inputs["model"].path("bundle"),
            "threads": cluster.node_threads(),
        },
        _shards(table),
        context.path("masks"),
        actors=actors,
        resources=resources,
        progress=context.progress,
    )
    storage.write_bytes(context.path("pseudo_masks.png"), _picture(context))
    shares = _shares(context)
    return {"images": table.num_rows, "shares": shares, "pictures": ["pseudo_masks.png"]}


def _shards(table: pa.Table) -> list[list[int]]:
    """Positions of images, in groups of about SHARD_PIXELS px."""
    shards: list[list[int]] = [[]]
    pixels = 0
    for position, (height, width) in enumerate(
        zip(table["height"].to_pylist(), table["width"].to_pylist(), strict=True)
    ):
        if shards[-1] and pixels + height * width > SHARD_PIXELS:
            shards.append([])
            pixels = 0
        shards[-1].append(position)
        pixels += height * width
    return shards


class _Predict:
    def __init__(self, config: Config, patches: str, model: str, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.settings, self.data, self.classes = config.pseudo_masks, config.data, config.classes.tissue()
        device = None if config.compute.device == "auto" else config.compute.device
        settings = config.pseudo_masks
        self.predictor = bundle.load(model, device).predictor(
            tile=settings.patch_size,
            stride=settings.stride or settings.patch_size // 2,
            symmetries=settings.symmetries,
            scales=(1.0,),
            window="gaussian",
            batch_size=settings.batch_size,
            average="logits",
        )
        self.patches = PatchSet.open(patches)

    def __call__(self, number: int, shard: list[int], part: str) -> None:
        images = [self.patches.image(position) for position in shard]
        rows = [
            self._row(position, image, logits)
            for position, image, logits in zip(shard, images, self.predictor.logits_many(images), strict=True)
        ]
        storage.write_parquet(pa.Table.from_pylist(rows, SCHEMA), part, row_group_size=64)

    def _row(self, position: int, image: NDArray[np.uint8], logits: NDArray[np.float32]) -> dict[str, Any]:
        height, width = image.shape[:2]
        cells = self.settings.grid / self.settings.patch_size
        grid = (max(1, round(height * cells)), max(1, round(width * cells)))
        kept = np.stack([cv2.resize(plane, grid[::-1], interpolation=cv2.INTER_AREA) for plane in logits])
        kept = kept.astype(np.float16)
        allowed = self.patches.allowed(position) if self.settings.constrain else None
        mask = pseudo_mask(kept.astype(np.float32), (height, width), allowed)
        if self.data.background == "bright":
            bright = background_mask(image, self.data.background_grey, self.data.background_min_area)
            mask[bright] = self.classes.background_id
        return {
            "image": self.patches.table["image"][position].as_py(),
            "name": self.patches.table["name"][position].as_py(),
            "height": height,
            "width": width,
            "grid_height": grid[0],
            "grid_width": grid[1],
            "logits": kept.tobytes(),
            "png": encode_mask(mask, self.classes),
        }


def pseudo_mask(
    logits: NDArray[np.float32], size: tuple[int, int], allowed: NDArray[np.bool_] | None
) -> NDArray[np.uint8]:
    """The likeliest class of every pixel among those that the image-level labels allow.

    Args:
        logits: (L, h, w) float32 on a grid; brought to full size bilinearly.
        size: (H, W) of the image.
        allowed: (L, H, W) bool, or None for no constraint; a pixel without any allowed class becomes `IGNORE_ID`.
    Returns:
        (H, W) uint8 class ids.
    """
    full = np.stack([cv2.resize(plane, size[::-1], interpolation=cv2.INTER_LINEAR) for plane in logits])
    if allowed is None:
        return full.argmax(0).astype(np.uint8)
    full[~allowed] = -np.inf
    mask = full.argmax(0).astype(np.uint8)
    mask[~allowed.any(0)] = IGNORE_ID
    return mask


def _shares(context: StageContext) -> dict[str, float]:
    from pistoseg.patches.decode import decode_ids

    classes = context.config.classes.tissue()
    counts = np.zeros(256, np.int64)
    for part in storage.list_dir(context.path("masks")):
        for png in storage.read_parquet(part, columns=["png"])["png"].to_pylist():
            counts += np.bincount(decode_ids(png).ravel(), minlength=256)
    names = [*enumerate(classes.names), (classes.background_id, "background"), (IGNORE_ID, "ignored")]
    return {name: round(float(counts[value] / counts.sum()), 4) for value, name in names}


def _picture(context: StageContext) -> bytes:
    """Training images beside their pseudo-masks, spread over the data set, those with several tissues first."""
    from pistoseg.patches.decode import decode_ids, encode_png

    classes = context.config.classes.tissue()
    patches = PatchSet.open(context.inputs["patches"].uri)
    masks = storage.read_parquet(context.path("masks"), columns=["name", "png"])
    mixed = [position for position in range(len(patches)) if patches.allowed(position).any((1, 2)).sum() > 1]
    chosen = mixed or list(range(len(patches)))
    chosen = [chosen[round(place)] for place in np.linspace(0, len(chosen) - 1, min(PICTURES, len(chosen)))]
    rows = [
        [
            Panel(masks["name"][position].as_py(), patches.image(position)),
            Panel("pseudo-mask", patches.image(position), decode_ids(masks["png"][position].as_py())),
        ]
        for position in chosen
    ]
    return encode_png(sheet(rows, classes))
