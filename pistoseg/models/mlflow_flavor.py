"""A model bundle as an MLflow model: `mlflow.pyfunc.log_model(loader_module=__name__, data_path=BUNDLE)`; no pickle."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pistoseg.models import bundle

LOADER_MODULE = "pistoseg.models.mlflow_flavor"


class BundleModel:
    """What `mlflow.pyfunc.load_model` wraps."""

    def __init__(self, segmenter: bundle.Segmenter) -> None:
        self.segmenter = segmenter

    def predict(self, model_input: NDArray[np.uint8], params: dict[str, Any] | None = None) -> NDArray[np.uint8]:
        """Segment a batch of images.

        Args:
            model_input: (N, H, W, 3) uint8, at the pixel size of the training images.
            params: `mpp`, um per px of the images, where it is another one.
        Returns:
            (N, H, W) uint8 class ids.
        """
        mpp = (params or {}).get("mpp")
        images = np.asarray(model_input)
        masks = [self.segmenter.predict(image, mpp) for image in images]
        return np.stack(masks) if masks else np.zeros(images.shape[:3], np.uint8)


def signature() -> Any:
    """The `ModelSignature` of a bundle: (N, H, W, 3) uint8 -> (N, H, W) uint8."""
    from mlflow.models import ModelSignature
    from mlflow.types import DataType, ParamSchema, ParamSpec, Schema, TensorSpec

    return ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, -1, -1, 3))]),
        outputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, -1, -1))]),
        params=ParamSchema([ParamSpec("mpp", DataType.double, None)]),
    )


def _load_pyfunc(data_path: str) -> BundleModel:
    return BundleModel(bundle.load(data_path))
