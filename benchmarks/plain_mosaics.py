"""Mosaics as one would write them down: the paper's text step by step, from memory and from a file for every crop.

`PaperText` has all images decoded in memory and does what the text says on whole images: it is the oracle of the
distributions in the tests (tests/unit/mosaic_oracle.py). `FilePerCrop` does the same, but like the published generator
opens and decodes a file for every crop that it draws, and finds its background anew. Neither is the authors' code.
"""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.material import Material

_ORACLE = Path(__file__).parents[1] / "tests" / "unit" / "mosaic_oracle.py"


def _oracle() -> ModuleType:
    import sys

    spec = importlib.util.spec_from_file_location("mosaic_oracle", _ORACLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mosaic_oracle"] = module  # where its dataclasses look for their annotations
    spec.loader.exec_module(module)
    return module


class PaperText:
    """The paper's text on images in memory.

    Args:
        material: of the mosaics.
    """

    def __init__(self, material: Material) -> None:
        self.oracle: Any = _oracle()
        self.config, self.id = material.config.synthesis, material.config.classes.tissue().background_id
        self.tissues = []
        for image, label in material.images:
            if min(image.shape[0] / self.config.crop_height, image.shape[1] / self.config.crop_width) >= 1:
                mask = np.where(material.background(image), self.id, label).astype(np.uint8)
                self.tissues.append(self.oracle.Tissue(image, mask, label))
        self.rng = random.Random(0)

    def sample(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Image (H, W, 3) and mask (H, W), uint8."""
        image, mask, _ = self.oracle.draw(self.tissues, self.config, self.id, self.rng)
        return image, mask


class FilePerCrop(PaperText):
    """The same, decoding a file for every crop.

    Args:
        material: of the mosaics.
        folder: receives the single-tissue images as PNG files, as the published data sets have them.
    """

    def __init__(self, material: Material, folder: Path) -> None:
        super().__init__(material)
        files = []
        for number, tissue in enumerate(self.tissues):
            path = folder / f"{number:06d}.png"
            Image.fromarray(tissue.image).save(path)
            files.append(path)
        self.tissues = [
            _File(path, tissue.label, material, self.id) for path, tissue in zip(files, self.tissues, strict=True)
        ]


class _File:
    """What stands for a `Tissue`: every look at its image decodes the file."""

    def __init__(self, path: Path, label: int, material: Material, background_id: int) -> None:
        self.path, self.label, self.material, self.background_id = path, label, material, background_id
        self._image: NDArray[np.uint8] = np.empty(0, np.uint8)

    @property
    def image(self) -> NDArray[np.uint8]:
        """(h, w, 3) uint8."""
        self._image = np.array(Image.open(self.path).convert("RGB"))
        return self._image

    @property
    def mask(self) -> NDArray[np.uint8]:
        """(h, w) uint8, of the image that was decoded last."""
        background = self.material.background(self._image)
        return np.where(background, self.background_id, self.label).astype(np.uint8)
