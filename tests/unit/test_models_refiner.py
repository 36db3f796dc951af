import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pistoseg.classes import TissueClass, TissueClasses
from pistoseg.errors import PistoSegError
from pistoseg.models import files, refiner
from pistoseg.models.inference import Predictor
from pistoseg.models.refiner import RefineModel, activation, attention, normalized_cam, project
from pistoseg.models.refining_losses import consistency_loss, refining_loss

SMALL = "tu-mobilenetv3_small_050"
L = 2


def tensors(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def attention_by_loops(query, key, normalize):
    """A of one sample, element by element."""
    cells = query.shape[1]
    matrix = np.zeros((cells, cells))
    for i in range(cells):
        for j in range(cells):
            matrix[i, j] = math.exp(float(query[:, i] @ key[:, j]))
    sums = matrix.sum(0)[None] if normalize == "columns" else matrix.sum(1)[:, None]
    return matrix / sums


def gradients_by_hand(maps, query, key, upstream, normalize):
    """Derivatives of sum(upstream * (maps A)) by maps, query and key of one sample, from the softmax's own."""
    matrix = attention_by_loops(query, key, normalize)
    by_matrix = maps.T @ upstream
    axis = 0 if normalize == "columns" else 1
    by_scores = matrix * (by_matrix - (matrix * by_matrix).sum(axis, keepdims=True))
    return upstream @ matrix.T, key @ by_scores.T, query @ by_scores


@pytest.mark.parametrize("normalize", ["columns", "rows"])
def test_attention_is_the_softmax_of_the_inner_products(normalize):
    query, key = tensors((2, 4, 6), (2, 4, 6))
    matrices = attention(query, key, normalize)
    for n in range(2):
        expected = attention_by_loops(query[n].numpy(), key[n].numpy(), normalize)
        np.testing.assert_allclose(matrices[n].numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(matrices.sum(1 if normalize == "columns" else 2).numpy(), 1, rtol=1e-12)


@pytest.mark.parametrize("normalize", ["columns", "rows"])
@pytest.mark.parametrize(("height", "width", "maps", "channels"), [(2, 3, 2, 4), (3, 3, 5, 2), (13, 17, 3, 4)])
def test_projected_values_and_gradients_are_those_of_the_matrix_product(height, width, maps, channels, normalize):
    cells = height * width
    values, query, key, upstream = tensors(
        (2, maps, height, width), (2, channels, cells), (2, channels, cells), (2, maps, height, width)
    )
    for tensor in (values, query, key):
        tensor.requires_grad_()
    projected = project(values, query, key, normalize)
    found = torch.autograd.grad((projected * upstream).sum(), (values, query, key))
    assert projected.shape == values.shape
    for n in range(2):
        flat, q, k, g = (item[n].detach().flatten(1).numpy() for item in (values, query, key, upstream))
        expected = flat @ attention_by_loops(q, k, normalize)
        np.testing.assert_allclose(projected[n].flatten(1).detach().numpy(), expected, rtol=1e-9, atol=1e-12)
        for mine, theirs in zip(found, gradients_by_hand(flat, q, k, g, normalize), strict=True):
            np.testing.assert_allclose(mine[n].flatten(1).numpy(), theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("normalize", ["columns", "rows"])
def test_attention_and_projection_pass_gradcheck(normalize):
    values, query, key = (item.requires_grad_() for item in tensors((2, 3, 2, 3), (2, 4, 6), (2, 4, 6)))
    assert torch.autograd.gradcheck(lambda *inputs: attention(*inputs, normalize), (query, key))
    assert torch.autograd.gradcheck(lambda *inputs: project(*inputs, normalize), (values, query, key))


@pytest.mark.parametrize("normalize", ["columns", "rows"])
def test_blocks_pass_gradcheck(normalize, monkeypatch):
    monkeypatch.setattr(refiner, "_BLOCK", 4)
    values, query, key = (item.requires_grad_() for item in tensors((1, 2, 2, 5), (1, 3, 10), (1, 3, 10)))
    assert torch.autograd.gradcheck(lambda *inputs: project(*inputs, normalize), (values, query, key))


@pytest.mark.parametrize("normalize", ["columns", "rows"])
def test_large_scores_stay_finite_and_autocast_does_not_blur_them(normalize):
    values, query, key = (item.float() for item in tensors((1, 2, 4, 4), (1, 8, 16), (1, 8, 16)))
    query, key = (query * 10).requires_grad_(), key * 10
    exact = project(values.double(), query.detach().double(), key.double(), normalize)
    with torch.autocast("cpu", torch.bfloat16):
        projected = project(values, query, key, normalize)
    projected.sum().backward()
    torch.testing.assert_close(projected.detach(), exact.float(), rtol=1e-3, atol=1e-3)
    assert torch.isfinite(query.grad).all()


class Largest(TorchDispatchMode):
    """Keeps the number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for item in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(item, torch.Tensor):
                self.elements = max(self.elements, item.numel())
        return result


@pytest.mark.parametrize("normalize", ["columns", "rows"])
def test_the_attention_matrix_of_a_full_batch_is_never_built(normalize):
    batch, cells = 16, 28 * 28
    values = torch.rand(batch, 9, 28, 28)
    query, key = (torch.randn(batch, 192, cells, requires_grad=True) for _ in range(2))
    with Largest() as seen:
        project(values, query, key, normalize).sum().backward()
    assert batch * 192 * cells <= seen.elements < batch * cells * cells / 3


def test_an_unknown_normalization_is_refused():
    with pytest.raises(ValueError, match="columns, rows"):
        project(torch.rand(1, 1, 2, 2), torch.rand(1, 3, 4), torch.rand(1, 3, 4), "both")
    with pytest.raises(ValueError, match="columns, rows"):
        refiner.build(SMALL, L, None, normalize="both")


def test_a_cam_is_the_share_of_each_class_relative_to_its_own_maximum():
    class_map = torch.tensor([[[[2.0, -1.0], [8.0, 4.0]], [[3.0, -2.0], [1.0, 0.75]]]])
    allowed = torch.tensor([[[[1.0, 1.0], [0.0, 1.0]], [[1.0, 1.0], [1.0, 1.0]]]])
    # Class 0 relative to its maximum 4, class 1 to 3: (1/2, 0, forbidden, 1) and (1, 0, 1/3, 1/4); then over their sum.
    expected = torch.tensor([[[[1 / 3, 0.5], [0.0, 0.8]], [[2 / 3, 0.5], [1.0, 0.2]]]])
    torch.testing.assert_close(normalized_cam(activation(class_map, allowed), allowed), expected)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return refiner.build(SMALL, L, None, output_stride=16, attention_channels=24).eval()


def batch(height, width, cells=9):
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(2, 3, height, width, generator=generator)
    pseudo, cam = (torch.rand(2, L, cells, cells, generator=generator) for _ in range(2))
    allowed = torch.ones(2, L, cells, cells)
    allowed[1, 0] = 0
    return images, pseudo, cam, allowed


def test_min_pooling_lowers_the_lowest_activations_of_an_image_of_one_tissue(network):
    network = copy.deepcopy(network)
    inputs = [item[1:] for item in batch(64, 64)]  # the second image may be of class 1 alone
    with torch.no_grad():  # features resemble their mean: every cell is active
        network.head.weight.copy_(
            network.encoder(inputs[0])[-1].mean((0, 2, 3))[None, :, None, None].expand(L, -1, 1, 1)
        )
    result = network(*inputs)
    lowest = (result.class_map[0, 1] / result.class_map[0, 1].max()).flatten().sort().values[:4].mean()
    labels = torch.tensor([[[0, 1]]], dtype=torch.uint8)
    arguments = (result, result.class_map.mean((2, 3)).unsqueeze(1), labels, torch.ones(1, 1, 4, 4))
    (total, parts), (without, _) = (refining_loss(*arguments, min_pooling=pooling) for pooling in (True, False))
    assert float(parts["min_pooling"]) == pytest.approx(lowest.item(), rel=1e-5)
    assert 0 < lowest.item() < 1
    found, expected = (
        torch.autograd.grad(term, network.head.weight, retain_graph=True)[0] for term in (total - without, lowest)
    )
    torch.testing.assert_close(found, expected)
    assert float(expected.abs().sum()) > 0


def test_without_feature_norm_the_network_is_the_papers_equations():
    torch.manual_seed(0)
    network = refiner.build(SMALL, L, None, output_stride=16, attention_channels=24, feature_norm=False).eval()
    images, pseudo, cam, allowed = batch(64, 96)
    with torch.inference_mode():
        result = network(images, pseudo, cam, allowed)
        *_, fine, coarse = network.encoder(images)
    grid = (4, 6)
    assert fine.shape[2:] == coarse.shape[2:] == grid
    weights = {name: value.flatten(1).double() for name, value in network.state_dict().items() if "encoder" not in name}
    patches = images.unfold(2, 16, 16).unfold(3, 16, 16).mean((4, 5))
    fine, coarse, patches = (item.flatten(2).double() for item in (fine, coarse, patches))
    features = torch.cat(
        [patches, (weights["pyramid.0.weight"] @ fine).relu(), (weights["pyramid.1.weight"] @ coarse).relu()], 1
    )
    assert features.shape[1] == 3 + 64 + 128
    scores = torch.exp((weights["query.weight"] @ features).transpose(1, 2) @ (weights["key.weight"] @ features))
    matrix = scores / scores.sum(1, keepdim=True)
    class_map = weights["head.weight"] @ coarse
    torch.testing.assert_close(result.class_map.flatten(2).double(), class_map, rtol=1e-4, atol=1e-4)
    active = class_map.clamp(min=0)
    active[1, 0] = 0
    peak = active.amax(2, keepdim=True)
    relative = torch.where(peak > 0, active / peak, 0)
    total = relative.sum(1, keepdim=True)
    may = torch.ones_like(active)
    may[1, 0] = 0
    cnn = torch.where(total > 0, relative / total, may / may.sum(1, keepdim=True))
    for maps, own, refined in (
        (F.interpolate(pseudo, grid, mode="bilinear", antialias=True), result.pseudo, result.refined_pseudo),
        (F.interpolate(cam, grid, mode="bilinear", antialias=True), result.cam, result.refined_cam),
        (cnn.view(2, L, *grid), result.cnn, result.refined_cnn),
    ):
        torch.testing.assert_close(own.double(), maps.double(), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(refined.flatten(2).double(), maps.flatten(2).double() @ matrix, rtol=1e-3, atol=1e-3)


def test_normalised_features_make_a_cell_read_itself_most_at_the_start(network):
    assert network.feature_norm
    generator = torch.Generator().manual_seed(5)
    features = 50 + 9 * torch.rand(1, 195, 4, 4, generator=generator)
    query, key = network.queries_and_keys(features)
    matrix = attention(query, key)[0]
    assert (matrix.argmax(0) == torch.arange(16)).all()
    rescaled = attention(*network.queries_and_keys(3 * features - 7))[0]
    torch.testing.assert_close(matrix, rescaled, rtol=1e-2, atol=1e-4)


def test_rows_are_normalised_on_request(network):
    inputs = batch(64, 64)
    other = refiner.build(SMALL, L, None, attention_channels=24, normalize="rows").eval()
    other.load_state_dict(network.state_dict())
    with torch.inference_mode():
        features = other.features(inputs[0], other.encoder(inputs[0]))
        query, key = other.queries_and_keys(features)
        result = other(*inputs)
    matrix = (query.transpose(1, 2) @ key).softmax(2)
    expected = result.pseudo.flatten(2) @ matrix
    torch.testing.assert_close(result.refined_pseudo.flatten(2), expected, rtol=1e-4, atol=1e-5)


def test_the_published_encoder_gives_conv4_conv5_and_conv6():
    with torch.device("meta"):
        network = refiner.build("resnet38d", 3, None, output_stride=8)
    shapes = [tuple(layer.weight.shape[:2]) for layer in (*network.pyramid, network.query, network.key, network.head)]
    assert shapes == [(64, 512), (128, 1024), (192, 195), (192, 195), (3, 4096)]


def test_queries_and_keys_start_equal_so_that_cells_attend_to_themselves_first(network):
    assert torch.equal(network.query.weight, network.key.weight)
    assert network.query.weight is not network.key.weight
    images = batch(64, 96)[0]
    with torch.inference_mode():
        query, key = network.queries_and_keys(network.features(images, network.encoder(images)))
    distances = torch.cdist(query.transpose(1, 2), key.transpose(1, 2))
    assert (distances.argmin(2) == torch.arange(24)).all()


@pytest.mark.parametrize("size", [(75, 33), (20, 100), (64, 96)])
@pytest.mark.parametrize("stride", [8, 16, 32])
def test_any_image_size_gives_a_grid_that_covers_it(size, stride):
    network = refiner.build(SMALL, L, None, output_stride=stride, attention_channels=8).eval()
    grid = tuple(math.ceil(side / stride) for side in size)
    with torch.inference_mode():
        result = network(*batch(*size))
        maps = RefineModel(network)(torch.randn(1, 3, *size), torch.rand(1, 3 * L, *size))
    assert {tuple(item.shape) for item in result} == {(2, L, *grid)}
    assert maps.shape == (1, 3 * L, *size)


def test_maps_stay_in_place_when_the_grid_ends_beyond_the_image(network):
    ramp = (torch.arange(75.0) + 0.5).view(1, 1, 75, 1).expand(1, 3 * L, 75, 40)
    cells = network.shrink(ramp, torch.zeros(1, 3, 75, 40))
    assert cells.shape == (1, 3 * L, 5, 3)
    torch.testing.assert_close(cells[0, 0, 1:4, 0], torch.tensor([24.0, 40.0, 56.0]), rtol=0, atol=0.3)


def test_a_cell_averages_everything_that_it_covers(network):
    rng = np.random.default_rng(0)
    speckle = torch.from_numpy(rng.random((1, 1, 224, 224)) < 0.3).float()
    cells = network.shrink(speckle, torch.zeros(1, 3, 224, 224))
    assert cells.shape == (1, 1, 14, 14)
    assert float(cells.mean()) == pytest.approx(0.3, abs=0.01)
    assert float(cells.std()) < 0.05  # four values would give 0.2


def test_the_consistency_loss_alone_reaches_the_cnn_but_not_the_class_head():
    network = refiner.build(SMALL, L, None, attention_channels=8).train()
    result = network(*batch(64, 64))
    consistency_loss(result.refined_pseudo, result.refined_cam, torch.ones(2, 1, 4, 4)).backward()
    first = next(network.encoder.parameters())
    assert float(first.grad.abs().sum()) > 0
    assert all(float(layer.weight.grad.abs().sum()) > 0 for layer in (*network.pyramid, network.query, network.key))
    assert network.head.weight.grad is None


def test_the_refined_cam_of_the_cnn_teaches_the_attention_and_not_the_class_head():
    network = refiner.build(SMALL, L, None, attention_channels=8).train()
    network(*batch(64, 64)).refined_cnn.square().sum().backward()
    assert float(network.query.weight.grad.abs().sum()) > 0
    assert network.head.weight.grad is None


def test_the_predictor_refines_whole_images_with_their_maps(network):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (64, 96, 3)).astype(np.uint8)
    maps = rng.random((3 * L, 64, 96)).astype(np.float32)
    maps[2 * L :] = 1
    model = RefineModel(network).eval()
    predictor = Predictor(model, network.normalization, tile=128, stride=64, device="cpu", precision="fp32")
    (found,) = predictor.logits_many([pixels], companions=[maps])
    with torch.inference_mode():
        images = network.normalization(pixels[None])
        result = network(images, *torch.from_numpy(maps)[None].chunk(3, 1))
    for number, refined in enumerate((result.refined_pseudo, result.refined_cam, result.refined_cnn)):
        expected = F.interpolate(refined, size=(64, 96), mode="bilinear", align_corners=False)[0]
        np.testing.assert_allclose(found[number * L : (number + 1) * L], expected.numpy(), atol=1e-4)


CLASSES = TissueClasses((TissueClass("gland", (200, 0, 0)), TissueClass("stroma", (0, 200, 0))))


def test_a_saved_network_comes_back(tmp_path):
    network = refiner.build(SMALL, L, None, 8, 24, "rows").eval()
    folder = str(tmp_path / "refiner")
    refiner.save(folder, network, CLASSES, metrics={"loss": 0.5})
    again = refiner.load(folder, "cpu")
    inputs = batch(40, 64)
    with torch.inference_mode():
        for mine, theirs in zip(network(*inputs), again(*inputs), strict=True):
            assert torch.equal(mine, theirs)
    assert again.normalization == network.normalization
    assert not again.training
    info = files.read_info(folder, refiner.FORMAT)
    assert [item["name"] for item in info["classes"]] == ["gland", "stroma"]
    assert info["metrics"] == {"loss": 0.5}


def test_a_model_of_another_kind_is_refused(tmp_path, network):
    files.write_model(str(tmp_path), network, {"format": "pistoseg-classifier"})
    with pytest.raises(PistoSegError, match="of this kind"):
        refiner.load(str(tmp_path))
