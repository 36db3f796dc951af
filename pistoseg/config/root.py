"""The whole config and what must agree between its sections."""

from __future__ import annotations

from typing import Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from pistoseg.classes import class_weights
from pistoseg.config.base import Section
from pistoseg.config.networks import (
    CamConfig,
    ClassifierConfig,
    PreciseConfig,
    PseudoMaskConfig,
    RefinedMaskConfig,
    RefinerConfig,
    SegmentationConfig,
)
from pistoseg.config.sections import (
    ClassesConfig,
    ComputeConfig,
    DataConfig,
    EvaluationConfig,
    ScaleConfig,
    StorageConfig,
    SynthesisConfig,
    TrackingConfig,
)


class Config(Section):
    """A whole pipeline."""

    seed: int = Field(
        0, ge=0, lt=2**63, description="Same config, data and seed: same mosaics on any number of workers."
    )
    classes: ClassesConfig = Field(description="Tissue classes; or the path of a YAML with them.")
    scale: ScaleConfig = Field(default_factory=ScaleConfig, description="Pixel size of all stages.")
    data: DataConfig = Field(default_factory=DataConfig, description="Training images.")
    synthesis: SynthesisConfig = Field(default_factory=SynthesisConfig, description="Mosaics.")
    preliminary: SegmentationConfig = Field(default_factory=SegmentationConfig, description="Model trained on mosaics.")
    pseudo_masks: PseudoMaskConfig = Field(default_factory=PseudoMaskConfig, description="Its masks of real images.")
    classifier: ClassifierConfig = Field(default_factory=ClassifierConfig, description="The CAM network.")
    cams: CamConfig = Field(default_factory=CamConfig, description="Its activation maps of real images.")
    refiner: RefinerConfig = Field(default_factory=RefinerConfig, description="The refining network.")
    refined_masks: RefinedMaskConfig = Field(default_factory=RefinedMaskConfig, description="What it refines.")
    precise: PreciseConfig = Field(default_factory=PreciseConfig, description="Model trained on real images.")
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig, description="Scores.")
    compute: ComputeConfig = Field(default_factory=ComputeConfig, description="Machine or cluster.")
    storage: StorageConfig = Field(default_factory=StorageConfig, description="Object storage.")
    tracking: TrackingConfig = Field(default_factory=TrackingConfig, description="MLflow.")

    @field_validator("synthesis")
    @classmethod
    def _class_weights(cls, value: SynthesisConfig, info: ValidationInfo) -> SynthesisConfig:
        """Weights by the names that the classes have, whatever the case in which they were written."""
        if not isinstance(value.class_sampling, dict) or "classes" not in info.data:
            return value
        names = info.data["classes"].tissue().names
        weights = dict(zip(names, class_weights(value.class_sampling, names), strict=True))
        return value.model_copy(update={"class_sampling": weights})

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problems = []
        if self.scale.fit and self.scale.source_mpp:  # not of `ScaleConfig`: bundles may have it
            problems.append(
                "scale.fit resizes training images without regard to scale.source_mpp, by which others are resized; "
                "set scale.fit=null, or leave source_mpp out"
            )
        same = ("architecture", "encoder", "decoder_attention")
        if self.precise.initial == "preliminary" and any(
            getattr(self.precise, key) != getattr(self.preliminary, key) for key in same
        ):
            problems.append("precise.initial=preliminary needs the same architecture, encoder and decoder_attention")
        for name in ("classifier", "refiner"):
            section = getattr(self, name)
            if section.initial == "preliminary" and section.encoder != self.preliminary.encoder:
                problems.append(
                    f"{name}.initial=preliminary needs the encoder of preliminary ({self.preliminary.encoder})"
                )
            if section.encoder == "resnet38d" and section.output_stride != 8:
                problems.append(f"{name}.encoder=resnet38d has output_stride 8 only")
        if problems:
            raise ValueError("; ".join(problems))
        return self
