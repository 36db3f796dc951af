"""The command line: each verb parses its arguments and calls one function."""

from __future__ import annotations

import argparse
import io
import os
import re
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from pistoseg import __version__
from pistoseg.errors import INTERRUPTED, PistoSegError, suggestion
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
    slides failed, the others are done; 130 interrupted, also by SIGTERM; 141 nobody reads its output any more, as in
    `| head`.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")  # not every terminal has the letters of every class and file
    given = list(sys.argv[1:] if arguments is None else arguments)
    options, unknown = build_parser().parse_known_args(given)
    if unknown:
        _refuse(unknown, options.parser)
    try:
        code = _told(given, options)
        if sys.stdout:  # there is none where it was closed before the start
            sys.stdout.flush()
        return code
    except SystemExit as end:  # that of rich, which meets the closed pipe before us
        if isinstance(end.__context__, BrokenPipeError):
            return 141
        raise
    except BrokenPipeError:  # or that of a connection, which is a defect
        if not _is_unread():
            raise
        return 141


def _told(given: list[str], options: argparse.Namespace) -> int:
    """Run a command and say why it ended."""
    try:
        with _terminable():
            return _run(given, options)
    except PistoSegError as error:
        print(f"pistoseg: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"pistoseg: {INTERRUPTED}", file=sys.stderr)
        return 130


TWICE_S = 5.0
"""Some send a signal twice; the second one would cut off the tidying up."""
_interrupted = -TWICE_S
"""When SIGTERM came last."""


@contextmanager
def _terminable() -> Iterator[None]:
    """Make an interrupt of SIGTERM, by which SLURM, Kubernetes and `timeout` end a job."""
    # Who has a handler in place, or runs this in a thread of theirs, ends their process themselves.
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    ):
        yield
        return
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _interrupt(*_: object) -> None:
    global _interrupted
    before, _interrupted = _interrupted, time.monotonic()
    if _interrupted - before > TWICE_S:
        raise KeyboardInterrupt


def _run(given: list[str], options: argparse.Namespace) -> int:
    run: Callable[[argparse.Namespace], int] = options.run
    if getattr(options, "submit", None):
        run = partial(_submit, given)
    if getattr(options, "log_format", None) == "json":
        from pistoseg.progress import run_with_json_log

        return run_with_json_log(lambda: run(options))
    return run(options)


def _submit(given: list[str], options: argparse.Namespace) -> int:
    from pistoseg.submission import submit

    if hasattr(options, "preset"):
        _say_preset(options)  # the job gets the resolved settings
    return submit(given, options)


def _is_unread() -> bool:
    """Whether what is printed goes into a closed pipe; from then on it goes nowhere, or Python's end would fail."""
    unread = False
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with suppress(OSError, ValueError):  # none of the system's
            pipe = select.poll()
            pipe.register(stream.fileno(), 0)
            if any(event & (select.POLLERR | select.POLLHUP) for _, event in pipe.poll(0)):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
                unread = True
    return unread


FEW = 3
"""Choices that are seen at a glance."""


class _Parser(argparse.ArgumentParser):
    """Says with an error what was probably meant."""

    def error(self, message: str) -> NoReturn:
        wrong = re.search(r"invalid choice: '(.+)' \(choose from (.+)\)", message)
        choices = re.findall(r"[\w.-]+", wrong[2]) if wrong else []
        meant = suggestion(wrong[1], choices) if wrong and len(choices) > FEW else ""  # `gpu` resembles `cpu`
        super().error(message + meant)


def _refuse(unknown: list[str], parser: argparse.ArgumentParser) -> NoReturn:
    """End with the usage of the verb to which words were given that it does not know."""
    options = re.findall(r"--[\w-]+", parser.format_usage())
    meant = suggestion(unknown[0].partition("=")[0], options) if unknown[0].startswith("-") else ""
    parser.error(f"unrecognized arguments: {' '.join(unknown)}{meant}")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    parser = _Parser(
        prog="pistoseg",
        description="From image-level labels to tissue segmentation models.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"pistoseg {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    train = _verb(verbs, "train", _train, "labelled images -> a trained, scored model")
    _config_options(train)
    _run_options(train)

    synthesize = _verb(verbs, "synthesize", _synthesize, "labelled images -> mosaics with masks")
    _config_options(synthesize)
    _run_options(synthesize)
    synthesize.add_argument("--preview", type=_positive, metavar="N", help="only draw a sheet of N mosaics")
    synthesize.add_argument("--out", default="mosaics.png", help="the sheet's file (default: %(default)s)")

    evaluate = _verb(verbs, "evaluate", _evaluate, "score a model, or the masks of a stage, against true masks")
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
        "--protocol", choices=("single-scale", "wsss4luad", "bcss-wsss"), help="default: the bundle's"
    )
    evaluate.add_argument("--classes", metavar="FILE", help="YAML with the classes of the masks; default: the bundle's")
    evaluate.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    evaluate.add_argument(
        "--max-pixels", type=_positive, metavar="N", help="refuse larger images and masks (default: 50000000 px)"
    )

    _job_options(evaluate)

    segment = _verb(verbs, "segment", _segment, "whole slides -> tissue maps, outlines for QuPath, areas")
    _segment_options(segment)
    _job_options(segment)

    ablate = _verb(verbs, "ablate", _ablate, "rerun a table of the paper on your data")
    ablate.add_argument(
        "table", choices=tuple(TABLES), metavar="TABLE", help="; ".join(f"{key}: {TABLES[key].title}" for key in TABLES)
    )
    _config_options(ablate)
    _run_options(ablate)
    ablate.add_argument("--seeds", type=_positive, default=1, metavar="N", help="runs of each row (default: 1)")
    ablate.add_argument("--dry-run", action="store_true", help="only print which stages would be computed")
    ablate.add_argument(
        "--out", metavar="DIR", help="folder or URI of the table (default: ablations/TABLE in the workspace)"
    )

    search = _verb(verbs, "search", _search, "find better settings, and prove that they are better")
    _config_options(search)
    _run_options(search)
    search_options(search)

    data = _group(verbs, "data", "look at data sets")
    check = _verb(data, "check", _data_check, "is a data set fit for training?")
    check.add_argument("data", metavar="DATA", help="folder or URI of the data set, or a manifest of slides")
    _config_options(check)
    check.add_argument("--out", metavar="DIR", help="write report.json and sheets of examples there")
    check.add_argument("--workers", type=_positive, default=None, help="threads (default: one a CPU)")
    windows = _verb(data, "windows", _data_windows, "annotated slides -> a manifest of labelled windows for --data")
    windows.add_argument("--slides", required=True, metavar="SOURCE", help="slide, folder, pattern or manifest")
    windows.add_argument("--annotations", required=True, metavar="DIR", help="GeoJSON of QuPath, named like the slides")
    windows.add_argument("--out", required=True, metavar="FILE", help="the manifest: .parquet or .csv")
    _config_options(windows)
    windows.add_argument("--size", type=_positive, metavar="N", help="side of a window, network px: data.window")
    windows.add_argument("--stride", type=_positive, metavar="N", help="step, network px: data.window_stride")
    windows.add_argument(
        "--min-share", type=float, metavar="SHARE", help="of a window for a class to count: data.window_min_share"
    )
    windows.add_argument("--workers", type=_positive, default=None, help="threads (default: one a CPU)")

    config = _group(verbs, "config", "look at settings")
    show = _verb(config, "show", _config_show, "print the resolved settings, each with its meaning")
    _config_options(show)

    model_verbs(_group(verbs, "models", "look at registered models, promote and export them"), _verb)

    doctor = _verb(verbs, "doctor", _doctor, "would a run work here, on this cluster, with this storage?")
    _config_options(doctor)
    doctor.add_argument("--data", metavar="DATA", help="folder or URI of the data set, or a manifest of slides")
    doctor.add_argument("--workspace", default="runs/pistoseg", help="where artifacts would go (default: %(default)s)")
    doctor.add_argument("--json", action="store_true", help="print a list of findings as JSON")

    cluster = _group(verbs, "cluster", "Ray clusters")
    local = _verb(cluster, "local", _cluster_local, "a cluster of several nodes and an S3 server on this machine")
    local.add_argument("--nodes", type=_positive, default=3, metavar="N", help="Ray nodes (default: %(default)s)")
    local.add_argument(
        "--cpus", type=_positive, default=2, metavar="N", help="of each, on paper (default: %(default)s)"
    )
    local.add_argument("--folder", metavar="DIR", help="keep the buckets there (default: they go at the end)")
    local.add_argument("--env-file", metavar="FILE", help="variables for clients, with keys (default: in the folder)")

    ui = _verb(verbs, "ui", _ui, "browse runs and models in MLflow")
    ui.add_argument("--workspace", default="runs/pistoseg", help="workspace with the runs (default: %(default)s)")
    ui.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    ui.add_argument("--port", type=int, default=5000, help="port to listen on (default: %(default)s)")
    server_options(ui)

    demo = _verb(verbs, "demo", _demo, "the whole pipeline on a synthetic cohort")
    demo.add_argument("--workspace", default="demo", help="folder of the cohort and the runs (default: %(default)s)")
    demo.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    _log_options(demo)
    return parser


def _verb(verbs: Any, name: str, run: Callable[[argparse.Namespace], int], summary: str) -> argparse.ArgumentParser:
    # Options are not abbreviated: a new one would change what an old script means.
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=summary, description=summary, allow_abbrev=False)
    parser.set_defaults(run=run, verb=name, parser=parser)
    return parser


def _group(verbs: Any, name: str, summary: str) -> Any:
    return verbs.add_parser(name, help=summary, description=summary).add_subparsers(metavar="VERB", required=True)


def _log_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--log-format", choices=("text", "json"), default="text", help="json: every line is an object, for log servers"
    )


def _job_options(parser: argparse.ArgumentParser) -> None:
    _log_options(parser)
    parser.add_argument(
        "--submit",
        metavar="ADDRESS",
        help="run as a job on the Ray cluster of this dashboard, e.g. http://head:8265, and follow its log",
    )


def _config_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--preset", help="wsss4luad, bcss-wsss, glas or demo (default: wsss4luad, but none beside --config)"
    )
    parser.add_argument("--profile", help="a profile of the preset, e.g. cpu")
    parser.add_argument("--config", metavar="FILE", help="YAML with settings; goes before the preset's")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="e.g. synthesis.alpha=0.3"
    )


def _run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", metavar="DATA", help="folder or URI of the data set, or a manifest of slides")
    parser.add_argument("--workspace", default="runs/pistoseg", help="where artifacts go (default: %(default)s)")
    parser.add_argument("--workers", type=_positive, metavar="N", help="actors that read images and make mosaics")
    _job_options(parser)


def _segment_options(parser: argparse.ArgumentParser) -> None:
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
        "--stride", type=_positive, metavar="PX", help="step between tiles (default: half a tile or less)"
    )
    parser.add_argument(
        "--symmetries",
        type=int,
        choices=(1, 2, 8),
        help="averaged: 1: none, 2: flip, 8: flips and turns (default: the bundle's)",
    )
    parser.add_argument(
        "--batch-size", type=_positive, metavar="N", help="tiles in a forward pass (default: the bundle's)"
    )
    parser.add_argument("--mpp", type=float, metavar="UM", help="um per network px, where the bundle does not say it")
    parser.add_argument("--probabilities", action="store_true", help="also write probabilities.zarr of every slide")
    parser.add_argument(
        "--workers", type=_positive, metavar="N", help="networks at a time (default: one a GPU, or one a node)"
    )
    parser.add_argument(
        "--wait-for-nodes",
        type=_positive,
        default=0,
        metavar="S",
        help="how long to wait for an autoscaler to start nodes for --workers; with --device cuda each gets a GPU",
    )
    parser.add_argument("--limit", type=_positive, metavar="N", help="do at most N slides, those tried least first")
    parser.add_argument("--only-failed", action="store_true", help="only do slides that failed before")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be done, tiles and time")
    parser.add_argument(
        "--cache-gb", type=float, metavar="GB", help="each node's cache of slides (default: half of the free disk)"
    )
    parser.add_argument(
        "--workspace",
        default="runs/pistoseg",
        help="whose MLflow gets the run and knows models:/, unless MLFLOW_TRACKING_URI is set (default: %(default)s)",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _config(options: argparse.Namespace) -> Config:
    from pistoseg.config import load_config
    from pistoseg.object_store import use

    overrides = list(options.overrides)
    if isinstance(getattr(options, "data", None), str):
        overrides.append(f"data.uri={_quoted(options.data)}")
    if getattr(options, "workers", None):
        overrides.append(f"compute.workers={options.workers}")
    config = load_config(options.preset, options.profile, options.config, overrides)
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


def _quoted(text: str) -> str:
    import json

    return json.dumps(text, ensure_ascii=False)  # YAML does not know JSON's pairs of surrogates


def _train(options: argparse.Namespace) -> int:
    from pistoseg.commands import train

    train(_run_config(options), options.workspace)
    return 0


def _synthesize(options: argparse.Namespace) -> int:
    from pistoseg.commands import synthesize

    synthesize(_run_config(options), options.workspace, options.preview, options.out)
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from pistoseg.commands import evaluate, evaluate_masks

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
        },
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
    from pistoseg.commands import ui

    return ui(options.workspace, options.host, options.port, server(options))


def _demo(options: argparse.Namespace) -> int:
    from pistoseg.commands import demo

    demo(options.workspace, options.overrides)
    return 0


if __name__ == "__main__":
    sys.exit(main())
