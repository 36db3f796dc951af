"""What is measured on: the phantom, or the published data sets where `--data` names their folder."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from benchmarks.harness import Options
from pistoseg.config import Config, load_config
from pistoseg.models import bundle, segmentation
from pistoseg.patches.background import background_rule
from pistoseg.patches.layouts import scan_training
from pistoseg.patches.store import IMAGES_SCHEMA, WINDOWS_SCHEMA, PatchSet, ingest
from pistoseg.phantom import PHANTOM_CLASSES, write_cohort, write_slide
from pistoseg.synthesis import TissueBank


@dataclass(frozen=True)
class Material:
    """Single-tissue images and the settings of mosaics made of them.

    Args:
        name: says what the mosaics are, e.g. `mosaic_7x32`.
        config: classes, synthesis.
        images: (h, w, 3) uint8 and class id of each.
    """

    name: str
    config: Config
    images: list[tuple[NDArray[np.uint8], int]]

    def background(self, image: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Tissue-free pixels of an image (h, w, 3): (h, w) bool."""
        rule = background_rule(self.config.data)
        return np.zeros(image.shape[:2], bool) if rule is None else rule(image)

    def bank(self) -> TissueBank:
        """The images as the pipeline packs them."""
        synthesis = self.config.synthesis
        size = (synthesis.crop_height, synthesis.crop_width)
        rule = background_rule(self.config.data)
        bank = TissueBank.from_images(self.images, len(self.config.classes.tissue()), rule, crop=size)
        return bank.with_rejection(*size, synthesis.background_threshold)


def mosaics(options: Options) -> list[Material]:
    """224 px of 7x7 crops of 32 px (WSSS4LUAD) and of 2x2 crops of 112 px (GlaS); or both of the phantom."""
    if options.data is None:
        small = {"crop_height": 32, "crop_width": 32, "n_h": 7, "n_w": 7, "background_threshold": 0.267}
        large = {"crop_height": 112, "crop_width": 112, "n_h": 2, "n_w": 2, "background_threshold": 1.0}
        images = phantom_images(options.size(200, 12))
        return [
            Material(
                name,
                load_config(preset="demo", overrides=[f"synthesis.{key}={value}" for key, value in sizes.items()]),
                images,
            )
            for name, sizes in (("mosaic_7x32", small), ("mosaic_2x112", large))
        ]
    found = []
    for name, preset, profile, folder in (
        ("mosaic_7x32", "wsss4luad", "cpu", "wsss4luad-mini"),
        ("mosaic_2x112", "glas", None, "glas"),
    ):
        config = load_config(preset=preset, profile=profile)
        found.append(Material(name, config, list(patches(config, options.data / folder / "training").single_tissue())))
    return found


def patches(config: Config, folder: Path) -> PatchSet:
    """The images and windows of a folder, as the `patches` stage keeps them."""
    images, windows = [], []
    for source in scan_training(str(folder), config.classes.tissue(), config.data).images:
        image, its_windows, _ = ingest(source, config.data, config.scale)
        images += [image] if image else []
        windows += its_windows
    return PatchSet(pa.Table.from_pylist(images, IMAGES_SCHEMA), pa.Table.from_pylist(windows, WINDOWS_SCHEMA))


@cache
def phantom_images(count: int) -> list[tuple[NDArray[np.uint8], int]]:
    """Single-tissue images of 128 px of a synthetic cohort."""
    with tempfile.TemporaryDirectory() as folder:
        write_cohort(folder, training=count, validation=0, patch_size=128)
        found = patches(load_config(preset="demo"), Path(folder) / "1.training")
    return list(found.single_tissue())


@contextmanager
def slide(options: Options) -> Iterator[Path]:
    """A slide: the phantom's, or a scanned one where there is one."""
    if options.data is not None:
        yield next((options.data / "slides").glob("cmu-1-small-region.svs"))
        return
    side = options.size(2048, 512)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "slide.tiff"
        write_slide(str(path), str(Path(folder) / "mask.tiff"), seed=1, size=(side, side))
        yield path


def save_bundle(folder: Path, options: Options, *, architecture: str, encoder: str, patch_size: int) -> str:
    """A bundle with random weights, whose speed is that of trained ones; what it sees is noise."""
    torch.manual_seed(0)
    network = segmentation.build(architecture, encoder, len(PHANTOM_CLASSES), None, None)
    uri = str(folder / "bundle")
    bundle.save(
        uri,
        network,
        classes=PHANTOM_CLASSES,
        patch_size=patch_size,
        scale={"mpp": 0.5, "source_mpp": 0.5},
        evaluation={"tile": patch_size, "stride": patch_size // 2, "symmetries": 1, "batch_size": 8},
    )
    return uri
