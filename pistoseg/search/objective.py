"""What trials are compared by: mIoU on images with masks, or without any the agreement with image-level labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pistoseg.artifacts import Artifact
from pistoseg.config import Config
from pistoseg.errors import PistoSegError
from pistoseg.patches.digest import validation_folder
from pistoseg.search.ablation import with_overrides

LABEL_HOLDOUT = 0.2
"""Share of the images that is held out where labels are the only judge and the config holds none out."""

LAST_EPOCH = {"preliminary.keep": "last", "precise.keep": "last"}
"""Of trainings that are scored by labels beside masks: these would choose the best epoch."""


@dataclass(frozen=True)
class Objective:
    """How trials are scored.

    Args:
        kind: `miou`: mIoU of the evaluation; `labels`: `label_iou` of held-out images.
        masks: whether there are images with masks.
        labels: whether images with labels are held out.
    """

    kind: Literal["miou", "labels"]
    masks: bool
    labels: bool

    @property
    def title(self) -> str:
        """As reports call it."""
        return "validation mIoU" if self.kind == "miou" else "agreement with held-out labels"

    @property
    def of_epoch(self) -> str:
        """The score that trainings report after an epoch."""
        return "validation_miou" if self.masks else "validation_label_iou"

    @property
    def settled(self) -> Mapping[str, Any]:
        """What it sets, and no trial may set otherwise, by `section.key`."""
        return LAST_EPOCH if self.kind == "labels" and self.masks else {}

    @property
    def targets(self) -> tuple[str, ...]:
        """Stages that score a trial."""
        return ("evaluation",) * self.masks + ("label_scores",) * self.labels

    def scores(self, artifacts: Mapping[str, Artifact]) -> dict[str, float]:
        """All scores of a pipeline's model."""
        found: dict[str, float] = {}
        for target in self.targets:
            found |= artifacts[target].summary["metrics"]
        return found

    def value(self, artifacts: Mapping[str, Artifact]) -> float:
        """The score that trials are compared by."""
        scores, key = self.scores(artifacts), "miou" if self.kind == "miou" else "label_iou"
        if key not in scores:
            raise PistoSegError(f"the model has no {key}: no image of the validation has a class")
        return scores[key]


def choose(kind: Literal["auto", "miou", "labels"], config: Config) -> tuple[Objective, Config]:
    """The objective for a data set, and the config with images held out if it needs some.

    By labels beside masks, trainings keep their last epoch: they would choose the best one by the masks' mIoU.

    Args:
        kind: auto: mIoU where there are masks, else labels.
        config: of the search.
    Raises:
        PistoSegError: mIoU is asked for, and there are no masks.
    """
    masks = validation_folder(config) is not None
    if kind == "miou" and not masks:
        raise PistoSegError(
            "there are no validation images with masks",
            field="--objective",
            remedy="name a folder with img/ and mask/ as data.validation, or use --objective labels",
        )
    chosen: Literal["miou", "labels"] = "miou" if kind != "labels" and masks else "labels"
    if chosen == "labels" and not config.data.label_holdout:
        config = with_overrides(config, {"data.label_holdout": LABEL_HOLDOUT})
    objective = Objective(chosen, masks, config.data.label_holdout > 0)
    return objective, with_overrides(config, objective.settled)
