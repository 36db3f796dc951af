"""Settings of what goes in and what comes out: classes, pixel size, data, mosaics, scores, machines, MLflow."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from pistoseg.classes import MAX_CLASSES, TissueClass, TissueClasses, folded
from pistoseg.config.base import Channel, Positive, Section, Share, refuse_gaps
from pistoseg.redaction import has_secret


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
        names = [folded(tissue.name) for tissue in self.classes]
        if len(set(names)) < len(names):
            raise ValueError("class names must differ (case and spaces around them do not count)")
        if 0 <= self.background_id < len(self.classes):
            raise ValueError(f"background_id {self.background_id} is the id of class {names[self.background_id]!r}")
        owners = {self.background_color: "the background"}
        for tissue in self.classes:
            if tissue.color in owners:
                raise ValueError(
                    f"{tissue.name} has the colour of {owners[tissue.color]}, {list(tissue.color)}, by which RGB masks "
                    "are read; give every class, and the background, a colour of its own"
                )
            owners[tissue.color] = tissue.name
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

    uri: str | None = Field(None, description="Data set folder, or manifest of slides; `--data` sets it.")
    validation: str | None = Field(None, description="Folder with img/ and mask/; null: the data set's own, if any.")
    layout: Literal["auto", "flags", "folders", "table"] = Field(
        "auto", description="Labels in file names, a folder per class, or a CSV/Parquet of windows."
    )
    table: str | None = Field(None, description="Table of windows, relative to the data; null: found by its name.")
    max_pixels: int = Field(50_000_000, ge=1, description="Larger images are rejected (px).")
    min_size: int = Field(16, ge=1, description="Images, and windows of them, with a smaller side are rejected (px).")
    max_rejected: Share = Field(0.1, description="Stop when more than this share of the images is rejected.")
    label_holdout: float = Field(
        0.0,
        ge=0,
        le=0.5,
        description="Share of the training images (or slides) on which no network is trained: models are scored by "
        "their image-level labels where there are no masks; 0: none.",
    )
    min_single_tissue: Positive = Field(20, description="Warn of classes with fewer single-tissue images.")
    background: Literal["none", "bright"] = Field(
        "none", description="bright: pixels lighter than background_grey are tissue-free."
    )
    background_grey: int = Field(200, ge=1, le=254, description="Grey value above which a pixel is tissue-free.")
    background_min_area: int = Field(50, ge=0, description="Smaller bright components are tissue (px).")
    window: int = Field(224, ge=16, le=4096, description="Windows cut from annotated slides (network px).")
    window_stride: int | None = Field(None, ge=1, description="Step between these (network px); null: side by side.")
    window_min_share: float = Field(
        0.02, gt=0, le=0.5, description="Least share of a window for a class to count; less than it may be unannotated."
    )


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
        "balanced", description="natural: by image; balanced: by class; or a weight for each class name."
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
        if self.strategy == "mosaic":
            self.anchors()
        return self

    def anchors(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Smallest and largest anchor of a mosaic, down and across (px); `ValueError` where there is none."""
        return self._anchors_of(self.height), self._anchors_of(self.width)

    def _anchors_of(self, side: int) -> tuple[int, int]:
        # 0.2 * 15 is a little above 3: that anchor is meant to be allowed.
        low, high = math.ceil(self.alpha * side - 1e-9), math.floor(self.beta * side + 1e-9)
        if low > high:
            raise ValueError(
                f"no anchor, a whole px, lies between alpha ({self.alpha}) and beta ({self.beta}) of {side} px; "
                "set them further apart"
            )
        return low, high


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

    @model_validator(mode="after")
    def _without_gaps(self) -> Self:
        refuse_gaps(self.stride, self.patch_size)
        return self

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
    max_failures: int = Field(
        2, ge=0, description="Restarts of a training, or of a trial of a search, whose process died."
    )
    wait_for_nodes: int = Field(
        0, ge=0, description="How long to wait for nodes that an autoscaler has yet to start (s); 0: there is none."
    )
    address: str | None = Field(None, description="Ray cluster; null: RAY_ADDRESS, else a local Ray.")


class TrackingConfig(Section):
    """MLflow."""

    uri: str | None = Field(
        None, description="Tracking server; null: MLFLOW_TRACKING_URI, else SQLite in the workspace."
    )
    experiment: str = Field("pistoseg", min_length=1, description="MLflow experiment.")
    model: str = Field("pistoseg", min_length=1, description="Registered model's name.")
    enabled: bool = Field(True, description="Whether runs are tracked.")


class StorageConfig(Section):
    """S3; credentials are never settings, they come from AWS's variables, profiles and roles."""

    endpoint: str | None = Field(None, description="URL of an S3 server; null: AWS_ENDPOINT_URL, else AWS.")
    region: str | None = Field(None, description="Of the bucket; null: AWS_REGION, else the profile's.")
    profile: str | None = Field(None, description="Of AWS's config files, with the credentials; null: AWS_PROFILE.")
    anonymous: bool = Field(False, description="Requests without credentials, for public buckets.")
    addressing: Literal["auto", "path", "virtual"] = Field(
        "auto",
        description="path: server/bucket/key; virtual: bucket.server/key; auto: path with an endpoint.",
    )

    @field_validator("endpoint")
    @classmethod
    def _no_secret(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("http://", "https://")):
            raise ValueError("must start with http:// or https://")
        if value is not None and has_secret(value):
            raise ValueError("must hold no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
        return value

    @model_validator(mode="before")
    @classmethod
    def _no_keys(cls, values: Any) -> Any:
        keys = {"key", "secret", "token", "access_key", "secret_key", "aws_access_key_id", "aws_secret_access_key"}
        if isinstance(values, dict) and (found := keys & {str(key).lower() for key in values}):
            raise ValueError(
                f"{', '.join(sorted(found))}: settings are logged and hold no secrets; set the variables "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
            )
        return values
