"""Search spaces: which settings vary, in which ranges, under which conditions; what can't be is never a point of one.

A point gives every active parameter its value. Ranges that depend on each other (alpha < beta) are drawn as a share of
the room that is left, and settings that belong together (n_h H_p = the height) are one parameter with several keys.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from pistoseg.config import Config
from pistoseg.config.base import Section, read_yaml
from pistoseg.errors import PistoSegError, suggestion

Point = dict[str, Any]
DIGITS = 4
"""Significant digits of a drawn number, or of its range's width: a config that a person reads and types."""
MOST_POINTS = 50_000
"""A grid with more points is not written down."""
MARGIN = 0.02
"""Least share of the whole range by which a parameter lies above the one that it must exceed."""


@dataclass(frozen=True)
class Parameter:
    """Something that varies.

    Args:
        name: key of the config (`section.field`), or for options that set several keys a name of its own.
        low: least number; None for options.
        high: largest number.
        log: whether it is drawn on a logarithmic scale.
        integer: whether it is a whole number.
        options: label -> what it sets by key.
        ordered: whether the options' order means something.
        above: name of an earlier parameter that it must exceed.
        when: name of an earlier parameter -> its labels with which this one is active.
    """

    name: str
    low: float | None = None
    high: float | None = None
    log: bool = False
    integer: bool = False
    options: Mapping[Any, Mapping[str, Any]] = field(default_factory=dict)
    ordered: bool = False
    above: str | None = None
    when: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    @property
    def keys(self) -> tuple[str, ...]:
        """What it sets, by `section.key`."""
        return tuple(dict.fromkeys(key for sets in self.options.values() for key in sets)) or (self.name,)

    def active(self, point: Mapping[str, Any]) -> bool:
        """Whether it counts beside the values that a point has so far."""
        return all(point.get(name) in labels for name, labels in self.when.items())

    def room(self, point: Mapping[str, Any]) -> tuple[float, float]:
        """The range that a point leaves it; the whole one where what it must exceed does not count."""
        low, high = self._ends
        if self.above is None or self.above not in point:
            return low, high
        other, margin = point[self.above], MARGIN * (high - low)
        least = max(math.floor(other) + 1, math.ceil(other + margin)) if self.integer else other + margin
        return max(low, least), high

    @property
    def _ends(self) -> tuple[float, float]:
        assert self.low is not None
        assert self.high is not None
        return self.low, self.high

    def at(self, share: float, point: Mapping[str, Any]) -> Any:
        """The value at a share (0 to 1) of its range, or of its options."""
        if self.options:
            labels = list(self.options)
            return labels[min(int(share * len(labels)), len(labels) - 1)]
        low, high = self.room(point)
        if self.log:
            value = math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
        else:
            value = low + share * (high - low)
        least, most = self._ends
        return round(value) if self.integer else _rounded(value, low, high, most - least)

    def holds(self, value: Any, point: Mapping[str, Any]) -> bool:
        """Whether a value is one that it can have."""
        if self.options:
            return value in list(self.options)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        low, high = self.room(point)
        return low <= value <= high and not (self.integer and value != round(value))

    def levels(self, count: int, point: Mapping[str, Any]) -> list[Any]:
        """Its values in a grid: all options, or `count` numbers from end to end."""
        if self.options:
            return list(self.options)
        shares = [index / (count - 1) for index in range(count)] if count > 1 else [0.5]
        return list(dict.fromkeys(self.at(share, point) for share in shares))

    def read(self, values: Mapping[str, Any], point: Mapping[str, Any]) -> Any:
        """The value that a config has, or None where this parameter can't have it.

        Args:
            values: of the config by key.
            point: values of the earlier parameters.
        """
        if self.options:
            found = (
                label for label, sets in self.options.items() if all(_same(values, *item) for item in sets.items())
            )
            return next(found, None)
        value = _value(values, self.name)
        return value if self.holds(value, point) else None

    def refusal(self, values: Mapping[str, Any]) -> str:
        """In words that it can't have the value of a config."""
        own = {key: _value(values, key) for key in self.keys}
        own = {key: "nothing" if value is _MISSING else value for key, value in own.items()}
        if self.options:
            return f"{self.name} has no option with {_option_label(own)}"
        return f"{self.name} can't be {own[self.name]}"


@dataclass(frozen=True)
class Space:
    """Parameters in an order in which each comes after those that it depends on.

    Args:
        name: as the command line has it.
        parameters: at least one.
        notes: what a user must know, such as parameters that were left out.
    """

    name: str
    parameters: tuple[Parameter, ...]
    notes: tuple[str, ...] = ()

    def draw(self, rng: random.Random, among: Mapping[str, Sequence[Any]] | None = None) -> Point:
        """A random point.

        Args:
            rng: draws it.
            among: name -> values of which the parameter, where it is active, gets one.
        """
        point: Point = {}
        for parameter in self.parameters:
            if parameter.active(point):
                values = [value for value in (among or {}).get(parameter.name, ()) if parameter.holds(value, point)]
                point[parameter.name] = rng.choice(values) if values else parameter.at(rng.random(), point)
        return point

    def conditions(self, name: str) -> dict[str, tuple[Any, ...]]:
        """Name -> values of all earlier parameters with which a parameter is active; none where they exclude it."""
        found: dict[str, tuple[Any, ...]] = {}
        for item in reversed(self.parameters):
            if item.name == name or item.name in found:
                for parent, labels in item.when.items():
                    found[parent] = tuple(label for label in labels if label in found.get(parent, labels))
        return found

    def overrides(self, point: Mapping[str, Any]) -> dict[str, Any]:
        """What a point sets, by `section.key`."""
        values: dict[str, Any] = {}
        for parameter in self.parameters:
            if parameter.name not in point:
                continue
            if parameter.options:
                values |= parameter.options[point[parameter.name]]
                continue
            parents = (key for key, value in values.items() if isinstance(value, Mapping))
            parent = next((key for key in parents if parameter.name.startswith(f"{key}.")), None)
            if parent is None:
                values[parameter.name] = point[parameter.name]
            else:  # a weight of synthesis.class_sampling: the class's name may have dots
                values[parent] = values[parent] | {parameter.name[len(parent) + 1 :]: point[parameter.name]}
        return values

    def point_of(self, config: Config) -> Point | None:
        """The point at which a config lies, None where it lies at none."""
        point, outside = self.place_of(config)
        return None if outside else point

    def place_of(self, config: Config) -> tuple[Point, list[str]]:
        """The values that a config has in the space, and in words what of it lies outside of the space."""
        values = config.model_dump(mode="json")
        point: Point = {}
        outside = []
        for parameter in self.parameters:
            if parameter.active(point):
                value = parameter.read(values, point)
                if value is not None:
                    point[parameter.name] = value
                else:
                    outside.append(parameter.refusal(values))
        return point, outside

    def grid(self, levels: int) -> list[Point]:
        """Every combination of all options and of `levels` numbers of each range."""
        points: list[Point] = [{}]
        for parameter in self.parameters:
            points = [
                {**point, **({parameter.name: value} if parameter.active(point) else {})}
                for point in points
                for value in (parameter.levels(levels, point) if parameter.active(point) else [None])
            ]
        return points

    def without(self, dead: Mapping[str, str]) -> Self:
        """The space without some parameters, each with the reason, and without those that count only beside them."""
        gone, kept, notes = dict(dead), [], []
        for item in self.parameters:
            if item.name not in gone and (parents := [name for name in item.when if name in gone]):
                gone[item.name] = f"it counts only beside {' and '.join(parents)}"
            if item.name in gone:
                notes.append(f"{item.name} is left out: {gone[item.name]}")
                continue
            if item.above in gone:
                notes.append(f"{item.name} has its whole range: {item.above}, which it was to exceed, is left out")
                item = replace(item, above=None)
            kept.append(item)
        return replace(self, parameters=tuple(kept), notes=(*self.notes, *notes))


class ParameterSpec(Section):
    """One parameter of a space's YAML."""

    low: int | float | None = Field(None, description="Least number.")
    high: int | float | None = Field(None, description="Largest number; whole if both ends are written without a dot.")
    scale: Literal["linear", "log"] = Field("linear", description="How it is drawn between them.")
    values: tuple[Any, ...] | None = Field(None, description="Or: the values to choose from.")
    options: tuple[dict[str, Any], ...] | None = Field(None, description="Or: mappings of several keys to values.")
    ordered: bool = Field(False, description="Whether the order of values or options means something.")
    above: str | None = Field(None, description="An earlier parameter that this one must exceed.")
    when: dict[str, tuple[Any, ...] | Any] = Field(
        default_factory=dict, description="Earlier parameters and the values with which this one counts."
    )

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        numbers = self.low is not None and self.high is not None
        if numbers + (self.values is not None) + (self.options is not None) != 1:
            raise ValueError("give low and high, or values, or options")
        if self.low is not None and self.high is not None:
            if not self.low < self.high:
                raise ValueError("low must be less than high")
            if self.scale == "log" and self.low <= 0:
                raise ValueError("a logarithmic scale needs low > 0")
        if self.above and (not numbers or self.scale == "log"):
            raise ValueError("above needs low and high on a linear scale")
        if any(len(found) < 2 for found in (self.values, self.options) if found is not None):
            raise ValueError("there is nothing to choose between")
        return self

    def parameter(self, name: str) -> Parameter:
        """As the search takes it."""
        options: dict[Any, dict[str, Any]] = {}
        if self.values is not None:
            options = {_label(value): {name: value} for value in self.values}
        elif self.options is not None:
            options = {_option_label(item): item for item in self.options}
        integer = isinstance(self.low, int) and isinstance(self.high, int)
        several = {key: value if isinstance(value, (list, tuple)) else (value,) for key, value in self.when.items()}
        when = {key: tuple(map(_label, values)) for key, values in several.items()}
        log = self.scale == "log"
        return Parameter(name, self.low, self.high, log, integer, options, self.ordered, self.above, when)


class SpaceFile(Section):
    """A space's YAML."""

    parameters: dict[str, ParameterSpec] = Field(min_length=1, description="By `section.key` of the config.")


def read_space(uri: str, config: Config) -> Space:
    """A space from a YAML file; `PistoSegError` lists what is wrong with it."""
    values = read_yaml(uri)
    problems = list(_wrong_keys(values.get("parameters"), config))
    parameters: tuple[Parameter, ...] = ()
    try:
        file = SpaceFile.model_validate(values)
        parameters = tuple(spec.parameter(name) for name, spec in file.parameters.items())
        problems += _wrong_order(parameters)
    except ValidationError as error:
        problems += [f"{'.'.join(map(str, item['loc']))}: {_message(item)}" for item in error.errors()]
    if problems:
        text = "".join(f"\n  {problem.removeprefix('parameters.')}" for problem in problems)
        raise PistoSegError(
            f"{len(problems)} problem(s) in the space:{text}",
            file=uri,
            remedy="`pistoseg config show` prints every key; a parameter has low and high, or values, or options",
        )
    return Space(uri.rsplit("/", 1)[-1].rsplit(".", 1)[0], parameters)


def _message(problem: Any) -> str:
    """A problem of pydantic's in the words of a YAML file."""
    if problem["type"] == "extra_forbidden":
        place = problem["loc"]
        section = ParameterSpec if len(place) > 1 else SpaceFile
        return f"unknown key{suggestion(str(place[-1]), section.model_fields)}"
    if problem["type"] == "model_type":
        return "must be a mapping with low and high, or values, or options"
    message: str = problem["msg"]
    return message.removeprefix("Value error, ")


def _wrong_order(parameters: Sequence[Parameter]) -> Iterator[str]:
    """What is wrong with parameters beside those that come before them."""
    ranges: dict[str, Parameter] = {}
    for item in parameters:
        for other in sorted({*item.when, *([item.above] if item.above else [])} - set(ranges)):
            yield f"{item.name}: names {other}, which does not come before it"
        for other, labels in item.when.items():
            if other in ranges:
                yield from _never(item, ranges[other], labels)
        if item.above in ranges:
            lower = ranges[item.above]
            if lower.options or lower.high is None:
                yield f"{item.name}: {item.above} is no range"
                continue
            low, high = item.room({item.above: lower.high})
            if low > high or (low == high and not item.integer):
                yield f"{item.name}: must exceed {item.above}, which may be {lower.high:g}"
        ranges[item.name] = item


def _never(item: Parameter, other: Parameter, labels: Sequence[Any]) -> Iterator[str]:
    """The values of an earlier parameter that a parameter counts with, but which that can't have."""
    for label in labels:
        if not other.holds(label, {}):
            hint = suggestion(str(label), map(str, other.options))
            hint = hint or (f"; it may be {', '.join(map(str, other.options))}" if other.options else "")
            yield f"{item.name}: counts when {other.name} is {label!r}, which it never is{hint}"


def _wrong_keys(parameters: Any, config: Config) -> Iterator[str]:
    """The keys that the config has not; a value out of range is found when the first points are validated.

    Args:
        parameters: as the YAML has them, be they right or wrong otherwise.
        config: has the keys.
    """
    values = config.model_dump(mode="json")
    known = [f"{section}.{key}" for section, found in values.items() if isinstance(found, dict) for key in found]
    for name, spec in parameters.items() if isinstance(parameters, dict) else ():
        options = spec.get("options") if isinstance(spec, dict) else None
        sets = [item for item in options if isinstance(item, dict)] if isinstance(options, list) else [{name: None}]
        keys = [key for item in sets for key in item]
        for key in dict.fromkeys(map(str, keys)):
            if _value(values, key) is _MISSING and not key.startswith("synthesis.class_sampling."):
                yield f"{key}: is no key of the config{suggestion(key, known)}"


_MISSING = object()


def _value(values: Mapping[str, Any], key: str) -> Any:
    """A value of a config by key; what comes after the section's field may have dots."""
    value: Any = values
    for part in key.split(".", 2):
        if not isinstance(value, Mapping) or part not in value:
            return _MISSING
        value = value[part]
    return value


def _same(values: Mapping[str, Any], key: str, wanted: Any) -> bool:
    """Whether a config has a value; {} stands for any mapping, whose entries are parameters of their own."""
    value = _value(values, key)
    return isinstance(value, Mapping) if wanted == {} else bool(value == wanted)


def _rounded(value: float, low: float, high: float, width: float) -> float:
    """A value to `DIGITS` digits of its own, or of its range's width where these are finer, as between 0.999 and 1."""
    finer = math.floor(math.log10(abs(value))) - math.floor(math.log10(width)) if value else 0
    return min(max(float(f"{value:.{DIGITS + max(finer, 0)}g}"), low), high)


def _label(value: Any) -> Any:
    return value if isinstance(value, (str, int, float, bool)) else str(value)


def _option_label(option: Mapping[str, Any]) -> str:
    return ", ".join(f"{key.rsplit('.', 1)[-1]}={value}" for key, value in option.items())


def grid_points(space: Space, levels: int, limit: int | None, seed: int) -> list[Point]:
    """The points of a grid in random order; where there are more than `limit`, that many of them, drawn by `seed`."""
    rng = random.Random(seed)
    total = math.prod(len(item.options) or levels for item in space.parameters)
    if total <= MOST_POINTS:
        points = space.grid(levels)
        rng.shuffle(points)
        return points if limit is None else points[:limit]
    if limit is None:
        raise PistoSegError(
            f"a grid over {space.name} has up to {total:,} points", field="--algorithm", remedy="give --trials"
        )
    found: dict[str, Point] = {}
    while len(found) < min(limit, MOST_POINTS):
        point: Point = {}
        for item in space.parameters:
            if item.active(point):
                point[item.name] = rng.choice(item.levels(levels, point))
        found[repr(point)] = point
    return list(found.values())
