"""What the three stages that draw masks on the real training images share: their Parquet, their rule, their picture.

Columns: `image` id, `name`, `height`, `width` (network px), `grid_height`, `grid_width`, and for each kind of mask
`scores` (float16 of shape (L, grid_height, grid_width), C order), `confidence` (uint8 of shape (grid_height,
grid_width): the winning class's share of the scores, 255 = all, 0 where no label allows any class) and `png`, the mask:
class ids; background; 255 where no label allows any class, or, without a constraint, no class has a score. Where the
labels allow several classes and none has a score, as outside of all CAMs, it is the first of them; the confidence, 1 by
their number, tells. The refined masks are of several kinds; their columns carry it: `png_cnn`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pistoseg import parquet, storage
from pistoseg.classes import IGNORE_ID, TissueClasses
from pistoseg.config import Config, DataConfig, TilingConfig
from pistoseg.errors import PistoSegError
from pistoseg.graph import StageContext
from pistoseg.outputs.pictures import Panel, sheet, shrunk
from pistoseg.patches.background import background_rule
from pistoseg.patches.decode import decode_ids, encode_mask, encode_png
from pistoseg.patches.store import PatchSet
from pistoseg.stages import sharding

FOLDER = "masks"
SHARD_PIXELS = 16 << 20
PICTURES = 12
KINDS = ("pseudo", "cam", "cnn")
"""Of refined masks: M_pseudo and M_CAM projected (eqs. 4, 5), and the refining network's own CAM projected."""


def column(name: str, kind: str = "") -> str:
    """Name of a kind's column."""
    return f"{name}_{kind}" if kind else name


def schema(kinds: Sequence[str] = ("",)) -> pa.Schema:
    """Of a mask stage's Parquet."""
    sizes = [(name, pa.int32()) for name in ("height", "width", "grid_height", "grid_width")]
    values = [(column(name, kind), pa.binary()) for kind in kinds for name in ("scores", "confidence", "png")]
    return pa.schema([("image", pa.int64()), ("name", pa.string()), *sizes, *values])


def over_images(context: StageContext, worker: type, arguments: dict[str, Any], folder: str) -> None:
    """Run a network over all training images; see `sharding.run_networks`.

    Args:
        context: of the stage.
        worker: built with `config`, `patches` (URI) and the given arguments; takes positions of images.
        arguments: further arguments of the worker.
        folder: where the parts go.
    """
    patches = context.inputs["patches"].uri
    images = PatchSet.open(patches).table
    names = images["name"].to_pylist()
    sharding.run_networks(
        worker,
        {"config": context.config, "patches": patches} | arguments,
        image_shards(images),
        folder,
        config=context.config.compute,
        progress=context.progress,
        names=lambda shard: [names[position] for position in shard],
    )


def image_shards(table: pa.Table) -> list[list[int]]:
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


def grid_size(image: NDArray[np.uint8], settings: TilingConfig) -> tuple[int, int]:
    """Height and width of the grid on which the maps of an image (H, W, 3) are kept."""
    height, width = (max(1, round(side * settings.grid / settings.patch_size)) for side in image.shape[:2])
    return height, width


def to_grid(maps: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """Maps (C, H, W) brought to a grid (C, h, w), by area."""
    return np.stack([cv2.resize(plane, size[::-1], interpolation=cv2.INTER_AREA) for plane in maps])


def allowed_on_grid(allowed: NDArray[np.bool_], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Which classes (L, h, w) the labels allow in every cell, from (L, H, W): those of at least half of its pixels.

    Where no class has half of them, those with the most; none where the labels allow none.
    """
    share = to_grid(allowed.astype(np.float32), size)
    return (share > 0) & (share >= np.minimum(0.5, share.max(0, keepdims=True)))


class MaskWriter:
    """Makes the rows of a mask stage.

    Args:
        patches: the training images.
        classes: the L tissues.
        data: how background is told.
        constrain: whether a pixel may only be of a class that its labels name.
    """

    def __init__(self, patches: PatchSet, classes: TissueClasses, data: DataConfig, constrain: bool) -> None:
        self.patches, self.classes, self.constrain = patches, classes, constrain
        self.background = background_rule(data)

    def row(
        self, position: int, image: NDArray[np.uint8], scores: Mapping[str, NDArray[np.float32]], logits: bool
    ) -> dict[str, Any]:
        """One image's row.

        Args:
            position: of the image in the patches' table.
            image: (H, W, 3) uint8.
            scores: by kind, (L, h, w) float32.
            logits: whether the scores are logits; otherwise they are not negative.
        """
        height, width = image.shape[:2]
        grid = next(iter(scores.values())).shape[1:]
        allowed = self.patches.allowed(position) if self.constrain else None
        bright = self.background(image) if self.background else None
        row = {
            "image": self.patches.table["image"][position].as_py(),
            "name": self.patches.table["name"][position].as_py(),
            "height": height,
            "width": width,
            "grid_height": grid[0],
            "grid_width": grid[1],
        }
        for kind, values in scores.items():
            kept = values.astype(np.float16)
            mask = pixel_mask(kept.astype(np.float32), (height, width), allowed)
            if bright is not None:
                mask[bright] = self.classes.background_id
            row[column("scores", kind)] = kept.tobytes()
            row[column("confidence", kind)] = confidence(kept.astype(np.float32), allowed, logits).tobytes()
            row[column("png", kind)] = encode_mask(mask, self.classes)
        return row


def pixel_mask(
    scores: NDArray[np.float32], size: tuple[int, int], allowed: NDArray[np.bool_] | None
) -> NDArray[np.uint8]:
    """The class of the highest score at every pixel among those that the image-level labels allow.

    Args:
        scores: (L, h, w) float32 on a grid; brought to full size bilinearly.
        size: (H, W) of the image.
        allowed: (L, H, W) bool, or None for no constraint. A pixel without any allowed class becomes `IGNORE_ID`;
            without a constraint, one where every score is 0, as those of refined masks are with no window near. Of
            equal scores, all 0 among them, the first allowed class wins: masks that are compared cover the same pixels.
    Returns:
        (H, W) uint8 class ids.
    """
    full = np.stack([cv2.resize(plane, size[::-1], interpolation=cv2.INTER_LINEAR) for plane in scores])
    if allowed is None:
        known = full.any(0)
    else:
        full[~allowed] = -np.inf
        known = allowed.any(0)
    mask = full.argmax(0).astype(np.uint8)
    mask[~known] = IGNORE_ID
    return mask


def shares_of_scores(
    scores: NDArray[np.float32], allowed: NDArray[np.bool_] | None, logits: bool
) -> NDArray[np.float32]:
    """Class probabilities (L, h, w) float32 of scores on the same grid; disallowed classes have none.

    Args:
        scores: (L, h, w) float32, logits or not negative.
        allowed: (L, h, w) bool, or None.
        logits: softmax over the allowed classes; otherwise each class's share of the sum, equal ones where it is 0.
            Cells without an allowed class are 0.
    """
    admitted = np.ones(scores.shape, bool) if allowed is None else allowed
    if logits:
        masked = np.where(admitted, scores, -np.inf)
        best = masked.max(0, keepdims=True)
        weights = np.exp(masked - np.where(np.isfinite(best), best, 0))
    else:
        weights = np.maximum(scores, 0) * admitted
    total = weights.sum(0, keepdims=True)
    even = admitted / np.maximum(admitted.sum(0, keepdims=True), 1)
    shares: NDArray[np.float32] = np.where(total > 0, weights / np.where(total > 0, total, 1), even).astype(np.float32)
    return shares


def confidence(scores: NDArray[np.float32], allowed: NDArray[np.bool_] | None, logits: bool) -> NDArray[np.uint8]:
    """The winning class's share of the scores, (h, w) uint8, 255 = all; arguments as above, `allowed` at full size."""
    on_grid = None if allowed is None else allowed_on_grid(allowed, scores.shape[1:])
    return np.round(255 * shares_of_scores(scores, on_grid, logits).max(0)).astype(np.uint8)


def read_maps(uri: str, patches: PatchSet, logits: bool) -> pa.Table:
    """The scores of a mask stage with one kind as class shares, for the refining network.

    M_pseudo and M_CAM must be on one scale, or the L1 losses between them measure their scales. The paper leaves it
    open; here both are shares that sum to 1 over the classes of a cell.

    Args:
        uri: of the artifact.
        patches: that its masks belong to.
        logits: whether its scores are logits, of which the softmax is taken.
    Returns:
        `grid_height`, `grid_width` and `maps`: float16 of shape (L, grid_height, grid_width), 0 for disallowed classes.
    Raises:
        PistoSegError: masks and images do not belong together.
    """
    folder = storage.join(uri, FOLDER)
    table = parquet.read(folder, columns=["image", "grid_height", "grid_width", "scores"])
    if table["image"].to_pylist() != patches.table["image"].to_pylist():
        raise PistoSegError("masks and images do not belong together", file=uri, remedy="delete that folder")
    maps = []
    for position, row in enumerate(table.to_pylist()):
        shape = (row["grid_height"], row["grid_width"])
        scores = np.frombuffer(row["scores"], np.float16).reshape(-1, *shape).astype(np.float32)
        allowed = allowed_on_grid(patches.allowed(position), shape)
        maps.append(shares_of_scores(scores, allowed, logits).astype(np.float16).tobytes())
    return table.select(["grid_height", "grid_width"]).append_column("maps", pa.array(maps, pa.binary()))


def finish(context: StageContext, kinds: Sequence[str] = ("",)) -> dict[str, Any]:
    """Draw `masks.png` and sum up the shares of classes; the stage's summary."""
    classes = context.config.classes.tissue()
    columns = [column("png", kind) for kind in kinds]
    masks = parquet.read(context.path(FOLDER), columns=["name", *columns])
    shares = {column("shares", kind): _shares(masks[column("png", kind)], classes) for kind in kinds}
    patches = PatchSet.open(context.inputs["patches"].uri)
    storage.write_bytes(context.path("masks.png"), _picture(patches, masks, classes, kinds))
    return {"images": masks.num_rows, **shares, "pictures": ["masks.png"]}


def _shares(pngs: pa.ChunkedArray, classes: TissueClasses) -> dict[str, float]:
    counts = np.zeros(256, np.int64)
    for png in pngs:
        counts += np.bincount(decode_ids(png.as_py()).ravel(), minlength=256)
    others = ((classes.background_id, "background"), (IGNORE_ID, "ignored"))
    names = [*enumerate(classes.names), *((value, classes.no_class(name)) for value, name in others)]
    return {name: round(float(counts[value] / counts.sum()), 4) for value, name in names}


def _picture(patches: PatchSet, masks: pa.Table, classes: TissueClasses, kinds: Sequence[str]) -> bytes:
    """Training images beside their masks, spread over the data set; only those with several tissues where there are."""
    mixed = np.flatnonzero(patches.image_labels().sum(1) > 1)
    chosen = mixed if len(mixed) else np.arange(len(patches))
    places = np.linspace(0, len(chosen) - 1, min(PICTURES, len(chosen)))
    positions = [int(chosen[round(place)]) for place in places]
    rows = []
    for position, image in zip(positions, patches.images(positions), strict=True):
        panels = [
            Panel(kind or "mask", image, decode_ids(masks[column("png", kind)][position].as_py())) for kind in kinds
        ]
        rows.append([shrunk(panel) for panel in (Panel(masks["name"][position].as_py(), image), *panels)])
    return encode_png(sheet(rows, classes))


def device_of(config: Config) -> str | None:
    """Where a worker's network runs; None: wherever there is a GPU."""
    return None if config.compute.device == "auto" else config.compute.device
