"""What the verbs do, callable from Python: `cli` and the jobs parse arguments, these functions act."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console

from pistoseg import object_store, storage
from pistoseg.artifacts import Artifact, Workspace
from pistoseg.claims import claimed
from pistoseg.config import (
    ComputeConfig,
    Config,
    DataConfig,
    TrackingConfig,
    load_classes,
    load_config,
)
from pistoseg.errors import PistoSegError
from pistoseg.pipeline import check_weights, run_pipeline
from pistoseg.printing import (
    estimate_lines,
    mask_table,
    next_lines,
    print_scores,
    print_slides,
    print_tree,
    score_table,
)
from pistoseg.progress import Progress
from pistoseg.redaction import redact

if TYPE_CHECKING:
    from pistoseg.stages.slides import Plan, SlideRun

FILE_WIDTH = 200
"""Columns for a wide table where the output is no terminal: nothing is folded in a log."""


def train(config: Config, workspace: str) -> dict[str, Artifact]:
    """Run the pipeline up to the scores; print them, the output tree, the model and what to do with it."""
    from pistoseg.patches.digest import scored_by_labels

    object_store.use(config.storage)
    place = Workspace(storage.absolute(workspace))
    targets = ("preliminary_evaluation", "evaluation", *(("label_scores",) if scored_by_labels(config) else ()))
    artifacts = _run(config, place, targets)
    console = Console()
    print_scores(console, artifacts)
    print_tree(console, place, artifacts)
    for line in next_lines(config, workspace, artifacts):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return artifacts


def synthesize(config: Config, workspace: str, preview: int | None, out: str) -> None:
    """Make the mosaics of a config; with `preview` only a sheet of that many, written to `out`."""
    object_store.use(config.storage)
    place = Workspace(storage.absolute(workspace))
    if preview is None and config.synthesis.mode == "streamed":
        raise PistoSegError(
            "synthesis.mode is streamed, so that no mosaics are kept",
            field="synthesis.mode",
            remedy="add --set synthesis.mode=stored, or --preview 16 for a sheet of them",
        )
    artifacts = _run(config, place, ("patches" if preview else "synthesis",))
    if preview:
        from pistoseg.stages.synthesis import mosaics
        from pistoseg.stages.synthesis import preview as picture
        from pistoseg.training.samples import fresh_mosaics

        synthesizer = fresh_mosaics(mosaics(config, artifacts["patches"]))
        samples = [synthesizer.sample(0, index) for index in range(preview)]
        storage.write_bytes(out, picture(samples, config.classes.tissue()))
        print(out)
    else:
        print(artifacts["synthesis"].path("mosaics"))


def evaluate(
    model: str,
    data: str,
    out: str,
    *,
    workspace: str = "runs/pistoseg",
    protocol: str | None = None,
    classes: str | None = None,
    device: str = "auto",
    max_pixels: int | None = None,
) -> dict[str, Any]:
    """Score a model on the images of a folder; classes and protocol come from its bundle unless given.

    `model` and `workspace` are as in `segment`. Of a `protocol` that is not the bundle's, window (`patch_size`) and
    `batch_size` are still the bundle's. Images of more than `max_pixels` are refused; None: the default of
    `data.max_pixels`.

    Raises:
        PistoSegError: the model, classes or images are wrong, or not all nodes of the cluster see the folders.
    """
    from pistoseg.models.bundle import evaluation_config
    from pistoseg.stages import cluster, placement
    from pistoseg.stages.evaluation import evaluate_folder, other_protocol
    from pistoseg.tracking.registry import bundle_uri

    named, model = model, bundle_uri(model, TrackingConfig(), Workspace(storage.absolute(workspace)))
    data, out, progress = storage.absolute(data), storage.absolute(out), Progress()
    config = evaluation_config(model, protocol)
    if protocol and (said := other_protocol(model, config)):
        progress.say(said)
    tissue = load_classes(classes) if classes else None
    with cluster.connected(ComputeConfig.model_validate({"device": device})):
        placement.check_shared(out, {"--data": data, "--model": model})
        report = evaluate_folder(
            model,
            data,
            out,
            config,
            classes=tissue,
            device=device,
            max_pixels=max_pixels or DataConfig().max_pixels,
            progress=progress,
        )
    Console().print(score_table({redact(named): report}, f"IoU on {storage.name(data)} ({report['images']} images)"))
    print(storage.join(out, "metrics.json"))
    return report


def evaluate_masks(
    workspace: str, stage: str, truth: str, out: str | None, *, max_pixels: int | None = None
) -> dict[str, dict[str, Any]]:
    """Score the masks that stages drew on the training images against true ones; `stage` may be `all`."""
    from pistoseg.stages import mask_scores
    from pistoseg.stages.cluster import available_cpus

    stages = tuple(mask_scores.STAGES) if stage == "all" else (stage,)
    out = storage.absolute(out) if out else None
    place = Workspace(storage.absolute(workspace))
    reports = mask_scores.score_workspace(
        place,
        stages,
        storage.absolute(truth),
        out,
        max_pixels=max_pixels or DataConfig().max_pixels,
        workers=available_cpus(),
    )
    Console().print(mask_table(reports))
    if out:
        print(storage.join(out, "mask_scores.json"))
    return reports


def segment(
    model: str,
    slides: str,
    out: str,
    *,
    workspace: str | None,
    settings: Mapping[str, Any],
    dry_run: bool = False,
    **options: Any,
) -> int:
    """Segment slides and print what came out; 3 when some failed. `dry_run` only says what would be done or fail.

    Args:
        model: URI of a bundle or of a workspace with one, or `models:/name@alias`.
        slides: a slide, folder, prefix, pattern or manifest.
        out: folder or URI of the results.
        workspace: whose MLflow is used unless MLFLOW_TRACKING_URI names a server; None: as `workspace_of` says.
        settings: of `pistoseg.slides.network.SlideSettings`.
        dry_run: whether nothing is to be done.
        options: of `pistoseg.stages.slides.SlideRun`.
    """
    from pistoseg.slides.network import SlideSettings
    from pistoseg.stages import slides as stage
    from pistoseg.tracking import batch_run
    from pistoseg.tracking.registry import bundle_uri, workspace_of

    tracking, place = TrackingConfig(), Workspace(storage.absolute(workspace or workspace_of(model)))
    uri = bundle_uri(model, tracking, place)
    run = stage.SlideRun(uri, slides, storage.absolute(out), SlideSettings(**settings), **options)
    if dry_run:
        found = _plan(run)
        estimate = stage.estimate(run, found)
        for line in estimate_lines(estimate, run.workers or 1):
            print(line)
        return 3 if estimate.unreadable else 0
    progress = Progress()
    with claimed(run.out, say=progress.say) as claim:  # two runs into one folder would delete each other's results
        found = _plan(run)
        params = {"model": model, "slides": slides, "out": run.out, **found.network.model, **found.network.decisive}
        with batch_run(tracking, place, redact(f"segment {storage.name(slides)}"), params) as tracked:
            record = stage.segment(run, found, progress, tracked, claim)
    print_slides(run.out, record)
    return 3 if record["slides"]["failed"] else 0


def _plan(run: SlideRun) -> Plan:
    from pistoseg.stages import slides as stage

    found = stage.plan(run)
    only = f" ({len(found.kept)} of them only get other outlines)" if found.kept else ""
    print(f"{len(found.todo)} slides to do{only}, {len(found.done)} up to date, {found.left} left alone", flush=True)
    if found.network.remark:
        remedy = "--mpp is the model's pixel size; that of slides is --slide-mpp, or a manifest's column mpp"
        Progress().say(f"warning: slides are {found.network.remark}: {remedy}")
    return found


def ablate(
    table: str, config: Config, workspace: str, *, seeds: int = 1, dry_run: bool = False, out: str | None = None
) -> int:
    """Run a table of the paper and print it; 2 when a row failed. `dry_run` only says what would be computed."""
    from pistoseg.search import ablation, report
    from pistoseg.search.tables import TABLES
    from pistoseg.stages import cluster

    object_store.use(config.storage)
    place, chosen = Workspace(storage.absolute(workspace)), TABLES[table]
    folder = storage.absolute(out) if out else storage.join(place.root, "ablations", table)
    console = Console()
    if not console.is_terminal:
        console = Console(width=FILE_WIDTH)
    _check_data(config)
    jobs, left_out = ablation.prepare(chosen, config, seeds)
    if dry_run:
        console.print(report.plan_text(ablation.outline(jobs, place)))
        for reason in left_out:
            console.print(f"left out: {reason}", highlight=False, markup=False)
        return 0
    with cluster.connected(config.compute):
        result = ablation.run(chosen, config, place, seeds, out=folder, progress=Progress())
    console.print(report.to_text(result))
    for line in report.notes(result):
        console.print(line, highlight=False, markup=False)
    print(storage.join(folder, "ablation.md"))
    return 2 if result.failures else 0


def data_check(data: str, config: Config, out: str | None, workers: int | None) -> int:
    """Validate a data set and print the report; 1 when something would stop a training."""
    from pistoseg.patches.check import check
    from pistoseg.patches.crops import network_mpp
    from pistoseg.patches.manifest import is_manifest, refuse_images
    from pistoseg.stages.cluster import available_cpus
    from pistoseg.stages.slide_images import SlideOpener

    object_store.use(config.storage)
    data = storage.absolute(data)
    if is_manifest(data):
        refuse_images(data)
    opener = SlideOpener(network_mpp(config.scale)) if is_manifest(data) else None
    report = check(
        data,
        config.classes.tissue(),
        config.data,
        scale=config.scale,
        synthesis=config.synthesis,
        workers=workers or available_cpus(),
        out=out,
        opener=opener,
    )
    print(report.to_text())
    return 0 if report.ok else 1


def data_windows(slides: str, annotations: str, out: str, config: Config, workers: int | None) -> int:
    """Write the labelled windows of annotated slides as a manifest and print what is in it; 1 when a slide failed."""
    from pistoseg.stages.cluster import available_cpus
    from pistoseg.stages.windows import write_windows

    object_store.use(config.storage)
    report = write_windows(slides, annotations, out, config, workers=workers or available_cpus())
    print(report.to_text())
    return 0 if report.ok else 1


def doctor(config: Config, workspace: str, as_json: bool = False, *, weights: bool = True) -> int:
    """Examine this machine, the cluster, the storage and the servers of a config; 1 when something would fail.

    `weights`: whether those of its networks are tried, too.
    """
    from pistoseg.doctor import examine, table, to_json

    findings = list(examine(config, workspace, weights=weights))
    if as_json:
        print(to_json(findings))
    else:
        console = Console()
        (console if console.is_terminal else Console(width=FILE_WIDTH)).print(table(findings))
    return 1 if any(found.status == "failed" for found in findings) else 0


def demo(workspace: str, overrides: list[str]) -> None:
    """Draw a synthetic cohort and run the whole pipeline on it."""
    from pistoseg.phantom import write_cohort

    cohort = storage.join(storage.absolute(workspace), "cohort")
    config = load_config("demo", overrides=[*overrides, f"data.uri={json.dumps(cohort, ensure_ascii=False)}"])
    object_store.use(config.storage)
    if not storage.exists(storage.join(cohort, "phantom.json")):
        print(f"drawing a synthetic cohort (no patient's tissue): {cohort}", flush=True)
        write_cohort(cohort, seed=0, slides=1)
    train(config, workspace)
    print("all images of this demo are synthetic; its scores say nothing about real tissue")


def _run(config: Config, workspace: Workspace, targets: tuple[str, ...]) -> dict[str, Artifact]:
    """Run the pipeline on the cluster of the config; data that isn't there is refused before Ray starts."""
    from pistoseg.stages import cluster

    _check_data(config)
    check_weights(config, targets)
    with cluster.connected(config.compute):
        return run_pipeline(config, workspace, targets, progress=Progress())


def _check_data(config: Config) -> None:
    """Refuse folders that aren't there, and a table of images in place of its folder."""
    from pistoseg.patches.digest import training_folder, validation_folder
    from pistoseg.patches.manifest import is_manifest, refuse_images

    training = training_folder(config)
    if is_manifest(training):
        refuse_images(training)
    validation_folder(config)
