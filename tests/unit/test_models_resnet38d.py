import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pistoseg.errors import PistoSegError
from pistoseg.models import encoders, resnet38d
from pistoseg.models.resnet38d import ResNet38d

WIDE = ["b2", "b2_1", "b2_2", "b3", "b3_1", "b3_2", "b4", *(f"b4_{k}" for k in range(1, 6)), "b5", "b5_1", "b5_2"]
NORM = ["weight", "bias", "running_mean", "running_var"]


def published_keys():
    """What the published .pth holds: convolutions and batch norms by block, no counters of batches."""
    norms, convolutions = ["bn7"], ["conv1a"]
    for block in WIDE:
        norms += [f"{block}.bn_branch2a", f"{block}.bn_branch2b1"]
        convolutions += [f"{block}.conv_branch2a", f"{block}.conv_branch2b1"]
        convolutions += [f"{block}.conv_branch1"] if block in ("b2", "b3", "b4", "b5") else []
    for block in ("b6", "b7"):
        norms += [f"{block}.bn_branch2{part}" for part in ("a", "b1", "b2")]
        convolutions += [f"{block}.conv_branch{part}" for part in ("1", "2a", "2b1", "2b2")]
    return {f"{n}.{k}" for n in norms for k in NORM} | {f"{n}.weight" for n in convolutions}


@pytest.fixture(scope="module")
def skeleton():
    with torch.device("meta"):
        return ResNet38d()


def save_published(path, skeleton, prefix=""):
    """A file with the published keys and shapes; every tensor repeats one number, so that it is small."""
    state = {}
    for number, key in enumerate(sorted(published_keys())):
        state[prefix + key] = torch.tensor([1e-3 + number * 1e-6]).expand(skeleton.state_dict()[key].shape)
    state[f"{prefix}fc8.weight"] = torch.zeros(1).expand(20, 4096, 1, 1)
    torch.save(state, path)
    return state


@pytest.fixture(scope="module")
def loaded(skeleton, tmp_path_factory):
    file = tmp_path_factory.mktemp("weights") / "published.pth"
    state = save_published(file, skeleton)
    return encoders.create("resnet38d", str(file), output_stride=8), state


def test_the_keys_are_those_of_the_published_weights(skeleton):
    keys = {key for key in skeleton.state_dict() if not key.endswith("num_batches_tracked")}
    assert keys == published_keys()


def test_widths_strides_and_dilations_are_those_of_the_published_network(skeleton):
    def square(c):
        return 9 * c * c

    wide = 1728 + 9 * 64 * 128 + 64 * 128 + 5 * square(128)
    wide += 9 * 128 * 256 + 128 * 256 + 5 * square(256) + 9 * 256 * 512 + 256 * 512 + 11 * square(512)
    wide += square(512) + 9 * 512 * 1024 + 512 * 1024 + 2 * 2 * 9 * 512 * 1024
    narrow = sum(i * o + i * o // 4 + 9 * (o // 4) * (o // 2) + (o // 2) * o for i, o in ((1024, 2048), (2048, 4096)))
    convolutions = [m for m in skeleton.modules() if isinstance(m, nn.Conv2d)]
    assert sum(m.weight.numel() for m in convolutions) == wide + narrow
    assert all(m.bias is None for m in convolutions)
    strided = {name for name, m in skeleton.named_modules() if isinstance(m, nn.Conv2d) and m.stride == (2, 2)}
    assert strided == {f"{block}.conv_branch{part}" for block in ("b2", "b3", "b4") for part in ("1", "2a")}
    dilated = {n: m.dilation[0] for n, m in skeleton.named_modules() if isinstance(m, nn.Conv2d) and m.dilation[0] > 1}
    assert dilated == {
        "b5.conv_branch2b1": 2,
        **{f"b5_{k}.conv_branch{part}": 2 for k in (1, 2) for part in ("2a", "2b1")},
        "b6.conv_branch2b1": 4,
        "b7.conv_branch2b1": 4,
    }
    assert (skeleton.b6.dropout.p, skeleton.b7.dropout.p) == (0.3, 0.5)


def test_the_maps_have_the_channels_and_strides_that_the_list_says(skeleton):
    assert skeleton.out_channels == [3, 128, 256, 512, 1024, 4096]
    maps = skeleton(torch.empty(2, 3, 96, 64, device="meta"))
    assert [m.shape[1] for m in maps] == skeleton.out_channels
    assert [96 // m.shape[2] for m in maps] == [1, 2, 4, 8, 8, skeleton.output_stride]
    assert all(m.shape[2] * 2 == m.shape[3] * 3 for m in maps)


def norm(x, bn):
    return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias).relu()


def randomized(block):
    for m in block.modules():
        if isinstance(m, nn.BatchNorm2d):
            for values in (m.weight.data, m.bias.data, m.running_mean):
                nn.init.normal_(values)
            nn.init.uniform_(m.running_var, 0.5, 2)
    return block.eval()


@torch.no_grad()
def test_blocks_are_pre_activated_and_the_shortcut_of_a_new_shape_starts_after_the_activation():
    torch.manual_seed(0)
    x = torch.randn(2, 4, 9, 9)
    same = randomized(resnet38d._WideBlock(4, 6, 4, 1, 2, 2))
    a, b = same.conv_branch2a.weight, same.conv_branch2b1.weight
    inner = norm(F.conv2d(norm(x, same.bn_branch2a), a, padding=2, dilation=2), same.bn_branch2b1)
    torch.testing.assert_close(same(x), (norm(x, same.bn_branch2a), x + F.conv2d(inner, b, padding=2, dilation=2)))

    halved = randomized(resnet38d._WideBlock(4, 6, 8, 2, 1, 2))
    start = norm(x, halved.bn_branch2a)
    inner = norm(F.conv2d(start, halved.conv_branch2a.weight, stride=2, padding=1), halved.bn_branch2b1)
    expected = F.conv2d(start, halved.conv_branch1.weight, stride=2)
    expected = expected + F.conv2d(inner, halved.conv_branch2b1.weight, padding=2, dilation=2)
    torch.testing.assert_close(halved(x)[1], expected)

    narrow = randomized(resnet38d._Bottleneck(4, 16, 4, 0.5))
    start = norm(x, narrow.bn_branch2a)
    inner = norm(F.conv2d(start, narrow.conv_branch2a.weight), narrow.bn_branch2b1)
    inner = norm(F.conv2d(inner, narrow.conv_branch2b1.weight, padding=4, dilation=4), narrow.bn_branch2b2)
    expected = F.conv2d(start, narrow.conv_branch1.weight) + F.conv2d(inner, narrow.conv_branch2b2.weight)
    torch.testing.assert_close(narrow(x)[1], expected)


def test_a_published_state_loads_whatever_else_is_in_it(loaded):
    encoder, state = loaded
    for key in published_keys():
        assert torch.equal(encoder.state_dict()[key], state[key]), key


def test_pretrained_it_trains_as_published_with_fixed_norms_and_first_blocks(loaded):
    encoder, _ = loaded
    encoder.train()
    norms = [m for m in encoder.modules() if isinstance(m, nn.BatchNorm2d)]
    assert encoder.training
    assert encoder.b7.dropout.training
    assert not any(m.training for m in norms)
    trained = {key for key, value in encoder.named_parameters() if value.requires_grad}
    convolutions = {f"{name}.weight" for name, m in encoder.named_modules() if isinstance(m, nn.Conv2d)}
    assert trained == {key for key in convolutions if key.split(".")[0] not in ("conv1a", "b2", "b2_1", "b2_2")}


def test_without_weights_it_trains_as_a_whole(skeleton):
    skeleton.train()
    assert all(parameter.requires_grad for parameter in skeleton.parameters())
    assert all(module.training for module in skeleton.modules())


@pytest.mark.parametrize("prefix", ["module.", "encoder."])
def test_a_state_of_a_network_around_it_loads_too(skeleton, tmp_path, prefix):
    state = save_published(tmp_path / "network.pth", skeleton, prefix)
    found = encoders._fit(skeleton, encoders._read(str(tmp_path / "network.pth")), "network.pth")
    assert torch.equal(found["b6.bn_branch2b1.weight"], state[f"{prefix}b6.bn_branch2b1.weight"])


def test_a_state_that_lacks_a_tensor_is_refused(skeleton):
    state = {key: value for key, value in skeleton.state_dict().items() if not key.startswith("b6.conv_branch2b2")}
    with pytest.raises(PistoSegError, match=r"x\.pth: weights: .*1 of \d+ tensors are missing.*b6\.conv_branch2b2"):
        encoders._fit(skeleton, state, "x.pth")


def test_imagenet_weights_are_asked_for_as_a_file(skeleton):
    with pytest.raises(PistoSegError, match=r"weights: no package and no hub.*path or URI of the published \.pth"):
        encoders.load_weights(skeleton, "resnet38d", "imagenet")
    assert encoders.normalization("resnet38d", "imagenet") == (encoders.IMAGENET_MEAN, encoders.IMAGENET_STD)


@pytest.mark.parametrize("stride", [16, 32])
def test_another_output_stride_is_refused(stride):
    with pytest.raises(PistoSegError, match=r"output_stride: .*output stride 8, not 5 and.*set output_stride to 8"):
        encoders.create("resnet38d", output_stride=stride)
