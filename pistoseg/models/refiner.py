"""The refining network: pyramid features, their attention, and activation maps projected into its space (eqs. 2-5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pistoseg.classes import TissueClasses
from pistoseg.models import encoders, files, inference
from pistoseg.models.segmentation import Normalization, pad

FORMAT = "pistoseg-refiner"
NORMALIZATIONS = ("columns", "rows")
PYRAMID_CHANNELS = (64, 128)
QUERY_GAIN = 0.25
"""Of W_Q at the start, on normalised features: a cell reads itself most, and its like."""

_PYRAMID_LEVELS = {encoders.RESNET38D: (-3, -2)}  # conv4 and conv5; its class head is on conv6
_ARGUMENTS = ("encoder", "output_stride", "attention_channels", "normalize", "feature_norm")
_BLOCK = 128
_TINY = 1e-6


class Refined(NamedTuple):
    """What the refining network makes of a batch, on its grid of h x w cells.

    Args:
        class_map: (N, L, h, w) class activations of the CNN, of any sign; their mean over a window is its logits.
        pseudo, cam: (N, L, h, w) M_pseudo and M_CAM, brought down to the grid.
        cnn: (N, L, h, w) the CNN's own CAM, 0..1, without a gradient: like the other two, it is projected, not learned.
        refined_pseudo, refined_cam, refined_cnn: (N, L, h, w) these three, projected (eqs. 4, 5).
        active: (N, L, h, w) `activation` of the class map, 0..1, with its gradient.
    """

    class_map: Tensor
    pseudo: Tensor
    cam: Tensor
    cnn: Tensor
    refined_pseudo: Tensor
    refined_cam: Tensor
    refined_cnn: Tensor
    active: Tensor


def attention(query: Tensor, key: Tensor, normalize: str = "columns") -> Tensor:
    """The attention matrix of all P cells of a grid (eq. 3).

        A = Softmax(Q^T K)

    Args:
        query, key: (N, C', P) float.
        normalize: `columns`: the columns of A sum to 1, so that a projected value is a weighted mean over the cells;
            `rows`: its rows do.
    Returns:
        (N, P, P) float.
    """
    return (query.transpose(1, 2) @ key).softmax(1 if _by_columns(normalize) else 2)


def project(maps: Tensor, query: Tensor, key: Tensor, normalize: str = "columns") -> Tensor:
    """Project maps into the attention space (eqs. 4, 5) in O(P) memory; A itself is never built.

        ^M_j = sum_i M_i A_ij

    With columns that sum to 1 this is plain attention: K asks, Q answers, M is what is read. With rows that sum to 1 it
    is summed over blocks of rows, which are computed once more in the backward pass. Forward and backward, 16 images of
    28 x 28 cells take 92 MB (columns) and 56 MB (rows) on a CPU, and 113 MB with the matrix; of 56 x 56 cells 301, 391
    and 1811 MB.

    Args:
        maps: (N, C, h, w) float; all maps of an image in one call.
        query, key: (N, C', h*w) float.
        normalize: see `attention`.
    Returns:
        (N, C, h, w), float32 or wider: scores are not scaled down, so that half precision would blur them.
    """
    with torch.autocast(maps.device.type, enabled=False):
        values, query, key = _wide(maps.flatten(2)), _wide(query), _wide(key)
        projected = (_project_columns if _by_columns(normalize) else _project_rows)(values, query, key)
    return projected.view(maps.shape)


def _project_columns(values: Tensor, query: Tensor, key: Tensor) -> Tensor:
    # Fused kernels want one width for all three; channels of 0 change no inner product.
    channels, width = values.shape[1], max(values.shape[1], query.shape[1])
    asked, offered, read = (
        F.pad(item.transpose(1, 2), (0, width - item.shape[1])).contiguous().unsqueeze(1)
        for item in (key, query, values)
    )
    result = F.scaled_dot_product_attention(asked, offered, read, scale=1.0)
    return result[:, 0, :, :channels].transpose(1, 2)


def _project_rows(values: Tensor, query: Tensor, key: Tensor) -> Tensor:
    total = torch.zeros_like(values)
    for rows in (slice(start, start + _BLOCK) for start in range(0, values.shape[2], _BLOCK)):
        block = (values[:, :, rows], query[:, :, rows], key)
        total = total + checkpoint(_project_block, *block, use_reentrant=False, preserve_rng_state=False)
    return total


def _project_block(values: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """(N, C, P): what some of the rows of A add, from their values (N, C, b) and queries (N, C', b)."""
    return values @ attention(query, key, "rows")


def _by_columns(normalize: str) -> bool:
    if normalize not in NORMALIZATIONS:
        raise ValueError(f"unknown normalization {normalize!r}; use one of {', '.join(NORMALIZATIONS)}")
    return normalize == "columns"


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def activation(class_map: Tensor, allowed: Tensor) -> Tensor:
    """How active every class is, as a share of its own highest activation in the image.

        m_cp = max(0, f_cp) a_cp / max over the cells p of max(0, f_cp) a_cp

    Args:
        class_map: (N, L, h, w) float, f.
        allowed: (N, L, h, w) float 0..1, a: what the labels allow.
    Returns:
        (N, L, h, w) float32 in 0..1; 0 where the labels do not allow a class.
    """
    active = class_map.float().relu() * allowed
    return active / active.amax((2, 3), keepdim=True).clamp(min=_TINY)


def normalized_cam(active: Tensor, allowed: Tensor) -> Tensor:
    """A CAM as class shares, the scale of M_pseudo and M_CAM that it is refined with.

        M_cp = m_cp / sum_c m_cp

    Args:
        active: (N, L, h, w) float 0..1, m: `activation` of the class map.
        allowed: (N, L, h, w) float 0..1, a: what the labels allow.
    Returns:
        (N, L, h, w) float32 in 0..1; equal shares of the allowed classes in cells where none is active.
    """
    total = active.sum(1, keepdim=True)
    even = allowed / allowed.sum(1, keepdim=True).clamp(min=_TINY)
    return torch.where(total > _TINY, active / total.clamp(min=_TINY), even)


class RefiningNetwork(nn.Module):
    """A CNN with a class head, whose pyramid features span the attention space.

    W_Q and W_K start equal and are then trained apart: Q^T K is then a similarity of features, and a cell attends
    mostly to itself and its like. Started apart, unscaled scores make nearly every cell read one or two random others,
    and the projected maps are at chance until that is unlearned.

    Attributes:
        normalization: what its input went through.
        output_stride: px per cell of the grid.
        encoder_name, n_classes, attention_channels, normalize, feature_norm: the arguments of `build`.
    """

    def __init__(
        self,
        encoder: nn.Module,
        normalization: Normalization,
        encoder_name: str,
        n_classes: int,
        attention_channels: int = 192,
        normalize: str = "columns",
        feature_norm: bool = True,
    ) -> None:
        super().__init__()
        _by_columns(normalize)
        self.encoder = encoder
        self.normalization = normalization
        self.encoder_name = encoder_name
        self.n_classes = n_classes
        self.attention_channels = attention_channels
        self.normalize = normalize
        self.feature_norm = feature_norm
        self.output_stride = int(encoder.output_stride)  # type: ignore[arg-type]
        self._levels = _PYRAMID_LEVELS.get(encoder_name, (-2, -1))
        channels: list[int] = list(encoder.out_channels)  # type: ignore[arg-type]
        self.pyramid = nn.ModuleList(
            nn.Conv2d(channels[level], width, 1, bias=False)
            for level, width in zip(self._levels, PYRAMID_CHANNELS, strict=True)
        )
        self.query = nn.Conv2d(3 + sum(PYRAMID_CHANNELS), attention_channels, 1, bias=False)
        self.key = nn.Conv2d(3 + sum(PYRAMID_CHANNELS), attention_channels, 1, bias=False)
        if feature_norm:
            nn.init.xavier_uniform_(self.query.weight, gain=QUERY_GAIN)
        self.key.load_state_dict(self.query.state_dict())
        self.head = nn.Conv2d(channels[-1], n_classes, 1, bias=False)
        nn.init.xavier_uniform_(self.head.weight)

    def forward(self, images: Tensor, pseudo: Tensor, cam: Tensor, allowed: Tensor) -> Refined:
        """Refine the maps of a batch; L_cons and L_cross reach the whole CNN through the attention.

        Args:
            images: (N, 3, H, W) float, normalised, of any H and W.
            pseudo: (N, L, g, g') float 0..1, class probabilities of the preliminary model over the whole image.
            cam: (N, L, g, g') float 0..1.
            allowed: (N, L, g, g') float 0 or 1, classes that the labels allow.
        Returns:
            Maps on a grid with a cell for every `output_stride` px from the top left, the last ones partly outside
            where these do not divide H and W.
        """
        padded = pad(images, self.output_stride)
        feature_maps = self.encoder(padded)
        class_map = self.head(feature_maps[-1])
        pseudo, cam, allowed = self.shrink(torch.cat([pseudo, cam, allowed], 1), images).chunk(3, 1)
        active = activation(class_map, allowed)
        cnn = normalized_cam(active.detach(), allowed)
        query, key = self.queries_and_keys(self.features(padded, feature_maps))
        projected = project(torch.cat([pseudo, cam, cnn], 1), query, key, self.normalize)
        refined_pseudo, refined_cam, refined_cnn = projected.chunk(3, 1)
        return Refined(class_map, pseudo, cam, cnn, refined_pseudo, refined_cam, refined_cnn, active)

    def features(self, images: Tensor, feature_maps: list[Tensor]) -> Tensor:
        """The concatenated pyramid F: image (3), a finer (64) and a coarser (128) map on the last map's grid.

        Args:
            images: (N, 3, H, W) float, normalised; H and W are multiples of the output stride.
            feature_maps: the encoder's, of these images.
        Returns:
            (N, 195, h, w) float32.
        """
        rows, columns = feature_maps[-1].shape[-2:]
        grid = (rows, columns)
        reduced = [
            _resize(convolution(feature_maps[level]).relu(), grid)
            for level, convolution in zip(self._levels, self.pyramid, strict=True)
        ]
        return torch.cat([F.adaptive_avg_pool2d(images.float(), grid), *reduced], 1)

    def queries_and_keys(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Q = W_Q F and K = W_K F (eq. 2), (N, C, h, w) -> (N, C', h*w) each, in full precision."""
        with torch.autocast(features.device.type, enabled=False):
            if self.feature_norm:
                # Scores are not scaled down: features of any size would make the attention uniform or one-hot.
                features = F.layer_norm(features.movedim(1, 3), features.shape[1:2]).movedim(3, 1)
            return self.query(features).flatten(2), self.key(features).flatten(2)

    def shrink(self, maps: Tensor, images: Tensor) -> Tensor:
        """Bring maps of whole images down to the grid.

        Bilinear with antialiasing: every cell is an average over its surroundings, whatever the ratio of the two grids;
        plain bilinear would read four values per cell and skip the rest.

        Args:
            maps: (N, C, g, g') float, over the whole of each image.
            images: (N, 3, H, W), only for their size.
        Returns:
            (N, C, h, w) float32.
        """
        size = images.shape[-2:]
        if any(side % self.output_stride for side in size):  # the grid ends beyond the image: extend maps as it is
            maps = pad(_resize(maps, size), self.output_stride)
        return _resize(maps, [-(-side // self.output_stride) for side in size])


def _resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    if maps.shape[-2:] == torch.Size(size):
        return maps.float()
    return F.interpolate(maps.float(), size=tuple(size), mode="bilinear", antialias=True, align_corners=False)


class RefineModel(nn.Module):
    """The refining network as `Predictor` runs it, with the maps to refine as companions of the image."""

    def __init__(self, network: RefiningNetwork) -> None:
        super().__init__()
        self.network = network
        self.normalization = network.normalization

    def forward(self, images: Tensor, companions: Tensor) -> Tensor:
        """Refined maps at the size of the images.

        Args:
            images: (N, 3, H, W) float, normalised.
            companions: (N, 3 L, H, W) float: M_pseudo, M_CAM and what the labels allow.
        Returns:
            (N, 3 L, H, W) float32: the refined M_pseudo, M_CAM and the CNN's own CAM.
        """
        height, width = images.shape[-2:]
        refined = self.network(images, *companions.chunk(3, 1))
        maps = torch.cat([refined.refined_pseudo, refined.refined_cam, refined.refined_cnn], 1)
        size = [side * self.network.output_stride for side in maps.shape[-2:]]
        return _resize(maps, size)[..., :height, :width]


def build(
    encoder: str,
    n_classes: int,
    weights: str | None = "imagenet",
    output_stride: int = 16,
    attention_channels: int = 192,
    normalize: str = "columns",
    feature_norm: bool = True,
) -> RefiningNetwork:
    """Build a refining network.

    Args:
        encoder: `resnet38d` (the published one), smp name, or `tu-` and a timm name.
        n_classes: L tissue classes.
        weights: of the encoder: `imagenet`, `none` or None, or a path or URI of a weights file.
        output_stride: px per cell of the grid; 8 for resnet38d.
        attention_channels: C', channels of queries and keys.
        normalize: softmax of eq. 3, see `attention`.
        feature_norm: bring every cell's features F to mean 0 and variance 1 before W_Q and W_K; not in the paper.
    """
    module = encoders.create(encoder, weights, output_stride=output_stride)
    mean, std = encoders.normalization(encoder, weights)
    return RefiningNetwork(
        module, Normalization(mean, std), encoder, n_classes, attention_channels, normalize, feature_norm
    )


def save(
    uri: str,
    network: RefiningNetwork,
    classes: TissueClasses,
    *,
    lineage: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> None:
    """Write a refining network as `model.safetensors` and `model.json`.

    Args:
        uri: folder, local or on any fsspec file system.
        network: on any device.
        classes: tissue classes by class id.
        lineage: artifact fingerprints, code version, data summary.
        metrics: scores.
    """
    info = {
        "format": FORMAT,
        "encoder": network.encoder_name,
        "output_stride": network.output_stride,
        "attention_channels": network.attention_channels,
        "normalize": network.normalize,
        "feature_norm": network.feature_norm,
        "normalization": {"mean": list(network.normalization.mean), "std": list(network.normalization.std)},
        **classes.to_json(),
        "lineage": dict(lineage or {}),
        "metrics": dict(metrics or {}),
    }
    files.write_model(uri, network, info)


def load(uri: str, device: str | torch.device | None = None) -> RefiningNetwork:
    """Load a refining network, in evaluation mode.

    Args:
        uri: the folder, local or on any fsspec file system.
        device: `cpu`, `cuda`...; None or `auto` for CUDA where there is one.
    Raises:
        PistoSegError: where the folder holds no refining network, is of a newer format, or its parts do not fit.
    """
    info, state = files.read_model(uri, FORMAT, (*_ARGUMENTS, "normalization", "classes"))
    try:
        classes = TissueClasses.from_json(info)
        normalization = Normalization(tuple(info["normalization"]["mean"]), tuple(info["normalization"]["std"]))
        network = build(n_classes=len(classes), weights=None, **{name: info[name] for name in _ARGUMENTS})
    except (KeyError, TypeError, ValueError) as error:
        raise files.damaged(uri, info, error) from error
    network.normalization = normalization
    files.fill(network, state, uri)
    return network.to(inference.resolve_device(device)).eval()
