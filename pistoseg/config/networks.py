"""Settings of the networks: how each is trained and what it is used for."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pistoseg.config.base import Positive, Precision, Section, Share, refuse_gaps


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
    """How a network is trained."""

    epochs: Positive = Field(15, description="Epochs.")
    samples_per_epoch: Positive | None = Field(None, description="Samples in an epoch; null: all that there are.")
    batch_size: Positive = Field(
        16, description="Images in an optimizer step, over all workers: as many each, rounded down, but one at least."
    )
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="AdamW, or SGD with momentum.")
    momentum: float = Field(0.9, ge=0, lt=1, description="Momentum of SGD.")
    lr: float = Field(1e-3, gt=0, le=1, description="Learning rate at the start.")
    schedule: Literal["exponential", "polynomial"] = Field(
        "exponential",
        description="exponential: times lr_decay after every epoch; polynomial: (1 - step/steps)^lr_power.",
    )
    lr_decay: float = Field(0.9, gt=0, le=1, description="Factor on the learning rate after every epoch.")
    lr_power: float = Field(0.9, gt=0, le=4, description="Exponent of the polynomial schedule.")
    new_layers_factor: float = Field(
        1.0, gt=0, le=100, description="Factor on the learning rate of the layers beside the pretrained encoder."
    )
    weight_decay: float = Field(0.05, ge=0, le=1, description="Weight decay of the optimizer.")
    clip_norm: float = Field(5.0, ge=0, description="Largest norm of the gradient; 0: no clipping.")
    average_decay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Decay per step of a running average of the weights, which is what is kept; 0: off.",
    )
    precision: Precision = Field("auto", description="auto: bf16 autocast where the device is good at it, else fp32.")
    keep: Literal["best", "last"] = Field(
        "best", description="Model kept: that of the best validation score, or the last; without validation the last."
    )
    validate_every: Positive = Field(1, description="Epochs between two validations.")
    augmentation: AugmentationConfig = Field(default_factory=AugmentationConfig, description="Random changes.")


class SegmentationConfig(TrainingConfig):
    """A segmentation network; the preliminary one sees whole mosaics."""

    architecture: Literal["unetplusplus", "unet", "fpn", "deeplabv3plus", "manet", "linknet", "pan"] = Field(
        "unetplusplus", description="Segmentation network, as segmentation-models-pytorch names it."
    )
    encoder: str = Field("efficientnet-b0", description="Encoder, as segmentation-models-pytorch names it.")
    weights: str | None = Field("imagenet", description="Encoder weights: imagenet, a file or URI, or null for none.")
    decoder_attention: Literal["scse"] | None = Field("scse", description="Attention in UNet's and UNet++'s decoder.")
    loss: Literal["bce", "dice", "bce+dice"] = Field("bce", description="Segmentation loss; bce is the paper's.")


MaskSource = Literal["synthesized", "pseudo", "cam", "refined_pseudo", "refined_cam", "refined_cnn"]


class PreciseConfig(SegmentationConfig):
    """The precise model: the one that is delivered."""

    encoder: str = Field("efficientnet-b3", description="Encoder, as segmentation-models-pytorch names it.")
    lr: float = Field(5e-4, gt=0, le=1, description="Learning rate at the start.")
    patch_size: int = Field(
        224, ge=32, le=4096, description="Height and width of a crop of a training image (network px)."
    )
    masks: MaskSource = Field(
        "refined_cnn",
        description="Trained on: synthesized: the mosaics alone; pseudo: pseudo-masks of the real images; cam: their "
        "CAMs; refined_pseudo, refined_cam: these refined (eqs. 4, 5); refined_cnn: the refining network's own CAM.",
    )
    min_confidence: Share = Field(
        0.0, description="Pixels whose class has a smaller share of the scores are ignored in the loss; 0: none."
    )
    class_sampling: Literal["natural", "rare"] = Field(
        "natural",
        description="natural: every crop once per epoch; rare: images with a rare class more often, by the square root "
        "of how much rarer it is than the commonest.",
    )
    initial: Literal["imagenet", "preliminary"] = Field(
        "imagenet", description="Start from `weights`, or from the preliminary model where the networks are the same."
    )


class TilingConfig(Section):
    """How a network goes over whole training images, and on which grid its maps are kept."""

    grid: int = Field(32, ge=4, le=512, description="Maps are kept on a grid of this many cells per `patch_size`.")
    patch_size: int = Field(224, ge=32, le=4096, description="Window of the network (network px).")
    stride: int | None = Field(None, ge=8, description="Step between windows (network px); null: half a window.")
    symmetries: Literal[1, 2, 8] = Field(
        8, description="Averaged: 1: none, 2: the horizontal flip, 8: flips and quarter turns."
    )
    batch_size: Positive = Field(16, description="Windows in a forward pass; symmetric copies count.")

    @model_validator(mode="after")
    def _without_gaps(self) -> Self:
        refuse_gaps(self.stride, self.patch_size)
        return self

    @property
    def step(self) -> int:
        """Step between windows (network px)."""
        return self.stride or self.patch_size // 2


class PseudoMaskConfig(TilingConfig):
    """Logits of the preliminary model on the real training images."""

    constrain: bool = Field(True, description="Only classes that the image-level label names may appear.")


class LabelledCropConfig(TrainingConfig):
    """Training on image-level labels: windows within crops of larger images."""

    encoder: str = Field(
        "efficientnet-b0", description="resnet38d (the published one), or a name of segmentation-models-pytorch."
    )
    weights: str | None = Field("imagenet", description="Encoder weights: imagenet, a file or URI, or null for none.")
    initial: Literal["imagenet", "preliminary"] = Field(
        "imagenet", description="Start from `weights`, or from the preliminary model's encoder where it is the same."
    )
    output_stride: Literal[8, 16, 32] = Field(16, description="Network px per cell of the last feature map.")
    patch_size: int = Field(
        224, ge=32, le=4096, description="Height and width of a crop (network px); a multiple of output_stride."
    )
    regions: int = Field(1, ge=1, le=64, description="Most labelled windows of a crop that are learned at once.")

    @model_validator(mode="after")
    def _whole_cells(self) -> Self:
        """A last cell that lies partly outside of the crop would shift the class map against the windows in it."""
        size, stride = self.patch_size, self.output_stride
        if size % stride:
            below = size - size % stride
            raise ValueError(
                f"patch_size ({size}) must be a multiple of output_stride ({stride}): {below} or {below + stride}"
            )
        return self


class ClassifierConfig(LabelledCropConfig):
    """The CAM network: a classifier on the image-level labels (eq. 6)."""

    dropout: float = Field(0.0, ge=0, lt=1, description="Share of the last feature map's channels that is dropped.")
    holdout: float = Field(
        0.1, ge=0, le=0.5, description="Share of the training images that are left out to measure mAP and F1."
    )
    contradiction: float = Field(
        0.95,
        gt=0.5,
        lt=1,
        description="Labels that the classifier contradicts with at least this probability are listed.",
    )


class CamConfig(TilingConfig):
    """Class activation maps of the real training images."""

    method: Literal["cam", "grad_cam", "grad_cam++", "sc_cam"] = Field(
        "cam", description="sc_cam: CAM of a second classifier that also learns sub-categories of each class."
    )
    scales: tuple[Annotated[float, Field(gt=0, le=8)], ...] = Field(
        (1.0,), min_length=1, description="Zoom factors of the image that are averaged."
    )
    symmetries: Literal[1, 2, 8] = Field(
        2, description="Averaged: 1: none, 2: the horizontal flip, 8: flips and quarter turns."
    )
    subcategories: int = Field(10, ge=2, le=100, description="Sub-categories of a class (sc_cam).")
    subcategory_weight: float = Field(1.0, ge=0, le=100, description="Weight of the sub-categories' loss (sc_cam).")


class RefinerConfig(LabelledCropConfig):
    """The refining network (eqs. 2 to 9)."""

    epochs: Positive = Field(20, description="Epochs.")
    attention_channels: int = Field(192, ge=8, le=2048, description="C': channels of queries and keys (eq. 2).")
    normalize: Literal["columns", "rows"] = Field(
        "columns",
        description="What sums to 1 in the attention matrix (eq. 3): columns: each projected value is a weighted mean "
        "over the cells, as in the authors' code; rows: each cell gives away as much as it has.",
    )
    feature_norm: bool = Field(
        True, description="Normalise each cell's features before queries and keys; not in the paper."
    )
    lambda_cls: float = Field(1.0, ge=0, description="Weight of L_cls (eq. 6); 0: off.")
    lambda_cons: float = Field(1.0, ge=0, description="Weight of L_cons (eq. 7); 0: off.")
    lambda_cross: float = Field(1.0, ge=0, description="Weight of L_cross (eq. 8); 0: off.")
    lambda_pseudo: float = Field(
        0.0, ge=0, description="Weight of L_pseudo, by which the class map learns the pseudo-masks; not in the paper."
    )
    hardest: float = Field(
        1.0, gt=0, le=1, description="Share of the largest differences that L_cross averages; the authors' code: 0.2."
    )
    min_pooling: bool = Field(False, description="Add the authors' min-pooling term to L_cls.")

    @model_validator(mode="after")
    def _some_loss(self) -> Self:
        if not self.lambda_cls + self.lambda_cons + self.lambda_cross + self.lambda_pseudo:
            raise ValueError("every lambda is 0; nothing would be learned")
        return self


class RefinedMaskConfig(TilingConfig):
    """Refined pseudo-masks of the real training images."""

    constrain: bool = Field(
        True,
        description="Only classes that the labels name at a pixel may appear there. Off: those that they name anywhere "
        "in the network's windows over it, so that nothing changes in images with one label.",
    )
