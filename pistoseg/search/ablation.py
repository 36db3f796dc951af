"""Ablations: a table's rows as pipelines in one workspace, which share all artifacts that a row does not vary."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pistoseg import object_store, storage
from pistoseg.artifacts import Artifact, Workspace
from pistoseg.claims import claimed
from pistoseg.config import Config, StorageConfig, validate
from pistoseg.errors import PistoSegError, UnavailableError, explained
from pistoseg.graph import Step, plan
from pistoseg.hooks import Hooks
from pistoseg.pipeline import check_trainings, check_weights, run_pipeline
from pistoseg.places import with_absolute
from pistoseg.progress import Progress
from pistoseg.redaction import redacted
from pistoseg.search.journal import digest, read_json
from pistoseg.search.tables import PaperScores, Row, Table, published_data
from pistoseg.tracking import Tracker

TARGETS = ("evaluation",)
DATA = ("patches", "validation")


@dataclass(frozen=True)
class Job:
    """One row with one seed, and the config that they make."""

    row: Row
    config: Config

    @property
    def name(self) -> str:
        """As progress and MLflow show it."""
        return f"{self.row.label}, seed {self.config.seed}"


@dataclass(frozen=True)
class RunResult:
    """What became of a row with one seed.

    Args:
        seed: of its pipeline.
        scores: `iou/<class>`, `miou` and `fwiou`; None for a class that no true pixel has; empty where it failed.
        artifacts: fingerprints by stage.
        computed: seconds by stage, of the stages that this run computed.
        reused: seconds by stage, which it was spared.
        problem: why it failed.
    """

    seed: int
    scores: Mapping[str, float | None]
    artifacts: Mapping[str, str]
    computed: Mapping[str, float]
    reused: Mapping[str, float]
    problem: str | None = None


@dataclass(frozen=True)
class RowResult:
    """A row of the result; `paper` is None unless the data set is the published one."""

    label: str
    overrides: Mapping[str, Any]
    runs: tuple[RunResult, ...]
    paper: PaperScores | None = None

    def values(self, score: str) -> list[float]:
        """A score of the seeds that have one."""
        found = (run.scores.get(score) for run in self.runs)
        return [value for value in found if value is not None]

    def mean(self, score: str) -> float | None:
        """Mean of a score over the seeds, None where no seed has one."""
        values = self.values(score)
        return statistics.fmean(values) if values else None

    def deviation(self, score: str) -> float | None:
        """Sample standard deviation of a score over the seeds, None for fewer than two."""
        values = self.values(score)
        return statistics.stdev(values) if len(values) > 1 else None

    def seconds(self, kind: str) -> float:
        """Seconds of the stages that were `computed`, or `reused`, over all seeds."""
        return sum(sum(getattr(run, kind).values()) for run in self.runs)


@dataclass(frozen=True)
class AblationReport:
    """A table with its scores.

    Args:
        table: its name.
        title: what it compares.
        classes: names of the L classes.
        seeds: of the runs.
        rows: in the table's order.
        left_out: rows that the config has no place for, with the reason.
        training_images: in the data set, those that were rejected among them.
        validation_images: that the scores belong to.
        published: key of the published data set that this is, if it is one.
        settings: hash of the config that the rows vary.
    """

    table: str
    title: str
    classes: tuple[str, ...]
    seeds: tuple[int, ...]
    rows: tuple[RowResult, ...]
    left_out: tuple[str, ...]
    training_images: int
    validation_images: int
    published: str | None
    settings: str

    @property
    def scores(self) -> list[str]:
        """Keys of the scores, in the order of the columns."""
        return [*(f"iou/{name}" for name in self.classes), "miou", "fwiou"]

    @property
    def failures(self) -> list[str]:
        """Runs that failed, with the reason."""
        return [f"{row.label}, seed {run.seed}: {run.problem}" for row in self.rows for run in row.runs if run.problem]


def decisive(config: Config) -> dict[str, Any]:
    """What of a config makes other models or scores: not the machine, the way to its storage, MLflow or passwords."""
    workers = config.compute.train_workers  # each with a share of the batch: other models, also by fingerprint
    # Journals of before have the storage's section, and no key for one worker.
    config = config.model_copy(update={"storage": StorageConfig()})
    values = {"config": redacted(config.model_dump(mode="json", exclude={"compute", "tracking"}))}
    return values | ({"train_workers": workers} if workers != 1 else {})


def with_overrides(config: Config, overrides: Mapping[str, Any]) -> Config:
    """A config with other values by `section.key`; `PistoSegError` names all problems."""
    values = config.model_dump(mode="json")
    for key, value in overrides.items():
        *sections, field = key.split(".", 2)  # a class's name, which may be the last part, may have dots
        target: Any = values
        for section in sections:
            target = target[section]
        if not isinstance(target, dict):
            above = ".".join(sections)
            raise PistoSegError(
                f"can't be set where {above} is {target!r}", field=key, remedy=f"set {above} to a mapping"
            )
        target[field] = value
    return validate(values)


def prepare(table: Table, config: Config, seeds: int = 1) -> tuple[list[Job], list[str]]:
    """The runs of a table, seed by seed, so that all rows have a score before the second seed begins.

    Args:
        table: what is compared.
        config: that the rows vary.
        seeds: the config's seed and the ones after it.
    Returns:
        The jobs, and the rows that are left out with the reason.
    Raises:
        PistoSegError: naming every row whose settings are refused.
    """
    jobs: list[Job] = []
    left_out: list[str] = []
    problems: dict[str, list[str]] = {}
    for row in table.rows:
        adapted = table.adapt(row, config) if table.adapt else row
        if isinstance(adapted, str):
            left_out.append(f"{row.label}: {adapted}")
            continue
        try:
            for seed in range(config.seed, config.seed + seeds):
                merged = with_overrides(config, {**adapted.overrides, "seed": seed})
                check_weights(merged, TARGETS)
                jobs.append(Job(adapted, merged))
        except PistoSegError as error:
            problems.setdefault(str(error), []).append(row.label)
    _refuse(table, problems)
    if not jobs:
        raise PistoSegError(f"no row of {table.name} fits these settings: {'; '.join(left_out)}")
    jobs.sort(key=lambda job: job.config.seed)
    return jobs, left_out


def _refuse(table: Table, problems: Mapping[str, Sequence[str]]) -> None:
    """Raise what is wrong with rows, if anything is: problem -> their labels."""
    if problems:
        lines = [f"\n  {', '.join(map(repr, labels))}: {problem}" for problem, labels in problems.items()]
        raise PistoSegError(f"{table.name} can't be run with these settings:" + "".join(lines).rstrip("."))


def _check_trainings(table: Table, jobs: Sequence[Job], workspace: Workspace) -> None:
    """Refuse rows whose networks can't be built or trained, before the first one takes hours; all are named."""
    problems: dict[str, list[str]] = {}
    for job in jobs:
        todo = [step.stage.name for step in plan(job.config, TARGETS) if step.find(workspace) is None]
        try:
            check_trainings(job.config, todo, lambda text: None)  # the row's run says it
        except UnavailableError:
            raise
        except PistoSegError as error:
            problems.setdefault(str(error), []).append(job.row.label)
    _refuse(table, problems)


def equal_budget(job: Job, patches: Artifact) -> Job:
    """A job whose precise model takes as many steps on mosaics as the other rows' on real images.

    Without `samples_per_epoch` an epoch is all that there is: `synthesis.count` mosaics, but each crop of the real
    images. So a row that trains on mosaics gets the number of those crops.
    """
    precise = job.config.precise
    if precise.masks != "synthesized" or precise.samples_per_epoch is not None:
        return job
    from pistoseg.patches.store import PatchSet
    from pistoseg.training.samples import crop_rows, rare_class_weights

    images = PatchSet.open(patches.uri)
    areas = images.table["height"].to_numpy().astype("int64") * images.table["width"].to_numpy()
    weights = rare_class_weights(images.image_labels()) if precise.class_sampling == "rare" else None
    count = len(crop_rows(areas, precise.patch_size, weights))
    return Job(job.row, with_overrides(job.config, {"precise.samples_per_epoch": count}))


@dataclass(frozen=True)
class JobPlan:
    """Stages of a job that would be computed, that an earlier job would have computed, and that are there."""

    name: str
    computed: tuple[str, ...]
    shared: tuple[str, ...]
    reused: tuple[str, ...]


def outline(jobs: Sequence[Job], workspace: Workspace) -> list[JobPlan]:
    """What running some jobs would compute; nothing but the data set's files is looked at."""
    plans = []
    planned: set[tuple[str, str]] = set()
    for job in jobs:
        patches = plan(job.config, DATA)[0].find(workspace)
        steps = plan((equal_budget(job, patches) if patches else job).config, TARGETS)
        kinds: dict[str, list[str]] = {"computed": [], "shared": [], "reused": []}
        for step in steps:
            key = (step.stage.name, step.fingerprint)
            kind = "shared" if key in planned else "reused" if step.find(workspace) else "computed"
            kinds[kind].append(step.stage.name)
            if kind == "computed":
                planned.add(key)
        plans.append(JobPlan(job.name, **{kind: tuple(names) for kind, names in kinds.items()}))
    return plans


def run(
    table: Table,
    config: Config,
    workspace: Workspace,
    seeds: int = 1,
    *,
    out: str | None = None,
    progress: Progress | None = None,
) -> AblationReport:
    """Run every row of a table with every seed, in the Ray that is connected; what is committed is reused.

    A row that fails is a row with its reason, the others go on.

    Args:
        table: what is compared.
        config: that the rows vary.
        workspace: where artifacts are kept.
        seeds: the config's seed and the ones after it.
        out: URI of the folder for `ablation.json`, `ablation.csv` and `ablation.md`; None: in the workspace.
        progress: where to say what happens.
    Raises:
        PistoSegError: settings of a row, or the images, are refused; there are no validation images; the folder holds
            a table of other settings, of more seeds or of another name.
        UnavailableError: a disk is full, a storage away or the cluster too small, which would end every row; a table of
            before stays.
    """
    object_store.use(config.storage)
    progress = progress or Progress()
    jobs, left_out = prepare(table, config, seeds)
    folder = out or storage.join(workspace.root, "ablations", table.name)
    _refuse_another(folder, table, config, seeds)  # before it waits for one that is running
    with claimed(folder, say=progress.say) as claim:
        assert claim is not None
        _refuse_another(folder, table, config, seeds)
        return _run_jobs(table, config, workspace, jobs, left_out, folder, claim.check, progress)


def _refuse_another(folder: str, table: Table, config: Config, seeds: int) -> None:
    """Refuse to replace a table that this one would not contain."""
    file = storage.join(folder, "ablation.json")
    if not storage.exists(file):
        return
    found = read_json(file, "delete that file and run again")
    own = {"table": table.name, "settings": _settings(config)}
    same = all(found.get(key, value) == value for key, value in own.items())  # a table of before has no settings
    if not same or not set(found.get("seeds", ())) <= set(range(config.seed, config.seed + seeds)):
        raise PistoSegError(
            "holds a table of other settings, other data, more seeds or another name",
            file=folder,
            remedy="give another --out, or delete it: its artifacts stay, and the same command makes it again",
        )


def _settings(config: Config) -> str:
    return digest(decisive(with_absolute(config)))


def _run_jobs(
    table: Table,
    config: Config,
    workspace: Workspace,
    jobs: Sequence[Job],
    left_out: Sequence[str],
    folder: str,
    check: Callable[[], None],
    progress: Progress,
) -> AblationReport:
    """Run the rows, and write the table unless `check` raises, as where another run has taken the folder over."""
    from pistoseg.search.report import files

    with Tracker.start(config, workspace, f"ablation {table.name}") as tracker:
        data = run_pipeline(config, workspace, DATA, progress=progress, run_name="images", parent_run=tracker.run_id)
        if not data["validation"].summary["images"]:
            raise PistoSegError(
                "there are no validation images, so that no row would have a score",
                field="data.validation",
                remedy="name a folder with img/ and mask/",
            )
        first = [equal_budget(job, data["patches"]) for job in jobs if job.config.seed == config.seed]
        _check_trainings(table, first, workspace)  # networks are the same for all seeds
        results: dict[str, list[RunResult]] = {job.row.label: [] for job in jobs}
        failed: dict[tuple[str, str], str] = {}
        for number, job in enumerate(jobs, 1):
            progress.say(f"-- {table.name} {number}/{len(jobs)}: {job.name}")
            result = _run(equal_budget(job, data["patches"]), workspace, progress, tracker.run_id, failed)
            results[job.row.label].append(result)
            if result.problem:
                progress.say(f"failed: {result.problem}")
        report = _report(table, config, jobs, results, left_out, data)
        check()
        for name, content in files(report).items():
            storage.write_bytes(storage.join(folder, name), content)
            tracker.run().file(name, content)
        for row in report.rows:
            means = {score: row.mean(score) for score in report.scores}
            tracker.run().metrics({f"{row.label}/{key}": value for key, value in means.items() if value is not None})
    return report


class _Begun(Hooks):
    """Knows which artifacts a run began to compute."""

    def __init__(self) -> None:
        self.keys: set[tuple[str, str]] = set()

    def begun(self, step: Step) -> None:
        self.keys.add((step.stage.name, step.fingerprint))


def _run(
    job: Job, workspace: Workspace, progress: Progress, parent: str | None, failed: dict[tuple[str, str], str]
) -> RunResult:
    """Run one job; `failed` knows which artifacts failed in which job, so that none is tried twice."""
    steps = {(step.stage.name, step.fingerprint): step for step in plan(job.config, TARGETS)}
    before = {key: step.find(workspace) is not None for key, step in steps.items()}
    scores: dict[str, float | None] = {}
    problem = next(
        (f"needs {key[0]}, which failed in {failed[key]}" for key in steps if key in failed and not before[key]), None
    )
    lost, hooks = False, _Begun()
    if problem is None:
        try:
            artifacts = run_pipeline(
                job.config, workspace, TARGETS, progress=progress, run_name=job.name, parent_run=parent, hooks=hooks
            )
            scores = _scores(artifacts["evaluation"].summary["report"])
        except Exception as error:  # whatever ends a row is its result; the others go on
            known = explained(error)
            if isinstance(known, UnavailableError):  # it would end every other one, too
                raise known from None
            from pistoseg.search.trial import explain, is_lost  # which need `with_overrides`

            problem, lost = explain(error), is_lost(error)
    found = {key: step.find(workspace) for key, step in steps.items()}
    # A row that was refused before its first stage began says nothing of that stage.
    broken = next((key for key, artifact in found.items() if artifact is None and key in hooks.keys), None)
    if problem and broken and not lost:  # a process that went away says nothing of other rows
        failed.setdefault(broken, job.name)
    seconds: dict[bool, dict[str, float]] = {True: {}, False: {}}
    for key, artifact in found.items():
        if artifact is not None:
            seconds[before[key]][key[0]] = artifact.manifest["seconds"]
    fingerprints = {name: key for (name, key), artifact in found.items() if artifact is not None}
    return RunResult(job.config.seed, scores, fingerprints, seconds[False], seconds[True], problem)


def _scores(report: Mapping[str, Any]) -> dict[str, float | None]:
    by_class = {f"iou/{name}": value for name, value in report["iou"].items()}
    return by_class | {"miou": report["miou"], "fwiou": report["fwiou"]}


def _report(
    table: Table,
    config: Config,
    jobs: Sequence[Job],
    results: Mapping[str, list[RunResult]],
    left_out: Sequence[str],
    data: Mapping[str, Artifact],
) -> AblationReport:
    classes = tuple(config.classes.tissue().names)
    summary = data["patches"].summary
    images = summary["images"] + summary["rejected"]
    published = published_data(classes, images)
    rows = {job.row.label: job.row for job in jobs}
    return AblationReport(
        table=table.name,
        title=table.title,
        classes=classes,
        seeds=tuple(sorted({job.config.seed for job in jobs})),
        rows=tuple(
            RowResult(label, row.overrides, tuple(results[label]), row.paper.get(published) if published else None)
            for label, row in rows.items()
        ),
        left_out=tuple(left_out),
        training_images=images,
        validation_images=data["validation"].summary["images"],
        published=published,
        settings=_settings(config),
    )
