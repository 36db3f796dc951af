"""A data set whose training masks are known in part: where the refining module gains and where it loses.

Neither the WSSS4LUAD nor the GlaS subset has masks of its training images. So the validation images become training
images as well, with image-level labels read off their masks: windows in the file names' layout, or rows of
`patches.csv`. `OUT/masks` has their true masks, for `pistoseg evaluate --stage`. The validation images stay what models
are scored on, so that those scores are worth nothing here: only the scores of the stages' masks are.

    python -m benchmarks.known_masks wsss4luad-mini OUT --preset wsss4luad
    pistoseg train --preset wsss4luad --profile cpu --data OUT --workspace W
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

LEAST_SHARE = 0.02
TABLE = "patches.csv"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a data set with training and validation/{img,mask}")
    parser.add_argument("out", type=Path, help="folder to write; must not exist")
    parser.add_argument("--preset", required=True, help="whose classes the masks have")
    parser.add_argument("--window", type=int, help="px; default: 112 where there is patches.csv, else 128")
    options = parser.parse_args()
    names = load_config(preset=options.preset).classes.tissue().names
    write_known_masks(options.data, options.out, list(names), options.window)


def write_known_masks(data: Path, out: Path, names: list[str], window: int | None = None) -> int:
    """Write the data set; returns how many windows of validation images were added.

    Args:
        data: with `training` and `validation/{img,mask}`.
        out: does not exist.
        names: of the classes, in the order of their ids.
        window: side in px.
    """
    shutil.copytree(data, out)
    (out / "masks").mkdir()
    table = out / "training" / TABLE
    added = 0
    for file in sorted((data / "validation" / "img").iterdir()):
        image, mask = Image.open(file), np.asarray(Image.open(data / "validation" / "mask" / f"{file.stem}.png"))
        name = f"known_{file.stem}"
        if table.is_file():
            image.save(out / "training" / "images" / f"{name}.png")
            Image.fromarray(mask).save(out / "masks" / f"{name}.png")
            with table.open("a", newline="") as text:
                for x, y, size, labels in windows(mask, len(names), window or 112):
                    csv.writer(text).writerow([f"images/{name}.png", x, y, size, size, *labels])
                    added += 1
            continue
        for x, y, size, labels in windows(mask, len(names), window or 128):
            own = f"{name}-{y}-{x}-{labels}.png"
            image.crop((x, y, x + size, y + size)).save(out / "training" / own)
            Image.fromarray(mask[y : y + size, x : x + size]).save(out / "masks" / own)
            added += 1
    return added


def windows(mask: NDArray[np.uint8], n_classes: int, size: int) -> Iterator[tuple[int, int, int, list[int]]]:
    """x, y, side (px) and the labels of the windows that have tissue; they overlap by half.

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
