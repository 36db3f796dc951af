"""What is trained: for each kind of network its loss and its validation. The loop around them is the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from pistoseg.classes import IGNORE_ID, TissueClasses
from pistoseg.config import RefinerConfig
from pistoseg.metrics import ConfusionMatrix, label_agreement, mean_over_classes, multilabel_scores
from pistoseg.models.bundle import Segmenter
from pistoseg.models.classifier import Classifier, classification_loss, pool_regions
from pistoseg.models.losses import segmentation_loss
from pistoseg.models.refining_losses import refining_loss
from pistoseg.models.segmentation import SegmentationNetwork
from pistoseg.patches.masked import MaskedImages
from pistoseg.training.labelled import LabelledCrops
from pistoseg.training.labelled_images import LabelledImages

Forward = Callable[..., Any]
"""The network in its precision: takes (N, H, W, 3) uint8 images, normalises them, and passes further tensors on."""


class Task(Protocol):
    """What the loop asks about the network that it trains; copied to every worker."""

    @property
    def score(self) -> str:
        """Name of the validation's score by which the best epoch is kept."""
        ...

    @property
    def validates(self) -> bool:
        """Whether there is anything to validate on."""
        ...

    def losses(self, forward: Forward, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The loss of an augmented batch as `loss`, and the terms that it is made of."""
        ...

    def validate(self, network: nn.Module, device: torch.device, rank: int, world: int) -> Any:
        """What one worker's share of the validation gives."""
        ...

    def scores(self, shares: list[Any]) -> dict[str, float]:
        """The validation's scores from all workers' shares, finite numbers; a score that has no value is left out."""
        ...


@dataclass(frozen=True)
class SegmentationTask:
    """Images with masks; validated by mIoU, or without masks by how well held-out image-level labels are met.

    Args:
        classes: the L tissues.
        loss: `bce`, `dice` or `bce+dice`.
        validation: URI of a validation artifact, or None.
        info: of the bundle that will be made of it: scale and window of the validation.
        labelled: images that no network is trained on and their labels, used where there is no validation; or None.
    """

    classes: TissueClasses
    loss: str
    validation: str | None
    info: dict[str, Any] = field(default_factory=dict)
    labelled: LabelledImages | None = None

    @property
    def score(self) -> str:
        """MIoU, or without masks the agreement with labels."""
        return "validation_miou" if self.validation or not self.labelled else "validation_label_iou"

    @property
    def validates(self) -> bool:
        """Whether there are images with masks, or held-out ones with labels."""
        return self.validation is not None or self.labelled is not None

    def losses(self, forward: Forward, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The segmentation loss."""
        logits = forward(batch["image"])
        return {"loss": segmentation_loss(logits, batch["mask"], self.loss, len(self.classes))}

    def validate(self, network: nn.Module, device: torch.device, rank: int, world: int) -> Any:
        """The confusion matrix of every world-th image, or labels and areas of its windows."""
        assert isinstance(network, SegmentationNetwork)
        segmenter = Segmenter(network, self.info, self.classes, device)
        if self.validation is None:
            assert self.labelled is not None
            return self.labelled.areas(segmenter, rank, world)
        matrix = ConfusionMatrix(len(self.classes))
        for item in MaskedImages.open(self.validation).shard(rank, world):
            matrix.update(item.mask, segmenter.predict(item.image, background="none"))
        return matrix.counts

    def scores(self, shares: list[Any]) -> dict[str, float]:
        """MIoU and fwIoU, or the mean agreement with labels."""
        if self.labelled is not None and self.validation is None:
            labels, areas = (np.concatenate(part) for part in zip(*shares, strict=True))
            return _known({self.score: mean_over_classes(label_agreement(labels, areas))})
        found = ConfusionMatrix(len(self.classes), np.sum(shares, axis=0)).to_dict(self.classes.names)
        return _known({self.score: found["miou"], "validation_fwiou": found["fwiou"]})


@dataclass(frozen=True)
class ClassificationTask:
    """Labelled crops for the CAM network; validated by mean average precision and F1 on windows that were held out.

    Args:
        class_names: of the L tissues.
        regions: R, labelled windows in a crop.
        held_out: reference to what `LabelledCrops` needs for the held-out windows, one a crop; or None.
        subcategory_weight: of the sub-categories' loss where the network has them.
    """

    class_names: tuple[str, ...]
    regions: int
    held_out: ray.ObjectRef | None
    subcategory_weight: float = 0.0
    score: str = "validation_map"

    @property
    def validates(self) -> bool:
        """Whether windows were held out."""
        return self.held_out is not None

    def losses(self, forward: Forward, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """L_cls (eq. 6); with sub-categories their loss is added to that of the classes."""
        count = len(self.class_names)
        logits = pool_regions(forward(batch["image"]).float(), batch["regions"], self.regions)
        labels = labels_in_view(batch["regions"], batch["labels"])
        of_classes = classification_loss(logits[..., :count], labels[..., :count])
        if logits.shape[-1] == count:
            return {"loss": of_classes}
        below = classification_loss(logits[..., count:], labels[..., count:])
        return {
            "loss": of_classes + self.subcategory_weight * below,
            "loss_cls": of_classes,
            "loss_subcategories": below,
        }

    def validate(self, network: nn.Module, device: torch.device, rank: int, world: int) -> tuple[Any, Any]:
        """Labels and probabilities, (n, L) each, of every world-th held-out window."""
        assert isinstance(network, Classifier)
        crops = LabelledCrops(ray.get(self.held_out))
        return window_probabilities(network, crops, range(rank, len(crops), world), device)

    def scores(self, shares: list[tuple[Any, Any]]) -> dict[str, float]:
        """Average precision and F1 by class, and their means."""
        labels, probabilities = (np.concatenate(part) for part in zip(*shares, strict=True))
        found = multilabel_scores(labels, probabilities)
        scores = {self.score: found["map"], "validation_f1": found["mean_f1"]}
        for kind in ("average_precision", "f1"):
            values = zip(self.class_names, found[kind], strict=True)
            scores |= {f"validation_{kind}/{name}": value for name, value in values}
        return _known(scores)


@dataclass(frozen=True)
class RefiningTask:
    """Labelled crops with pseudo-masks and CAMs for the refining network; its last epoch is kept.

    Args:
        n_classes: L.
        config: weights of the losses and their variants, and the number of regions.
    """

    n_classes: int
    config: RefinerConfig
    score: str = "validation_none"
    validates: bool = False

    def losses(self, forward: Forward, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """L = lambda_cls L_cls + lambda_cons L_cons + lambda_cross L_cross (eq. 9)."""
        pseudo, cam = batch["maps"].float().split(self.n_classes, dim=1)
        regions, labels = batch["regions"], labels_in_view(batch["regions"], batch["labels"])
        allowed = allowed_maps(regions, labels, tuple(pseudo.shape[-2:]))
        refined = forward(batch["image"], pseudo, cam, allowed)
        inside = (regions != IGNORE_ID).float().unsqueeze(1)
        valid = F.adaptive_avg_pool2d(inside, refined.class_map.shape[-2:])
        logits = pool_regions(refined.class_map.float(), regions, self.config.regions)
        total, parts = refining_loss(
            refined,
            logits,
            labels,
            valid,
            lambda_cls=self.config.lambda_cls,
            lambda_cons=self.config.lambda_cons,
            lambda_cross=self.config.lambda_cross,
            lambda_pseudo=self.config.lambda_pseudo,
            hardest=self.config.hardest,
            min_pooling=self.config.min_pooling,
        )
        return {"loss": total, **{f"loss_{name}": value for name, value in parts.items()}}

    def validate(self, network: nn.Module, device: torch.device, rank: int, world: int) -> None:
        """Nothing: what is refined has no truth."""

    def scores(self, shares: list[Any]) -> dict[str, float]:
        """None."""
        return {}


def _known(scores: dict[str, float | None]) -> dict[str, float]:
    return {name: float(value) for name, value in scores.items() if value is not None}


def labels_in_view(regions: Tensor, labels: Tensor) -> Tensor:
    """Labels (N, R, L) without those of regions that augmentation moved out of the crop: 255, as for unused ones."""
    numbers = torch.arange(labels.shape[1], device=regions.device)
    seen = (regions.flatten(1).unsqueeze(2) == numbers).any(1)
    return torch.where(seen.unsqueeze(2), labels, IGNORE_ID)


def allowed_maps(regions: Tensor, labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Which classes the labels allow at every cell of a grid.

    Args:
        regions: (N, H, W) uint8 numbers of labelled windows, 255 outside of all.
        labels: (N, R, L) uint8 flags, 255 for unused regions.
        size: (h, w) of the grid.
    Returns:
        (N, L, h, w) float, 0 or 1: the flags of the window that a cell's centre lies in; outside of all windows those
        of any window of the crop.
    """
    near = F.interpolate(regions.unsqueeze(1).float(), size=size, mode="nearest-exact")[:, 0].long()
    flags = torch.where(labels == IGNORE_ID, 0, labels).float()
    outside = flags.amax(1, keepdim=True)
    table = torch.cat([flags, outside], 1)
    index = torch.where(near == IGNORE_ID, flags.shape[1], near)
    rows = torch.arange(len(table), device=table.device)[:, None, None]
    return table[rows, index].permute(0, 3, 1, 2).contiguous()


def window_probabilities(
    network: Classifier, crops: LabelledCrops, indices: range, device: torch.device, batch_size: int = 32
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """What a CAM network says about labelled windows.

    Args:
        network: on the device.
        crops: with one labelled window each.
        indices: which samples of epoch 0.
        device: where it runs.
        batch_size: crops in a forward pass.
    Returns:
        Labels (n, L) uint8 and probabilities (n, L) float32 of these windows.
    """
    count = network.n_classes
    labels, probabilities = [np.zeros((0, count), np.uint8)], [np.zeros((0, count), np.float32)]
    training = network.training
    network.eval()
    with torch.inference_mode():
        for start in range(0, len(indices), batch_size):
            samples = [crops.sample(0, index)[:3] for index in indices[start : start + batch_size]]
            images, regions, flags = (np.stack(items) for items in zip(*samples, strict=True))
            maps = network(network.normalization(images, device))
            pooled = pool_regions(maps.float(), torch.from_numpy(regions).to(device), 1)
            labels.append(flags[:, 0, :count])
            probabilities.append(pooled[:, 0, :count].sigmoid().cpu().numpy())
    network.train(training)
    return np.concatenate(labels), np.concatenate(probabilities)
