"""Tissue classes: names, colours, the background's id, and how a label is written in a file name."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pistoseg.errors import PistoSegError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

IGNORE_ID = 255
"""Mask value of a pixel whose class is unknown: never trained on, never scored."""

MAX_CLASSES = 250


@dataclass(frozen=True)
class TissueClass:
    """One tissue.

    Args:
        name: as labels, reports and QuPath write it.
        color: RGB, 0-255 each.
    """

    name: str
    color: tuple[int, int, int]


@dataclass(frozen=True)
class TissueClasses:
    """The tissues of a project; class ids are positions 0..L-1 in `classes`.

    Args:
        classes: L tissue classes in the order of the image-level flags.
        background_id: mask value of tissue-free pixels, usually L.
        background_color: RGB of those pixels in pictures.
        codec: how an image-level label is written: `flags` (`x-[1, 0, 1].png`, `x[101].png`), `prefix`
            (`TUM___x.png`), or `auto`.
    """

    classes: tuple[TissueClass, ...]
    background_id: int = field(default=-1)
    background_color: tuple[int, int, int] = (255, 255, 255)
    codec: str = "auto"

    def __post_init__(self) -> None:
        if self.background_id < 0:
            object.__setattr__(self, "background_id", len(self.classes))

    def __len__(self) -> int:
        return len(self.classes)

    @property
    def names(self) -> list[str]:
        """The L class names, by class id."""
        return [tissue.name for tissue in self.classes]

    def index(self, name: str) -> int:
        """Class id of a name, compared as `folded`; `KeyError` when there is none."""
        for position, tissue in enumerate(self.classes):
            if folded(tissue.name) == folded(name):
                return position
        raise KeyError(name)

    def no_class(self, name: str) -> str:
        """What reports call pixels of no class: the name, told from a class that has it."""
        return f"{name} (no class)" if name in self.names else name

    def palette(self) -> NDArray[np.uint8]:
        """Colours by mask value, (256, 3) uint8; values without a meaning are grey."""
        import numpy as np

        colors = np.full((256, 3), 128, np.uint8)
        for position, tissue in enumerate(self.classes):
            colors[position] = tissue.color
        colors[self.background_id] = self.background_color
        return colors

    def to_json(self) -> dict[str, Any]:
        """As written in config files, manifests and model bundles."""
        return {
            "classes": [{"name": tissue.name, "color": list(tissue.color)} for tissue in self.classes],
            "background_id": self.background_id,
            "background_color": list(self.background_color),
            "codec": self.codec,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> TissueClasses:
        """The inverse of `to_json`."""
        return cls(
            tuple(TissueClass(item["name"], _rgb(item["color"])) for item in value["classes"]),
            value.get("background_id", -1),
            _rgb(value.get("background_color", (255, 255, 255))),
            value.get("codec", "auto"),
        )


def composed(name: str) -> str:
    """A name with its accents as most keyboards write them (NFC); those of Macs' files are letters of their own."""
    return unicodedata.normalize("NFC", name)


def folded(name: str) -> str:
    """A name as names are compared: without spaces around it, case, and the way in which accents are written."""
    return composed(name.strip()).casefold()


def class_weights(weights: Mapping[str, float], names: Sequence[str]) -> list[float]:
    """The weight of every class, in the order of `names`, from weights by name, whatever their case.

    Raises:
        PistoSegError: a class has no weight or two, a name is no class, or the weights can't be drawn by.
    """
    given = {folded(name): weight for name, weight in weights.items()}
    expected = [folded(name) for name in names]
    if len(given) < len(weights) or set(given) != set(expected):
        raise PistoSegError(
            f"weights are given for {', '.join(weights)}, but the classes are {', '.join(names)}",
            field="class_sampling",
            remedy="give one weight per class name, 0 for a class to leave out",
        )
    found = [float(given[name]) for name in expected]
    if not all(math.isfinite(weight) and weight >= 0 for weight in found) or not any(found):
        raise PistoSegError(
            "the weights must be finite, not negative, and not all 0",
            field="class_sampling",
            remedy="give at least one class a positive weight",
        )
    return found


def _rgb(value: Any) -> tuple[int, int, int]:
    red, green, blue = value
    return int(red), int(green), int(blue)
