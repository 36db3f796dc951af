"""The CAM network: a multi-label classifier whose logits are means of a class map."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pistoseg.classes import IGNORE_ID, TissueClasses
from pistoseg.models import encoders, files, inference
from pistoseg.models.segmentation import Normalization, pad

FORMAT = "pistoseg-classifier"

_ARGUMENTS = ("encoder", "output_stride", "dropout", "subcategories")


class Classifier(nn.Module):
    """An encoder and a 1x1 convolution without bias on its last feature map.

    The convolution commutes with mean pooling, so that the mean of the class map over a region is the logit of that
    region, and the class map itself is its class activation map (Zhou et al. 2016).

    Attributes:
        normalization: what its input went through.
        encoder, encoder_name: the encoder and its name.
        n_classes: L tissue classes.
        subcategories: k sub-categories of every class (SC-CAM, Chang et al. 2020); 0 without.
        output_stride: input px per px of the class map.
        dropout: on whole channels of the last feature map, in training.
    """

    def __init__(
        self,
        encoder: nn.Module,
        normalization: Normalization,
        encoder_name: str,
        n_classes: int,
        dropout: float = 0.0,
        subcategories: int = 0,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.normalization = normalization
        self.encoder_name = encoder_name
        self.n_classes = n_classes
        self.subcategories = subcategories
        self.output_stride = int(encoder.output_stride)  # type: ignore[arg-type]
        self.dropout = nn.Dropout2d(dropout)
        channels: int = encoder.out_channels[-1]  # type: ignore[index, assignment]
        self.head = nn.Conv2d(channels, n_classes * (1 + subcategories), 1, bias=False)
        nn.init.xavier_uniform_(self.head.weight)

    def forward(self, images: Tensor) -> Tensor:
        """Class map of normalised images of any size.

        Args:
            images: (N, 3, H, W) float.
        Returns:
            (N, L, h, w) float, a cell for every `output_stride` px from the top left, the last ones partly outside
            where these do not divide H and W. With k sub-categories (N, L + L*k, h, w): the classes, then the
            sub-categories of class c at channels L + c*k ... L + (c+1)*k - 1.
        """
        return self.class_map(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """Last feature map, (N, 3, H, W) float -> (N, C, h, w) float."""
        height, width = images.shape[-2:]
        features: Tensor = self.encoder(pad(images, self.output_stride))[-1]
        return features[..., : -(-height // self.output_stride), : -(-width // self.output_stride)]

    def class_map(self, features: Tensor) -> Tensor:
        """Class map of the last feature map, (N, C, h, w) float -> as `forward`."""
        maps: Tensor = self.head(self.dropout(features))
        return maps


def build(
    encoder: str,
    n_classes: int,
    weights: str | None = "imagenet",
    output_stride: int = 16,
    dropout: float = 0.0,
    subcategories: int = 0,
) -> Classifier:
    """Build a classifier.

    Args:
        encoder: smp name, `tu-` and a timm name, or `resnet38d` (the published one, of output stride 8).
        n_classes: L tissue classes.
        weights: of the encoder: `imagenet`, `none` or None, or a path or URI of a weights file.
        output_stride: input px per px of the class map: 8, 16 or 32.
        dropout: probability that a channel of the last feature map is dropped in training.
        subcategories: of every class; 0 without.
    Raises:
        PistoSegError: where there is no such encoder, it can't have that stride, or there are no such weights.
    """
    module = encoders.create(encoder, weights, output_stride=output_stride)
    mean, std = encoders.normalization(encoder, weights)
    return Classifier(module, Normalization(mean, std), encoder, n_classes, dropout, subcategories)


def pool_regions(maps: Tensor, regions: Tensor, n_regions: int) -> Tensor:
    """Mean of maps over numbered regions; a cell counts by the share of its area that lies in the region.

    Args:
        maps: (N, C, h, w) float, over the whole of the image.
        regions: (N, H, W) uint8, number 0..R-1 of the region that a pixel lies in; others lie in none. Shares are
            exact where h divides H and w divides W.
        n_regions: R.
    Returns:
        (N, R, C) float, at least float32; 0 where a region has no pixel.
    """
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    numbers = torch.arange(n_regions, device=regions.device).view(1, -1, 1, 1)
    inside = (regions.unsqueeze(1) == numbers).to(maps.dtype)
    height, width = maps.shape[-2:]
    with torch.autocast(maps.device.type, enabled=False):
        shares = F.adaptive_avg_pool2d(inside, (height, width)).flatten(2)  # (N, R, h*w)
        sums = shares @ maps.flatten(2).transpose(1, 2)
    area = shares.sum(2, keepdim=True)
    return sums / torch.where(area > 0, area, 1)


def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Multi-label soft margin loss (eq. 6), the mean over all regions that have labels.

        L_cls = -1 / L sum_i [ y_i log s(z_i) + (1 - y_i) log(1 - s(z_i)) ]

    with z the logits, s the sigmoid and y the labels; log(e^-z / (1 + e^-z)) of the paper is log(1 - s(z)).

    Args:
        logits: (N, R, L) float.
        labels: (N, R, L) uint8 flags; 255 where a region is unused.
    Returns:
        () float, at least float32; 0 with a gradient of 0 when no region is used.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    used = labels != IGNORE_ID
    target = torch.where(used, labels, 0).to(logits.dtype)
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return torch.where(used, loss, 0).sum() / used.sum().clamp(min=1)


def save(
    uri: str,
    classifier: Classifier,
    classes: TissueClasses,
    *,
    lineage: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> None:
    """Write a classifier as `model.safetensors` and `model.json`.

    Args:
        uri: folder, local or on any fsspec file system.
        classifier: on any device.
        classes: tissue classes by class id.
        lineage: artifact fingerprints, code version, data summary.
        metrics: scores.
    """
    info = {
        "format": FORMAT,
        "encoder": classifier.encoder_name,
        "output_stride": classifier.output_stride,
        "dropout": classifier.dropout.p,
        "subcategories": classifier.subcategories,
        "normalization": {"mean": list(classifier.normalization.mean), "std": list(classifier.normalization.std)},
        **classes.to_json(),
        "lineage": dict(lineage or {}),
        "metrics": dict(metrics or {}),
    }
    files.write_model(uri, classifier, info)


def load(uri: str, device: str | torch.device | None = None) -> Classifier:
    """Load a classifier, in evaluation mode.

    Args:
        uri: the folder, local or on any fsspec file system.
        device: `cpu`, `cuda`...; None or `auto` for CUDA where there is one.
    Raises:
        PistoSegError: where the folder holds no classifier, is of a newer format, or its parts do not fit each other.
    """
    info, state = files.read_model(uri, FORMAT, (*_ARGUMENTS, "normalization", "classes"))
    try:
        classes = TissueClasses.from_json(info)
        normalization = Normalization(tuple(info["normalization"]["mean"]), tuple(info["normalization"]["std"]))
    except (KeyError, TypeError, ValueError) as error:
        raise files.damaged(uri, info, error) from error
    module = build(n_classes=len(classes), weights=None, **{name: info[name] for name in _ARGUMENTS})
    module.normalization = normalization
    files.fill(module, state, uri)
    return module.to(inference.resolve_device(device)).eval()
