import cv2
import numpy as np
import pytest
import torch
from pytorch_grad_cam import GradCAM, GradCAMPlusPlus
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import nn

from pistoseg.models import cams, classifier
from pistoseg.models.cams import CamModel, normalize_cams
from pistoseg.models.inference import Predictor

CLASSES = 3


def build(gain, encoder="resnet18", subcategories=0):
    torch.manual_seed(0)
    network = classifier.build(encoder, CLASSES, None, output_stride=16, subcategories=subcategories).eval()
    network.head.weight.data.normal_(0, gain)
    return network


def by_the_library(network, method, images, class_id):
    """The map of a class by `pytorch_grad_cam`, by back-propagation from pooled logits."""
    whole = nn.Sequential(network, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    kind = GradCAM if method == "grad_cam" else GradCAMPlusPlus
    with kind(whole, [network.encoder.layer4]) as explain:
        return explain(images, [ClassifierOutputTarget(class_id)] * len(images))


def span(maps):
    """Every map on the scale of its own minimum and maximum, as the library gives it."""
    low, high = maps.min((-2, -1), keepdims=True), maps.max((-2, -1), keepdims=True)
    return (maps - low) / (high - low)


@pytest.mark.parametrize("gain", [10, 300])
@pytest.mark.parametrize("method", ["grad_cam", "grad_cam++"])
def test_gradient_methods_equal_a_well_kept_library(method, gain):
    """To 1e-4 of the span, with weights so large that the library's epsilon of 1e-6 beside squared gradients is small.

    With a gain of 1 that epsilon alone makes 6e-4 of Grad-CAM++'s span.
    """
    network = build(gain)
    images = torch.randn(2, 3, 64, 80)
    maps = CamModel(network, method)(images).numpy()
    assert maps.shape == (2, CLASSES, 64, 80)
    assert (maps.max((2, 3)) > 0).all()
    for class_id in range(CLASSES):
        expected = by_the_library(network, method, images, class_id)
        np.testing.assert_allclose(span(maps[:, class_id]), expected, atol=1e-4)


@torch.no_grad()
def test_cam_equals_its_closed_form():
    network = build(1.0, subcategories=2)
    images = torch.randn(2, 3, 64, 96)
    features = network.encoder(images)[-1].double().numpy()
    weights = network.head.weight.double().numpy()[:CLASSES, :, 0, 0]
    cells = np.maximum(np.einsum("ck,nkhw->nchw", weights, features), 0)
    expected = [[cv2.resize(m, (96, 64), interpolation=cv2.INTER_LINEAR) for m in image] for image in cells]
    np.testing.assert_allclose(CamModel(network, "cam")(images).numpy(), expected, rtol=1e-4, atol=1e-4)


def test_grad_cam_of_a_mean_of_the_class_map_is_cam_and_grad_cam_pp_is_not():
    network, images = build(0.1), torch.randn(2, 3, 48, 64)
    plain, by_gradient, plus = (CamModel(network, method)(images) for method in cams.METHODS)
    torch.testing.assert_close(by_gradient, plain, rtol=1e-4, atol=1e-5)
    assert np.corrcoef(plus.flatten(), plain.flatten())[0, 1] < 0.99


@pytest.mark.parametrize("method", cams.METHODS)
def test_maps_have_the_size_of_the_image_and_no_graph(method):
    network, images = build(1.0), torch.randn(1, 3, 50, 77)
    maps = CamModel(network, method)(images)
    assert maps.shape == (1, CLASSES, 50, 77)
    assert maps.dtype == torch.float32
    assert (maps >= 0).all()
    assert not maps.requires_grad
    assert all(parameter.grad is None for parameter in network.parameters())
    with torch.inference_mode():
        torch.testing.assert_close(CamModel(network, method)(images), maps)


@torch.no_grad()
def test_grad_cam_pp_of_signed_features_takes_their_positive_part_as_what_a_relu_would_give():
    """The last map of EfficientNet-lite has no ReLU; a sum of both signs could make the denominator vanish."""
    network, images = build(1.0, "tu-tf_efficientnet_lite0"), torch.randn(2, 3, 64, 64)
    features = network.encoder(images)[-1].double().numpy()
    assert features.min() < 0
    gradient = network.head.weight.double().numpy()[:, :, 0, 0] / 16  # the mean over 4x4 cells
    squared, cubed = gradient**2, gradient**3 * np.maximum(features, 0).sum((2, 3))[:, None]
    weights = 16 * np.where(gradient > 0, gradient * squared / (2 * squared + cubed), 0)
    cells = np.maximum(np.einsum("nck,nkhw->nchw", weights, features), 0)
    assert cells.max() > 0
    maps = CamModel(network, "grad_cam++")(images).numpy()
    expected = [[cv2.resize(m, (64, 64), interpolation=cv2.INTER_LINEAR) for m in image] for image in cells]
    np.testing.assert_allclose(maps, expected, rtol=1e-3, atol=1e-3 * cells.max())


@pytest.mark.parametrize("method", cams.METHODS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_predictor_averages_maps_over_symmetries_and_scales(method, precision):
    network = build(1.0)
    settings = {"tile": 64, "stride": 64, "device": "cpu", "average": "logits"}
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    model = CamModel(network, method)
    whole = Predictor(model, network.normalization, precision=precision, symmetries=8, scales=(1, 1.25), **settings)
    maps = whole.logits(pixels)
    assert maps.shape == (CLASSES, 64, 64)
    one = Predictor(model, network.normalization, precision="fp32", **settings)
    flipped, plain = one.logits(np.ascontiguousarray(pixels[:, ::-1]))[:, :, ::-1], one.logits(pixels)
    assert not np.allclose(flipped, plain, atol=0.1)
    if precision == "fp32":
        turns = [(k, flip) for k in range(4) for flip in (False, True)]
        average = np.zeros_like(plain)
        for k, flip in turns:
            seen = np.rot90(pixels, k)[:, :: -1 if flip else 1]
            got = one.logits(np.ascontiguousarray(seen))[:, :, :: -1 if flip else 1]
            average += np.rot90(got, -k, (1, 2)) / 8
        single = Predictor(model, network.normalization, precision="fp32", symmetries=8, **settings).logits(pixels)
        np.testing.assert_allclose(single, average, rtol=1e-3, atol=1e-3)
    else:
        exact = Predictor(model, network.normalization, precision="fp32", symmetries=8, scales=(1, 1.25), **settings)
        np.testing.assert_allclose(maps, exact.logits(pixels), atol=0.05 * maps.max())


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="unknown CAM method 'gradcam'; use one of cam, grad_cam, "):
        CamModel(nn.Identity(), "gradcam")


def test_maps_are_scaled_by_class_over_what_the_labels_allow():
    maps = np.random.default_rng(0).random((4, 6, 5)).astype(np.float32)
    maps[3] = 0
    allowed = np.ones((4, 6, 5), bool)
    allowed[1] = False
    allowed[2, :3] = False
    maps[2, 0, 0] = 9  # not allowed there, so that it must not set the scale
    scaled = normalize_cams(maps, allowed)
    assert scaled.dtype == np.float32
    np.testing.assert_allclose(scaled[0], maps[0] / maps[0].max(), rtol=1e-6)
    assert (scaled[1] == 0).all()
    assert (scaled[2, :3] == 0).all()
    np.testing.assert_allclose(scaled[2, 3:], maps[2, 3:] / maps[2, 3:].max(), rtol=1e-6)
    assert (scaled[3] == 0).all()
    assert maps[2, 0, 0] == 9
