import copy

import pytest
import segmentation_models_pytorch as smp
import torch

from pistoseg.models import segmentation
from pistoseg.models.scse import ScSE


def pair(channels: int) -> tuple[torch.nn.Module, ScSE]:
    torch.manual_seed(0)
    theirs = smp.base.Attention("scse", in_channels=channels).attention
    return theirs, ScSE(copy.deepcopy(theirs))


def differentiated(module: torch.nn.Module, features: torch.Tensor, by: torch.Tensor) -> list[torch.Tensor]:
    """Output and all gradients."""
    features = features.clone().requires_grad_()
    output = module(features)
    output.backward(by.to(output.dtype))
    return [output.detach(), features.grad, *(parameter.grad for parameter in module.parameters())]


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("shape", [(3, 32, 6, 5), (1, 16, 1, 1), (2, 48, 1, 9)])
def test_output_and_gradients_are_those_of_smp(layout, shape):
    features, by = torch.randn(2, *shape).unbind()
    features = features.contiguous(memory_format=layout)
    for expected, result in zip(*(differentiated(module, features, by) for module in pair(shape[1])), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


def test_its_gradient_is_that_of_its_output():
    _, module = pair(16)
    module.double()
    features = torch.randn(2, 16, 3, 4, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    inputs = (features.requires_grad_(), *module.parameters())
    assert torch.autograd.gradcheck(lambda features, *_: module(features), inputs)


def test_bf16_features_stay_bf16_and_are_as_exact_as_with_smp():
    theirs, ours = pair(64)
    features, by = (
        part.bfloat16().contiguous(memory_format=torch.channels_last) for part in torch.randn(2, 4, 64, 20, 20)
    )
    exact = differentiated(copy.deepcopy(theirs), features.float(), by)
    errors = []
    for module in (theirs, ours):
        with torch.autocast("cpu", torch.bfloat16):
            results = differentiated(module, features, by)
        assert results[0].dtype == results[1].dtype == torch.bfloat16
        errors.append([(result - right).norm() / right.norm() for result, right in zip(results, exact, strict=True)])
    for smps, own in zip(*errors, strict=True):
        assert own < max(1.2 * smps, 0.01)


def test_a_network_has_it_under_the_names_of_smp():
    network = segmentation.build("unet", "resnet18", 2, None).network
    plain = smp.Unet("resnet18", encoder_weights=None, classes=2, decoder_attention_type="scse")
    assert network.state_dict().keys() == plain.state_dict().keys()
    assert sum(isinstance(module, ScSE) for module in network.modules()) == 10
    plain.load_state_dict(network.state_dict())
    images = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        torch.testing.assert_close(network.eval()(images), plain.eval()(images), rtol=1e-4, atol=1e-4)
