"""The paper's tables as data: which settings a row varies, and what the paper has for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from pistoseg.config import Config


class PaperScores(NamedTuple):
    """What the paper has for a row.

    Args:
        miou: mIoU.
        fwiou: fwIoU; None: not published.
        iou: by class in the data set's order; empty: not published.
    """

    miou: float
    fwiou: float | None = None
    iou: tuple[float, ...] = ()


@dataclass(frozen=True)
class PublishedData:
    """A data set on which the paper's values were measured.

    Args:
        title: its name.
        classes: names as the preset of the same name has them, in the order of the flags.
        training_images: files in its training folder.
        test_images: that the paper's values belong to.
    """

    title: str
    classes: tuple[str, ...]
    training_images: int
    test_images: int


PUBLISHED = {
    "wsss4luad": PublishedData("WSSS4LUAD", ("tumor", "stroma", "normal"), 10_091, 80),
    "bcss-wsss": PublishedData("BCSS-WSSS", ("tumor", "stroma", "lymphocytic infiltrate", "necrosis"), 23_422, 4_986),
}


def published_data(classes: Sequence[str], training_images: int) -> str | None:
    """The published data set that a training is on: its classes in its order, and all of its training images.

    A part of the data, or more of it, is not what the paper's values were measured on.

    Args:
        classes: names of the L classes; case does not count.
        training_images: found, those that were rejected among them.
    Returns:
        A key of `PUBLISHED`, or None.
    """
    names = tuple(name.casefold() for name in classes)
    for key, data in PUBLISHED.items():
        if names == data.classes and training_images == data.training_images:
            return key
    return None


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Args:
        label: its name.
        overrides: values by `section.key`.
        paper: the paper's scores by key of `PUBLISHED`.
    """

    label: str
    overrides: Mapping[str, Any]
    paper: Mapping[str, PaperScores] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """A comparison.

    Args:
        name: as the command line takes it.
        title: what it compares.
        rows: in the order of the paper.
        adapt: makes a row fit a config, or says why it can't.
    """

    name: str
    title: str
    rows: tuple[Row, ...]
    adapt: Callable[[Row, Config], Row | str] | None = None


def _luad(miou: float, fwiou: float | None = None, *iou: float) -> dict[str, PaperScores]:
    return {"wsss4luad": PaperScores(miou, fwiou, iou)}


_PISTOSEG = _luad(0.7513, 0.7707, 0.8119, 0.7173, 0.7246)


def _same_size(row: Row, config: Config) -> Row | str:
    """A row with another crop size, with as many crops as make the config's mosaic."""
    crop = row.overrides["synthesis.crop_height"]
    height, width = config.synthesis.height, config.synthesis.width
    if height % crop or width % crop:
        return f"{height}x{width} px mosaics are not made of whole crops of {crop} px"
    return replace(
        row, overrides=dict(row.overrides) | {"synthesis.n_h": height // crop, "synthesis.n_w": width // crop}
    )


def _crops(size: int, miou: float) -> Row:
    return Row(f"H_p = W_p = {size}", {"synthesis.crop_height": size, "synthesis.crop_width": size}, _luad(miou))


def _losses(label: str, cls: int, cons: int, cross: int, paper: dict[str, PaperScores]) -> Row:
    weights = {"refiner.lambda_cls": cls, "refiner.lambda_cons": cons, "refiner.lambda_cross": cross}
    weights["refiner.lambda_pseudo"] = 0  # a loss of our own, not in the paper
    return Row(label, {"precise.masks": "refined_cnn"} | weights, paper)


def _cams(title: str, method: str, plain: dict[str, PaperScores], refined: dict[str, PaperScores]) -> tuple[Row, Row]:
    return (
        Row(title, {"cams.method": method, "precise.masks": "cam"}, plain),
        Row(f"{title}, refined", {"cams.method": method, "precise.masks": "refined_cnn"}, refined),
    )


TABLES = {
    table.name: table
    for table in (
        Table(
            "table1",
            "What the precise model is trained on (Tables 1, 2)",
            (
                Row(
                    "Training with Synthesized Images",
                    {"precise.masks": "synthesized"},
                    _luad(0.5210, 0.5409, 0.6707, 0.3631, 0.5291),
                ),
                Row(
                    "Training with Pseudo-Masks of Real Images",
                    {"precise.masks": "pseudo"},
                    _luad(0.5735, 0.5590, 0.6794, 0.3866, 0.6545),
                ),
                Row(
                    "PistoSeg",
                    {"precise.masks": "refined_cnn"},
                    _PISTOSEG | {"bcss-wsss": PaperScores(0.7055, 0.7589, (0.8110, 0.7504, 0.6184, 0.6422))},
                ),
            ),
        ),
        Table(
            "table3",
            "Losses of the refining network (Table 3)",
            (
                _losses("L_cons", 0, 1, 0, _luad(0.4871, 0.4912, 0.6373, 0.2870, 0.5369)),
                _losses("L_cons + L_cross", 0, 1, 1, _luad(0.5286, 0.5107, 0.6249, 0.3462, 0.6148)),
                _losses("L_cls + L_cons", 1, 1, 0, _luad(0.4257, 0.3616, 0.2884, 0.4493, 0.5394)),
                _losses("L_cls + L_cross", 1, 0, 1, _luad(0.7166, 0.7477, 0.7933, 0.6909, 0.6658)),
                _losses("L_cls + L_cons + L_cross", 1, 1, 1, _PISTOSEG),
            ),
        ),
        Table(
            "table4",
            "CAM methods, with and without the refining module (Table 4)",
            (
                *_cams("CAM", "cam", _luad(0.7117, 0.7430, 0.7878, 0.6875, 0.6597), _PISTOSEG),
                *_cams(
                    "Grad-CAM",
                    "grad_cam",
                    _luad(0.7177, 0.7624, 0.7998, 0.7204, 0.6329),
                    _luad(0.7542, 0.7634, 0.8063, 0.7053, 0.7510),
                ),
                *_cams(
                    "Grad-CAM++",
                    "grad_cam++",
                    _luad(0.7270, 0.7270, 0.7576, 0.6841, 0.7392),
                    _luad(0.7212, 0.7615, 0.8029, 0.7130, 0.6477),
                ),
                *_cams(
                    "SC-CAM",
                    "sc_cam",
                    _luad(0.7260, 0.7647, 0.7982, 0.7268, 0.6529),
                    _luad(0.7265, 0.7575, 0.8045, 0.6988, 0.6762),
                ),
            ),
        ),
        Table(
            "table5",
            "Refined masks that the precise model is trained on (Table 5)",
            (
                Row(
                    "M_pseudo, refined",
                    {"precise.masks": "refined_pseudo"},
                    _luad(0.5542, 0.5719, 0.6913, 0.4085, 0.5627),
                ),
                Row(
                    "M_CAM, refined",
                    {"precise.masks": "refined_cam"},
                    _luad(0.7298, 0.7547, 0.7980, 0.6998, 0.6915),
                ),
                Row("CNN", {"precise.masks": "refined_cnn"}, _PISTOSEG),
            ),
        ),
        Table(
            "crop-size",
            "Size of the crops that a mosaic of the same size is made of (supplement)",
            (_crops(224, 0.7206), _crops(112, 0.6976), _crops(32, 0.7513), _crops(16, 0.7493)),
            _same_size,
        ),
        Table(
            "strategy",
            "Synthesis strategies (supplement)",
            (
                Row("One label", {"synthesis.strategy": "one_label"}, _luad(0.6356)),
                Row("CutMix", {"synthesis.strategy": "cutmix"}, _luad(0.6825)),
                Row("Gridding", {"synthesis.strategy": "gridding"}, _luad(0.7395)),
                Row("Mosaic", {"synthesis.strategy": "mosaic"}, _luad(0.7513)),
            ),
        ),
    )
}
"""Tables by name. `crop-size` and `strategy` leave `precise.masks` as the config has it."""
