"""What a job on a Ray cluster is given: the package, the resolved settings, and arguments that hold where it runs."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

import pistoseg
from pistoseg import storage
from pistoseg.arguments import resolved_config
from pistoseg.errors import PistoSegError
from pistoseg.redaction import has_secret

if TYPE_CHECKING:
    from pistoseg.config import Config

SETTINGS = "job.yaml"
PLACES = ("--data", "--workspace", "--out", "--model", "--slides")
SHIPPED = ("--classes", "--space")
"""Options whose files travel with the job; a value that names no file here stays as it is."""
SETTINGS_OPTIONS = ("--preset", "--profile", "--config", "--set")
NEEDS_WORKSPACE = ("train", "synthesize", "search", "ablate")
"""Verbs whose results are in the workspace."""


def package(arguments: list[str], options: argparse.Namespace, folder: Path, here: bool) -> list[str]:
    """Put what a job needs into a folder, and say with which arguments it runs there.

    Args:
        arguments: of the command line.
        options: what they were parsed to.
        folder: an empty one; gets the package and, unless they are in object storage, the resolved settings.
        here: whether the cluster is on this machine, and sees its files.
    """
    from pistoseg.tracking.registry import workspace_of

    command = _without(arguments, ("--submit",))
    if any(has_secret(argument) for argument in command):
        raise PistoSegError(
            "holds credentials, and everyone who sees the cluster sees a job's arguments",
            file=next(argument for argument in command if has_secret(argument)),
            remedy="give the URI without them, and the cluster's nodes the AWS_* variables, a profile or a role",
        )
    shutil.copytree(Path(pistoseg.__file__).parent, folder / "pistoseg", ignore=shutil.ignore_patterns("__pycache__"))
    travel = hasattr(options, "config") and (options.config is None or storage.is_local(options.config))
    if travel:
        command = [*_without(command, SETTINGS_OPTIONS), "--config", SETTINGS]
    for flag in _needed(options, here):
        if not given(command, flag):
            command += [flag, getattr(options, flag.strip("-")) or workspace_of(options.model)]
    command = [*_reachable(command, here, folder)]  # first: what is wrong with --data is wrong with data.uri, too
    if travel:
        values = _portable(resolved_config(options), here)
        _require_no_secret(values)
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        (folder / SETTINGS).write_text(text, encoding="utf-8")
    return command


def _needed(options: argparse.Namespace, here: bool) -> Iterator[str]:
    """Options whose defaults are places of this machine, which a job has to be told."""
    stage = getattr(options, "stage", None)  # of `evaluate`: its masks are in the workspace
    # Elsewhere a job that looks for a registered model has its cluster's tracking server, and wants no workspace.
    if options.verb in NEEDS_WORKSPACE or stage or (here and options.verb in ("segment", "evaluate")):
        yield "--workspace"
    if getattr(options, "preview", None):
        yield "--out"


def _portable(config: Config, here: bool) -> dict[str, Any]:
    """A config as plain values, without what is this machine's."""
    values = config.model_dump(mode="json")
    values["compute"]["address"] = None  # the job is told by Ray
    _settle(values, here)
    return values


def _settle(values: dict[str, Any], here: bool) -> bool:
    """Make the places in settings absolute, or refuse those that only this machine has; whether any was changed."""
    changed = False
    for section, settings in values.items():
        for field, value in settings.items() if isinstance(settings, dict) else ():
            if isinstance(value, str) and (place := _settled(value, section, field, here)) != value:
                settings[field], changed = place, True
    return changed


def _settled(value: str, section: str, field: str, here: bool) -> str:
    from pistoseg import places
    from pistoseg.tracking.server import database_file

    name = f"{section}.{field}"
    if name == "tracking.uri" and (database := database_file(value)) and not here and not database.is_absolute():
        raise PistoSegError(
            "is on this machine, where the cluster can't reach it",
            file=value,
            field=name,
            remedy="name a tracking server, or leave it to MLFLOW_TRACKING_URI of the cluster's nodes",
        )
    if places.is_data(section, field, value):
        _require(value, name, here)
    return places.absolute(section, field, value)


def _require(value: str, field: str, here: bool) -> None:
    """Refuse what only this machine has; an absolute path may be a share that all nodes mount."""
    _require_no_secret(value, field)
    if not here and storage.is_local(value) and not os.path.isabs(value):
        raise PistoSegError(
            "is on this machine, where the cluster can't reach it",
            file=value,
            field=field,
            remedy="give a URI, e.g. s3://bucket/folder, or the absolute path of a folder that all nodes mount",
        )


def _require_no_secret(value: Any, field: str = "") -> None:
    """Refuse a setting, or a section with one, that holds credentials."""
    if isinstance(value, dict):
        for key, item in value.items():
            _require_no_secret(item, f"{field}.{key}" if field else str(key))
    elif isinstance(value, list):
        for item in value:
            _require_no_secret(item, field)
    elif isinstance(value, str) and has_secret(value):
        raise PistoSegError(
            "holds credentials, and everyone who sees the cluster sees a job's settings",
            file=value,
            field=field,
            remedy="give it without them; the cluster's nodes have credentials of their own",
        )


def _reachable(command: list[str], here: bool, folder: Path) -> Iterator[str]:
    """The arguments with local paths made absolute, and small files put into the job's folder."""
    flag = ""
    for argument in command:
        name, equals, value = argument.partition("=")
        if flag == "--set":
            yield _setting(argument, here, folder)
        elif name == "--set" and equals:
            yield f"--set={_setting(value, here, folder)}"
        elif flag in PLACES + SHIPPED:
            yield _place(argument, flag, here, folder)
        elif equals and name in PLACES + SHIPPED:
            yield f"{name}={_place(value, name, here, folder)}"
        else:
            yield argument
        flag = argument


def _setting(item: str, here: bool, folder: Path) -> str:
    """A `section.key=value` beside settings that the job reads itself."""
    from pistoseg.config import parse_override

    ((key, value),) = (values := parse_override(item)).items()
    changed = _settle(values, here)
    if key == "classes" and isinstance(value, str):
        value, changed = _place(value, "--classes", here, folder), True
    return f"{key}={json.dumps(value, ensure_ascii=False, default=str)}" if changed else item


def _place(value: str, flag: str, here: bool, folder: Path) -> str:
    if value.startswith("models:/"):
        return value
    if flag in SHIPPED:
        source = storage.local_path(value)
        if source is None or not source.is_file():
            return value
        name = f"{flag.strip('-')}{source.suffix}"
        shutil.copy(source, folder / name)
        return name
    _require(value, flag, here)
    return storage.absolute(value)


def given(command: list[str], flag: str) -> bool:
    """Whether an option is among arguments, as `--flag value` or `--flag=value`."""
    return any(argument == flag or argument.startswith(f"{flag}=") for argument in command)


def _without(command: Sequence[str], flags: Sequence[str]) -> list[str]:
    """The arguments without some options and their values."""
    kept, skip = [], False
    for argument in command:
        if skip:
            skip = False
        elif argument in flags:
            skip = True
        elif argument.partition("=")[0] not in flags:
            kept.append(argument)
    return kept
