"""From presets, files and `--set` to a config; from a config to text."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from functools import reduce
from importlib import resources
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from pistoseg.classes import TissueClasses
from pistoseg.config.base import parse_yaml, read_yaml
from pistoseg.config.root import Config
from pistoseg.config.sections import ClassConfig, ClassesConfig, StorageConfig, TrackingConfig
from pistoseg.errors import PistoSegError, suggestion

Model = TypeVar("Model", bound=BaseModel)
_log = logging.getLogger("pistoseg.config")
_HELP = "`pistoseg config show` prints every key with its meaning"


DEFAULT_PRESET = "wsss4luad"


def presets() -> list[str]:
    """Names of the presets that ship with PistoSeg."""
    folder = resources.files("pistoseg") / "presets"
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def load_config(
    preset: str | None = None,
    profile: str | None = None,
    file: str | None = None,
    overrides: list[str] | tuple[str, ...] = (),
    *,
    images: bool = True,
) -> Config:
    """Resolve a config.

    Args:
        preset: name of a preset; the default is `wsss4luad` unless `file` is given.
        profile: one of the preset's profiles, e.g. `cpu`.
        file: path or URI of a YAML with any of the sections; it may name a `preset` and a `profile` itself.
        overrides: `section.key=value` strings, values in YAML.
        images: whether images may be read by it, whose pixel size is the one that is set; slides say their own.

    Raises:
        PistoSegError: listing every problem of the config.
    """
    own = read_yaml(file) if file else {}
    preset = preset or own.pop("preset", None) or (None if file else DEFAULT_PRESET)
    profile = profile or own.pop("profile", None)
    own = {key: value for key, value in own.items() if key not in ("preset", "profile")}
    if isinstance(own.get("classes"), list):  # of a config these are a section
        raise PistoSegError("this is a file of classes", file=file, remedy=f"give it with --set classes={file}")
    for key, name in (("preset", preset), ("profile", profile)):
        if name and not isinstance(name, str):
            raise PistoSegError(f"{name!r} is no name", file=file, field=key, remedy=f"name one {key}, as text")
    values: dict[str, Any] = {}
    if profile and not preset:
        raise PistoSegError(
            f"profile {profile!r} belongs to a preset, and beside a file none is taken unless it is named",
            field="--profile",
            remedy="add --preset NAME, or the key preset to the file",
        )
    if preset:
        values = _read_preset(preset)
        profiles = values.pop("profiles", {})
        if profile and profile not in profiles:
            raise PistoSegError(
                f"preset {preset!r} has no profile {profile!r}",
                field="--profile",
                remedy=f"use one of: {', '.join(profiles)}"
                if profiles
                else "leave it out: this preset has no profiles",
            )
        if profile:
            values = _merge(values, profiles[profile])
    given = [own, *map(parse_override, overrides)]
    base = _for_classes(values, reduce(_merge, given))
    config = validate(reduce(_merge, given, base), source=file or (f"preset {preset}" if preset else "config"))
    if preset and images:
        _warn_of_pixel_size(config, preset, values, reduce(_merge, given))
    return config


def _for_classes(values: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """A preset's values without its background_id where the user's own classes are more or fewer.

    Args:
        values: of the preset.
        given: what the user set.
    """
    classes = given.get("classes")
    own = classes.get("classes") if isinstance(classes, dict) else None
    if not isinstance(own, list) or values.get("classes", {}).get("background_id") == len(own):
        return values
    return _without(values, ("classes", "background_id"))


def _warn_of_pixel_size(config: Config, preset: str, values: dict[str, Any], given: dict[str, Any]) -> None:
    """Say that images with other classes than a preset's are taken to have its pixel size.

    Args:
        config: as it was resolved.
        preset: its name.
        values: of the preset.
        given: what the user set.
    """
    others = config.classes != ClassesConfig.model_validate(values["classes"])
    if others and config.scale.source_mpp and "source_mpp" not in given.get("scale", {}):
        _log.warning(
            "warning: images, unlike slides, are taken to have the %g um/px of preset %s, but its classes are not "
            "yours: set scale.source_mpp to the pixel size of your images or, where nobody knows it, it and scale.mpp "
            "to null",
            config.scale.source_mpp,
            preset,
        )


class _Services(BaseModel):
    """Sections of a config that say which services are there, whatever is trained."""

    tracking: TrackingConfig = TrackingConfig()
    storage: StorageConfig = StorageConfig()


def load_services(
    file: str | None = None, overrides: list[str] | tuple[str, ...] = ()
) -> tuple[TrackingConfig, StorageConfig]:
    """The sections `tracking` and `storage` alone, of a file that need not be a whole config.

    Args:
        file: as in `load_config`.
        overrides: as in `load_config`.

    Raises:
        PistoSegError: listing every problem of these sections, and sections that no config has.
    """
    values: dict[str, Any] = read_yaml(file) if file else {}
    for item in overrides:
        values = _merge(values, parse_override(item))
    source = file or "config"
    if unknown := sorted(map(str, values.keys() - Config.model_fields - {"preset", "profile"})):
        raise PistoSegError(f"has the unknown sections {', '.join(unknown)}", file=source, remedy=_HELP)
    services = _validated(values, source, _Services)
    return services.tracking, services.storage


def load_classes(uri: str) -> TissueClasses:
    """Tissue classes from a YAML file with the keys of the config's `classes` section."""
    return _read_classes(uri).tissue()


def _read_classes(uri: str) -> ClassesConfig:
    return _validated(read_yaml(uri), uri, ClassesConfig)


def validate(values: dict[str, Any], source: str = "config") -> Config:
    """A `Config` from plain values; `PistoSegError` lists all problems at once, those of a file of classes first."""
    classes = values.get("classes")
    if isinstance(classes, str):
        values = values | {"classes": _read_classes(classes)}
    return _validated(values, source, Config)


def _validated(values: Any, source: str, root: type[Model]) -> Model:
    """Plain values of a source as `root`; `PistoSegError` lists all problems."""
    try:
        return root.model_validate(values)
    except ValidationError as error:
        problems = error.errors()
    unknown = [problem["loc"] for problem in problems if problem["type"] == "extra_forbidden"]
    try:  # pydantic passes over a section's rules about several keys where one is unknown
        root.model_validate(reduce(_without, unknown, values))
    except ValidationError as error:
        misspelled = [location for location in unknown if _suggestion(location, root)]
        problems += [problem for problem in error.errors() if not _may_lack(problem, misspelled)]
    raise _refusal(problems, source, root)


def _may_lack(problem: Any, misspelled: Iterable[tuple[int | str, ...]]) -> bool:
    """Whether a rule about several keys may be broken only because one of them, or of keys below, is misspelled."""
    return problem["type"] == "value_error" and any(_is_below(key, problem["loc"]) for key in misspelled)


def _without(values: Any, location: tuple[int | str, ...]) -> Any:
    """Plain values without the key at a place; those in lists stay."""
    key, *below = location
    if not isinstance(values, dict) or key not in values:
        return values
    if below:
        return values | {key: _without(values[key], tuple(below))}
    return {other: value for other, value in values.items() if other != key}


def _refusal(problems: Sequence[Any], source: str, root: type[BaseModel]) -> PistoSegError:
    """What to say of the problems with a source that was read as `root`."""
    lines = []
    for problem in problems:
        location = problem["loc"]
        if problem["type"] == "too_short" and any(_is_below(other["loc"], location) for other in problems):
            continue  # pydantic does not count entries that are wrong themselves
        key = ".".join(str(part) for part in location if part not in ("literal", "dict"))
        lines.append(f"\n  {key + ': ' if key else ''}{_message(problem, root)}")
    lines = list(dict.fromkeys(lines))
    what = "classes" if root is ClassesConfig else "config"
    lacks_classes = any(problem["type"] == "missing" and problem["loc"] == ("classes",) for problem in problems)
    remedy = f"add --preset NAME, or a section classes; {_HELP}" if lacks_classes and root is Config else _HELP
    return PistoSegError(f"{len(lines)} problem(s) in the {what}:" + "".join(lines), file=source, remedy=remedy)


def _is_below(location: tuple[int | str, ...], other: tuple[int | str, ...]) -> bool:
    return len(location) > len(other) and location[: len(other)] == other


def _message(problem: Any, root: type[BaseModel]) -> str:
    """A problem of pydantic's in the words of a YAML file."""
    location = problem["loc"]
    if problem["type"] == "extra_forbidden":
        return f"unknown key{_suggestion(location, root)}"
    if problem["type"] == "model_type":
        if _model_at(location, root) is ClassConfig:
            return f"write {{name: {problem['input']}, color: [r, g, b]}}"
        return "must be a mapping of keys to values"
    message: str = problem["msg"]
    return message.removeprefix("Value error, ").rstrip(".")


def describe(config: Config) -> str:
    """The resolved config as YAML, each field with its doc line as a comment."""
    return "\n".join(_describe(config, 0)) + "\n"


def _describe(section: BaseModel, indent: int) -> list[str]:
    lines, pad = [], "  " * indent
    for key, info in type(section).model_fields.items():
        value = getattr(section, key)
        if isinstance(value, BaseModel):
            lines += [f"{pad}{key}:  # {info.description}", *_describe(value, indent + 1)]
        else:
            dumped = section.model_dump(mode="json", include={key})[key]
            text = yaml.safe_dump(dumped, default_flow_style=True, width=10_000, allow_unicode=True)
            lines.append(f"{pad}{key}: {text.removesuffix('...' + chr(10)).strip()}  # {info.description}")
    return lines


def _read_preset(preset: str) -> dict[str, Any]:
    if preset not in presets():
        raise PistoSegError(
            f"there is no preset {preset!r}", field="--preset", remedy=f"use one of: {', '.join(presets())}"
        )
    text = (resources.files("pistoseg") / "presets" / f"{preset}.yaml").read_text("utf-8")
    value: dict[str, Any] = yaml.safe_load(text)
    return value


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def parse_override(item: str) -> dict[str, Any]:
    """The sections that a `section.key=value` string sets."""
    key, equals, text = item.partition("=")
    if not equals or not key.strip():
        raise PistoSegError(f"{item!r} is not section.key=value", field="--set")
    try:
        value: Any = parse_yaml(text) if text.strip() else None
    except ValueError as error:
        raise PistoSegError(f"{item!r}: the value is not valid YAML: {error}", field="--set") from None
    *sections, field = key.strip().split(".")
    nested = {field: value}
    for section in reversed(sections):
        nested = {section: nested}
    return nested


def _suggestion(location: tuple[int | str, ...], root: type[BaseModel]) -> str:
    model = _model_at(location[:-1], root)
    return suggestion(str(location[-1]), model.model_fields if model else ())


def _model_at(location: tuple[int | str, ...], root: type[BaseModel]) -> type[BaseModel] | None:
    """The section, or the entry of a list, at a place in a file; None where there is none."""
    found: Any = root
    for part in location:
        if isinstance(part, int):
            found = next(iter(get_args(found)), None)
        else:
            field = getattr(found, "model_fields", {}).get(part)
            found = field.annotation if field else None
    return found if isinstance(found, type) and issubclass(found, BaseModel) else None
