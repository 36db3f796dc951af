"""A model bundle as an MLflow model: `mlflow.pyfunc.log_model(loader_module=__name__, data_path=BUNDLE)`; no pickle."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

import pistoseg
from pistoseg import storage
from pistoseg.errors import PistoSegError
from pistoseg.models import bundle
from pistoseg.redaction import first_line, redact
from pistoseg.tracking.delivery import NoFilesError, found_by, quoted, takes_no_files
from pistoseg.tracking.server import database_file, default_server

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

LOADER_MODULE = "pistoseg.models.mlflow_flavor"


class BundleModel:
    """What `mlflow.pyfunc.load_model` wraps."""

    def __init__(self, segmenter: bundle.Segmenter) -> None:
        self.segmenter = segmenter

    def predict(self, model_input: NDArray[np.uint8], params: dict[str, Any] | None = None) -> NDArray[np.uint8]:
        """Segment a batch of images.

        Args:
            model_input: (N, H, W, 3) uint8, at the pixel size of the training images.
            params: `mpp`, um per px of the images, where it is another one; `background`, as in `Segmenter.predict`.
        Returns:
            (N, H, W) uint8 class ids.
        """
        images, given = np.asarray(model_input), params or {}
        mpp, background = given.get("mpp"), given.get("background") or "model"
        masks = [self.segmenter.predict(image, mpp, background=background) for image in images]
        return np.stack(masks) if masks else np.zeros(images.shape[:3], np.uint8)


def signature() -> Any:
    """The `ModelSignature` of a bundle: (N, H, W, 3) uint8 -> (N, H, W) uint8."""
    from mlflow.models import ModelSignature
    from mlflow.types import DataType, ParamSchema, ParamSpec, Schema, TensorSpec

    return ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, -1, -1, 3))]),
        outputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, -1, -1))]),
        params=ParamSchema(
            [ParamSpec("mpp", DataType.double, None), ParamSpec("background", DataType.string, "model")]
        ),
    )


def register(
    client: MlflowClient, run_id: str, name: str, uri: str, fingerprint: str, tags: Mapping[str, str] | None = None
) -> str:
    """Register a bundle as a model's next version unless it is one.

    Args:
        client: of the server.
        run_id: that gets the files.
        name: of the registered model.
        uri: of the bundle.
        fingerprint: of its artifact, by which it is known again.
        tags: of the version, also of one that is there; one whose bundle is gone is led to this one.
    Returns:
        The version.
    Raises:
        NoFilesError: the place that the server keeps files in does not take them; then it has no such version.
    """
    tags = dict(tags or {})
    for known in found_by(client.search_model_versions, filter_string=f"name={quoted(name)}"):
        if known.tags.get("pistoseg.fingerprint") == fingerprint:
            if _is_gone(known.tags.get("pistoseg.bundle", ""), str(client.tracking_uri)):
                tags["pistoseg.bundle"] = redact(uri)
            _set_tags(client, name, str(known.version), tags)
            return str(known.version)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "bundle"
        copy.mkdir()
        for file in ("model.json", "model.safetensors"):
            (copy / file).write_bytes(storage.read_bytes(storage.join(uri, file)))
        info = _log_model(client, run_id, name, copy)
    version = str(info.registered_model_version)
    _set_tags(client, name, version, {"pistoseg.fingerprint": fingerprint, "pistoseg.bundle": redact(uri)} | tags)
    return version


def _log_model(client: MlflowClient, run_id: str, name: str, folder: Path) -> Any:
    """Log a bundle's files with a run as a model's next version; what MLflow says of it."""
    import mlflow

    before = client.get_run(run_id).info
    try:
        with (
            default_server(str(client.tracking_uri)),  # that of another workspace's run may be MLflow's default now
            warnings.catch_warnings(),
            mlflow.start_run(run_id=run_id),
        ):
            # An example would be segmented to guess the signature, which is given.
            warnings.filterwarnings("ignore", message=".*input example was not provided")
            return mlflow.pyfunc.log_model(
                name="bundle",
                loader_module=LOADER_MODULE,
                data_path=str(folder),
                signature=signature(),
                pip_requirements=[f"pistoseg=={pistoseg.__version__}"],
                registered_model_name=name,
            )
    except Exception as error:  # every storage has errors of its own
        if takes_no_files(error):
            raise NoFilesError(first_line(error)) from error
        raise
    finally:  # MLflow ends a run with the block that writes to it
        if before.status == "RUNNING":
            client.update_run(run_id, status=before.status)
        else:
            client.set_terminated(run_id, before.status, before.end_time)


def _is_gone(uri: str, server: str) -> bool:
    """Whether a bundle is no longer there; one that can't be looked at may be, as one on another machine's disk.

    A database in a file is of this machine, and so are the disks that it names.
    """
    try:
        seen = not storage.is_local(uri) or database_file(server) is not None
        return seen and not storage.exists(storage.join(uri, "model.json"))
    except (PistoSegError, OSError):
        return False


def _set_tags(client: MlflowClient, name: str, version: str, tags: Mapping[str, str]) -> None:
    for key, value in tags.items():
        client.set_model_version_tag(name, version, key, value)


def _load_pyfunc(data_path: str) -> BundleModel:
    return BundleModel(bundle.load(data_path))
