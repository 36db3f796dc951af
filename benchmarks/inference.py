"""Pseudo-masks and CAMs: the pipeline's tiling with eight symmetries, beside the network alone on the same batches.

python -m benchmarks.inference
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks import harness
from benchmarks.harness import Options, Report
from pistoseg.memory import keep_freed_memory
from pistoseg.models import cams, classifier, segmentation
from pistoseg.models.inference import Predictor

SHARE_OF_NETWORK = 0.95
SYMMETRIES = 8


def benchmark(options: Options) -> Report:
    """Measure all of it."""
    report = Report("inference")
    side, batch_size = options.size(224, 64), options.size(16, 8)
    encoder = "tu-mobilenetv3_small_050" if options.tiny else "efficientnet-b0"
    architecture, attention = ("unet", None) if options.tiny else ("unetplusplus", "scse")
    network = segmentation.build(architecture, encoder, 3, None, attention)
    cam_network = classifier.build(encoder, 3, None, output_stride=16)
    models: dict[str, tuple[nn.Module, Any]] = {
        "pseudo_masks": (network, network.normalization),
        "cams": (cams.CamModel(cam_network), cam_network.normalization),
    }
    images = list(np.random.default_rng(0).integers(0, 256, (options.size(4, 1), side, side, 3), np.uint8))
    for name, (model, normalization) in models.items():
        predictor = Predictor(
            model,
            normalization,
            tile=side,
            stride=side // 2,
            symmetries=SYMMETRIES,
            batch_size=batch_size,
            average="logits",
        )
        forwards = len(images) * SYMMETRIES
        batch = normalization(np.stack([images[0]] * batch_size), predictor.device)
        batch = batch.contiguous(memory_format=torch.channels_last)

        def alone(predictor: Predictor = predictor, batch: torch.Tensor = batch, forwards: int = forwards) -> None:
            predictor.model.eval()
            bf16 = torch.autocast(predictor.device.type, torch.bfloat16, enabled=predictor.bf16)
            with torch.inference_mode(), bf16, keep_freed_memory():
                for _ in range(forwards // len(batch)):
                    predictor.model(batch).float().cpu()

        def ours(predictor: Predictor = predictor) -> None:
            with keep_freed_memory():  # as a stage does
                predictor.logits_many(images)

        timings = harness.interleaved({"ours": ours, "network": alone}, options.size(15, 1))
        for variant, timing in timings.items():
            report.add(f"{name}_{variant}_per_s", timing.per_s(forwards))
        report.compare(f"{name}_share_of_network", timings["ours"], timings["network"], least=SHARE_OF_NETWORK)
    report.note(f"rates are forward passes of {side} px; an image takes {SYMMETRIES}")
    return report


if __name__ == "__main__":
    harness.main(benchmark, __doc__)
