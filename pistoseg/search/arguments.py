"""The options of the verb `search` on the command line."""

from __future__ import annotations

import argparse

from pistoseg.arguments import above_zero, positive


def search_options(parser: argparse.ArgumentParser) -> None:
    """Add them to the verb's parser."""
    parser.add_argument(
        "--space", required=True, metavar="SPACE", help="synthesis, losses, optim, or a YAML over any config keys"
    )
    parser.add_argument(
        "--trials",
        type=positive,
        metavar="N",
        help="trials in all (default: 32, without --hours); run again to go on",
    )
    parser.add_argument("--hours", type=above_zero, metavar="H", help="time for the trials, over all runs")
    parser.add_argument("--algorithm", choices=("tpe", "random", "grid"), default="tpe", help="default: %(default)s")
    parser.add_argument(
        "--objective",
        choices=("auto", "miou", "labels"),
        default="auto",
        help="miou: of images with masks; labels: agreement with held-out image-level labels; auto: miou if it can be",
    )
    parser.add_argument("--time", action="store_true", help="a trial's seconds are a second objective")
    parser.add_argument(
        "--pruning", choices=("asha", "none"), default="asha", help="stop bad trials early (default: %(default)s)"
    )
    parser.add_argument("--grace", type=positive, metavar="N", help="epochs before a trial can be stopped")
    parser.add_argument(
        "--reduction", type=_factor, default=3.0, metavar="N", help="the best 1/N goes on at each rung (default: 3)"
    )
    parser.add_argument("--parallel", type=positive, metavar="N", help="trials at a time (default: one a GPU or node)")
    parser.add_argument(
        "--confirm-seeds",
        type=_seeds,
        default=3,
        metavar="N",
        help="seeds that the best must hold on, 0 or 2 and more (default: 3)",
    )
    parser.add_argument("--name", help="of its folder search/NAME in the workspace (default: from its settings)")
    parser.add_argument("--dry-run", action="store_true", help="only print the space and what its trials share")


def _seeds(text: str) -> int:
    value = int(text)
    if value < 0 or value == 1:  # of one there is no interval
        raise argparse.ArgumentTypeError("must be 0, or 2 and more")
    return value


def _factor(text: str) -> float:
    value = float(text)
    if not value > 1:
        raise argparse.ArgumentTypeError("must be more than 1")
    return value
