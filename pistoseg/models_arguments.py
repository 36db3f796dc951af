"""The verbs `models list|show|promote|export` on the command line, and which MLflow server a verb is to look at."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pistoseg.config import TrackingConfig

Verb = Callable[..., argparse.ArgumentParser]


def model_verbs(models: Any, verb: Verb) -> None:
    """Add them to their group.

    Args:
        models: the group.
        verb: adds a verb to a group; takes the group, the verb's name, what it runs, and its help.
    """
    listed = verb(models, "list", _list, "all versions of all models")
    shown = verb(models, "show", _show, "metrics, lineage and pictures of a version")
    promoted = verb(models, "promote", _promote, "point an alias to a version")
    exported = verb(models, "export", _export, "copy a version's bundle to a folder")
    for parser in (shown, exported):
        parser.add_argument("model", metavar="MODEL", help="NAME, NAME@ALIAS or NAME/VERSION")
    promoted.add_argument("model", metavar="NAME", help="of the registered model")
    promoted.add_argument("version", metavar="VERSION", help="its number")
    promoted.add_argument(
        "--alias", default="champion", help="default: %(default)s; the champion before gets `previous`"
    )
    exported.add_argument("--out", required=True, metavar="DIR", help="folder or URI of the bundle")
    for parser in (listed, shown, promoted, exported):
        parser.add_argument(
            "--workspace", default="runs/pistoseg", help="whose MLflow knows the models (default: %(default)s)"
        )
        server_options(parser)


def server_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `server` reads."""
    parser.add_argument("--config", metavar="FILE", help="YAML with settings; tracking and storage count")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="e.g. tracking.uri=URL"
    )


def server(options: argparse.Namespace) -> TrackingConfig:
    """The MLflow server that the settings name; their object storage is what is used from now on."""
    from pistoseg.config import load_services
    from pistoseg.object_store import use

    tracking, storage = load_services(options.config, options.overrides)
    use(storage)
    return tracking


def _list(options: argparse.Namespace) -> int:
    from pistoseg.models_command import list_models

    return list_models(options.workspace, server(options))


def _show(options: argparse.Namespace) -> int:
    from pistoseg.models_command import show

    return show(options.model, options.workspace, server(options))


def _promote(options: argparse.Namespace) -> int:
    from pistoseg.models_command import promote

    return promote(options.model, options.version, options.alias, options.workspace, server(options))


def _export(options: argparse.Namespace) -> int:
    from pistoseg.models_command import export

    return export(options.model, options.out, options.workspace, server(options))
