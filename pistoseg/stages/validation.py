"""Validation images with masks: checked, kept at their own pixel size: the truth that models are scored against."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa

from pistoseg import parquet, storage
from pistoseg.classes import TissueClasses
from pistoseg.errors import PistoSegError, UnavailableError
from pistoseg.graph import StageContext
from pistoseg.patches import decode
from pistoseg.patches.digest import unscored_folder, validation_folder
from pistoseg.patches.layouts import scan_evaluation
from pistoseg.patches.masked import FOLDER
from pistoseg.progress import Progress
from pistoseg.stages import cluster, sharding

SHARD_IMAGES = 64
SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("image", pa.binary()),
        ("mask", pa.binary()),
    ]
)


def run(context: StageContext) -> dict[str, Any]:
    """Write `images/` (name, height, width, image and mask as PNG); no images is a valid result."""
    folder = validation_folder(context.config)
    if folder is None:
        named = unscored_folder(context.config)
        what = f"{named} has no img/ and mask/" if named else "there are no validation images (img/ and mask/)"
        if context.config.data.label_holdout:
            context.progress.say(f"{what}: models are scored by the labels of held-out images (data.label_holdout)")
        else:
            context.progress.say(f"warning: {what}: models will not be scored")
        return {"images": 0, "missing_images": [], "missing_masks": []}
    config = context.config
    return collect(
        folder,
        context.folder,
        config.classes.tissue(),
        max_pixels=config.data.max_pixels,
        actors=cluster.cpu_pool(config.compute),
        progress=context.progress,
    )


def collect(
    folder: str, out: str, classes: TissueClasses, *, max_pixels: int, actors: int, progress: Progress
) -> dict[str, Any]:
    """Read the images of a folder that have masks into an artifact's folder.

    Args:
        folder: URI with img/ and mask/.
        out: URI of the artifact's folder.
        classes: what the masks' values mean.
        max_pixels: larger images are refused.
        actors: that read.
        progress: told the number of finished images.
    Returns:
        `images` read, `missing_images` that only have a mask, `missing_masks`.
    Raises:
        PistoSegError: naming every image or mask that is bad.
    """
    listing = scan_evaluation(folder)
    pairs = [asdict(pair) for pair in listing.scored]
    if not pairs:
        raise PistoSegError("has no image with a mask", file=folder, remedy="give img/ and mask/ files the same names")
    shards = [pairs[start : start + SHARD_IMAGES] for start in range(0, len(pairs), SHARD_IMAGES)]
    sharding.run_shards(
        _Read,
        {"classes": classes, "max_pixels": max_pixels},
        shards,
        storage.join(out, FOLDER),
        actors=actors,
        resources={"num_cpus": 1},
        progress=progress,
        names=lambda shard: [pair["name"] for pair in shard],
    )
    missing = {"missing_images": listing.missing_images, "missing_masks": listing.missing_masks}
    for kind, names in missing.items():
        if names:
            progress.say(f"warning: {len(names)} {kind.replace('_', ' ')} in {folder}: {', '.join(names[:5])}")
    if not _shows_a_class(storage.join(out, FOLDER), len(classes)):
        progress.say(
            f"warning: no mask in {folder} has a pixel of any class, only background and unknown: no model can be "
            "scored on it; are the values those of these classes?"
        )
    return {"images": len(pairs), **missing}


def _shows_a_class(folder: str, n_classes: int) -> bool:
    """Whether any mask of an artifact's images has a class; of most artifacts, one part is read."""
    for part in (item for item in storage.list_dir(folder) if item.endswith(".parquet")):
        masks = parquet.read(part, columns=["mask"])["mask"].to_pylist()
        if any((decode.decode_ids(mask) < n_classes).any() for mask in masks):
            return True
    return False


class _Read:
    def __init__(self, classes: TissueClasses, max_pixels: int) -> None:
        self.classes, self.max_pixels = classes, max_pixels

    def __call__(self, number: int, shard: list[dict[str, Any]], part: str) -> None:
        rows, problems = [], []
        for pair in shard:
            try:
                rows.append(self._read(pair))
            except UnavailableError:
                raise
            except PistoSegError as error:
                problems.append(str(error))
        if problems:
            # A truth that can't be read must not silently shrink the images that scores are made of.
            raise PistoSegError(
                f"{len(problems)} validation images or masks are bad:\n  " + "\n  ".join(problems),
                remedy="mend or remove them",
            )
        parquet.write(pa.Table.from_pylist(rows, SCHEMA), part, row_group_size=16)

    def _read(self, pair: dict[str, Any]) -> dict[str, Any]:
        image = decode.read_rgb(pair["image_uri"], max_pixels=self.max_pixels)
        size = image.shape[:2]
        data = decode.read_file(pair["mask_uri"])
        mask = decode.decode_mask(data, pair["mask_uri"], self.classes, size, self.max_pixels)
        if pair["background_uri"]:
            data = decode.read_file(pair["background_uri"])
            background = decode.decode_background(data, pair["background_uri"], size, self.max_pixels)
            mask = np.where(background, self.classes.background_id, mask).astype(np.uint8)
        return {
            "name": pair["name"],
            "height": size[0],
            "width": size[1],
            "image": decode.encode_png(image),
            "mask": decode.encode_png(mask),
        }
