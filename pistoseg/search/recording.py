"""Keeps the journal and MLflow up to date while Tune runs the trials; all of it in the driver.

A trial's process writes artifacts only: when it is stopped or killed, no MLflow run of its own is left open.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray
from ray.tune import Callback, Stopper

from pistoseg.artifacts import Artifact, Workspace
from pistoseg.errors import PistoSegError, UnavailableError, explained
from pistoseg.progress import Progress
from pistoseg.redaction import first_line
from pistoseg.search.journal import Journal, TrialRecord
from pistoseg.search.objective import Objective
from pistoseg.search.sampling import Halving
from pistoseg.search.trial import UNAVAILABLE, explain
from pistoseg.tracking import StageRun, Tracker

STATUS = {"finished": "FINISHED", "pruned": "KILLED", "failed": "FAILED", "running": "KILLED"}
"""MLflow's word for a trial's state."""


class Ending(Stopper):
    """Ends a search with a problem that the other trials would meet, too: a full disk, a storage that is away."""

    def __init__(self) -> None:
        self.problem: Exception | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles it into a state that nobody reads, and not every error can be."""
        return {}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Look at a report; the trial that sent it ends by itself."""
        if UNAVAILABLE in result:
            self.problem = self.problem or UnavailableError(**json.loads(result[UNAVAILABLE]))
        return False

    def stop_all(self) -> bool:
        """Whether the search has to end."""
        return self.problem is not None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Keep what the block raises, the first of several: Tune would take it for a failure of the trial at hand."""
        try:
            yield
        except Exception as error:
            self.problem = self.problem or explained(error) or error


class Recorder(Callback):
    """Tune's callback; what goes wrong in it ends the search, but is no trial's fault.

    Args:
        journal: of the search.
        tracker: with the search's run.
        objective: what trials are scored by.
        workers: `Workers` actor.
        scheduler: that stops trials; None: none is stopped.
        shared: artifacts that all trials have.
        progress: where to say what became of a trial.
        workspace: of the artifacts.
        ending: told what goes wrong.
    """

    def __init__(
        self,
        journal: Journal,
        tracker: Tracker,
        objective: Objective,
        workers: Any,
        scheduler: Halving | None,
        shared: Mapping[str, Artifact],
        progress: Progress,
        workspace: Workspace,
        ending: Ending,
    ) -> None:
        self.journal, self.tracker, self.objective = journal, tracker, objective
        self.workers, self.scheduler, self.shared = workers, scheduler, shared
        self.progress, self.workspace, self.ending = progress, workspace, ending
        self._runs: dict[int, StageRun] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its callbacks into a state that nobody reads."""
        return {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Open the trial's MLflow run."""
        with self.ending.watching():
            record = self._record(trial)
            run = self._open(record)
            self._runs[record.number] = run
            record.run_id = run.run_id or record.run_id  # one without MLflow leaves it to the next
            self.journal.save(record)
            settings = ", ".join(f"{key}={value}" for key, value in record.overrides.items())
            self.progress.say(f"trial {record.number}: {settings or 'the own setting'}")

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        """An epoch of the trial is over."""
        if "objective" in result and not result.get("finished"):
            with self.ending.watching():
                record = self._record(trial)
                record.report(int(result["epoch"]), float(result["objective"]))
                self.journal.save(record)
                self._runs[record.number].metrics({"objective": result["objective"]}, step=int(result["epoch"]))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The trial finished, failed with a reason, was stopped by ASHA, or the time is over."""
        with self.ending.watching():
            record = self._record(trial)
            self._fill(record, trial.last_result or {}, trial.trial_id)
            self._close(record)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The trial's process or node was lost; it starts again."""
        with self.ending.watching():
            record = self._record(trial)
            ray.get(self.workers.release.remote(str(record.number)))
            self.progress.say(f"trial {record.number}: its process was lost, it starts again")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The trial's process died once too often."""
        with self.ending.watching():
            record = self._record(trial)
            error = trial.get_error()
            record.state, record.reason = "failed", explain(error) if error else "its process died"
            self._close(record)

    def end_all(self) -> None:
        """End the runs of trials that were cut off."""
        for number in list(self._runs):
            with self.ending.watching():
                self._close(self.journal.records[number])

    def _record(self, trial: Any) -> TrialRecord:
        return self.journal.records[trial.config["number"]]

    def _open(self, record: TrialRecord) -> StageRun:
        tracker = self.tracker
        if tracker.client is None or tracker.run_id is None:
            return StageRun()
        if record.run_id and tracker.guard(tracker.goes_on, record.run_id):
            kept = StageRun(tracker.client, record.run_id, tracker.guard)
            kept.skip_logged()
            return kept
        tags = {"mlflow.parentRunId": tracker.run_id, "pistoseg.trial": str(record.number)}
        for stage, artifact in self.shared.items():
            tags[f"pistoseg.shared.{stage}"] = artifact.fingerprint
        run = tracker.guard(
            tracker.client.create_run, tracker.experiment_id, tags=tags, run_name=f"trial {record.number}"
        )
        opened = StageRun(tracker.client if run else None, run.info.run_id if run else None, tracker.guard)
        opened.params(record.point if record.point is not None else record.overrides)
        return opened

    def _fill(self, record: TrialRecord, result: Mapping[str, Any], trial_id: str) -> None:
        """Note what became of a trial by its last report."""
        if result.get("finished"):
            details = json.loads(result["details"])
            for epoch, value in details["curve"]:  # one whose report was lost with a driver
                record.report(epoch, value)
            record.scores, record.artifacts, record.computed = (
                details[key] for key in ("scores", "artifacts", "computed")
            )
            record.seconds, record.value = float(result["seconds"]), float(result["objective"])
            record.state = "finished"
            if not math.isfinite(record.value):
                record.value, record.state, record.reason = None, "failed", "the objective is no number"
        elif "problem" in result:
            record.state, record.reason = "failed", str(result["problem"])
        elif self.scheduler is not None and trial_id in self.scheduler.stopped:
            record.state = "pruned"

    def _close(self, record: TrialRecord) -> None:
        ray.get(self.workers.release.remote(str(record.number)))
        self.journal.check()  # whoever took the search over has the runs, too
        run = self._runs.pop(record.number, None)
        if run is not None and run.run_id is not None:
            self._end(record, run)
        self.journal.save(record)  # last: a trial whose run was not ended goes on in the next search, and ends it
        self.progress.say(f"trial {record.number}: {self._outcome(record)}")

    def _end(self, record: TrialRecord, run: StageRun) -> None:
        tags: dict[str, str] = {"pistoseg.state": "cut off" if record.state == "running" else record.state}
        if record.reason:
            tags["pistoseg.reason"] = record.reason
        tags |= {f"pistoseg.artifact.{stage}": key for stage, key in record.artifacts.items()}
        tags |= {"pistoseg.computed": " ".join(record.computed)} if record.computed else {}
        run.tags(tags)
        # Also what the driver of an earlier run had in the journal, but not in MLflow, when it was killed.
        for epoch, value in record.curve:
            run.metrics({"objective": value}, step=epoch)
        run.metrics(record.scores)
        if record.seconds is not None:
            run.metrics({"seconds": record.seconds})
        self._pictures(record, run)
        self.tracker.end(run.run_id, STATUS[record.state])

    def _pictures(self, record: TrialRecord, run: StageRun) -> None:
        for stage in ("synthesis", *self.objective.targets):
            try:
                found = self.workspace.find(stage, record.artifacts[stage]) if stage in record.artifacts else None
                if found is not None:
                    run.pictures(found)
            except (OSError, PistoSegError) as error:  # deleted, or a storage that is away: no picture is worth a trial
                self.progress.say(f"trial {record.number}: MLflow lacks pictures of {stage}: {first_line(error)}")

    def _outcome(self, record: TrialRecord) -> str:
        if record.state == "finished" and record.value is not None:
            return f"{self.objective.title} {record.value:.4f}"
        if record.state == "pruned":
            epoch, value = record.curve[-1]
            return f"stopped early after epoch {epoch}, at {value:.4f}"
        return f"failed: {record.reason}" if record.state == "failed" else "cut off; it goes on in the next run"
