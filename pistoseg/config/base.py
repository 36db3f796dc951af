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

_MERGE = "tag:yaml.org,2002:merge"
"""Of the key `<<`, which may stand twice: both count."""


class Section(BaseModel):
    """Base of every section: unknown keys are refused, values don't change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def read_yaml(uri: str) -> dict[str, Any]:
    """A YAML mapping from a path or URI."""
    from pistoseg import storage

    try:
        text = storage.read_text(uri)
    except FileNotFoundError:
        raise PistoSegError("does not exist", file=uri, remedy="give the path or URI of a YAML file") from None
    except OSError as error:
        reason = f"can't be read: {error.strerror or error}"
        raise PistoSegError(reason, file=uri, remedy="name a YAML file that you may read") from None
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise PistoSegError(f"is not valid YAML: {error}", file=uri) from None
    if not isinstance(value, dict):
        raise PistoSegError("must be a mapping of keys to values", file=uri)
    return value


def parse_yaml(text: str) -> Any:
    """The value of a YAML document; `ValueError` says what is wrong with it, also that keys stand in it twice."""
    try:
        if repeated := _repeated_keys(yaml.compose(text, Loader=yaml.SafeLoader)):
            raise ValueError(f"{'; '.join(repeated)}, and only the last one would count")
        return yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        raise ValueError(_with_line(error)) from None
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _with_line(error: yaml.MarkedYAMLError) -> str:
    """An error of PyYAML's on one line, which it begins with; of a tab, the likeliest of them, what to do."""
    problem, at, began = error.problem, error.problem_mark, error.context_mark
    if problem and r"'\t'" in problem:
        problem = "has a tab where only spaces may stand; use spaces"
    elif began:
        problem = f"{problem}, {error.context} that begins on line {began.line + 1}"
    return f"line {at.line + 1}: {problem}" if at else str(problem)


def _repeated_keys(root: yaml.Node | None) -> list[str]:
    """What to say of every key that stands in one mapping more than once, which `safe_load` takes without a word."""
    found: list[tuple[list[int], str]] = []
    seen: set[int] = set()
    left = [root]
    while left:
        node = left.pop()
        if not isinstance(node, yaml.CollectionNode) or id(node) in seen:  # an alias may lead back up
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            left += node.value
            continue
        lines: dict[tuple[str, str], list[int]] = {}
        for key, value in node.value:
            left.append(value)
            if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE:
                lines.setdefault((key.tag, key.value), []).append(key.start_mark.line + 1)
        found += [(at, key) for (_, key), at in lines.items() if len(at) > 1]
    return [f"the key {key!r} stands on lines {' and '.join(map(str, at))}" for at, key in sorted(found)]


def refuse_gaps(stride: int | None, patch_size: int) -> None:
    """Refuse a step between windows that leaves pixels between them unseen; `ValueError`, as validators raise it."""
    if stride is not None and stride > patch_size:
        raise ValueError(
            f"stride ({stride}) must be at most patch_size ({patch_size}), or pixels between windows are never seen; "
            "lower stride, or set it to null"
        )
