"""Where a search or an ablation looks into its pipelines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pistoseg.artifacts import Artifact
    from pistoseg.graph import Step


class Hooks:
    """What a search or an ablation does around the stages of its pipelines; by default nothing."""

    def train_callbacks(self, step: Step) -> tuple[Any, ...]:
        """`ray.train.UserCallback`s of a stage's training."""
        return ()

    def begun(self, step: Step) -> None:
        """Told of a stage that begins to compute its artifact."""

    def reused(self, artifact: Artifact) -> None:
        """Told of an artifact that was there, or that another run made in the meantime."""
