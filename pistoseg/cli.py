"""The command line: each verb parses its arguments and calls one function."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from pistoseg import __version__
from pistoseg.arguments import (
    Parser,
    add_group,
    add_verb,
    config_options,
    job_options,
    log_options,
    positive,
    refuse,
    refuse_idle,
    resolved_config,
    run_options,
    segment_options,
)
from pistoseg.ending import exit_code
from pistoseg.errors import PistoSegError
from pistoseg.models_arguments import model_verbs, server, server_options
from pistoseg.search.arguments import search_options
from pistoseg.search.tables import TABLES

if TYPE_CHECKING:
    from pistoseg.config import Config

EPILOG = """first steps:
  pistoseg demo                                                    the whole pipeline on a synthetic cohort
  pistoseg data check DATA --preset wsss4luad                      is my data set fit for training?
  pistoseg train --preset wsss4luad --profile cpu --data DATA --workspace runs/mine
  pistoseg evaluate --model BUNDLE --data DIR --out DIR            score a model on images with masks
  pistoseg segment --model BUNDLE --slides DIR --out DIR           tissue maps and areas of whole slides
  pistoseg ablate table1 --profile cpu --data DATA --workspace runs/mine            rerun a table of the paper
  pistoseg search --space synthesis --profile cpu --data DATA --workspace runs/mine   find better settings, and prove it
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code.

    0 done; 1 a check found something; 2 the user's input or settings are wrong, or a row of a table failed; 3 some
    slides failed, the others are done (or would be, of a dry run); 130 interrupted, also by SIGTERM; 141 nobody reads
    its output any more, as in `| head`.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    options, unknown = build_parser().parse_known_args(given)
    if unknown:
        refuse(unknown, options.parser)
    return exit_code(partial(_run, given, options))


def _run(given: list[str], options: argparse.Namespace) -> int:
    run: Callable[[argparse.Namespace], int] = options.run
    if getattr(options, "submit", None) is not None:
        run = partial(_submit, given)
    if getattr(options, "log_format", None) == "json":
        from pistoseg.progress import run_with_json_log

        return run_with_json_log(lambda: run(options))
    return run(options)


def _submit(given: list[str], options: argparse.Namespace) -> int:
    from pistoseg.submission import submit

    _refuse_idle(options)
    if hasattr(options, "preset"):
        _say_preset(options)  # the job gets the resolved settings
    return submit(given, options)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    parser = Parser(
        prog="pistoseg",
        description="From image-level labels to tissue segmentation models.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"pistoseg {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    train = add_verb(verbs, "train", _train, "labelled images -> a trained, scored model")
    config_options(train)
    run_options(train)

    synthesize = add_verb(verbs, "synthesize", _synthesize, "labelled images -> mosaics with masks")
    config_options(synthesize)
    run_options(synthesize)
    synthesize.add_argument("--preview", type=positive, metavar="N", help="only draw a sheet of N mosaics")
    synthesize.add_argument("--out", default="mosaics.png", help="the file of --preview (default: %(default)s)")

    evaluate = add_verb(verbs, "evaluate", _evaluate, "score a model, or the masks of a stage, against true masks")
    what = evaluate.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--model", metavar="MODEL", help="URI of a bundle or of a workspace with one, or models:/NAME@ALIAS"
    )
    what.add_argument(
        "--stage",
        choices=("pseudo_masks", "cams", "refined_masks", "all"),
        help="masks that a workspace's stages drew on the training images",
    )
    evaluate.add_argument(
        "--data",
        required=True,
        metavar="DIR",
        help="folder or URI with img/ and mask/; with --stage: of masks named like the training images",
    )
    evaluate.add_argument(
        "--workspace",
        default="runs/pistoseg",
        help="of the stage, or whose MLflow knows models:/ (default: %(default)s)",
    )
    evaluate.add_argument("--out", metavar="DIR", help="folder or URI of the report; needed with --model")
    evaluate.add_argument(
        "--protocol",
        choices=("single-scale", "wsss4luad", "bcss-wsss"),
        help="default: the bundle's; another one comes with its own stride, scales and symmetries, the window stays",
    )
    evaluate.add_argument("--classes", metavar="FILE", help="YAML with the classes of the masks; default: the bundle's")
    evaluate.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    evaluate.add_argument(
        "--max-pixels", type=positive, metavar="N", help="refuse larger images and masks (default: 50000000 px)"
    )

    job_options(evaluate)

    segment = add_verb(verbs, "segment", _segment, "whole slides -> tissue maps, outlines for QuPath, areas")
    segment_options(segment)
    job_options(segment)

    ablate = add_verb(verbs, "ablate", _ablate, "rerun a table of the paper on your data")
    ablate.add_argument(
        "table", choices=tuple(TABLES), metavar="TABLE", help="; ".join(f"{key}: {TABLES[key].title}" for key in TABLES)
    )
    config_options(ablate)
    run_options(ablate)
    ablate.add_argument("--seeds", type=positive, default=1, metavar="N", help="runs of each row (default: 1)")
    ablate.add_argument("--dry-run", action="store_true", help="only print which stages would be computed")
    ablate.add_argument(
        "--out", metavar="DIR", help="folder or URI of the table (default: ablations/TABLE in the workspace)"
    )

    search = add_verb(verbs, "search", _search, "find better settings, and prove that they are better")
    config_options(search)
    run_options(search)
    search_options(search)

    data = add_group(verbs, "data", "look at data sets")
    check = add_verb(data, "check", _data_check, "is a data set fit for training?")
    check.add_argument("data", metavar="DATA", help="folder or URI of the data set, or a manifest of slides")
    config_options(check)
    check.add_argument("--out", metavar="DIR", help="write report.json and sheets of examples there")
    check.add_argument("--workers", type=positive, default=None, help="threads (default: one a CPU)")
    windows = add_verb(data, "windows", _data_windows, "annotated slides -> a manifest of labelled windows for --data")
    windows.add_argument("--slides", required=True, metavar="SOURCE", help="slide, folder, pattern or manifest")
    windows.add_argument("--annotations", required=True, metavar="DIR", help="GeoJSON of QuPath, named like the slides")
    windows.add_argument("--out", required=True, metavar="FILE", help="the manifest: .parquet or .csv")
    config_options(windows)
    windows.add_argument("--size", type=positive, metavar="N", help="side of a window, network px: data.window")
    windows.add_argument("--stride", type=positive, metavar="N", help="step, network px: data.window_stride")
    windows.add_argument(
        "--min-share", type=float, metavar="SHARE", help="of a window for a class to count: data.window_min_share"
    )
    windows.add_argument("--workers", type=positive, default=None, help="threads (default: one a CPU)")

    config = add_group(verbs, "config", "look at settings")
    show = add_verb(config, "show", _config_show, "print the resolved settings, each with its meaning")
    config_options(show)

    model_verbs(add_group(verbs, "models", "look at registered models, promote and export them"), add_verb)

    doctor = add_verb(verbs, "doctor", _doctor, "would a run work here, on this cluster, with this storage?")
    config_options(doctor)
    doctor.add_argument("--data", metavar="DATA", help="folder or URI of the data set, or a manifest of slides")
    doctor.add_argument("--workspace", default="runs/pistoseg", help="where artifacts would go (default: %(default)s)")
    doctor.add_argument("--json", action="store_true", help="print a list of findings as JSON")

    cluster = add_group(verbs, "cluster", "Ray clusters")
    local = add_verb(cluster, "local", _cluster_local, "a cluster of several nodes and an S3 server on this machine")
    local.add_argument("--nodes", type=positive, default=3, metavar="N", help="Ray nodes (default: %(default)s)")
    local.add_argument("--cpus", type=positive, default=2, metavar="N", help="of each, on paper (default: %(default)s)")
    local.add_argument("--folder", metavar="DIR", help="keep the buckets there (default: they go at the end)")
    local.add_argument("--env-file", metavar="FILE", help="variables for clients, with keys (default: in the folder)")

    ui = add_verb(verbs, "ui", _ui, "browse runs and models in MLflow")
    ui.add_argument("--workspace", default="runs/pistoseg", help="workspace with the runs (default: %(default)s)")
    ui.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    ui.add_argument("--port", type=int, default=5000, help="port to listen on (default: %(default)s)")
    server_options(ui)

    demo = add_verb(verbs, "demo", _demo, "the whole pipeline on a synthetic cohort")
    demo.add_argument("--workspace", default="demo", help="folder of the cohort and the runs (default: %(default)s)")
    demo.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    log_options(demo)
    return parser


def _config(options: argparse.Namespace) -> Config:
    from pistoseg.object_store import use

    config = resolved_config(options)
    use(config.storage)
    return config


def _run_config(options: argparse.Namespace) -> Config:
    """The config of something that reads data by it."""
    config = _config(options)
    _say_preset(options)
    return config


def _say_preset(options: argparse.Namespace) -> None:
    """Say which preset it is where nobody chose it."""
    if not (options.preset or options.config):
        from pistoseg.config import DEFAULT_PRESET
        from pistoseg.progress import Progress

        Progress().say(f"neither --preset nor --config is given: the preset is {DEFAULT_PRESET}")


def _refuse_idle(options: argparse.Namespace) -> None:
    if options.verb == "synthesize" and not options.preview:
        refuse_idle(options, "without --preview", "out")
    if options.verb == "evaluate" and options.stage:
        refuse_idle(options, "with --stage", "protocol", "classes", "device")


def _train(options: argparse.Namespace) -> int:
    from pistoseg.commands import train

    train(_run_config(options), options.workspace)
    return 0


def _synthesize(options: argparse.Namespace) -> int:
    from pistoseg.commands import synthesize

    _refuse_idle(options)
    synthesize(_run_config(options), options.workspace, options.preview, options.out)
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from pistoseg.commands import evaluate, evaluate_masks

    _refuse_idle(options)
    if options.stage:
        evaluate_masks(options.workspace, options.stage, options.data, options.out, max_pixels=options.max_pixels)
        return 0
    if not options.out:
        raise PistoSegError("is needed", field="--out", remedy="name a folder for the report")
    evaluate(
        options.model,
        options.data,
        options.out,
        workspace=options.workspace,
        protocol=options.protocol,
        classes=options.classes,
        device=options.device,
        max_pixels=options.max_pixels,
    )
    return 0


def _segment(options: argparse.Namespace) -> int:
    from pistoseg.commands import segment

    return segment(
        options.model,
        options.slides,
        options.out,
        workspace=options.workspace,
        dry_run=options.dry_run,
        settings={
            "mpp": options.mpp,
            "stride": options.stride,
            "symmetries": options.symmetries,
            "batch_size": options.batch_size,
            "probabilities": options.probabilities,
            "tolerance_um": options.tolerance,
            "min_area_um2": options.min_area,
            "background": options.background,
        },
        slide_mpp=options.slide_mpp,
        workers=options.workers,
        limit=options.limit,
        only_failed=options.only_failed,
        device=options.device,
        cache_gb=options.cache_gb,
        wait_for_nodes=options.wait_for_nodes,
    )


def _ablate(options: argparse.Namespace) -> int:
    from pistoseg.commands import ablate

    return ablate(
        options.table,
        _run_config(options),
        options.workspace,
        seeds=options.seeds,
        dry_run=options.dry_run,
        out=options.out,
    )


def _search(options: argparse.Namespace) -> int:
    from pistoseg.search.command import search

    return search(_run_config(options), options.workspace, options.space, vars(options))


def _data_check(options: argparse.Namespace) -> int:
    from pistoseg.commands import data_check

    return data_check(options.data, _run_config(options), options.out, options.workers)


def _data_windows(options: argparse.Namespace) -> int:
    from pistoseg.commands import data_windows

    given = {"window": options.size, "window_stride": options.stride, "window_min_share": options.min_share}
    options.overrides += [f"data.{key}={value}" for key, value in given.items() if value is not None]
    return data_windows(options.slides, options.annotations, options.out, _run_config(options), options.workers)


def _config_show(options: argparse.Namespace) -> int:
    from pistoseg.config import describe

    print(describe(_config(options)), end="")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from pistoseg.commands import doctor

    chosen = bool(options.preset or options.profile or options.config)
    chosen = chosen or any(item.partition("=")[0].endswith(".weights") for item in options.overrides)
    return doctor(_config(options), options.workspace, options.json, weights=chosen)


def _cluster_local(options: argparse.Namespace) -> int:
    from pistoseg.local_cluster import serve

    return serve(options.nodes, options.cpus, options.folder, options.env_file)


def _ui(options: argparse.Namespace) -> int:
    from pistoseg.tracking.browser import browse

    return browse(options.workspace, options.host, options.port, server(options))


def _demo(options: argparse.Namespace) -> int:
    from pistoseg.commands import demo

    demo(options.workspace, options.overrides)
    return 0


if __name__ == "__main__":
    sys.exit(main())
