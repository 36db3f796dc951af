"""The settings of a pipeline: typed, validated, each with a doc line.

A config is a preset, then a profile of that preset, then a YAML file, then `--set section.key=value`; later ones win.
Everything that is wrong with it is reported at once, before anything starts.
"""

from __future__ import annotations

from importlib import resources
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pistoseg.classes import MAX_CLASSES, TissueClass, TissueClasses
from pistoseg.errors import PistoSegError

Channel = Annotated[int, Field(ge=0, le=255)]
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Precision = Literal["auto", "bf16", "fp32"]


class Section(BaseModel):
    """Base of every section: unknown keys are refused, values don't change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ClassConfig(Section):
    """One tissue class."""

    name: str = Field(min_length=1, max_length=100, description="Name in reports, pictures and QuPath.")
    color: tuple[Channel, Channel, Channel] = Field(description="RGB, 0-255.")


class ClassesConfig(Section):
    """The tissues, in the order of the image-level flags."""

    classes: tuple[ClassConfig, ...] = Field(min_length=2, max_length=MAX_CLASSES, description="The L tissue classes.")
    background_id: int = Field(-1, ge=-1, le=254, description="Mask value of tissue-free pixels; -1: L.")
    background_color: tuple[Channel, Channel, Channel] = Field((255, 255, 255), description="RGB of the background.")
    codec: Literal["auto", "flags", "prefix"] = Field(
        "auto", description="Labels in file names: flags `x-[1, 0, 1].png`, prefix `TUM___x.png`, auto: either."
    )

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        names = [tissue.name.casefold() for tissue in self.classes]
        if len(set(names)) < len(names):
            raise ValueError("class names must differ (case does not count)")
        if 0 <= self.background_id < len(self.classes):
            raise ValueError(f"background_id {self.background_id} is the id of class {names[self.background_id]!r}")
        return self

    def tissue(self) -> TissueClasses:
        """As the rest of PistoSeg takes them."""
        return TissueClasses(
            tuple(TissueClass(tissue.name, tissue.color) for tissue in self.classes),
            self.background_id,
            self.background_color,
            self.codec,
        )


class ScaleConfig(Section):
    """The one pixel size of all stages, carried by the model bundle."""

    mpp: float | None = Field(None, gt=0, le=100, description="um per network px; null: unknown, `resize` counts.")
    source_mpp: float | None = Field(None, gt=0, le=100, description="um per px of the training and validation images.")
    resize: float = Field(1.0, gt=0, le=16, description="Network px per image px where an mpp is unknown.")
    fit: int | None = Field(
        None, ge=16, le=4096, description="Resize every training image to this many px, whatever its size (faithful)."
    )

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.source_mpp and not self.mpp:
            raise ValueError("source_mpp needs mpp, the pixel size to which images are brought")
        if self.mpp and self.source_mpp and self.resize != 1.0:
            raise ValueError("mpp and source_mpp give the resize factor; leave resize at 1")
        if self.fit and self.resize != 1.0:
            raise ValueError("fit and resize contradict each other; set one")
        return self

    def factor(self, image_mpp: float | None = None) -> float:
        """Network px per image px, for an image of `image_mpp` um per px (default: `source_mpp`)."""
        image_mpp = image_mpp or self.source_mpp
        return image_mpp / self.mpp if self.mpp and image_mpp else self.resize


class DataConfig(Section):
    """Where training images come from and what is accepted."""

    uri: str | None = Field(None, description="Data set folder or URI; `--data` sets it.")
    validation: str | None = Field(None, description="Folder with img/ and mask/; null: the data set's own, if any.")
    layout: Literal["auto", "flags", "folders", "table"] = Field(
        "auto", description="Labels in file names, a folder per class, or a CSV/Parquet of windows."
    )
    table: str | None = Field(None, description="Table of windows, relative to the data; null: found by its name.")
    max_pixels: int = Field(50_000_000, ge=1, description="Larger images are rejected (px).")
    min_size: int = Field(16, ge=1, description="Images with a smaller side are rejected (px).")
    max_rejected: Share = Field(0.1, description="Stop when more than this share of the images is rejected.")
    min_single_tissue: Positive = Field(20, description="Warn of classes with fewer single-tissue images.")
    background: Literal["none", "bright"] = Field(
        "none", description="bright: pixels lighter than background_grey are tissue-free."
    )
    background_grey: int = Field(200, ge=1, le=254, description="Grey value above which a pixel is tissue-free.")
    background_min_area: int = Field(50, ge=0, description="Smaller bright components are tissue (px).")


class SynthesisConfig(Section):
    """Mosaics from single-tissue images (eq. 1)."""

    strategy: Literal["mosaic", "one_label", "cutmix", "gridding"] = Field(
        "mosaic", description="The paper's Mosaic, or one of the strategies it compares with."
    )
    crop_height: int = Field(32, ge=4, le=2048, description="H_p: height of a crop (network px).")
    crop_width: int = Field(32, ge=4, le=2048, description="W_p: width of a crop (network px).")
    n_h: int = Field(7, ge=1, le=128, description="n_h: crops from top to bottom.")
    n_w: int = Field(7, ge=1, le=128, description="n_w: crops from left to right.")
    alpha: float = Field(0.2, gt=0, lt=1, description="alpha: lowest anchor, as a share of the side.")
    beta: float = Field(0.8, gt=0, lt=1, description="beta: highest anchor, as a share of the side.")
    flip: Share = Field(0.5, description="Probability of a horizontal, and of a vertical, flip of a spliced image.")
    transform_probability: Share = Field(0.8, description="Probability that a spliced image is rotated and scaled.")
    shift: float = Field(0.0625, ge=0, le=0.5, description="Largest shift, as a share of the side.")
    scale: float = Field(0.2, ge=0, lt=1, description="Scale factors are drawn from 1-scale to 1+scale.")
    rotate: float = Field(45.0, ge=0, le=180, description="Largest rotation (degrees).")
    background_threshold: Share = Field(1.0, description="Redraw a crop with a larger share of background; 1: never.")
    max_redraws: int = Field(10, ge=0, le=100, description="Redraws of one crop at the most.")
    class_sampling: Literal["natural", "balanced"] | dict[str, Annotated[float, Field(ge=0)]] = Field(
        "balanced", description="natural: by image; balanced: by class; or a weight per class name."
    )
    mode: Literal["streamed", "stored"] = Field(
        "streamed", description="streamed: fresh mosaics every epoch, nothing on disk; stored: `count` in Parquet."
    )
    count: Positive = Field(20_000, description="Mosaics stored; also those of an epoch without samples_per_epoch.")

    @property
    def height(self) -> int:
        """Height of a mosaic: n_h * H_p network px."""
        return self.n_h * self.crop_height

    @property
    def width(self) -> int:
        """Width of a mosaic: n_w * W_p network px."""
        return self.n_w * self.crop_width

    @model_validator(mode="after")
    def _anchor(self) -> Self:
        if self.alpha >= self.beta:
            raise ValueError(f"alpha ({self.alpha}) must be less than beta ({self.beta})")
        return self


class AugmentationConfig(Section):
    """Random changes of training images and masks, on the training device."""

    flip: bool = Field(True, description="Flips and quarter turns, each with probability 1/2.")
    crop_scale: float = Field(0.9, gt=0, le=1, description="Resized crop: smallest share of the side.")
    rotate: float = Field(45.0, ge=0, le=180, description="Largest rotation (degrees).")
    scale: float = Field(0.2, ge=0, lt=1, description="Zoom factors are drawn from 1-scale to 1+scale.")
    probability: Share = Field(0.8, description="Probability of rotation and zoom.")
    stain: float = Field(0.03, ge=0, le=1, description="HED stain augmentation: sigma of gain and offset; 0: off.")
    brightness: float = Field(0.1, ge=0, lt=1, description="Brightness and contrast factors within 1 +- this; 0: off.")


class TrainingConfig(Section):
    """A segmentation network and how it is trained; the preliminary one sees whole mosaics."""

    architecture: Literal["unetplusplus", "unet", "fpn", "deeplabv3plus", "manet", "linknet", "pan"] = Field(
        "unetplusplus", description="Segmentation network, as segmentation-models-pytorch names it."
    )
    encoder: str = Field("efficientnet-b0", description="Encoder, as segmentation-models-pytorch names it.")
    weights: str | None = Field("imagenet", description="Encoder weights: imagenet, a file or URI, or null for none.")
    decoder_attention: Literal["scse"] | None = Field("scse", description="Attention in UNet's and UNet++'s decoder.")
    loss: Literal["bce", "dice", "bce+dice"] = Field("bce", description="Segmentation loss; bce is the paper's.")
    epochs: Positive = Field(15, description="Epochs.")
    samples_per_epoch: Positive | None = Field(
        None, description="Samples in an epoch; null: the number of mosaics or training images."
    )
    batch_size: Positive = Field(16, description="Images in an optimizer step, over all workers.")
    lr: float = Field(1e-3, gt=0, le=1, description="AdamW's learning rate in the first epoch.")
    lr_decay: float = Field(0.9, gt=0, le=1, description="Factor on the learning rate after every epoch.")
    weight_decay: float = Field(0.05, ge=0, le=1, description="AdamW's weight decay.")
    clip_norm: float = Field(5.0, ge=0, description="Largest norm of the gradient; 0: no clipping.")
    average_decay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Decay per step of a running average of the weights, which is what is kept; 0: off.",
    )
    precision: Precision = Field("auto", description="auto: bf16 autocast where the device is good at it, else fp32.")
    keep: Literal["best", "last"] = Field(
        "best", description="Model kept: best validation mIoU, or last; without validation masks the last."
    )
    validate_every: Positive = Field(1, description="Epochs between two validations.")
    augmentation: AugmentationConfig = Field(default_factory=AugmentationConfig, description="Random changes.")


class PreciseConfig(TrainingConfig):
    """The precise model: the one that is delivered."""

    encoder: str = Field("efficientnet-b3", description="Encoder, as segmentation-models-pytorch names it.")
    lr: float = Field(5e-4, gt=0, le=1, description="AdamW's learning rate in the first epoch.")
    patch_size: int = Field(
        224, ge=32, le=4096, description="Height and width of a crop of a training image (network px)."
    )
    masks: Literal["synthesized", "pseudo"] = Field(
        "pseudo", description="Trained on pseudo-masks of the real images, or on the mosaics alone (Table 1)."
    )
    class_sampling: Literal["natural", "rare"] = Field(
        "natural",
        description="natural: every crop once per epoch; rare: images with a rare class more often, by the square root "
        "of how much rarer it is than the commonest.",
    )
    initial: Literal["imagenet", "preliminary"] = Field(
        "imagenet", description="Start from `weights`, or from the preliminary model where the networks are the same."
    )


class PseudoMaskConfig(Section):
    """Logits of the preliminary model on the real training images."""

    grid: int = Field(32, ge=4, le=512, description="Logits are kept on a grid of this many cells per `patch_size`.")
    patch_size: int = Field(224, ge=32, le=4096, description="Window of the network (network px).")
    stride: int | None = Field(None, ge=8, description="Step between windows (network px); null: half a window.")
    symmetries: Literal[1, 8] = Field(8, description="Flips and quarter turns whose logits are averaged.")
    constrain: bool = Field(True, description="Only classes that the image-level label names may appear.")
    batch_size: Positive = Field(16, description="Windows in a forward pass; symmetric copies count.")


class EvaluationConfig(Section):
    """How a model is scored on images with masks."""

    protocol: Literal["single-scale", "wsss4luad", "bcss-wsss"] = Field(
        "single-scale",
        description="wsss4luad: the authors' five scales, half-overlapping windows; bcss-wsss: the patch itself; "
        "single-scale: Gaussian windows, eight symmetries.",
    )
    patch_size: int = Field(224, ge=32, le=4096, description="Window of the network (network px).")
    stride: int | None = Field(None, ge=8, description="Step between windows (network px); null: the protocol's.")
    scales: tuple[Annotated[float, Field(gt=0, le=8)], ...] | None = Field(
        None, description="Zoom factors averaged; null: the protocol's."
    )
    symmetries: Literal[1, 8] | None = Field(None, description="Symmetries averaged; null: the protocol's.")
    batch_size: Positive = Field(16, description="Windows in a forward pass; symmetric copies count.")
    bootstrap: int = Field(1000, ge=0, description="Resamplings of the images for the confidence intervals; 0: none.")

    def resolved(self) -> dict[str, Any]:
        """Window, stride, scales and symmetries with the protocol's values filled in."""
        luad, single = self.protocol == "wsss4luad", self.protocol == "single-scale"
        half = self.patch_size // 2
        return {
            "tile": self.patch_size,
            "stride": self.stride or (half if luad or single else self.patch_size),
            "scales": self.scales or ((1.0, 1.25, 1.5, 1.75, 2.0) if luad else (1.0,)),
            "symmetries": self.symmetries or (8 if single else 1),
            "window": "gaussian" if single else "mean",
        }


class ComputeConfig(Section):
    """What a run may use of the machine or cluster."""

    workers: int = Field(0, ge=0, description="Actors that make mosaics and read images; 0: from the cluster's CPUs.")
    train_workers: Positive = Field(1, description="Data-parallel training workers (GPUs, or CPU processes).")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where the networks run.")
    max_failures: int = Field(2, ge=0, description="Restarts of a training whose worker died.")
    address: str | None = Field(None, description="Ray cluster; null: RAY_ADDRESS, else a local Ray.")


class TrackingConfig(Section):
    """MLflow."""

    uri: str | None = Field(
        None, description="Tracking server; null: MLFLOW_TRACKING_URI, else SQLite in the workspace."
    )
    experiment: str = Field("pistoseg", min_length=1, description="MLflow experiment.")
    model: str = Field("pistoseg", min_length=1, description="Registered model's name.")
    enabled: bool = Field(True, description="Whether runs are tracked.")


class Config(Section):
    """A whole pipeline."""

    seed: int = Field(
        0, ge=0, lt=2**63, description="Same config, data and seed: same mosaics on any number of workers."
    )
    classes: ClassesConfig = Field(description="Tissue classes; or the path of a YAML with them.")
    scale: ScaleConfig = Field(default_factory=ScaleConfig, description="Pixel size of all stages.")
    data: DataConfig = Field(default_factory=DataConfig, description="Training images.")
    synthesis: SynthesisConfig = Field(default_factory=SynthesisConfig, description="Mosaics.")
    preliminary: TrainingConfig = Field(default_factory=TrainingConfig, description="Model trained on mosaics.")
    pseudo_masks: PseudoMaskConfig = Field(default_factory=PseudoMaskConfig, description="Its masks of real images.")
    precise: PreciseConfig = Field(default_factory=PreciseConfig, description="Model trained on real images.")
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig, description="Scores.")
    compute: ComputeConfig = Field(default_factory=ComputeConfig, description="Machine or cluster.")
    tracking: TrackingConfig = Field(default_factory=TrackingConfig, description="MLflow.")

    @field_validator("classes", mode="before")
    @classmethod
    def _classes_file(cls, value: Any) -> Any:
        return read_yaml(value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problems = []
        weights = self.synthesis.class_sampling
        if isinstance(weights, dict):
            names = {tissue.name for tissue in self.classes.classes}
            if unknown := sorted(set(weights) - names):
                problems.append(f"synthesis.class_sampling names classes that there are not: {', '.join(unknown)}")
            if not any(weights.get(name, 0) > 0 for name in names):
                problems.append("synthesis.class_sampling gives every class the weight 0")
        same = ("architecture", "encoder", "decoder_attention")
        if self.precise.initial == "preliminary" and any(
            getattr(self.precise, key) != getattr(self.preliminary, key) for key in same
        ):
            problems.append("precise.initial=preliminary needs the same architecture, encoder and decoder_attention")
        if problems:
            raise ValueError("; ".join(problems))
        return self


def presets() -> list[str]:
    """Names of the presets that ship with PistoSeg."""
    folder = resources.files("pistoseg") / "presets"
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def load_config(
    preset: str | None = None,
    profile: str | None = None,
    file: str | None = None,
    overrides: list[str] | tuple[str, ...] = (),
) -> Config:
    """Resolve a config.

    Args:
        preset: name of a preset; the default is `wsss4luad` unless `file` is given.
        profile: one of the preset's profiles, e.g. `cpu`.
        file: path or URI of a YAML with any of the sections; it may name a `preset` and a `profile` itself.
        overrides: `section.key=value` strings, values in YAML.

    Raises:
        PistoSegError: listing every problem of the config.
    """
    own = read_yaml(file) if file else {}
    preset = preset or own.pop("preset", None) or (None if file else "wsss4luad")
    profile = profile or own.pop("profile", None)
    own = {key: value for key, value in own.items() if key not in ("preset", "profile")}
    values: dict[str, Any] = {}
    if profile and not preset:
        raise PistoSegError(
            f"profile {profile!r} belongs to a preset, and none is given", field="--profile", remedy="add --preset NAME"
        )
    if preset:
        values = _read_preset(preset)
        profiles = values.pop("profiles", {})
        if profile and profile not in profiles:
            raise PistoSegError(
                f"preset {preset!r} has no profile {profile!r}",
                field="--profile",
                remedy=f"use one of: {', '.join(profiles) or '(it has none)'}",
            )
        if profile:
            values = _merge(values, profiles[profile])
    values = _merge(values, own)
    for item in overrides:
        values = _merge(values, _parse_override(item))
    return validate(values, source=file or (f"preset {preset}" if preset else "config"))


def load_classes(uri: str) -> TissueClasses:
    """Tissue classes from a YAML file with the keys of the config's `classes` section."""
    try:
        return ClassesConfig.model_validate(read_yaml(uri)).tissue()
    except ValidationError as error:
        raise _refusal(error, uri) from None


def validate(values: dict[str, Any], source: str = "config") -> Config:
    """A `Config` from plain values; `PistoSegError` lists all problems at once."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise _refusal(error, source) from None


def _refusal(error: ValidationError, source: str) -> PistoSegError:
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"] if part not in ("literal", "dict"))
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            message = f"unknown key{_suggestion(problem['loc'])}"
        lines.append(f"\n  {key + ': ' if key else ''}{message}")
    return PistoSegError(
        f"{len(lines)} problem(s) in the config:" + "".join(dict.fromkeys(lines)),
        file=source,
        remedy="`pistoseg config show` prints every key with its meaning",
    )


def read_yaml(uri: str) -> dict[str, Any]:
    """A YAML mapping from a path or URI."""
    from pistoseg import storage

    try:
        value = yaml.safe_load(storage.read_text(uri))
    except FileNotFoundError:
        raise PistoSegError("does not exist", file=uri) from None
    except yaml.YAMLError as error:
        raise PistoSegError(f"is not valid YAML: {error}", file=uri) from None
    if not isinstance(value, dict):
        raise PistoSegError("must be a mapping of keys to values", file=uri)
    return value


def describe(config: Config) -> str:
    """The resolved config as YAML, each field with its doc line as a comment."""
    return "\n".join(_describe(config, 0)) + "\n"


def _describe(section: BaseModel, indent: int) -> list[str]:
    lines, pad = [], "  " * indent
    for key, info in type(section).model_fields.items():
        value = getattr(section, key)
        if isinstance(value, BaseModel):
            lines += [f"{pad}{key}:  # {info.description}", *_describe(value, indent + 1)]
        else:
            dumped = section.model_dump(mode="json", include={key})[key]
            text = yaml.safe_dump(dumped, default_flow_style=True, width=10_000, allow_unicode=True)
            lines.append(f"{pad}{key}: {text.removesuffix('...' + chr(10)).strip()}  # {info.description}")
    return lines


def _read_preset(preset: str) -> dict[str, Any]:
    if preset not in presets():
        raise PistoSegError(
            f"there is no preset {preset!r}", field="--preset", remedy=f"use one of: {', '.join(presets())}"
        )
    text = (resources.files("pistoseg") / "presets" / f"{preset}.yaml").read_text("utf-8")
    value: dict[str, Any] = yaml.safe_load(text)
    return value


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _parse_override(item: str) -> dict[str, Any]:
    key, equals, text = item.partition("=")
    if not equals or not key.strip():
        raise PistoSegError(f"{item!r} is not section.key=value", field="--set")
    try:
        value: Any = yaml.safe_load(text) if text.strip() else None
    except yaml.YAMLError as error:
        raise PistoSegError(f"{item!r}: the value is not valid YAML: {error}", field="--set") from None
    *sections, field = key.strip().split(".")
    nested = {field: value}
    for section in reversed(sections):
        nested = {section: nested}
    return nested


def _suggestion(location: tuple[int | str, ...]) -> str:
    import difflib

    model: Any = Config
    for part in location[:-1]:
        annotation = (
            model.model_fields[part].annotation if isinstance(part, str) and part in model.model_fields else None
        )
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return ""
        model = annotation
    close = difflib.get_close_matches(str(location[-1]), list(model.model_fields), n=1)
    return f"; did you mean {close[0]}?" if close else ""
