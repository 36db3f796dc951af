"""Class activation maps of a classifier, by one interface."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from pistoseg.models.classifier import Classifier

METHODS = ("cam", "grad_cam", "grad_cam++")


class CamModel(nn.Module):
    """Class activation maps at the size of the image, for a `Predictor` that averages `logits`.

    With A_k(x) the last feature map, S_c the class's logit, and g_ck(x) = dS_c / dA_k(x):

        cam         ReLU( sum_k w_ck A_k(x) ), w the weights of the classifier's 1x1 convolution (Zhou et al. 2016)
        grad_cam    ReLU( sum_k a_ck A_k(x) ), a_ck = sum_x g_ck(x) (Selvaraju et al. 2017, eqs. 1 and 2)
        grad_cam++  ReLU( sum_k a_ck A_k(x) ), a_ck = sum_x b_ck(x) ReLU(g_ck(x)),
                    b_ck(x) = g^2 / (2 g^2 + g^3 sum_y A_k(y)) (Chattopadhay et al. 2018, eqs. 5, 7 and 19)

    Two factors of the papers that change nothing but a map's scale are left out, because they would weigh tiles of
    other sizes and scores differently when tiles and scales are averaged: 1 / (h w) in Grad-CAM and exp(S_c) in
    Grad-CAM++. As S_c is the mean of the class map, g_ck(x) = w_ck / (h w) everywhere, so that Grad-CAM equals CAM for
    this network, as its authors prove; Grad-CAM++ does not. SC-CAM (Chang et al. 2020) is `cam` of a classifier that
    was trained with sub-categories, of which the maps of the classes are taken.

    Args:
        classifier: the CAM network.
        method: one of `METHODS`.
    """

    def __init__(self, classifier: Classifier, method: str = "cam") -> None:
        super().__init__()
        if method not in METHODS:
            raise ValueError(f"unknown CAM method {method!r}; use one of {', '.join(METHODS)}")
        self.classifier = classifier
        self.method = method

    def forward(self, images: Tensor) -> Tensor:
        """Maps of normalised images, (N, 3, H, W) float -> (N, L, H, W) float32 >= 0, bilinear between cells.

        The encoder runs without a graph, and inference mode is left for the head where gradients are needed.
        """
        height, width = images.shape[-2:]
        with torch.no_grad():
            features = self.classifier.features(images)
        with torch.autocast(images.device.type, enabled=False):
            maps = self._maps(features.float())
        stride = self.classifier.output_stride
        size = (maps.shape[-2] * stride, maps.shape[-1] * stride)
        return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)[..., :height, :width]

    def _maps(self, features: Tensor) -> Tensor:
        """(N, C, h, w) float32 -> (N, L, h, w) float32 >= 0."""
        if self.method == "cam":
            with torch.no_grad():
                return self.classifier.class_map(features)[:, : self.classifier.n_classes].relu()
        with torch.inference_mode(False), torch.enable_grad():
            features = features.detach().clone().requires_grad_()
            scores = self.classifier.class_map(features)[:, : self.classifier.n_classes].mean((2, 3)).sum(0)
            maps = []
            for score in scores:
                (gradient,) = torch.autograd.grad(score, features, retain_graph=True)
                weights = _grad_cam(gradient) if self.method == "grad_cam" else _grad_cam_pp(gradient, features)
                maps.append(torch.einsum("nk,nkhw->nhw", weights, features).relu().detach())
        return torch.stack(maps, 1)


def normalize_cams(maps: NDArray[np.float32], allowed: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Maps of one image on a scale of 0 to 1.

    Args:
        maps: (L, h, w) float32 >= 0.
        allowed: (L, h, w) bool, the classes that the labels allow at every pixel.
    Returns:
        (L, h, w) float32: every class divided by its own maximum over the image where it is allowed, 0 where it is not.
    """
    kept = np.where(allowed, maps, 0).astype(np.float32)
    peak = kept.max((1, 2), keepdims=True)
    return np.divide(kept, peak, out=np.zeros_like(kept), where=peak > 0)


def _grad_cam(gradient: Tensor) -> Tensor:
    """Channel weights from the gradient, (N, C, h, w) -> (N, C)."""
    return gradient.sum((2, 3))


def _grad_cam_pp(gradient: Tensor, features: Tensor) -> Tensor:
    """Channel weights from the gradient and the feature map, (N, C, h, w) each -> (N, C).

    b is written as 1 / (2 + g sum A): where g is positive that needs no epsilon. The method is made for features that a
    ReLU gave; of an encoder without one, only the positive part enters the sum, which keeps b in (0, 1/2].
    """
    positive = gradient.relu()
    total = features.relu().sum((2, 3), keepdim=True)
    return (positive / (2 + positive * total)).sum((2, 3))
