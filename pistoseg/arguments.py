"""What verbs have in common on the command line, and what is said to arguments that they do not have."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from pistoseg.errors import PistoSegError, suggestion

if TYPE_CHECKING:
    from pistoseg.config import Config

FEW = 3
"""Choices that are seen at a glance."""


class Parser(argparse.ArgumentParser):
    """Says with an error what was probably meant."""

    def error(self, message: str) -> NoReturn:
        """Print usage and message, and exit with 2."""
        wrong = re.search(r"invalid choice: '(.+)' \(choose from (.+)\)", message)
        choices = re.findall(r"[\w.-]+", wrong[2]) if wrong else []
        meant = suggestion(wrong[1], choices) if wrong and len(choices) > FEW else ""  # `gpu` resembles `cpu`
        super().error(message + meant)


def refuse(unknown: list[str], parser: argparse.ArgumentParser) -> NoReturn:
    """End with the usage of the verb to which words were given that it does not know."""
    options = re.findall(r"--[\w-]+", parser.format_usage())
    meant = suggestion(unknown[0].partition("=")[0], options) if unknown[0].startswith("-") else ""
    parser.error(f"unrecognized arguments: {' '.join(unknown)}{meant}")


def refuse_idle(options: argparse.Namespace, why: str, *names: str) -> None:
    """Refuse options that do nothing beside the others, `why` says which; those at their defaults are not seen.

    Raises:
        PistoSegError: naming the first.
    """
    for name in names:
        if getattr(options, name) != options.parser.get_default(name):
            raise PistoSegError(f"does nothing {why}", field=f"--{name}", remedy="leave it out")


def add_verb(verbs: Any, name: str, run: Callable[[argparse.Namespace], int], summary: str) -> argparse.ArgumentParser:
    """Add a verb to a group; it does `run`."""
    # Options are not abbreviated: a new one would change what an old script means.
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=summary, description=summary, allow_abbrev=False)
    parser.set_defaults(run=run, verb=name, parser=parser)
    return parser


def add_group(verbs: Any, name: str, summary: str) -> Any:
    """Add a verb that has verbs."""
    return verbs.add_parser(name, help=summary, description=summary).add_subparsers(metavar="VERB", required=True)


def log_options(parser: argparse.ArgumentParser) -> None:
    """Add how the log is written."""
    parser.add_argument(
        "--log-format", choices=("text", "json"), default="text", help="json: every line is an object, for log servers"
    )


def job_options(parser: argparse.ArgumentParser) -> None:
    """Add those of verbs that can be jobs of a cluster."""
    log_options(parser)
    parser.add_argument(
        "--submit",
        metavar="ADDRESS",
        help="run as a job on the Ray cluster of this dashboard, e.g. http://head:8265, and follow its log",
    )


def config_options(parser: argparse.ArgumentParser) -> None:
    """Add those that make a config."""
    parser.add_argument(
        "--preset", help="wsss4luad, bcss-wsss, glas or demo (default: wsss4luad, but none beside --config)"
    )
    parser.add_argument("--profile", help="a profile of the preset, e.g. cpu")
    parser.add_argument("--config", metavar="FILE", help="YAML with settings; overrides the preset's")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="e.g. synthesis.alpha=0.3"
    )


def resolved_config(options: argparse.Namespace) -> Config:
    """The config that arguments make; `--data` and `--workers` go before what else sets them.

    Raises:
        PistoSegError: listing every problem of the config.
    """
    from pistoseg.config import load_config

    overrides = list(options.overrides)
    if isinstance(getattr(options, "data", None), str):
        # YAML does not know JSON's pairs of surrogates.
        overrides.append(f"data.uri={json.dumps(options.data, ensure_ascii=False)}")
    if getattr(options, "workers", None):
        overrides.append(f"compute.workers={options.workers}")
    reads_images = options.verb != "windows"  # which cuts slides
    return load_config(options.preset, options.profile, options.config, overrides, images=reads_images)


def run_options(parser: argparse.ArgumentParser) -> None:
    """Add those of verbs that run stages on a data set."""
    parser.add_argument("--data", metavar="DATA", help="folder or URI of the data set, or a manifest of slides")
    parser.add_argument("--workspace", default="runs/pistoseg", help="where artifacts go (default: %(default)s)")
    parser.add_argument("--workers", type=positive, metavar="N", help="actors that read images and make mosaics")
    job_options(parser)


def segment_options(parser: argparse.ArgumentParser) -> None:
    """Add those of `segment`."""
    parser.add_argument(
        "--model",
        required=True,
        metavar="MODEL",
        help="URI of a bundle or of a workspace with one, or models:/NAME@ALIAS",
    )
    parser.add_argument(
        "--slides",
        required=True,
        metavar="SOURCE",
        help="a slide, folder, prefix or pattern on any file system, or a CSV/Parquet manifest with the column slide "
        "and optionally slide_id, mpp, tissue_mask",
    )
    parser.add_argument(
        "--out",
        required=True,
        metavar="URI",
        help="folder of the results; run again to go on (the summary is of the last run's SOURCE)",
    )
    parser.add_argument(
        "--stride", type=positive, metavar="PX", help="step between tiles (default: half a tile or less)"
    )
    parser.add_argument(
        "--symmetries",
        type=int,
        choices=(1, 2, 8),
        help="averaged: 1: none, 2: flip, 8: flips and turns (default: the bundle's)",
    )
    parser.add_argument(
        "--batch-size", type=positive, metavar="N", help="tiles in a forward pass (default: the bundle's)"
    )
    parser.add_argument(
        "--mpp",
        type=float,
        metavar="UM",
        help="um per px of the model's training images, where the bundle does not say it; of slides: --slide-mpp",
    )
    parser.add_argument(
        "--slide-mpp",
        type=above_zero,
        metavar="UM",
        help="um per px of the slides at full size, such as PNGs that do not say it; it goes before what a slide says, "
        "and a manifest's column mpp before it",
    )
    parser.add_argument(
        "--min-area",
        type=zero_or_more,
        metavar="UM2",
        help="smallest region of the outlines, um2; the mask and areas keep smaller ones (default: 100, and down to 25 "
        "for a slide on which that would change the area of a class by more than 0.5 %%; gaps that are closed do not "
        "count); other outlines are drawn on the masks that are there",
    )
    parser.add_argument(
        "--tolerance",
        type=zero_or_more,
        default=2.0,
        metavar="UM",
        help="of the outlines' simplification, um; 0 keeps every corner (default: %(default)g)",
    )
    parser.add_argument(
        "--background",
        choices=("model", "none"),
        default="model",
        help="which bright pixels inside the tissue are glass, of no class: those that the model's training left out "
        "(model), or none (default: %(default)s)",
    )
    parser.add_argument("--probabilities", action="store_true", help="also write probabilities.zarr of every slide")
    parser.add_argument(
        "--workers", type=positive, metavar="N", help="networks at a time (default: one a GPU, or one a node)"
    )
    parser.add_argument(
        "--wait-for-nodes",
        type=positive,
        default=0,
        metavar="S",
        help="how long to wait for an autoscaler to start nodes for --workers; with --device cuda each gets a GPU",
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="do at most N slides, those tried least first")
    parser.add_argument("--only-failed", action="store_true", help="only do slides that failed before")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be done, tiles and time")
    parser.add_argument(
        "--cache-gb",
        type=above_zero,
        metavar="GB",
        help="each node's cache of slides (default: half of the free disk, or of the node's PISTOSEG_DISK_GB)",
    )
    parser.add_argument(
        "--workspace",
        help="whose MLflow gets the run and knows models:/, unless MLFLOW_TRACKING_URI is set (default: --model, if "
        "that is one on a disk, else runs/pistoseg)",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")


def positive(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def zero_or_more(text: str) -> float:
    """A finite number that is not below 0."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError("must be 0 or a number above it")
    return value


def above_zero(text: str) -> float:
    """A finite number above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError("must be a number above 0")
    return value
