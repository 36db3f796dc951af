"""What MLflow is told, kept in the workspace while it can't be reached and sent when it can.

An `Outbox` stands in for an `MlflowClient`. A call that the server does not answer is written to
`<workspace>/mlflow-unsent/<outbox>/` and everything after it too, in order, so that no run waits for MLflow or ends
with it. Once a minute the outbox tries again; what is left at the end of a run is sent by the workspace's next run.
What belongs to a run that another outbox has still to send waits for it; what belongs to one that MLflow refused, or
that no outbox keeps any more, is left out.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from pistoseg import storage
from pistoseg.errors import UnavailableError
from pistoseg.liveness import is_alive, process
from pistoseg.redaction import redact
from pistoseg.tracking.turn import turn

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

FOLDER = "mlflow-unsent"
RETRY_S = 60.0
"""Between two tries, and between two signs of life of a run."""
UNSENT = "unsent-"
"""Begins the id of a run that the server does not know yet."""
RUN_TAG, PROCESS_TAG, LIFE_TAG, WORKSPACE_TAG = (
    f"pistoseg.{name}" for name in ("run", "process", "alive", "workspace")
)
CALLS = (
    *("create_run", "update_run", "log_batch", "log_metric", "log_param", "set_tag", "log_artifact"),
    *("set_terminated", "register"),
)
"""What is read from an outbox is nothing but arguments of these."""

Register = Callable[..., Any]
_sending = threading.Lock()
"""Held while others' messages are sent: two outboxes of this process would make a run twice."""
_unsent: set[str] = set()
"""Runs that outboxes of this process have still to make, also where the workspace could not be written."""


@dataclass
class _Message:
    """A call that is kept; `data` are the bytes of a file to log."""

    number: int
    call: str
    arguments: dict[str, Any]
    data: bytes | None = None
    written: bool = False


class _UnsentError(Exception):
    """A message belongs to a run that the server does not know: another outbox, as of a parent, has to send that."""

    def __init__(self, run_id: str) -> None:
        super().__init__(f"{run_id} is still to be sent")
        self.run_id = run_id


class _GoneError(LookupError):
    """A message belongs to a run that the server refused or that nobody can send any more."""


class Outbox:
    """An MLflow client whose writing calls never fail for want of a server.

    Other calls go to the client itself.

    Args:
        client: of the server.
        workspace: URI of the folder that messages are kept in.
        register: called with the client and the arguments of a kept `register`.
    """

    def __init__(self, client: MlflowClient, workspace: str, register: Register | None = None) -> None:
        self._client, self._register = client, register
        self._workspace = workspace
        self._folder = storage.join(workspace, FOLDER, uuid.uuid4().hex)
        self._lock = threading.Lock()
        self._queue: deque[_Message] = deque()
        self._numbers = 0
        self._ids: dict[str, str] = {}
        self._alive: set[str] = set()
        self._stuck: set[str] = set()
        self._gone: set[str] = set()
        self._makes: dict[str, str | None] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.away = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def create_run(self, experiment_id: str, tags: Mapping[str, str] | None = None, run_name: str | None = None) -> Any:
        """Create a run that this process keeps alive; `.info.run_id` begins with `UNSENT` while there is no server."""
        placeholder = UNSENT + uuid.uuid4().hex
        own = {PROCESS_TAG: process(), LIFE_TAG: str(int(time.time())), WORKSPACE_TAG: redact(self._workspace)}
        arguments = {
            "experiment_id": experiment_id,
            "start_time": _now(),
            "tags": {**own, **(tags or {}), RUN_TAG: placeholder},
            "run_name": run_name,
        }
        run_id = self._say("create_run", arguments) or placeholder
        self._keep_alive(run_id)
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id))

    def log_params(self, run_id: str, values: Mapping[str, str]) -> None:
        """Log any number of parameters."""
        self._say("log_batch", {"run_id": run_id, "params": dict(values)})

    def log_param(self, run_id: str, key: str, value: Any) -> None:
        """Log one parameter."""
        self._say("log_param", {"run_id": run_id, "key": key, "value": str(value)})

    def log_metric(self, run_id: str, key: str, value: float, step: int = 0) -> None:
        """Log one value, with the time of this call."""
        self._say("log_metric", {"run_id": run_id, "key": key, "value": value, "timestamp": _now(), "step": step})

    def logged(self, run_id: str) -> set[tuple[str, int]]:
        """(metric, step) of all that the server has of a run; nothing while it can't be asked."""
        if self.away:
            return set()
        try:
            known = self._id(run_id)
            keys = self._client.get_run(known).data.metrics
            return {(key, item.step) for key in keys for item in self._client.get_metric_history(known, key)}
        except Exception as error:  # as in `_say`
            if not is_refusal(error):
                self._went_away(error)
            return set()

    def set_tag(self, run_id: str, key: str, value: str) -> None:
        """Set one tag."""
        self._say("set_tag", {"run_id": run_id, "key": key, "value": value})

    def log_artifact(self, run_id: str, local_path: str) -> None:
        """Log a file."""
        data = Path(local_path).read_bytes()
        self._say("log_artifact", {"run_id": run_id, "name": Path(local_path).name}, data)

    def set_terminated(self, run_id: str, status: str) -> None:
        """End a run, with the time of this call."""
        with self._lock:
            self._alive.discard(run_id)
        self._say("set_terminated", {"run_id": run_id, "status": status, "end_time": _now()})

    def update_run(self, run_id: str, status: str) -> None:
        """Go on with a run that is there, as a run of this process.

        Raises:
            MlflowException: it is not there.
        """
        self._say("update_run", {"run_id": run_id, "status": status})
        self._keep_alive(run_id)
        self.set_tag(run_id, PROCESS_TAG, process())

    def register(self, **arguments: Any) -> Any:
        """Register a model through `register`; what it returns, None while there is no server."""
        return self._say("register", arguments)

    def close(self) -> None:
        """Try once more to send what is kept, and what outboxes keep that were closed before."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._send_kept()
        if not self._queue:
            self._send_others()  # parts of the runs that were just sent may have waited for them
            return
        with suppress(OSError, UnavailableError):  # the workspace is away: it is another's once this process ends
            self._write_owner("")
        where = redact(self._folder)
        print(f"MLflow is still away or lacks a run: what is kept in {where} is sent by another run in this workspace")

    def send_left(self) -> None:
        """Send what earlier runs in the workspace could not, and end the runs of processes that are no more."""
        if not self._send_others():
            return
        try:
            self._end_dead_runs()
        except Exception as error:  # the server or the workspace is away: the next run tries again
            if not is_refusal(error):
                self._went_away(error)

    def _say(self, call: str, arguments: dict[str, Any], data: bytes | None = None) -> Any:
        if not self.away:
            try:
                return self._deliver(call, arguments, data)
            except Exception as error:  # of any of MLflow's back ends and file stores
                if is_refusal(error):
                    raise
                self._went_away(error)
        with self._lock:
            self._numbers += 1
            message = _Message(self._numbers, call, arguments, data)
            self._queue.append(message)
            if call == "create_run":
                _unsent.add(arguments["tags"][RUN_TAG])
            self._write(message)
            self.away = True  # it may have come back just now; the order counts
        return None

    def _went_away(self, error: Exception) -> None:
        if not self.away:
            self.away = True
            what = "lacks an earlier run" if isinstance(error, _UnsentError) else "can't be reached"
            print(f"MLflow {what}, the run goes on; what it misses is sent later: {first_line(error)}")

    def _write(self, message: _Message) -> None:
        """Keep a message; where even that fails it stays in memory and is written with the next one."""
        try:
            if self._numbers == 1 or not storage.exists(storage.join(self._folder, "owner.json")):
                self._write_owner(process())
            for waiting in self._queue:
                if not waiting.written:
                    _write(self._folder, waiting)
        except Exception as error:  # MLflow's messages must not end a run when the disk is full or the bucket away
            print(f"what MLflow misses can't be written now: {first_line(error)}")

    def _write_owner(self, name: str) -> None:
        """Say which process sends the messages while it lives; with an empty name any outbox may."""
        owner = {"process": name, "server": self._server(), "alive": int(time.time()) if name else 0}
        storage.write_bytes(storage.join(self._folder, "owner.json"), json.dumps(owner).encode())

    def _keep_alive(self, run_id: str) -> None:
        with self._lock:
            self._alive.add(run_id)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, daemon=True)
                self._thread.start()

    def _work(self) -> None:
        while not self._stop.wait(RETRY_S):
            with self._lock:
                is_written = any(message.written for message in self._queue)
            if is_written:
                with suppress(OSError, UnavailableError):  # the workspace is away, for those who would look, too
                    self._write_owner(process())
            self._send_kept()
            with self._lock:
                alive = [] if self.away else list(self._alive)
            for run_id in alive:
                try:
                    self._deliver("set_tag", {"run_id": run_id, "key": LIFE_TAG, "value": str(int(time.time()))})
                except Exception:  # said when the run has something to say
                    break

    def _send_kept(self) -> None:
        """Send what other outboxes left, then this one's messages in order, until one has to wait."""
        if not self._queue or not self._send_others():
            return
        sent = 0
        while True:
            with self._lock:
                if not self._queue:
                    if sent:
                        self.away = False
                    break
                message = self._queue[0]
            try:
                self._deliver_kept(message.call, message.arguments, message.data)
            except Exception:  # the next try says so, if it has to
                break
            with self._lock:
                self._queue.popleft()
            _remove(self._folder, message.number)
            sent += 1
        if sent and not self.away:
            storage.remove_tree(self._folder)
            print(f"MLflow is back: {sent} messages sent")

    def _send_others(self) -> bool:
        """Send what other outboxes left, in the order of their runs; False when the server is away.

        What fails for another reason stays, and keeps nothing else from being sent.
        """
        with _sending:
            try:
                folders = storage.list_dir(storage.join(self._workspace, FOLDER))
            except Exception:  # the workspace is away, which the server need not be; the next run tries again
                return True
            folders = [folder for folder in folders if folder != self._folder]
            sent = True
            while sent:
                sent = False
                for folder in list(folders):
                    try:
                        if not self._send_folder(folder):
                            continue
                        sent = True
                    except Exception as error:
                        if not self._answers():
                            return False
                        self._say_stuck(folder, error)
                    folders.remove(folder)
        return True

    def _answers(self) -> bool:
        """Whether the server is there, asked after something failed."""
        try:
            self._client.search_experiments(max_results=1)
        except Exception as error:
            self._went_away(error)
            return False
        return True

    def _say_stuck(self, folder: str, error: Exception) -> None:
        if folder not in self._stuck:
            self._stuck.add(folder)
            print(f"what an earlier run kept in {redact(folder)} can't be sent to MLflow now: {first_line(error)}")

    def _send_folder(self, folder: str) -> bool:
        """Send what an outbox left, unless its process lives or spoke with another server; whether all is sent.

        Nothing is sent that another process is sending.
        """
        try:
            owner = json.loads(storage.read_bytes(storage.join(folder, "owner.json")))
        except (OSError, ValueError):
            return False
        if owner.get("server") != self._server() or is_alive(owner.get("process", ""), float(owner.get("alive", 0))):
            return False
        with turn(folder) as go_on:
            return go_on is not None and self._send_messages(folder, go_on)

    def _send_messages(self, folder: str, go_on: Callable[[], None]) -> bool:
        messages = sorted(item for item in storage.list_dir(folder) if _is_message(item))
        for item in messages:
            go_on()
            number = int(storage.name(item).removesuffix(".json"))
            try:
                kept = json.loads(storage.read_bytes(item))
                data = storage.read_bytes(storage.join(folder, f"{number:06d}.data")) if kept["data"] else None
            except (FileNotFoundError, KeyError, ValueError):
                continue
            try:
                if kept["call"] in CALLS:
                    self._deliver_kept(kept["call"], kept["arguments"], data)
            except _UnsentError as error:
                if self._may_come(error.run_id):
                    return False
                self._leave_out(error.run_id)
                print(f"MLflow has no run for {kept['call']}, which is left out with all of it: {error.run_id} is gone")
            _remove(folder, number)
        storage.remove_tree(folder)
        if messages:  # else another process has just sent them
            print(f"MLflow got {len(messages)} messages that an earlier run could not send")
        return True

    def _deliver_kept(self, call: str, arguments: dict[str, Any], data: bytes | None) -> None:
        """Send a message that was kept, or raise when it has to wait. One that the server refuses is dropped."""
        try:
            self._deliver(call, arguments, data, again=True)
        except Exception as error:
            deleted = call == "register" and isinstance(error, FileNotFoundError)  # its bundle, since
            if not is_refusal(error) and not deleted:
                raise
            if not isinstance(error, _GoneError):  # that was said of the run
                print(f"MLflow refuses {call}, which is left out: {first_line(error)}")
            if call == "create_run":
                self._leave_out(arguments["tags"][RUN_TAG])

    def _leave_out(self, run_id: str) -> None:
        """Drop from now on what belongs to a run that MLflow will never have."""
        _unsent.discard(run_id)
        with self._lock:
            self._gone.add(run_id)
            self._alive.discard(run_id)

    def _may_come(self, run_id: str) -> bool:
        """Whether an outbox can still make a run; the server is asked last, as that may happen meanwhile."""
        return run_id in _unsent or self._is_kept(run_id) or self._find(run_id, None) is not None

    def _is_kept(self, run_id: str) -> bool:
        for folder in storage.list_dir(storage.join(self._workspace, FOLDER)):
            for item in filter(_is_message, storage.list_dir(folder)):
                if item not in self._makes:  # each is read once; none ever changes
                    try:
                        kept = json.loads(storage.read_bytes(item))
                        makes = kept["arguments"]["tags"][RUN_TAG] if kept["call"] == "create_run" else None
                    except (FileNotFoundError, KeyError, ValueError):  # just sent, or nothing that can be sent
                        continue
                    self._makes[item] = makes
                if self._makes[item] == run_id:
                    return True
        return False

    def _deliver(self, call: str, arguments: Mapping[str, Any], data: bytes | None = None, again: bool = False) -> Any:
        """Make a call now, maybe `again`; ids of runs that the server got to know since are put in."""
        named = dict(arguments)
        if call == "create_run":
            return self._create(named, again)
        if "run_id" in named:
            named["run_id"] = self._id(named["run_id"])
        if call == "register":
            assert self._register is not None
            return self._register(self._client, **named)
        if call == "log_batch":
            return self._log_params(named["run_id"], named["params"])
        if call == "log_artifact":
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / storage.name(named["name"])
                file.write_bytes(data or b"")
                return self._client.log_artifact(named["run_id"], str(file))
        return getattr(self._client, call)(**named)

    def _create(self, named: dict[str, Any], again: bool) -> str:
        placeholder, parent = named["tags"][RUN_TAG], named["tags"].get("mlflow.parentRunId")
        if parent:
            named["tags"] = {**named["tags"], "mlflow.parentRunId": self._id(parent)}
        named["experiment_id"] = self._experiment(named["experiment_id"])
        found = self._find(placeholder, named["experiment_id"]) if again else None
        run_id = found or str(self._client.create_run(**named).info.run_id)
        self._ids[placeholder] = run_id
        _unsent.discard(placeholder)
        with self._lock:
            if placeholder in self._alive:
                self._alive = (self._alive - {placeholder}) | {run_id}
        return run_id

    def _log_params(self, run_id: str, params: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        entities = [Param(key, value) for key, value in params.items()]
        for start in range(0, len(entities), 100):  # the most that a server takes
            self._client.log_batch(run_id, params=entities[start : start + 100])

    def _id(self, run_id: str) -> str:
        """The server's id of a run; `_UnsentError` where it does not know that yet, `_GoneError` if it never will."""
        if not run_id.startswith(UNSENT):
            return run_id
        if run_id in self._gone:
            raise _GoneError(f"{run_id} is gone")
        if run_id not in self._ids:
            found = self._find(run_id, None)
            if found is None:
                raise _UnsentError(run_id)
            self._ids[run_id] = found
        return self._ids[run_id]

    def _find(self, placeholder: str, experiment: str | None) -> str | None:
        places = [experiment] if experiment else [item.experiment_id for item in self._client.search_experiments()]
        runs = self._client.search_runs(places, f"tags.`{RUN_TAG}` = '{placeholder}'", max_results=1)
        return str(runs[0].info.run_id) if runs else None

    def experiment(self, name: str, place: str | None) -> str:
        """Id of an experiment, which is made if it is not there; what stands for it while there is no server.

        Args:
            name: of the experiment.
            place: URI of its files; None: the server's choice.
        """
        unknown = UNSENT + json.dumps({"name": name, "place": place})
        if self.away:
            return unknown
        try:
            return self._experiment(unknown)
        except Exception as error:
            if is_refusal(error):
                raise
            self._went_away(error)
            return unknown

    def _experiment(self, experiment_id: str) -> str:
        if not experiment_id.startswith(UNSENT):
            return experiment_id
        wanted = json.loads(experiment_id.removeprefix(UNSENT))
        found = self._client.get_experiment_by_name(wanted["name"])
        if found is not None:
            return str(found.experiment_id)
        return str(self._client.create_experiment(wanted["name"], artifact_location=wanted["place"]))

    def _end_dead_runs(self) -> None:
        """Runs of this workspace that MLflow believes to go on, and whose process is no more, were killed."""
        places = [item.experiment_id for item in self._client.search_experiments()]
        asked = f"attributes.status = 'RUNNING' and tags.`{WORKSPACE_TAG}` = '{_quoted(redact(self._workspace))}'"
        for run in self._client.search_runs(places, asked, max_results=1000):
            tags = run.data.tags
            if PROCESS_TAG in tags and not is_alive(tags[PROCESS_TAG], float(tags.get(LIFE_TAG, 0))):
                self._client.set_terminated(run.info.run_id, "KILLED")

    def _server(self) -> str:
        """Tells servers apart without their address, which may hold a password."""
        return hashlib.sha256(str(self._client.tracking_uri).encode()).hexdigest()[:16]


def is_refusal(error: Exception) -> bool:
    """Whether a server answered and will never take this, in contrast to one that is away."""
    from mlflow.exceptions import MlflowException

    refusals = ("INVALID_PARAMETER_VALUE", "RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST", "BAD_REQUEST")
    answered = isinstance(error, MlflowException) and error.error_code in (*refusals, "INVALID_STATE", "NOT_FOUND")
    return answered or isinstance(error, (LookupError, TypeError, AssertionError))


def first_line(error: Exception) -> str:
    """What an error says first, without the password that a server's address may hold."""
    return redact((str(error).splitlines() or [type(error).__name__])[0])


def _write(folder: str, message: _Message) -> None:
    if message.data is not None:
        storage.write_bytes(storage.join(folder, f"{message.number:06d}.data"), message.data)
    kept = {"call": message.call, "arguments": message.arguments, "data": message.data is not None}
    storage.write_bytes(storage.join(folder, f"{message.number:06d}.json"), json.dumps(kept).encode())
    message.written = True


def _remove(folder: str, number: int) -> None:
    for ending in ("json", "data"):
        # Never written, or the workspace is away: a message that is sent twice does no harm.
        with suppress(OSError, UnavailableError):
            storage.remove_file(storage.join(folder, f"{number:06d}.{ending}"))


def _is_message(uri: str) -> bool:
    name = storage.name(uri)
    return name.endswith(".json") and name.removesuffix(".json").isdigit()


def _quoted(text: str) -> str:
    return text.replace("'", "\\'")


def _now() -> int:
    return int(time.time() * 1000)
