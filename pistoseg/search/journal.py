"""What a search has done so far, as JSON files beside its report: enough to go on after the driver was killed.

`search.json` says what is searched, `trials/<number>.json` what became of each trial. Nothing is pickled: a workspace
may lie where others can write.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from pistoseg import storage
from pistoseg.errors import PistoSegError

SEARCH = "search.json"
TRIALS = "trials"
State = Literal["running", "finished", "pruned", "failed"]


@dataclass
class TrialRecord:
    """A trial.

    Args:
        number: from 0, the config's own setting.
        point: value by active parameter; None for a setting that is no point of the space.
        overrides: what it sets, by `section.key`.
        state: `running` also of a trial that was cut off, which goes on in the next run.
        value: the objective, of a finished trial.
        seconds: of the stages that only a part of the trials share, as their artifacts say.
        scores: all scores of a finished trial.
        curve: (epoch, objective) in the order of reporting; epochs count from 1 over all networks that are compared.
        artifacts: fingerprints by stage.
        computed: stages that this trial computed; it reused the others.
        reason: why it failed.
        run_id: of its MLflow run.
    """

    number: int
    point: dict[str, Any] | None
    overrides: dict[str, Any]
    state: State = "running"
    value: float | None = None
    seconds: float | None = None
    scores: dict[str, float] = field(default_factory=dict)
    curve: list[tuple[int, float]] = field(default_factory=list)
    artifacts: dict[str, str] = field(default_factory=dict)
    computed: list[str] = field(default_factory=list)
    reason: str | None = None
    run_id: str | None = None

    @property
    def key(self) -> str:
        """Hash of its settings."""
        return digest(self.overrides)

    def report(self, epoch: int, value: float) -> None:
        """Add an epoch to the curve; one that is there is left alone (a resumed trial may repeat some)."""
        if all(epoch != known for known, _ in self.curve):
            self.curve.append((epoch, value))
            self.curve.sort()


def digest(value: Any) -> str:
    """16 hexadecimal digits of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


class Journal:
    """The records of one search.

    Args:
        folder: URI of the search's folder.
        check: called before each writing; raises when the folder has become another run's.
    """

    def __init__(self, folder: str, check: Callable[[], None] = lambda: None) -> None:
        self.folder, self.check = folder, check
        self.settings: dict[str, Any] = {}
        self.records: dict[int, TrialRecord] = {}

    @classmethod
    def open(cls, folder: str, settings: Mapping[str, Any], check: Callable[[], None] = lambda: None) -> Journal:
        """Start a journal, or go on with the one that is there.

        Args:
            folder: URI of the search's folder.
            settings: what is searched, as JSON; `identity` decides whether a journal is of the same search.
            check: as of the journal.
        Raises:
            PistoSegError: another search has that folder, or a file is damaged.
        """
        journal = cls(folder, check)
        found = cls.refuse_another(folder, settings)
        if found is not None:
            journal.settings = found
            for item in _trial_files(folder):
                record = _record(item)
                journal.records[record.number] = record
        else:
            journal.update(**settings)
        return journal

    @staticmethod
    def refuse_another(folder: str, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """The settings of the search that has a folder, None where there is none.

        Raises:
            PistoSegError: it is another search than that of `settings`, or the file is damaged or gone.
        """
        file = storage.join(folder, SEARCH)
        remedy = "give another --name, or delete the folder to begin anew"
        trials = _trial_files(folder)  # before a look at the file, which is written before them
        if not storage.exists(file):
            if trials:  # nobody knows of which search; this one's would overwrite them
                raise PistoSegError(f"holds trials of a search whose {SEARCH} is gone", file=folder, remedy=remedy)
            return None
        found = read_json(file, remedy)
        if found.get("identity") != settings["identity"]:
            raise PistoSegError(
                "holds a search of other settings, another space or another score",
                file=folder,
                remedy="give another --name",
            )
        return found

    def update(self, **values: Any) -> None:
        """Change some of `settings`."""
        self.check()
        self.settings |= values
        storage.write_bytes(storage.join(self.folder, SEARCH), json.dumps(self.settings, indent=1).encode())

    def save(self, record: TrialRecord) -> None:
        """Write one trial."""
        self.check()
        self.records[record.number] = record
        file = storage.join(self.folder, TRIALS, _file_name(record))
        storage.write_bytes(file, json.dumps(asdict(record), indent=1).encode())

    def start(self, point: dict[str, Any] | None, overrides: dict[str, Any]) -> TrialRecord:
        """A new trial with the lowest number that is free: also one whose damaged file was deleted."""
        number = next(number for number in itertools.count() if number not in self.records)
        record = TrialRecord(number, point, overrides)
        self.save(record)
        return record

    def ended(self) -> list[TrialRecord]:
        """Trials that are finished, pruned or failed, by number."""
        return [item for _, item in sorted(self.records.items()) if item.state != "running"]

    def cut_off(self) -> list[TrialRecord]:
        """Trials that were running when the search ended, by number."""
        return [item for _, item in sorted(self.records.items()) if item.state == "running"]

    def finished(self) -> list[TrialRecord]:
        """Trials with an objective, by number."""
        return [item for item in self.ended() if item.state == "finished" and item.value is not None]

    def best(self) -> TrialRecord | None:
        """The finished trial with the highest objective; the first of equals."""
        return max(self.finished(), key=lambda item: (item.value or 0.0, -item.number), default=None)

    def count(self, state: State) -> int:
        """Trials in a state."""
        return sum(item.state == state for item in self.records.values())


def _trial_files(folder: str) -> list[str]:
    """URIs of the trials of a search; without what a killed driver had half written, or a file manager left."""
    found = storage.list_dir(storage.join(folder, TRIALS))
    return [item for item in found if storage.name(item).endswith(".json") and not storage.name(item).startswith(".")]


def _file_name(record: TrialRecord) -> str:
    return f"{record.number:05d}.json"


def _record(uri: str) -> TrialRecord:
    remedy = "delete that file and run again"  # a trial with its number is run anew
    values = read_json(uri, remedy)
    try:
        record = TrialRecord(**values)
        if storage.name(uri) != _file_name(record):  # it would take another's place
            raise ValueError(f"is of trial {record.number}")
        record.curve = [(int(epoch), float(value)) for epoch, value in record.curve]
    except (TypeError, ValueError) as error:
        raise PistoSegError(f"is damaged: {error}", file=uri, remedy=remedy) from None
    return record


def read_json(uri: str, remedy: str) -> dict[str, Any]:
    """Keys and values of a JSON file; `PistoSegError` with the remedy where it is damaged."""
    content = storage.read_bytes(uri)
    try:
        value = json.loads(content)
        if not isinstance(value, dict):
            raise ValueError(f"holds {type(value).__name__} in place of keys and values")
    except ValueError as error:  # also of bytes that are no text
        raise PistoSegError(f"is damaged: {error}", file=uri, remedy=remedy) from None
    return value
