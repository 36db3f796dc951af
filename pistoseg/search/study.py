"""A search from its first trial to its report: what is there is kept, whatever ended the last run."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray import tune

from pistoseg import object_store, storage
from pistoseg.actors import start_here
from pistoseg.artifacts import Artifact, Workspace
from pistoseg.claims import claimed
from pistoseg.config import Config
from pistoseg.errors import PistoSegError, UnavailableError, explained
from pistoseg.graph import BY_NAME, plan
from pistoseg.pipeline import check_trainings, run_pipeline
from pistoseg.places import data_places, is_data
from pistoseg.progress import Progress
from pistoseg.search.ablation import DATA, decisive, with_overrides
from pistoseg.search.confirmation import Confirmation
from pistoseg.search.journal import Journal, TrialRecord, digest
from pistoseg.search.objective import Objective
from pistoseg.search.recording import Ending, Recorder
from pistoseg.search.sampling import Algorithm, Halving, PointSearcher
from pistoseg.search.sharing import Sharing
from pistoseg.search.spaces import Space
from pistoseg.search.trial import TrialJob, Workers, explain, is_lost, run_trial
from pistoseg.stages import cluster, placement
from pistoseg.tracking import Tracker

DRIVER_BYTES = 512 << 20
"""Memory that Ray sets aside for the process that leads a trial. It gets no CPU: drivers that hold CPUs and wait for
their training workers to get one would wait for ever."""


@dataclass(frozen=True)
class Budget:
    """When a search ends: after so many trials, or hours over all its runs, whichever comes first; and how wide it is.

    Args:
        trials: in all; None: no limit.
        hours: of searching, without the confirmation; None: no limit.
        parallel: trials at a time; None: what the cluster has room for.
        confirm_seeds: seeds of the confirmation; 0: none.
    """

    trials: int | None
    hours: float | None = None
    parallel: int | None = None
    confirm_seeds: int = 3


@dataclass(frozen=True)
class Pruning:
    """ASHA's settings.

    Args:
        grace: epochs before a trial can be stopped.
        factor: the best 1/factor of the trials goes on at each rung.
    """

    grace: int
    factor: float


@dataclass(frozen=True)
class Search:
    """What is searched.

    Args:
        name: of its folder and its run.
        config: that the trials vary; its own setting is trial 0.
        space: without the parameters that change nothing.
        sharing: what trials share.
        objective: what they are scored by.
        algorithm: where points come from.
        timed: whether a trial's time is a second objective.
        pruning: of bad trials; None: every trial runs to its end.
    """

    name: str
    config: Config
    space: Space
    sharing: Sharing
    objective: Objective
    algorithm: Algorithm
    timed: bool
    pruning: Pruning | None

    def identity(self) -> dict[str, Any]:
        """What makes it another search; the budget, the machine, the way to its storage, MLflow and passwords don't."""
        kind: str = self.objective.kind
        return decisive(self.config) | {
            "parameters": [repr(item) for item in self.space.parameters],
            # Trials with scores of two versions could not be compared.
            "objective": f"labels {BY_NAME['label_scores'].version}" if kind == "labels" else kind,
            "timed": self.timed,
        }


@dataclass(frozen=True)
class Outcome:
    """What came out.

    Args:
        search: what was searched.
        journal: with all trials.
        confirmation: of the best; None where there is nothing to confirm, or no seeds for it.
        version: of the registered model that became the champion.
        shared: artifacts that all trials have.
    """

    search: Search
    journal: Journal
    confirmation: Confirmation | None
    version: str | None
    shared: dict[str, Artifact]


def folder_of(workspace: Workspace, name: str) -> str:
    """URI of a search's folder."""
    return storage.join(workspace.root, "search", name)


def run(search: Search, workspace: Workspace, budget: Budget, progress: Progress | None = None) -> Outcome:
    """Search in the Ray that is connected, confirm the best setting, write and log the report.

    Args:
        search: what is searched.
        workspace: of artifacts, journal and report.
        budget: when it ends.
        progress: where to say what happens.
    Raises:
        PistoSegError: another search has the folder, the own setting can't be trained, or images or labels changed.
        UnavailableError: a disk is full, a storage away or the cluster too small; the search can go on later.
    """
    object_store.use(search.config.storage)
    progress = progress or Progress()
    folder = folder_of(workspace, search.name)
    settings = {"identity": search.identity(), "spent_s": 0.0, "run_id": None}
    Journal.refuse_another(folder, settings)  # before it waits for that to end
    # Before there is a journal, which would keep its name.
    _check_trainings(search, workspace, progress)
    placement.check_shared(workspace.root, _places(search))  # each trial is led, and reads, on any node
    # Two runs of one search would overwrite each other's trials.
    with claimed(folder, say=progress.say) as claim:
        assert claim is not None
        journal = Journal.open(folder, settings, claim.check)
        _check_data(search, journal)
        if 0 in journal.records and search.space.point_of(search.config) is None:
            journal.records[0].point = None  # an earlier version may have taken it for one of the space
        return _run(search, workspace, budget, journal, progress)


def _places(search: Search) -> dict[str, str]:
    """Folders and files of data that trials read, those among the space's options, too, by what they are called."""
    return data_places(search.config) | {
        f"{key}={value}": value
        for parameter in search.space.parameters
        for option in parameter.options.values()
        for key, value in option.items()
        if isinstance(value, str) and is_data(*key.partition(".")[::2], value)
    }


def _check_trainings(search: Search, workspace: Workspace, progress: Progress) -> None:
    """Refuse an own setting whose networks can't be built or trained, before hours go into what trials share."""
    steps = plan(search.config, search.objective.targets)
    # What is shared is looked at when it is computed, which comes first.
    varied = [step for step in steps if step.stage.name in search.sharing.varied]
    todo = [step.stage.name for step in varied if step.find(workspace) is None]
    check_trainings(search.config, todo, progress.say)


def _check_data(search: Search, journal: Journal) -> None:
    """Refuse to go on where images or labels are no longer those of the trials: their values could not be compared."""
    data = {step.stage.name: digest(step.settings) for step in plan(search.config, DATA)}  # of the own setting
    known = journal.settings.get("data")
    if known is None or not journal.records:
        journal.update(data=data)
    elif known != data:
        changed = " and ".join(name for name in DATA if known.get(name) != data[name])
        raise PistoSegError(
            f"holds a search of other data: what the stage {changed} reads has changed since",
            file=journal.folder,
            remedy="give another --name; where files were only copied anew, remove `data` from search.json",
        )


def _run(search: Search, workspace: Workspace, budget: Budget, journal: Journal, progress: Progress) -> Outcome:
    from pistoseg.search import findings

    for line in search.space.notes:
        progress.say(line)
    with Tracker.start(search.config, workspace, f"search {search.name}", run_id=journal.settings["run_id"]) as tracker:
        journal.update(run_id=tracker.run_id or journal.settings["run_id"])  # one without MLflow leaves it to the next
        tracker.run().tags({"pistoseg.search": search.name, "pistoseg.objective": search.objective.title})
        shared = _compute_shared(search, workspace, tracker, progress)
        _run_trials(search, workspace, budget, journal, tracker, shared, progress)
        _report(Outcome(search, journal, *_confirmed(journal), shared), tracker)  # stays if the confirmation is cut off
        confirmation, version = _confirm(search, workspace, budget, journal, tracker, progress)
        outcome = Outcome(search, journal, confirmation, version, shared)
        _report(outcome, tracker)
        tracker.run().metrics(findings.metrics(outcome))
    return outcome


def _report(outcome: Outcome, tracker: Tracker) -> None:
    """Write what came out into the search's folder and its MLflow run."""
    from pistoseg.search import findings

    files = findings.files(outcome)
    outcome.journal.check()
    for name, content in files.items():
        storage.write_bytes(storage.join(outcome.journal.folder, name), content)
        tracker.run().file(name, content)


def room(config: Config) -> int:
    """Trials that the cluster can run at the same time without one waiting for what another holds.

    On CPUs a training takes a CPU a worker, and one more for all the rest.
    """
    compute = config.compute
    if compute.device != "cpu" and cluster.cluster_gpus():
        return max(1, placement.gpu_trainings(compute))
    return max(1, cluster.cluster_cpus() // (compute.train_workers + 1))


def _compute_shared(search: Search, workspace: Workspace, tracker: Tracker, progress: Progress) -> dict[str, Artifact]:
    """What no trial varies, before the first one begins."""
    if not search.sharing.shared:
        return {}
    progress.say(f"shared by all trials, computed once: {', '.join(search.sharing.shared)}")
    return run_pipeline(
        search.config,
        workspace,
        search.sharing.shared,
        progress=progress,
        run_name="shared by all trials",
        parent_run=tracker.run_id,
    )


def _run_trials(
    search: Search,
    workspace: Workspace,
    budget: Budget,
    journal: Journal,
    tracker: Tracker,
    shared: dict[str, Artifact],
    progress: Progress,
) -> None:
    left_s = None if budget.hours is None else budget.hours * 3600 - journal.settings["spent_s"]
    enough = budget.trials is not None and len(journal.records) >= budget.trials and not journal.cut_off()
    if enough or (left_s is not None and left_s <= 0):
        progress.say("the budget is spent: no new trials")
        return
    parallel = _parallel(search.config, budget.parallel, progress)
    scheduler = _scheduler(search, journal)
    workers, ending = start_here(Workers), Ending()
    recorder = Recorder(journal, tracker, search.objective, workers, scheduler, shared, progress, workspace, ending)
    own = search.space.point_of(search.config)
    if own is None:
        progress.say("the own setting is outside of the space: trial 0 counts, but does not guide the search")
    searcher = PointSearcher(
        search.space, journal, search.algorithm, search.config.seed, budget.trials, own, search.timed, progress.say
    )
    job = TrialJob(
        search.config,
        workspace.root,
        search.objective,
        search.sharing.compared,
        frozenset(search.sharing.shared),
        workers,
        parallel,
        placement.local_places(_places(search)),
    )
    before, started = journal.settings["spent_s"], time.monotonic()
    try:
        with _tune_settings(), tempfile.TemporaryDirectory() as scratch:
            tune.Tuner(
                tune.with_resources(tune.with_parameters(run_trial, job=job), {"cpu": 0, "memory": DRIVER_BYTES}),
                tune_config=tune.TuneConfig(
                    search_alg=searcher,
                    scheduler=scheduler,
                    num_samples=-1,
                    max_concurrent_trials=parallel,
                    time_budget_s=left_s,
                ),
                # Its own state is pickled; it stays in a folder of this run, and nobody reads it.
                run_config=tune.RunConfig(
                    name="trials",
                    storage_path=scratch,
                    verbose=0,
                    callbacks=[_Clock(journal, before, ending), recorder],
                    # What a trial raises is its result: one that fails here has lost its process, or its node.
                    failure_config=tune.FailureConfig(max_failures=search.config.compute.max_failures),
                    stop=ending,
                ),
            ).fit()
    finally:
        recorder.end_all()
        with ending.watching():
            journal.update(spent_s=before + time.monotonic() - started)
        ray.kill(workers)
    if ending.problem:
        raise ending.problem


class _Clock(tune.Callback):
    """Keeps the time that a search has taken, so that hours count over a crash, too."""

    def __init__(self, journal: Journal, before: float, ending: Ending) -> None:
        self.journal, self.before, self.started, self.ending = journal, before, time.monotonic(), ending

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its callbacks into a state that nobody reads."""
        return {}

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        """A time to look at the clock."""
        with self.ending.watching():
            self.journal.update(spent_s=self.before + time.monotonic() - self.started)


def _parallel(config: Config, wanted: int | None, progress: Progress) -> int:
    most = room(config)
    gpus = config.compute.device != "cpu" and cluster.cluster_gpus() > 0
    # On CPUs a training uses its whole node, unless asked to share it.
    parallel = wanted or (most if gpus else min(most, sum(bool(node["Alive"]) for node in ray.nodes())))
    if parallel > most:
        progress.say(f"warning: there is room for {most} trials at a time, not for {parallel}")
    return min(parallel, most)


def _scheduler(search: Search, journal: Journal) -> Halving | None:
    epochs = search.sharing.epochs(search.config)
    if search.pruning is None or epochs <= search.pruning.grace:
        return None
    return Halving(epochs, search.pruning.grace, search.pruning.factor, journal.ended(), journal.cut_off())


@contextmanager
def _tune_settings() -> Iterator[None]:
    """Tune's switches: no logs and tables of its own, Ctrl-C ends the search, a failed trial need not have a score."""
    switches = {
        "RAY_AIR_NEW_OUTPUT": "0",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    }
    before = {name: os.environ.get(name) for name in switches}
    os.environ.update(switches)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _confirmed(journal: Journal) -> tuple[Confirmation | None, str | None]:
    """What an earlier run confirmed and registered, if that is of the best setting still."""
    found, best = journal.settings.get("confirmation"), journal.best()
    if found is None or best is None or found.get("setting") != best.key:
        return None, None
    return Confirmation.from_json(found), found.get("version")


def _confirm(
    search: Search, workspace: Workspace, budget: Budget, journal: Journal, tracker: Tracker, progress: Progress
) -> tuple[Confirmation | None, str | None]:
    """Run the best setting and the own one on fresh seeds; the best becomes the champion if it holds."""
    best = journal.best()
    if best is None or best.number == 0 or not budget.confirm_seeds:
        return _confirmed(journal)
    first = search.config.seed + 1  # the search's own seed chose the best: it would speak for it
    seeds = tuple(range(first, first + budget.confirm_seeds))
    problems: list[str] = []
    models: list[Artifact] = []

    def score(label: str, overrides: dict[str, Any], seed: int) -> float | None:
        config = with_overrides(search.config, {**overrides, "seed": seed})
        progress.say(f"-- confirmation: {label}, seed {seed}")
        try:
            artifacts = run_pipeline(
                config,
                workspace,
                search.objective.targets,
                progress=progress,
                run_name=f"confirmation: {label}, seed {seed}",
                parent_run=tracker.run_id,
            )
            value = search.objective.value(artifacts)
            if not math.isfinite(value):
                raise PistoSegError("the objective is no number")
            if overrides:
                models.append(artifacts["precise"])
            return value
        except Exception as error:  # as of a trial: a run that ran out of memory is one that failed
            known = explained(error)
            if isinstance(known, UnavailableError):
                raise known from error
            if is_lost(error):  # that says nothing of the setting; the same command goes on
                raise
            reason = explain(error)
            problems.append(f"{label}, seed {seed}: {reason}")
            progress.say(f"failed: {reason}")
            return None

    pairs = [_pair(best, seed, score) for seed in seeds]
    confirmation = Confirmation(
        seeds, tuple(pair[0] for pair in pairs), tuple(pair[1] for pair in pairs), tuple(problems)
    )
    # What an earlier run registered of this setting became the champion, also where MLflow is away or off now.
    known = _confirmed(journal)[1] if confirmation.holds else None
    kept = confirmation.to_json() | {"setting": best.key, "version": known}
    journal.update(confirmation=kept)
    if not confirmation.holds or not models:
        return confirmation, None
    version = tracker.register(models[0], {"pistoseg.search": search.name})
    if version is None or tracker.client is None:
        return confirmation, known
    version = tracker.guard(_promote, tracker.client, search.config.tracking.model, version, known) or known
    journal.update(confirmation=kept | {"version": version})
    return confirmation, version


def _promote(client: Any, model: str, version: str, known: str | None) -> str:
    """Make a version the champion, unless another one has taken that over from the one of an earlier run.

    Args:
        client: of MLflow.
        model: name of the registered model.
        version: that holds; after an update of the project the same setting has a new one.
        known: what an earlier run of this search made the champion; None: nothing.
    Returns:
        What this search made the champion last.
    """
    from pistoseg.tracking.registry import CHAMPION, set_alias

    champion = client.get_registered_model(model).aliases.get(CHAMPION)
    if known is not None and champion is not None and str(champion) != known:
        return known
    set_alias(client, model, version)
    return version


def _pair(
    best: TrialRecord, seed: int, score: Callable[[str, dict[str, Any], int], float | None]
) -> tuple[float | None, float | None]:
    """Both settings on one seed."""
    return score(f"trial {best.number}", best.overrides, seed), score("own setting", {}, seed)
