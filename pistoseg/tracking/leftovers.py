"""What earlier processes of a workspace could not tell MLflow, sent by a later one; and their runs, which it ends."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from contextlib import suppress

from pistoseg import storage
from pistoseg.errors import PistoSegError
from pistoseg.liveness import is_alive
from pistoseg.redaction import first_line, redact
from pistoseg.tracking import messages
from pistoseg.tracking.delivery import Delivery, UnsentError, quoted, unsent
from pistoseg.tracking.messages import Message
from pistoseg.tracking.turn import turn

PROCESS_TAG, LIFE_TAG, WORKSPACE_TAG = (f"pistoseg.{name}" for name in ("process", "alive", "workspace"))
"""Of a run: the process that keeps it, when that last said so (seconds since 1970), and where."""
MOST_RUNS = 1000
"""Runs that are looked at for killed processes, at a time."""

_dice = random.SystemRandom()
"""Not the generator that a run may have seeded."""
_sending = threading.Lock()
"""Held while others' messages are sent: two outboxes of this process would make a run twice."""


class Leftovers:
    """Sends what other outboxes of a workspace left.

    Args:
        delivery: to the server.
        workspace: URI of the folder that messages are kept in.
        own: URI of the outbox's own folder, which is left alone.
        answers: says whether the server is there, asked after something failed.
    """

    def __init__(self, delivery: Delivery, workspace: str, own: str, answers: Callable[[], bool]) -> None:
        self.delivery, self.workspace, self.own, self._answers = delivery, workspace, own, answers
        self._server = str(delivery.client.tracking_uri)
        self._untaken: Exception | None = None
        self._stuck: set[str] = set()
        self._makes: dict[str, str | None] = {}

    def send(self) -> bool:
        """Send what there is, in the order of its runs; False when the server is away.

        What fails for another reason stays, and keeps nothing else from being sent; but after an upload that fails
        the others wait for the next call, as each may take minutes to fail. Chance decides which are tried first, or
        one that always fails would keep the same ones back in all runs.
        """
        with _sending:
            self._untaken = None
            try:
                folders = storage.list_dir(storage.join(self.workspace, messages.FOLDER))
            except Exception:  # the workspace is away, which the server need not be; the next run tries again
                return True
            folders = [folder for folder in folders if folder != self.own]
            _dice.shuffle(folders)
            sent = True
            while sent:  # what was sent may have been what others waited for
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

    def end_dead_runs(self) -> None:
        """Runs of the workspace that MLflow believes to go on, and whose process is no more, were killed."""
        client = self.delivery.client
        asked = f"attributes.status = 'RUNNING' and tags.`{WORKSPACE_TAG}` = {quoted(redact(self.workspace))}"
        for run in client.search_runs(self.delivery.experiments(), asked, max_results=MOST_RUNS):
            tags = run.data.tags
            if PROCESS_TAG in tags and not is_alive(tags[PROCESS_TAG], float(tags.get(LIFE_TAG, 0))):
                client.set_terminated(run.info.run_id, "KILLED")

    def _send_folder(self, folder: str) -> bool:
        """Send what an outbox left, unless its process lives or spoke with another server; whether all is sent.

        Nothing is sent that another process is sending.
        """
        if not messages.may_send(folder, self._server):
            return False
        with turn(folder) as go_on:
            return go_on is not None and self._send_messages(folder, go_on)

    def _send_messages(self, folder: str, go_on: Callable[[], None]) -> bool:
        kept, uploads = list(messages.uris(folder)), []
        for uri in kept:
            go_on()
            message = messages.read(folder, uri, whole=False)  # only uploads have data
            if message is None:
                continue
            if message.call in messages.UPLOADS:
                uploads.append(uri)
            elif not self._deliver(folder, message):
                return False
        _dice.shuffle(uploads)
        for uri in uploads:
            if self._untaken is not None:
                raise self._untaken
            go_on()
            message = messages.read(folder, uri)
            try:
                if message is not None and not self._deliver(folder, message):
                    return False
            except Exception as error:
                self._untaken = error
                raise
        with suppress(OSError, PistoSegError):  # all is sent; what is left takes room
            storage.remove_tree(folder)
        if kept:  # else another process has just sent them
            print(f"MLflow got {len(kept)} messages that an earlier run could not send")
        return True

    def _deliver(self, folder: str, message: Message) -> bool:
        """Send a message and forget it; False where an outbox can still make its run."""
        try:
            self.delivery.deliver_kept(message)
        except UnsentError as error:
            if self._may_come(error.run_id):
                return False
            self.delivery.leave_out(error.run_id)
            what = f"MLflow has no run for {message.call}"
            print(f"{what}, which is left out with all of it: {error.run_id} is gone")
        messages.remove(folder, message.number)
        return True

    def _say_stuck(self, folder: str, error: Exception) -> None:
        if folder not in self._stuck:
            self._stuck.add(folder)
            print(f"what an earlier run kept in {redact(folder)} can't be sent to MLflow now: {first_line(error)}")

    def _may_come(self, run_id: str) -> bool:
        """Whether an outbox can still make a run; the server is asked last, as that may happen meanwhile."""
        return run_id in unsent or self._is_kept(run_id) or self.delivery.find(run_id) is not None

    def _is_kept(self, run_id: str) -> bool:
        for folder in storage.list_dir(storage.join(self.workspace, messages.FOLDER)):
            for uri in messages.uris(folder):
                if uri not in self._makes:  # each is read once; none ever changes
                    message = messages.read(folder, uri, whole=False)
                    self._makes[uri] = message.makes if message else None
                if self._makes[uri] == run_id:
                    return True
        return False
