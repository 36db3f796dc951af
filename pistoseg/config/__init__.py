"""The settings of a pipeline: typed, validated, each with a doc line.

A config is a preset, then a profile of that preset, then a YAML file, then `--set section.key=value`; later ones win.
Everything that is wrong with it is reported at once, before anything starts.
"""

from pistoseg.config.loading import (
    DEFAULT_PRESET,
    describe,
    load_classes,
    load_config,
    load_services,
    parse_override,
    presets,
    validate,
)
from pistoseg.config.networks import (
    AugmentationConfig,
    CamConfig,
    ClassifierConfig,
    LabelledCropConfig,
    PreciseConfig,
    PseudoMaskConfig,
    RefinedMaskConfig,
    RefinerConfig,
    SegmentationConfig,
    TilingConfig,
    TrainingConfig,
)
from pistoseg.config.root import Config
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

__all__ = [
    "DEFAULT_PRESET",
    "AugmentationConfig",
    "CamConfig",
    "ClassesConfig",
    "ClassifierConfig",
    "ComputeConfig",
    "Config",
    "DataConfig",
    "EvaluationConfig",
    "LabelledCropConfig",
    "PreciseConfig",
    "PseudoMaskConfig",
    "RefinedMaskConfig",
    "RefinerConfig",
    "ScaleConfig",
    "SegmentationConfig",
    "StorageConfig",
    "SynthesisConfig",
    "TilingConfig",
    "TrackingConfig",
    "TrainingConfig",
    "describe",
    "load_classes",
    "load_config",
    "load_services",
    "parse_override",
    "presets",
    "validate",
]
