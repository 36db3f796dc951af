"""Scores of the masks that stages drew on the training images, where a user has the true ones."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pistoseg import metrics, parquet, storage
from pistoseg.artifacts import MANIFEST, Artifact, Workspace
from pistoseg.classes import TissueClasses, folded
from pistoseg.errors import PistoSegError
from pistoseg.patches import decode
from pistoseg.patches.labels import is_image, stem
from pistoseg.patches.layouts import relative_files
from pistoseg.redaction import redact
from pistoseg.stages import masks

STAGES = {"pseudo_masks": ("",), "cams": ("",), "refined_masks": masks.KINDS}
"""Stages that draw masks on the training images, and the kinds of masks they draw."""
MOST_NAMES = 5
"""Images that a line names."""


def find_artifacts(workspace: Workspace, stage: str) -> Iterator[Artifact]:
    """The committed artifacts of a stage, the oldest first."""
    folder = storage.join(workspace.root, stage)
    names = [storage.name(item) for item in storage.list_dir(folder)] if storage.is_dir(folder) else []
    found = [workspace.find(stage, name) for name in names]
    yield from sorted((item for item in found if item is not None), key=lambda item: item.manifest["created"])


def score_masks(
    artifact: Artifact,
    truth: str,
    classes: TissueClasses,
    *,
    max_pixels: int,
    workers: int,
    said: set[str] | None = None,
) -> dict[str, dict[str, Any]]:
    """Compare an artifact's masks with true ones.

    Args:
        artifact: of a stage in `STAGES`.
        truth: URI of a folder of masks that are named like the training images, with their folders or, where a name is
            that of one image and one mask, without; those of a part of them will do.
        classes: what the masks' values mean.
        max_pixels: larger masks are refused.
        workers: threads.
        said: lines on images that are left out, which are not said again; it gets this artifact's.
    Returns:
        By kind: `images`, the scores of `ConfusionMatrix.to_dict`, and `without_class`, the share of the truth's tissue
        pixels that the mask gives no class to (background, or no label allows any); they are not scored.
    Raises:
        PistoSegError: no mask belongs to a training image, or a mask can't be read.
    """
    kinds = STAGES[artifact.stage]
    columns = [masks.column("png", kind) for kind in kinds]
    table = parquet.read(artifact.path(masks.FOLDER), columns=["name", *columns])
    uris = _truths(table["name"].to_pylist(), truth, set() if said is None else said)
    rows = [
        (uris[row["name"]], [row[column] for column in columns]) for row in table.to_pylist() if row["name"] in uris
    ]
    if not rows:
        raise PistoSegError(
            "has no mask of a training image",
            file=truth,
            remedy=f"name the masks like the images, e.g. {stem(table['name'][0].as_py())}.png",
        )

    def compare(item: tuple[str, list[bytes]]) -> list[tuple[NDArray[np.int64], int, int]]:
        uri, pngs = item
        true = decode.decode_mask(decode.read_file(uri), uri, classes, None, max_pixels)
        return [_compare(true, decode.decode_ids(png), len(classes)) for png in pngs]

    with ThreadPoolExecutor(workers) as pool:
        results = list(pool.map(compare, rows))
    report = {}
    for number, kind in enumerate(kinds):
        matrices, unknown, tissue = zip(*(result[number] for result in results), strict=True)
        matrix = metrics.ConfusionMatrix(len(classes), np.sum(matrices, axis=0))
        share = sum(unknown) / max(1, sum(tissue))
        report[kind] = {"images": len(rows), **matrix.to_dict(classes.names), "without_class": round(share, 4)}
    return report


def _truths(images: list[str], truth: str, said: set[str]) -> dict[str, str]:
    """URIs of the true masks by image: of the same path, else of a name that one image and one mask have.

    Says which images are left out because their names mean several, unless that was said.
    """
    files = {folded(stem(name)): uri for name, uri in relative_files(truth).items() if is_image(name)}
    names = {image: folded(stem(image)) for image in images}
    wanted = set(names.values())
    spare = [name for name in files if name not in wanted]
    masks_of, images_of = (Counter(map(storage.name, part)) for part in (spare, wanted))
    by_stem = {storage.name(name): files[name] for name in spare}
    found, unclear = {}, []
    for image, name in names.items():
        last = storage.name(name)
        if name in files:
            found[image] = files[name]
        elif masks_of[last] == images_of[last] == 1:
            found[image] = by_stem[last]
        elif masks_of[last]:
            unclear.append(image)
    if unclear:
        named = ", ".join(unclear[:MOST_NAMES]) + (" ..." if len(unclear) > MOST_NAMES else "")
        why = f"{len(unclear)} images are left out, for their names mean several"
        line = f"{redact(truth)}: {why}; name the masks like them: {named}"
        if line not in said:
            print(line)
        said.add(line)
    return found


def _compare(true: NDArray[np.uint8], mask: NDArray[np.uint8], n_classes: int) -> tuple[NDArray[np.int64], int, int]:
    """Confusion at the truth's pixel size; tissue pixels without a class in the mask, and all tissue pixels."""
    if mask.shape != true.shape:
        mask = cv2.resize(mask, true.shape[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
    tissue = true < n_classes
    unknown = tissue & (mask >= n_classes)
    scored = np.where(unknown, n_classes, true)
    return metrics.confusion(scored, mask, n_classes), int(unknown.sum()), int(tissue.sum())


def score_workspace(
    workspace: Workspace, stages: tuple[str, ...], truth: str, out: str | None, *, max_pixels: int, workers: int
) -> dict[str, dict[str, Any]]:
    """Score the masks of all artifacts of some stages; `mask_scores.json` goes to `out`.

    Returns:
        What `score_masks` gives, by `stage/fingerprint` and kind, e.g. `refined_masks/1f0c.../cnn`.
    """
    reports = {}
    said: set[str] = set()
    for stage in stages:
        for artifact in find_artifacts(workspace, stage):
            patches = Workspace(workspace.root).find("patches", artifact.manifest["inputs"]["patches"]["fingerprint"])
            if patches is None:
                raise PistoSegError(f"lacks the {MANIFEST} of its patches", file=artifact.uri)
            classes = TissueClasses.from_json(patches.manifest["settings"]["classes"])
            scores = score_masks(artifact, truth, classes, max_pixels=max_pixels, workers=workers, said=said)
            for kind, report in scores.items():
                reports["/".join(filter(None, (stage, artifact.fingerprint, kind)))] = report
    if not reports:
        raise PistoSegError(
            f"has no finished {' or '.join(stages)}", file=workspace.root, remedy="run `pistoseg train` with it first"
        )
    if out:
        storage.write_bytes(storage.join(out, "mask_scores.json"), json.dumps(reports, indent=2).encode())
    return reports
