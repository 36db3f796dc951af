"""Batch norms made part of the convolutions before them, in a network that is only used from now on."""

from __future__ import annotations

import copy
from collections import Counter

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

SIDE = 64
"""Height and width of the image on which it is found out what feeds what, and whether the result is the same, px."""
TOLERANCE = 1e-3
"""Largest difference of the outputs, of their largest value."""


def fold_batch_norms(network: nn.Module) -> nn.Module:
    """A network in evaluation mode that computes the same with fewer passes over its activations.

    A batch norm after a convolution with weights W and bias b, y = gamma (W x + b - mean) / sqrt(var + eps) + beta, is
    itself a convolution with weights gamma W / sqrt(var + eps). What was not fed by a convolution stays.

    Args:
        network: (N, 3, H, W) float -> (N, L, H, W); it is not changed.
    Returns:
        A copy, or the network itself where nothing can be folded or the copy would not compute the same.
    """
    if not any(isinstance(module, nn.BatchNorm2d) for module in network.modules()):
        return network
    device = next(network.parameters()).device
    example = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)).to(device)
    folded = copy.deepcopy(network).eval()
    expected, pairs = _observed(folded, example)
    names = {module: name for name, module in folded.named_modules()}
    for convolution, norm in pairs:
        _replace(folded, names[convolution], fuse_conv_bn_eval(convolution, norm))
        _replace(folded, names[norm], nn.Sequential(*norm.children()))  # timm's norms hold the activation
    with torch.inference_mode():
        difference = (folded(example) - expected).abs().max()
    return folded if difference <= TOLERANCE * expected.abs().max() else network


def _observed(network: nn.Module, example: Tensor) -> tuple[Tensor, list[tuple[nn.Conv2d, nn.BatchNorm2d]]]:
    """Output of a network, and its batch norms that get just what a convolution gives, each used once."""
    given: dict[int, nn.Conv2d] = {}
    alive = []  # an id is that of one tensor only as long as the tensor lives
    pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []
    used: Counter[nn.Module] = Counter()

    def after(module: nn.Module, _: object, output: Tensor) -> None:
        used[module] += 1
        if isinstance(module, nn.Conv2d):
            given[id(output)] = module
            alive.append(output)

    def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if isinstance(module, nn.BatchNorm2d) and id(inputs[0]) in given:
            pairs.append((given[id(inputs[0])], module))

    hooks = []
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
            hooks += [module.register_forward_hook(after), module.register_forward_pre_hook(before)]
    with torch.inference_mode():
        output: Tensor = network(example)
    for hook in hooks:
        hook.remove()
    return output, [pair for pair in pairs if used[pair[0]] == used[pair[1]] == 1]


def _replace(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, module)
