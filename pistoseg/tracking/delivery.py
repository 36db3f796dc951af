"""Calls to MLflow, made now or again, with the ids of runs that the server got to know meanwhile put in."""

from __future__ import annotations

import errno
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from pistoseg import object_store, storage
from pistoseg.redaction import first_line
from pistoseg.tracking.messages import RUN_TAG, Message

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

UNSENT = "unsent-"
"""Begins what stands for the id of a run, or of an experiment, that the server does not know yet."""
MOST_PARAMS = 100
"""As many parameters a server takes in one call."""
REFUSED_FILES = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR)
"""What a folder says that takes no file, in contrast to one that is full.

A mount that is away may say the same: what is logged meanwhile is lost.
"""
PASSING_STATUS = (401, 403, 407, 408, 425, 429)
"""HTTP's answers that another try may not get, of those that blame a request.

Whom a server keeps out meets that with all calls, which wait until it is mended.
"""

Register = Callable[..., Any]
unsent: set[str] = set()
"""Runs that outboxes of this process have still to make, also where the workspace could not be written."""


class UnsentError(Exception):
    """A message belongs to a run that the server does not know: another outbox, as of a parent, has to send that."""

    def __init__(self, run_id: str) -> None:
        super().__init__(f"{run_id} is still to be sent")
        self.run_id = run_id


class GoneError(LookupError):
    """A message belongs to a run that the server refused or that nobody can send any more."""


class NoFilesError(Exception):
    """The place that the server keeps files in takes none, or not those of a model."""


class Delivery:
    """Makes calls on a server.

    Args:
        client: of the server.
        register: called with the client and the arguments of a `register`.
    """

    def __init__(self, client: MlflowClient, register: Register | None = None) -> None:
        self.client, self._register = client, register
        self._ids: dict[str, str] = {}
        self._gone: set[str] = set()
        self._said_files = False

    def deliver(self, call: str, arguments: Mapping[str, Any], data: bytes | None = None, again: bool = False) -> Any:
        """Make a call of `messages.CALLS`.

        Args:
            call: its name.
            arguments: by name.
            data: bytes of a file to log.
            again: it may have been made before.
        Returns:
            What the client returns; of a new run its id; of a model None where the server has no place for its files.
        Raises:
            UnsentError: its run is still to be sent by another outbox.
            GoneError: its run never comes.
            Exception: any that MLflow's back ends and file stores raise; `is_refusal` tells whether they ever take it.
        """
        named = dict(arguments)
        if call == "create_run":
            return self._create(named, again)
        if "run_id" in named:
            named["run_id"] = self.run_id(named["run_id"])
        if call == "register":
            return self._register_model(named)
        if call == "log_batch":
            return self._log_params(named["run_id"], named["params"])
        if call == "log_artifact":
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / storage.name(named["name"])
                file.write_bytes(data or b"")
                return self._log_file(named["run_id"], file)
        return getattr(self.client, call)(**named)

    def deliver_kept(self, message: Message) -> None:
        """Send a message that was kept, or raise when it has to wait. One that the server refuses is left out."""
        try:
            self.deliver(message.call, message.arguments, message.data, again=True)
        except Exception as error:
            deleted = message.call == "register" and isinstance(error, FileNotFoundError)  # its bundle, since
            if not is_refusal(error) and not deleted:
                raise
            if not isinstance(error, GoneError):  # that was said of the run
                print(f"MLflow refuses {message.call}, which is left out: {first_line(error)}")
            if message.makes:
                self.leave_out(message.makes)

    def leave_out(self, run_id: str) -> None:
        """Refuse from now on what belongs to a run that MLflow will never have."""
        unsent.discard(run_id)
        self._gone.add(run_id)

    def run_id(self, run_id: str) -> str:
        """The server's id of a run; `UnsentError` where it does not know that yet, `GoneError` if it never will."""
        if not run_id.startswith(UNSENT):
            return run_id
        if run_id in self._gone:
            raise GoneError(f"{run_id} is gone")
        if run_id not in self._ids:
            found = self.find(run_id)
            if found is None:
                raise UnsentError(run_id)
            self._ids[run_id] = found
        return self._ids[run_id]

    def find(self, placeholder: str, experiment: str | None = None) -> str | None:
        """The server's id of a run by what stood for it; None where it has no such run.

        Args:
            placeholder: what stands for the id.
            experiment: id of its experiment; None: any.
        """
        places = [experiment] if experiment else self.experiments()
        runs = self.client.search_runs(places, f"tags.`{RUN_TAG}` = '{placeholder}'", max_results=1)
        return str(runs[0].info.run_id) if runs else None

    def experiments(self) -> list[str]:
        """Ids of the server's experiments."""
        return [item.experiment_id for item in found_by(self.client.search_experiments)]

    def experiment(self, experiment_id: str) -> str:
        """The server's id of an experiment, which is made if it is not there; see `unknown_experiment`."""
        if not experiment_id.startswith(UNSENT):
            return experiment_id
        wanted = json.loads(experiment_id.removeprefix(UNSENT))
        name, place = wanted["name"], wanted["place"]
        if wanted.get("own"):
            name = own_experiment(self.client, name, place)
        found = self.client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        try:
            made = str(self.client.create_experiment(name, artifact_location=place))
        except Exception as error:
            found = self.client.get_experiment_by_name(name) if is_refusal(error) else None
            if found is None:
                raise
            return str(found.experiment_id)  # another process has just made it
        if name != wanted["name"]:
            print(f"the workspace was moved or copied: its runs are in the experiment {name!r} of MLflow from now on")
        return made

    def _create(self, named: dict[str, Any], again: bool) -> str:
        placeholder, parent = named["tags"][RUN_TAG], named["tags"].get("mlflow.parentRunId")
        if parent:
            named["tags"] = {**named["tags"], "mlflow.parentRunId": self.run_id(parent)}
        named["experiment_id"] = self.experiment(named["experiment_id"])
        found = self.find(placeholder, named["experiment_id"]) if again else None
        run_id = found or str(self.client.create_run(**named).info.run_id)
        self._ids[placeholder] = run_id
        unsent.discard(placeholder)
        return run_id

    def _log_file(self, run_id: str, file: Path) -> None:
        """Log a file, or leave it out where the place that the server keeps files in does not take it."""
        try:
            self.client.log_artifact(run_id, str(file))
        except Exception as error:  # every storage has errors of its own
            if not takes_no_files(error):
                raise
            if not self._said_files:
                self._said_files = True
                print(f"MLflow's files can't be written and are left out for good: {first_line(error)}")

    def _register_model(self, named: dict[str, Any]) -> Any:
        """Register a model, or leave it out as a file; the rest of its run is not to wait for a place of files."""
        assert self._register is not None
        try:
            return self._register(self.client, **named)
        except NoFilesError as error:
            print(f"MLflow's files can't be written and the model is not registered: {error}")
            return None

    def _log_params(self, run_id: str, params: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        entities = [Param(key, value) for key, value in params.items()]
        for start in range(0, len(entities), MOST_PARAMS):
            self.client.log_batch(run_id, params=entities[start : start + MOST_PARAMS])


def takes_no_files(error: Exception) -> bool:
    """Whether no further try can log a file, in contrast to a place of files that is full or away.

    A folder that takes none; a server that does not take this one, as it is too large for the proxy before it; object
    storage that this machine has no rights, keys or client for.
    """
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return 400 <= status < 500 and status not in PASSING_STATUS
    of_folder = isinstance(error, OSError) and error.errno in REFUSED_FILES
    return of_folder or isinstance(error, ImportError) or object_store.keeps_out(error)


def unknown_experiment(name: str, place: str | None, own: bool = False) -> str:
    """What stands for an experiment's id until it is made.

    Args:
        name: of the experiment.
        place: URI of its files; None: the server's choice.
        own: it is that of `own_experiment`.
    """
    return UNSENT + json.dumps({"name": name, "place": place} | ({"own": True} if own else {}))


def own_experiment(client: MlflowClient, name: str, place: str) -> str:
    """Name of a workspace's experiment in its own database.

    MLflow never changes where an experiment's files are: one that came with a workspace which was moved or copied keeps
    writing to the old place.

    Args:
        client: of the database.
        name: of the experiment where the workspace was made.
        place: URI of the workspace's folder of files.
    """
    found = client.get_experiment_by_name(name)
    if found is None or urlsplit(found.artifact_location).scheme != "file":
        return name
    old, new = (Path(url2pathname(urlsplit(uri).path)) for uri in (found.artifact_location, place))
    if old == new or old.name != new.name:  # which a user has chosen
        return name
    try:
        same = old.parent.samefile(new.parent)
    except OSError:  # the old place is no more
        same = False
    return name if same else f"{name} in {new.parent}"


def found_by(search: Callable[..., Any], **named: Any) -> Iterator[Any]:
    """All that one of a client's searches finds, page by page."""
    token = None
    while True:
        page = search(**named, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def quoted(text: str) -> str:
    """A text as a search takes it, in quotes; MLflow has no way to write both kinds in one, and finds nothing then."""
    if "'" in text and '"' not in text:
        return f'"{text}"'
    escaped = text.replace("'", "\\'")  # so that the search can be read
    return f"'{escaped}'"


def is_refusal(error: Exception) -> bool:
    """Whether a server answered and will never take this, in contrast to one that is away."""
    from mlflow.exceptions import MlflowException

    refusals = ("INVALID_PARAMETER_VALUE", "RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST", "BAD_REQUEST")
    answered = isinstance(error, MlflowException) and error.error_code in (*refusals, "INVALID_STATE", "NOT_FOUND")
    return answered or isinstance(error, (LookupError, TypeError, AssertionError))
