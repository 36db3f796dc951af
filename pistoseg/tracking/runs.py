"""A run per pipeline or batch job, a child per stage, pictures, and the precise model as a registered version.

The pipelines of an ablation are children of the ablation's run; their models are compared, not registered.

A pipeline's result never depends on MLflow: where it can't be reached the run says so once, goes on, and what the
server misses is sent later (`pistoseg.tracking.outbox`).
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pistoseg
from pistoseg import storage
from pistoseg.artifacts import Artifact, Workspace
from pistoseg.config import Config, TrackingConfig
from pistoseg.errors import UnavailableError
from pistoseg.redaction import first_line, redact, redacted
from pistoseg.tracking.delivery import UNSENT, is_refusal
from pistoseg.tracking.outbox import Outbox
from pistoseg.tracking.server import connect, default_server, experiment_id, is_own

MAX_PARAM = 500
"""Longest parameter value, in characters, that is sent."""


class _Guard:
    """Calls MLflow and keeps its failures from ending a pipeline."""

    def __init__(self) -> None:
        self.broken = False

    def __call__(self, call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        return None if self.broken else self.anyway(call, *arguments, **named)

    def anyway(self, call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """Call MLflow also after a failure: a run that lacks something is still to be ended."""
        from mlflow.exceptions import MlflowException
        from requests.exceptions import RequestException
        from sqlalchemy.exc import SQLAlchemyError

        try:
            return call(*arguments, **named)
        # A LookupError is an answer that MLflow can't read, as of a proxy in its place.
        except (MlflowException, RequestException, SQLAlchemyError, OSError, UnavailableError, LookupError) as error:
            if not self.broken:
                self.broken = True
                print(f"MLflow can't be written, this run goes on without it: {first_line(error)}")
            return None


class StageRun:
    """The MLflow run of one stage; does nothing when tracking is off."""

    def __init__(self, client: Outbox | None = None, run_id: str | None = None, guard: _Guard | None = None) -> None:
        self.client, self.run_id, self.guard = client, run_id, guard or _Guard()
        self._logged: set[tuple[str, int]] = set()

    def metrics(self, values: Mapping[str, float | None], step: int = 0) -> None:
        """Log numbers, and nothing of what is None; a (name, step) that was logged before is left alone."""
        if self.client is None or self.run_id is None:
            return
        client, run_id = self.client, self.run_id
        for key, value in _keyed(values).items():
            if (key, step) not in self._logged and value is not None and value == value:
                self._logged.add((key, step))
                self.guard(client.log_metric, run_id, key, float(value), step=step)

    def skip_logged(self) -> None:
        """Leave alone from now on what an earlier process logged."""
        if self.client is not None and self.run_id is not None:
            self._logged |= self.client.logged(self.run_id)

    def params(self, values: Mapping[str, Any]) -> None:
        """Log parameters, nested ones by their dotted names."""
        if self.client is None or self.run_id is None:
            return
        for key, value in _params(values).items():
            self.guard(self.client.log_param, self.run_id, key, value)

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags, without secrets."""
        if self.client is None or self.run_id is None:
            return
        for key, value in _keyed(values).items():
            self.guard(self.client.set_tag, self.run_id, key, redact(value))

    def finish(self, artifact: Artifact) -> None:
        """Log a committed artifact's metrics, pictures and manifest."""
        self.metrics(_scores(artifact))
        self.pictures(artifact)

    def pictures(self, artifact: Artifact) -> None:
        """Log a committed artifact's pictures and manifest."""
        if self.client is None:
            return
        for name in ("manifest.json", *artifact.summary.get("pictures", [])):
            self.file(storage.name(name), storage.read_bytes(artifact.path(name)))

    def file(self, name: str, data: bytes) -> None:
        """Log a file."""
        if self.client is None or self.run_id is None:
            return
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / name
            file.write_bytes(data)
            self.guard(self.client.log_artifact, self.run_id, str(file))


class Tracker:
    """The MLflow run of one pipeline, or of an ablation that runs several."""

    def __init__(
        self,
        config: Config,
        workspace: Workspace,
        client: Outbox | None,
        name: str | None = None,
        parent: str | None = None,
        run_id: str | None = None,
    ) -> None:
        self.config, self.workspace, self.client = config, workspace, client
        self.name, self.parent = name, parent
        self.guard = _Guard()
        self.run_id = run_id
        self.experiment_id = ""
        self._stage_runs: dict[str, str] = {}

    @classmethod
    @contextmanager
    def start(
        cls,
        config: Config,
        workspace: Workspace,
        name: str | None = None,
        parent: str | None = None,
        run_id: str | None = None,
    ) -> Iterator[Tracker]:
        """Open a run; it is ended as finished, failed or killed.

        Args:
            config: whose settings are its parameters.
            workspace: where the database is unless the config names a server.
            name: of the run; None: the data set's.
            parent: id of the run that it is a part of.
            run_id: of a run that is there, to go on with; None: a new one.
        """
        if not config.tracking.enabled:
            yield cls(config, workspace, None)
            return
        client = connect(config.tracking, workspace)
        with default_server(client.tracking_uri):
            tracker = cls(config, workspace, client, name, parent, run_id)
            if parent is None:
                client.send_left()
            tracker.guard(tracker._open)
            status = "FAILED"
            try:
                yield tracker
                status = "FINISHED"
            except KeyboardInterrupt:
                status = "KILLED"
                raise
            finally:
                tracker.end(tracker.run_id, status)
                client.close()

    def _open(self) -> None:
        assert self.client is not None
        self.experiment_id = experiment_id(self.client, self.config.tracking, self.workspace)
        if self.run_id and self.goes_on(self.run_id):
            return
        tags = _tags(self.workspace)
        if self.parent:
            tags["mlflow.parentRunId"] = self.parent
        name = redact(self.name or storage.name(self.config.data.uri or "pipeline"))
        self.run_id = self.client.create_run(self.experiment_id, tags=tags, run_name=name).info.run_id
        self.client.log_params(self.run_id, _params(self.config.model_dump(mode="json", exclude={"tracking"})))

    def goes_on(self, run_id: str) -> bool:
        """Go on with a run that is there.

        Returns:
            False where MLflow refuses, as one that was deleted or another server's, and where its files would be
            written elsewhere, as to where the workspace was before it was moved.
        """
        assert self.client is not None
        if self._is_elsewhere(run_id):
            print(f"run {run_id} is in another experiment of MLflow, a new one takes its place")
            return False
        try:
            self.client.update_run(run_id, status="RUNNING")
        except Exception as error:
            if not is_refusal(error):
                raise
            print(f"MLflow does not go on with run {run_id}, a new one takes its place: {first_line(error)}")
            return False
        return True

    def _is_elsewhere(self, run_id: str) -> bool:
        """Whether a run is in the workspace's own database, but not in the experiment whose files are in it."""
        assert self.client is not None
        if self.experiment_id.startswith(UNSENT) or not is_own(str(self.client.tracking_uri), self.workspace):
            return False
        return self.client.experiment_of(run_id) not in (None, self.experiment_id)

    @contextmanager
    def stage(
        self, name: str, key: str, settings: Mapping[str, Any], inputs: Mapping[str, Artifact]
    ) -> Iterator[StageRun]:
        """Open a stage's run below the pipeline's; it is ended as finished, failed or killed."""
        if self.client is None or self.run_id is None:
            yield StageRun()
            return
        client, parent, experiment = self.client, self.run_id, self.experiment_id
        tags = {"mlflow.parentRunId": parent, "pistoseg.stage": name, "pistoseg.fingerprint": key}
        tags |= {f"pistoseg.input.{role}": f"{item.stage}/{item.fingerprint}" for role, item in inputs.items()}

        def create() -> str:
            run_id: str = client.create_run(experiment, tags=tags, run_name=name).info.run_id
            return run_id

        run_id = self.guard(create)
        if run_id:
            params = _params(settings).items()
            sent = {key: value for key, value in params if not key.startswith("files")}
            self.guard(client.log_params, run_id, sent)
        status = "FAILED"
        try:
            yield StageRun(client if run_id else None, run_id, self.guard)
            status = "FINISHED"
            if run_id:
                self._stage_runs[name] = run_id
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            self.end(run_id, status)

    def reused(self, artifact: Artifact) -> None:
        """Note that a stage was up to date."""
        if self.client is not None and self.run_id is not None:
            client, run_id = self.client, self.run_id
            self.guard(client.set_tag, run_id, f"pistoseg.reused.{artifact.stage}", artifact.fingerprint)

    def run(self) -> StageRun:
        """The run itself, for metrics and files of its own."""
        return StageRun(self.client, self.run_id, self.guard)

    def finish(self, artifacts: Mapping[str, Artifact]) -> None:
        """Log the pipeline's scores and register its precise model, unless it is one of several that are compared."""
        if self.client is None or self.run_id is None:
            return
        run = self.run()
        for stage in ("preliminary_evaluation", "evaluation", "label_scores"):
            if stage in artifacts:
                prefix = "preliminary_" if stage == "preliminary_evaluation" else ""
                run.metrics({prefix + key: value for key, value in _scores(artifacts[stage]).items()})
        if "precise" in artifacts and not self.parent:
            version = self.register(artifacts["precise"])
            if version is not None:
                print(f"the model is models:/{self.config.tracking.model}/{version} in MLflow")

    def register(self, artifact: Artifact, tags: Mapping[str, str] | None = None) -> str | None:
        """Register a precise model.

        Args:
            artifact: of the stage `precise`.
            tags: of the version beside its lineage, also where the model is registered already.
        Returns:
            Its version; None without a server, which is told later.
        """
        if self.client is None or self.run_id is None:
            return None
        inputs = artifact.manifest["inputs"].items()
        lineage = {f"pistoseg.input.{role}": f"{item['stage']}/{item['fingerprint']}" for role, item in inputs}
        version: str | None = self.guard(
            self.client.register,
            run_id=self._stage_runs.get("precise", self.run_id),
            name=self.config.tracking.model,
            uri=artifact.path("bundle"),
            fingerprint=artifact.fingerprint,
            tags=lineage | dict(tags or {}),
        )
        return version

    def end(self, run_id: str | None, status: str) -> None:
        """End a run of this client, also one that lacks what MLflow could not take."""
        if self.client is not None and run_id is not None:
            self.guard.anyway(self.client.set_terminated, run_id, status)


@contextmanager
def batch_run(config: TrackingConfig, workspace: Workspace, name: str, params: Mapping[str, Any]) -> Iterator[StageRun]:
    """The MLflow run of a job that is no pipeline; it is ended as finished, failed or killed.

    Args:
        config: of the server.
        workspace: where the database is unless the config names a server.
        name: of the run.
        params: its parameters.
    """
    if not config.enabled:
        yield StageRun()
        return
    try:
        client, guard = connect(config, workspace), _Guard()
    except UnavailableError as error:  # a job that is no pipeline needs no workspace but for this
        print(f"this run goes on without MLflow: {error.file} {error.reason}; give --workspace or MLFLOW_TRACKING_URI")
        yield StageRun()
        return

    def create() -> str:
        experiment = experiment_id(client, config, workspace)
        run_id: str = client.create_run(experiment, tags=_tags(workspace), run_name=name).info.run_id
        return run_id

    with default_server(client.tracking_uri):
        client.send_left()
        run_id = guard(create)
        if run_id:
            guard(client.log_params, run_id, _params(params))
        status = "FAILED"
        try:
            yield StageRun(client if run_id else None, run_id, guard)
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            if run_id:
                guard.anyway(client.set_terminated, run_id, status)
            client.close()


def _scores(artifact: Artifact) -> dict[str, float | None]:
    """Metrics of an artifact, with None for classes without a score: `_keyed` numbers alike names of all classes."""
    classes = artifact.summary.get("report", {}).get("iou", {})
    return {f"iou/{name}": None for name in classes} | artifact.summary.get("metrics", {})


def _tags(workspace: Workspace) -> dict[str, str]:
    tags = {"pistoseg.version": pistoseg.__version__, "pistoseg.workspace": redact(workspace.root)}
    if commit := _git_commit():
        tags["pistoseg.commit"] = commit
    return tags


def _params(values: Mapping[str, Any]) -> dict[str, str]:
    """Settings as a run's parameters."""
    return {key: str(value)[:MAX_PARAM] for key, value in _keyed(_flat(values)).items()}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            value = redacted(value)
            flat[prefix + key] = value if isinstance(value, (str, int, float)) else json.dumps(value)
    return flat


def _keyed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by names that MLflow takes; names that only differ in what it does not take are numbered."""
    keyed: dict[str, Any] = {}
    for name, value in values.items():
        key, number = _key(name), 1
        while key in keyed:
            number += 1
            key = f"{_key(name)}_{number}"
        keyed[key] = value
    return keyed


def _key(name: str) -> str:
    """A name as MLflow takes it, which reads it as a path: of some characters, and without parts that say nothing."""
    text = "".join(char if char.isalnum() or char in "_-. /" else "_" for char in name)
    return "/".join("_" if part in ("", ".", "..") else part for part in text.split("/"))


def _git_commit() -> str | None:
    folder = Path(pistoseg.__file__).parent.parent
    if not (folder / ".git").exists():
        return None
    try:
        call = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=False)
    except OSError:  # no git here
        return None
    return call.stdout.strip() or None
