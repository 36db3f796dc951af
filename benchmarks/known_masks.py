"""A data set whose training masks are known in part: where the refining module gains and where it loses.

Neither the WSSS4LUAD nor the GlaS subset has masks of its training images. So the validation images become training
images as well, with image-level labels read off their masks: windows in the file names' layout, or rows of
`patches.csv`. `OUT/masks` has their true masks, for `pistoseg evaluate --stage`. The validation images stay what models
are scored on, so that those scores are worth nothing here: only the scores of the stages' masks are.

    python -m benchmarks.known_masks wsss4luad-mini OUT --preset wsss4luad
    pistoseg train --preset wsss4luad --profile cpu --config benchmarks/known_masks.yaml --data OUT --workspace W
    pistoseg evaluate --stage all --data OUT/masks --workspace W
"""

from __future__ import annotations

import argparse
import csv
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pistoseg.config import load_config
from pistoseg.patches.layouts import find_split

LEAST_SHARE = 0.02
"""Of a window, that makes a class one of its labels."""
TABLE = "patches.csv"
Window = tuple[int, int, int, list[int]]
"""x, y, side (px), and a flag for each class."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a data set with training and validation/{img,mask}")
    parser.add_argument("out", type=Path, help="folder to write; must not exist")
    parser.add_argument("--preset", required=True, help="whose classes the masks have")
    parser.add_argument("--window", type=int, default=128, metavar="PX", help="side of the windows (default: 128)")
    options = parser.parse_args()
    added = write_known_masks(
        options.data, options.out, len(load_config(preset=options.preset).classes.classes), options.window
    )
    print(f"{options.out}: {added} labelled windows of validation images added to the training images")


def write_known_masks(data: Path, out: Path, n_classes: int, size: int) -> int:
    """Write the data set.

    Args:
        data: with `training` and `validation/{img,mask}`; image and mask have the same name.
        out: does not exist.
        n_classes: L; ids from there on are no tissue.
        size: side of the windows, px.
    Returns:
        How many windows of validation images were added.
    """
    shutil.copytree(data, out)
    training, validation = (Path(find_split(str(out), split) or out) for split in ("training", "validation"))
    masks = out / "masks"
    masks.mkdir()
    add = _add_rows if (training / TABLE).is_file() else _add_images
    added = 0
    for file in sorted((validation / "img").iterdir()):
        mask = np.asarray(Image.open(validation / "mask" / f"{file.stem}.png"))
        found = list(windows(mask, n_classes, size))
        add(training, masks, f"known_{file.stem}", Image.open(file), mask, found)
        added += len(found)
    return added


def _add_rows(
    training: Path, masks: Path, name: str, image: Image.Image, mask: NDArray[np.uint8], found: list[Window]
) -> None:
    """The whole image and its mask, and rows of the table for its windows."""
    image.save(training / "images" / f"{name}.png")
    Image.fromarray(mask).save(masks / f"{name}.png")
    with (training / TABLE).open("a", newline="") as table:
        csv.writer(table).writerows([f"images/{name}.png", x, y, side, side, *labels] for x, y, side, labels in found)


def _add_images(
    training: Path, masks: Path, name: str, image: Image.Image, mask: NDArray[np.uint8], found: list[Window]
) -> None:
    """Every window and its mask as a file whose name has the labels."""
    for x, y, side, labels in found:
        own = f"{name}-{y}-{x}-{labels}.png"
        image.crop((x, y, x + side, y + side)).save(training / own)
        Image.fromarray(mask[y : y + side, x : x + side]).save(masks / own)


def windows(mask: NDArray[np.uint8], n_classes: int, size: int) -> Iterator[Window]:
    """The windows that have tissue; they overlap by half.

    Args:
        mask: (H, W) uint8 class ids.
        n_classes: ids from there on are no tissue.
        size: side of the windows.
    """
    height, width = mask.shape
    for y in range(0, height - size + 1, size // 2):
        for x in range(0, width - size + 1, size // 2):
            counts = np.bincount(mask[y : y + size, x : x + size].ravel(), minlength=256)[:n_classes]
            labels = [int(count >= LEAST_SHARE * size * size) for count in counts]
            if any(labels):
                yield x, y, size, labels


if __name__ == "__main__":
    main()
