"""A slide through TIAToolbox's SemanticSegmentor, with the network of one of our bundles.

TIAToolbox pins other versions of NumPy and PyTorch, so that it lives in an environment of its own, and nothing of this
project is imported here. `benchmarks.slides` runs this file where the variable TIATOOLBOX_PYTHON names a Python:

    python -m venv toolbox && toolbox/bin/pip install tiatoolbox segmentation-models-pytorch
    TIATOOLBOX_PYTHON=toolbox/bin/python python -m benchmarks.slides --data DATA

Takes one argument, JSON with `bundle`, `slide`, `tile`, `stride`, `batch_size`, `device`, `threads`, `workers` and
`repeats`, and prints as its last line JSON with `tiles`, the `device` that the network was on and the `seconds` of each
repeat.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import segmentation_models_pytorch as smp
import torch
from safetensors.torch import load_file
from tiatoolbox.models.engine.io_config import IOSegmentorConfig
from tiatoolbox.models.engine.semantic_segmentor import SemanticSegmentor
from tiatoolbox.models.models_abc import ModelABC


class Network(ModelABC):
    """The network of a bundle in the form that TIAToolbox wants of its users' own models."""

    def __init__(self, bundle: Path) -> None:
        super().__init__()
        info = json.loads((bundle / "model.json").read_text(encoding="utf-8"))
        attention = {"decoder_attention_type": info["decoder_attention"]} if info["decoder_attention"] else {}
        self.network = smp.create_model(
            info["architecture"], info["encoder"], None, classes=len(info["classes"]), **attention
        )
        mean, std = (torch.tensor(info["normalization"][name]).view(1, 3, 1, 1) * 255 for name in ("mean", "std"))
        self.load_state_dict(load_file(bundle / "model.safetensors"), strict=True)
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) float of 0 to 255 to logits."""
        logits: torch.Tensor = self.network((images - self.mean) / self.std)
        return logits

    @staticmethod
    def infer_batch(model: torch.nn.Module, batch_data: Any, *, device: str) -> np.ndarray:
        """(N, H, W, 3) images to (N, H, W, L) probabilities."""
        model.eval()
        with torch.inference_mode():
            images = batch_data.to(device=device, dtype=torch.float32).permute(0, 3, 1, 2)
            maps: np.ndarray = model(images.contiguous()).softmax(1).permute(0, 2, 3, 1).cpu().numpy()
        return maps

    @staticmethod
    def postproc(image: np.ndarray) -> np.ndarray:
        """Class ids of probabilities."""
        return np.argmax(image, axis=-1)


def main() -> None:
    """Segment the slide as often as asked."""
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(asked["threads"])
    engine = SemanticSegmentor(
        Network(Path(asked["bundle"])),
        batch_size=asked["batch_size"],
        num_workers=asked["workers"],
        device=asked["device"],
        verbose=False,
    )
    whole = [{"units": "baseline", "resolution": 1.0}]
    config = IOSegmentorConfig(
        input_resolutions=whole,
        output_resolutions=whole,
        patch_input_shape=(asked["tile"], asked["tile"]),
        patch_output_shape=(asked["tile"], asked["tile"]),
        stride_shape=(asked["stride"], asked["stride"]),
        save_resolution=whole[0],
    )
    seconds = []
    for _ in range(asked["repeats"]):
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            engine.run(
                [Path(asked["slide"])],
                patch_mode=False,
                ioconfig=config,
                save_dir=Path(folder) / "out",
                output_type="zarr",
                auto_get_mask=False,
            )
            seconds.append(time.perf_counter() - began)
    assert engine.dataloader is not None
    device = str(next(engine.model.parameters()).device)
    print(json.dumps({"tiles": len(engine.dataloader.dataset), "device": device, "seconds": seconds}))


if __name__ == "__main__":
    main()
