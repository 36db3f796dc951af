"""What MLflow is told, kept in the workspace while it can't be reached and sent when it can.

An `Outbox` stands in for an `MlflowClient`. A call that the server does not answer is written to
`<workspace>/mlflow-unsent/<outbox>/` and everything after it too, in order, so that no run waits for MLflow or ends
with it. Once a minute the outbox tries again; what is left at the end of a run is sent by the workspace's next run.
A file or a model that a server which answers does not take is tried again as well, and keeps nothing back but other
files and models, of which each may take minutes to fail: one is tried in a pass, another one in the next.
What belongs to a run that another outbox has still to send waits for it; what belongs to one that MLflow refused, or
that no outbox keeps any more, is left out.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from pistoseg import storage
from pistoseg.errors import PistoSegError
from pistoseg.liveness import process
from pistoseg.redaction import first_line, redact
from pistoseg.tracking import messages
from pistoseg.tracking.delivery import (
    UNSENT,
    Delivery,
    Register,
    UnsentError,
    is_refusal,
    unknown_experiment,
    unsent,
)
from pistoseg.tracking.leftovers import LIFE_TAG, PROCESS_TAG, WORKSPACE_TAG, Leftovers
from pistoseg.tracking.messages import Message

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

RETRY_S = 60.0
"""Between two tries, and between two signs of life of a run."""


class Outbox:
    """An MLflow client whose writing calls never fail for want of a server.

    Other calls go to the client itself.

    Args:
        client: of the server.
        workspace: URI of the folder that messages are kept in.
        register: called with the client and the arguments of a kept `register`.
    """

    def __init__(self, client: MlflowClient, workspace: str, register: Register | None = None) -> None:
        self._client = client
        self._workspace = workspace
        self._folder = self._new_folder()
        self._delivery = Delivery(client, register)
        self._leftovers = Leftovers(self._delivery, workspace, self._folder, self._answers)
        self._lock = threading.Lock()
        self._queue: deque[Message] = deque()
        self._numbers = 0
        self._alive: set[str] = set()
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
            "tags": {**own, **(tags or {}), messages.RUN_TAG: placeholder},
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
            known = self._delivery.run_id(run_id)
            keys = self._client.get_run(known).data.metrics
            return {(key, item.step) for key in keys for item in self._client.get_metric_history(known, key)}
        except Exception as error:  # as in `_say`
            if not is_refusal(error):
                self._went_away(error)
            return set()

    def experiment_of(self, run_id: str) -> str | None:
        """The server's id of a run's experiment; None where it can't be asked, or has no such run."""
        if self.away:
            return None
        try:
            return str(self._client.get_run(self._delivery.run_id(run_id)).info.experiment_id)
        except Exception as error:  # as in `_say`
            if not is_refusal(error):
                self._went_away(error)
            return None

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

    def experiment(self, name: str, place: str | None, own: bool = False) -> str:
        """Id of an experiment, which is made if it is not there; what stands for it while there is no server.

        Args:
            name: of the experiment.
            place: URI of its files; None: the server's choice.
            own: it is that of `delivery.own_experiment`.
        """
        unknown = unknown_experiment(name, place, own)
        if self.away:
            return unknown
        try:
            return self._delivery.experiment(unknown)
        except Exception as error:
            if is_refusal(error):
                raise
            self._went_away(error)
            return unknown

    def close(self) -> None:
        """Try once more to send what is kept, and what outboxes keep that were closed before."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._send_kept()
        if not self._queue:
            self._leftovers.send()  # parts of the runs that were just sent may have waited for them
            return
        with suppress(OSError, PistoSegError):  # the workspace is away: it is another's once this process ends
            self._write_owner("")
        why = "is still away, lacks a run or does not take a file"
        print(f"MLflow {why}: what is kept in {redact(self._folder)} is sent by another run in this workspace")

    def send_left(self) -> None:
        """Send what earlier runs in the workspace could not, and end the runs of processes that are no more."""
        if not self._leftovers.send():
            return
        try:
            self._leftovers.end_dead_runs()
        except Exception as error:  # the server or the workspace is away: the next run tries again
            if not is_refusal(error):
                self._went_away(error)

    def _new_folder(self) -> str:
        return storage.join(self._workspace, messages.FOLDER, uuid.uuid4().hex)

    def _say(self, call: str, arguments: dict[str, Any], data: bytes | None = None) -> Any:
        is_upload = call in messages.UPLOADS
        if not self.away and not (is_upload and self._queue):  # what waits there are uploads, one of which failed
            try:
                return self._delivery.deliver(call, arguments, data)
            except Exception as error:  # of any of MLflow's back ends and file stores
                if is_refusal(error):
                    raise
                if is_upload and not isinstance(error, UnsentError) and self._answers():
                    what = f"MLflow does not take {arguments['name']} now"
                    print(f"{what}, the run goes on; uploads are tried again: {first_line(error)}")
                else:
                    self._went_away(error)
        with self._lock:
            self._numbers += 1
            message = Message(self._numbers, call, arguments, data)
            self._queue.append(message)
            if message.makes:
                unsent.add(message.makes)
            self._keep()
            if not is_upload:
                self.away = True  # it may have come back just now; the order counts
        return None

    def _went_away(self, error: Exception) -> None:
        if not self.away:
            self.away = True
            what = "lacks an earlier run" if isinstance(error, UnsentError) else "can't be reached"
            print(f"MLflow {what}, the run goes on; what it misses is sent later: {first_line(error)}")

    def _answers(self) -> bool:
        try:
            self._client.search_experiments(max_results=1)
        except Exception as error:
            self._went_away(error)
            return False
        return True

    def _keep(self) -> None:
        """Write the messages; where even that fails they stay in memory and are written with the next one."""
        try:
            if self._numbers == 1 or not storage.exists(storage.join(self._folder, messages.OWNER)):
                self._write_owner(process())
            for waiting in self._queue:
                if not waiting.written:
                    messages.write(self._folder, waiting)
        except Exception as error:  # MLflow's messages must not end a run when the disk is full or the bucket away
            print(f"what MLflow misses can't be written now: {first_line(error)}")

    def _write_owner(self, name: str) -> None:
        messages.write_owner(self._folder, name, str(self._client.tracking_uri))

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
                with suppress(OSError, PistoSegError):  # the workspace is away, for those who would look, too
                    self._write_owner(process())
            if self._send_kept():
                self._say_alive()

    def _say_alive(self) -> None:
        with self._lock:
            alive = list(self._alive)
        for run_id in alive:
            try:
                self._delivery.deliver("set_tag", {"run_id": run_id, "key": LIFE_TAG, "value": str(int(time.time()))})
            except Exception as error:  # said when the run has something to say
                if not is_refusal(error):  # else only of this run, as of one that a user deleted
                    return

    def _send_kept(self) -> bool:
        """Send what other outboxes left, then this one's messages in order, until one has to wait that is no upload.

        After an upload that fails the others are held, and it goes behind them: the next pass begins with another one.

        Returns:
            Whether the server is there and has got the last one.
        """
        if not self._queue:
            return not self.away
        if not self._leftovers.send():
            return False
        sent, held, fails, done = 0, 0, False, None  # uploads that are held are the first of the queue
        while True:
            if self._stop.is_set() and threading.current_thread() is self._thread:
                return False  # `close` sends the rest
            with self._lock:
                if held == len(self._queue):
                    was_away, self.away = self.away, False
                    if not held:  # what is kept from now on is not to be deleted with the old folder
                        done, self._folder = self._folder, self._new_folder()
                        self._leftovers.own = self._folder
                    break
                message = self._queue[held]
            is_upload = message.call in messages.UPLOADS
            if fails and is_upload:
                held += 1
                continue
            try:
                self._delivery.deliver_kept(message)
            except Exception as error:  # the next try says so, if it has to
                if not is_upload or isinstance(error, UnsentError) or not self._answers():
                    return False
                fails = True
                with self._lock:
                    del self._queue[held]
                    self._queue.append(message)
                continue
            with self._lock:
                del self._queue[held]
            messages.remove(self._folder, message.number)
            sent += 1
        if done:
            with suppress(OSError, PistoSegError):  # what is left is nothing but the owner's name
                storage.remove_tree(done)
        if sent:
            print(f"MLflow {'is back' if was_away else 'takes files again'}: {sent} messages sent")
        return True


def _now() -> int:
    return int(time.time() * 1000)
