import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pistoseg.classes import TissueClass, TissueClasses
from pistoseg.errors import PistoSegError
from pistoseg.models import bundle, classifier, encoders, segmentation
from pistoseg.models.classifier import classification_loss, pool_regions
from pistoseg.models.segmentation import Normalization

SMALL = "tu-mobilenetv3_small_050"
CLASSES = TissueClasses((TissueClass("tumor", (0, 64, 128)), TissueClass("strôma", (64, 128, 0))))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return classifier.build(SMALL, 2, None, dropout=0.4, subcategories=3).eval()


@pytest.mark.parametrize("encoder", ["tu-tf_efficientnet_lite0", "efficientnet-b0", SMALL])
@pytest.mark.parametrize("stride", [8, 16, 32])
def test_encoders_have_the_output_stride_that_is_asked_for(encoder, stride):
    module = encoders.create(encoder, output_stride=stride).eval()
    with torch.inference_mode():
        assert module(torch.randn(1, 3, 64, 96))[-1].shape[2:] == (64 // stride, 96 // stride)
    assert module.output_stride == stride


@torch.no_grad()
def test_the_mean_of_the_class_map_is_the_logit_of_the_pooled_features(network):
    images = torch.randn(2, 3, 64, 96)
    pooled = network.encoder(images)[-1].mean((2, 3))
    expected = pooled @ network.head.weight[:, :, 0, 0].T
    regions = torch.zeros(2, 64, 96, dtype=torch.uint8)
    torch.testing.assert_close(pool_regions(network(images), regions, 1)[:, 0], expected, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_images_of_any_size_give_a_cell_for_every_stride(network):
    assert network(torch.randn(1, 3, 75, 33)).shape == (1, 2 + 2 * 3, 5, 3)
    assert network(torch.randn(1, 3, 8, 40)).shape == (1, 8, 1, 3)
    images = torch.randn(1, 3, 75, 40)
    padded = F.pad(images, (0, 8, 0, 5), mode="reflect")
    torch.testing.assert_close(network(images), network.head(network.encoder(padded)[-1])[..., :5, :3])


def test_without_subcategories_there_is_a_channel_a_class():
    network = classifier.build(SMALL, 4, None, output_stride=32).eval()
    assert network(torch.randn(1, 3, 64, 64)).shape == (1, 4, 2, 2)
    assert network.normalization == Normalization()


@torch.no_grad()
def test_dropout_drops_channels_in_training_alone(network):
    features = torch.ones(1, network.head.in_channels, 4, 4)
    still = network.class_map(features)
    assert torch.equal(network.class_map(features), still)
    network.train()
    try:
        dropped = network.class_map(features)
    finally:
        network.eval()
    assert not torch.allclose(dropped, still)
    torch.testing.assert_close(dropped, dropped[..., :1, :1].expand_as(dropped))


def test_pooling_equals_a_mean_over_the_pixels_of_a_region():
    rng = np.random.default_rng(0)
    maps = rng.standard_normal((2, 3, 4, 5))
    regions = np.full((2, 32, 40), 255, np.uint8)
    regions[0, :13, :21], regions[0, 13:30, 21:], regions[1, 3:5, 7:9] = 0, 1, 3
    pixels = np.kron(maps, np.ones((8, 8)))
    expected = np.zeros((2, 4, 3))
    for n in range(2):
        for r in range(4):
            inside = regions[n] == r
            if inside.any():
                expected[n, r] = pixels[n][:, inside].mean(1)
    pooled = pool_regions(torch.tensor(maps), torch.tensor(regions), 4)
    np.testing.assert_allclose(pooled.numpy(), expected, atol=1e-12)
    assert pool_regions(torch.tensor(maps).bfloat16(), torch.tensor(regions), 4).dtype == torch.float32


def test_pooling_has_the_gradient_of_its_shares():
    regions = torch.randint(0, 3, (2, 12, 12), dtype=torch.uint8)
    maps = torch.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: pool_regions(x, regions, 4), maps)


def test_the_loss_is_the_soft_margin_loss_of_the_used_regions():
    torch.manual_seed(1)
    logits = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 2, (3, 4, 5), dtype=torch.uint8)
    labels[0, 2:], labels[2, 0] = 255, 255
    used = labels[..., 0] != 255
    z, y = logits[used], labels[used].double()
    by_paper = -(y * torch.log(1 / (1 + (-z).exp())) + (1 - y) * torch.log((-z).exp() / (1 + (-z).exp()))).mean(1)
    loss = classification_loss(logits, labels)
    torch.testing.assert_close(loss, by_paper.mean())
    torch.testing.assert_close(loss, F.multilabel_soft_margin_loss(z, y))
    assert torch.autograd.gradcheck(lambda x: classification_loss(x, labels), logits)


def test_the_loss_is_nought_without_regions_and_finite_for_large_logits():
    logits = torch.randn(2, 3, 4, requires_grad=True)
    loss = classification_loss(logits, torch.full((2, 3, 4), 255, dtype=torch.uint8))
    loss.backward()
    assert loss == 0
    assert (logits.grad == 0).all()
    large = torch.tensor([[[1e4, -1e4]]], dtype=torch.bfloat16)
    assert classification_loss(large, torch.tensor([[[0, 1]]], dtype=torch.uint8)) == pytest.approx(1e4, rel=0.01)


@pytest.mark.parametrize("where", ["disk", "memory"])
def test_a_saved_classifier_gives_the_same_maps(network, tmp_path, where):
    uri = str(tmp_path / "cam [1]") if where == "disk" else "memory://models/cam"
    network.normalization = Normalization((0.7, 0.5, 0.6), (0.2, 0.25, 0.3))
    classifier.save(uri, network, CLASSES, lineage={"patches": "3f2a"}, metrics={"map": np.float64(0.5)})
    loaded = classifier.load(uri, "cpu")
    images = torch.randn(1, 3, 40, 50)
    with torch.inference_mode():
        assert torch.equal(loaded(images), network(images))
    assert not loaded.training
    assert (loaded.encoder_name, loaded.n_classes, loaded.subcategories, loaded.output_stride) == (SMALL, 2, 3, 16)
    assert (loaded.dropout.p, loaded.normalization) == (0.4, network.normalization)
    if where == "disk":
        assert sorted(item.name for item in Path(uri).iterdir()) == ["model.json", "model.safetensors"]
        info = json.loads(Path(uri, "model.json").read_text())
        assert info["format"] == "pistoseg-classifier"
        assert (info["metrics"], info["lineage"]) == ({"map": 0.5}, {"patches": "3f2a"})


def test_a_model_of_another_kind_and_a_damaged_one_are_refused(network, tmp_path):
    cam, segmenter = str(tmp_path / "cam"), str(tmp_path / "segmenter")
    classifier.save(cam, network, CLASSES)
    bundle.save(segmenter, segmentation.build("unet", SMALL, 2, None, None), classes=CLASSES, patch_size=64)
    with pytest.raises(PistoSegError, match=r"model\.json: format: does not describe .*'pistoseg-model', not"):
        classifier.load(segmenter)
    with pytest.raises(PistoSegError, match=r"model\.json: format: does not describe .*'pistoseg-classifier', not"):
        bundle.load(cam)
    description = Path(cam, "model.json")
    info = json.loads(description.read_text())
    for changes, message in (
        ({"subcategories": 2}, "weights do not fit"),
        ({"encoder": "tu-no_such"}, "no_such"),
        ({"classes": [{}]}, "is damaged"),
    ):
        description.write_text(json.dumps(info | changes))
        with pytest.raises(PistoSegError, match=message):
            classifier.load(cam)
    del info["output_stride"]
    description.write_text(json.dumps(info))
    with pytest.raises(PistoSegError, match="output_stride: is missing"):
        classifier.load(cam)


def test_the_encoder_of_a_saved_classifier_starts_another_network(network, tmp_path):
    classifier.save(str(tmp_path), network, CLASSES)
    encoder = encoders.create(SMALL, str(tmp_path / "model.safetensors"), output_stride=32)
    for key, value in network.encoder.state_dict().items():
        assert torch.equal(encoder.state_dict()[key], value), key
