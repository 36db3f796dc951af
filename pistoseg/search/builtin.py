"""The spaces that ship with PistoSeg, fitted to a config: its own setting is a point of them.

It is none where beta exceeds alpha by less than `spaces.MARGIN` of its range, or where a class's weight or a weight
decay is 0, which no logarithmic range has; it is trial 0 all the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pistoseg import storage
from pistoseg.config import Config
from pistoseg.errors import PistoSegError
from pistoseg.search.spaces import Parameter, Space, read_space

LEAST_CROP = 8
MOST_CROPS = 16


def load_space(name: str, config: Config) -> Space:
    """A space by its name, or of a YAML file; `PistoSegError` where it is neither."""
    build = SPACES.get(name)
    if build is None and not storage.exists(name):
        raise PistoSegError(
            f"there is no space {name!r}, and no such file",
            field="--space",
            remedy=f"use one of: {', '.join(SPACES)}; or a YAML file",
        )
    return Space(name, tuple(build(config))) if build else read_space(name, config)


def synthesis(config: Config) -> list[Parameter]:
    """Mosaics: anchors, crops that fill an image of the same size, strategy, class weights, rotation and scaling."""
    own = config.synthesis
    weights = own.class_sampling if isinstance(own.class_sampling, dict) else {}
    names = [tissue.name for tissue in config.classes.classes]
    sampling = {value: {"synthesis.class_sampling": value} for value in ("natural", "balanced")}
    weighted = {"synthesis.class_sampling": ("weights",)}
    mosaic = {"synthesis.strategy": ("mosaic",)}
    strategies = ("mosaic", "gridding", "cutmix", "one_label")
    return [
        _choice("synthesis.strategy", strategies),
        _range("synthesis.alpha", 0.05, 0.6, own.alpha, when=mosaic),
        _range("synthesis.beta", 0.2, 0.95, own.beta, above="synthesis.alpha", when=mosaic),
        _crops("synthesis.n_h", "synthesis.crop_height", own.height, own.n_h),
        _crops("synthesis.n_w", "synthesis.crop_width", own.width, own.n_w),
        Parameter("synthesis.class_sampling", options=sampling | {"weights": {"synthesis.class_sampling": {}}}),
        *(
            _range(f"synthesis.class_sampling.{name}", 0.25, 4.0, weights.get(name, 1.0), log=True, when=weighted)
            for name in names
        ),
        _range("synthesis.rotate", 0.0, 180.0, own.rotate),
        _range("synthesis.scale", 0.0, 0.5, own.scale),
    ]


def losses(config: Config) -> list[Parameter]:
    """Weights of the refining network's losses, and the segmentation loss of the precise model."""
    own = config.refiner
    return [
        _range("refiner.lambda_cls", 0.0, 2.0, own.lambda_cls),
        _range("refiner.lambda_cons", 0.0, 2.0, own.lambda_cons),
        _range("refiner.lambda_cross", 0.0, 2.0, own.lambda_cross),
        _choice("precise.loss", ("bce", "dice", "bce+dice")),
    ]


def optim(config: Config) -> list[Parameter]:
    """Learning rates, weight decay and their schedule, of every network that leads to the model."""
    parameters = []
    for name in ("preliminary", "classifier", "refiner", "precise"):
        own = getattr(config, name)
        parameters += [
            _range(f"{name}.lr", own.lr / 10, min(own.lr * 10, 1.0), own.lr, log=True),
            _range(f"{name}.weight_decay", 1e-4, 0.3, own.weight_decay, log=True),
            _range(f"{name}.lr_decay", 0.5, 1.0, own.lr_decay),
        ]
    return parameters


SPACES: dict[str, Callable[[Config], list[Parameter]]] = {"synthesis": synthesis, "losses": losses, "optim": optim}


def _range(name: str, low: float, high: float, own: float, log: bool = False, **more: Any) -> Parameter:
    """A range that holds the config's own value; a logarithmic one can't hold 0."""
    if own > 0 or not log:
        low, high = min(low, own), max(high, own)
    return Parameter(name, low, high, log, **more)


def _choice(name: str, values: tuple[str, ...]) -> Parameter:
    return Parameter(name, options={value: {name: value} for value in values})


def _crops(number: str, size: str, side: int, own: int) -> Parameter:
    """How many crops fill a side; only whole crops of a useful size, so that the images' size stays."""
    counts = {count for count in range(2, MOST_CROPS + 1) if side % count == 0 and side // count >= LEAST_CROP} | {own}
    return Parameter(number, options={n: {number: n, size: side // n} for n in sorted(counts)}, ordered=True)
