"""What every section of a config is made of, and how its YAML is read."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

from pistoseg.errors import PistoSegError

Channel = Annotated[int, Field(ge=0, le=255)]
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Precision = Literal["auto", "bf16", "fp32"]


class Section(BaseModel):
    """Base of every section: unknown keys are refused, values don't change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def read_yaml(uri: str) -> dict[str, Any]:
    """A YAML mapping from a path or URI."""
    from pistoseg import storage

    try:
        value = yaml.safe_load(storage.read_text(uri))
    except FileNotFoundError:
        raise PistoSegError("does not exist", file=uri) from None
    except OSError as error:
        reason = f"can't be read: {error.strerror or error}"
        raise PistoSegError(reason, file=uri, remedy="name a YAML file that you may read") from None
    except yaml.YAMLError as error:
        raise PistoSegError(f"is not valid YAML: {error}", file=uri) from None
    if not isinstance(value, dict):
        raise PistoSegError("must be a mapping of keys to values", file=uri)
    return value


def refuse_gaps(stride: int | None, patch_size: int) -> None:
    """Refuse a step between windows that leaves pixels between them unseen; `ValueError`, as validators raise it."""
    if stride is not None and stride > patch_size:
        raise ValueError(
            f"stride ({stride}) must be at most patch_size ({patch_size}), or pixels between windows are never seen; "
            "lower stride, or set it to null"
        )
