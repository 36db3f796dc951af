"""How Tune gets its trials: points from TPE, at random or from a grid, and ASHA; both know what earlier runs found.

Ray's `OptunaSearch` takes no evaluated points for spaces with conditions, and tells Optuna a stopped trial's last value
as if it were its result; this searcher asks and tells Optuna itself.
"""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import Searcher

from pistoseg.search.journal import Journal, TrialRecord
from pistoseg.search.spaces import Parameter, Point, Space, grid_points

if TYPE_CHECKING:
    import optuna

Algorithm = Literal["tpe", "random", "grid"]
GRID_LEVELS = 3
TRIES = 20
"""Points of an algorithm that may be known before random ones are looked at."""
DRAWS = 1000
"""Random points that may be known before a space counts as used up."""


class PointSearcher(Searcher):
    """Gives Tune trials cut off by a crash, then new points; no setting twice.

    Args:
        space: where points are.
        journal: of the search; receives the new trials.
        algorithm: tpe, random or grid.
        seed: of the drawing.
        trials: most trials in all, with those of earlier runs; None: no limit.
        own: the config's own setting as a point, None where it is none of the space.
        timed: whether the trials' time is a second objective.
        say: told when the space is used up.
    """

    def __init__(
        self,
        space: Space,
        journal: Journal,
        algorithm: Algorithm,
        seed: int,
        trials: int | None,
        own: Point | None,
        timed: bool = False,
        say: Callable[[str], None] = print,
    ) -> None:
        super().__init__(metric="objective", mode="max")
        self.space, self.journal, self.trials, self.own = space, journal, trials, own
        self.algorithm, self.seed, self.timed, self.say = algorithm, seed, timed, say
        self._waiting = journal.cut_off()
        self._grid = grid_points(space, GRID_LEVELS, trials, seed) if algorithm == "grid" else []
        self._study = _study(space, journal, seed, trials, timed) if algorithm == "tpe" else None
        self._running: dict[str, tuple[TrialRecord, optuna.Trial | None]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its searcher into a state that nobody reads."""
        return {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """The next trial's number and settings, or that there is none."""
        found = self._next()
        if found is None:
            return str(Searcher.FINISHED)
        self._running[trial_id] = found
        record = found[0]
        return {"number": record.number, "overrides": json.dumps(record.overrides)}

    def _next(self) -> tuple[TrialRecord, optuna.Trial | None] | None:
        if self._waiting:
            record = self._waiting.pop(0)
            return record, self._asked_for(record.point)
        if self.trials is not None and len(self.journal.records) >= self.trials:
            return None
        if 0 not in self.journal.records:
            return self.journal.start(self.own, {}), self._asked_for(self.own)
        known = {self._settings(item) for item in self.journal.records.values()}
        for attempt in range(TRIES + len(self._grid)):  # of a grid that is gone on with, all points may be known
            point, asked = self._draw(len(self.journal.records), attempt)
            if point is None:
                return None
            overrides = self.space.overrides(point)
            if json.dumps(overrides, sort_keys=True) not in known:
                return self.journal.start(point, overrides), asked
            if asked is not None and self._study is not None:
                self._study.tell(asked, state=_states().FAIL)
        return self._at_random(known)

    def _at_random(self, known: set[str]) -> tuple[TrialRecord, optuna.Trial | None] | None:
        """A new point where the algorithm finds none, as a sampler that has settled on some options; None without."""
        number = len(self.journal.records)
        for attempt in range(TRIES, TRIES + DRAWS):
            point = self.space.draw(random.Random(f"{self.seed}/{number}/{attempt}"))
            overrides = self.space.overrides(point)
            if json.dumps(overrides, sort_keys=True) not in known:
                return self.journal.start(point, overrides), self._asked_for(point)
        self.say(f"the space is used up: {DRAWS} random points of it are known, no new trials")
        return None

    def _settings(self, record: TrialRecord) -> str:
        overrides = self.space.overrides(record.point) if record.point is not None else record.overrides
        return json.dumps(overrides, sort_keys=True)

    def _draw(self, number: int, attempt: int) -> tuple[Point | None, optuna.Trial | None]:
        if self.algorithm == "grid":
            return (self._grid.pop(0), None) if self._grid else (None, None)
        if self._study is None:
            return self.space.draw(random.Random(f"{self.seed}/{number}/{attempt}")), None
        asked = self._study.ask()
        return suggest(self.space, asked), asked

    def _asked_for(self, point: Point | None) -> optuna.Trial | None:
        """Optuna's trial at a given point."""
        if self._study is None or point is None:
            return None
        self._study.enqueue_trial(encode(self.space, point))
        asked = self._study.ask()
        suggest(self.space, asked)
        return asked

    def on_trial_result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        """An epoch was reported."""
        asked = self._running[trial_id][1]
        if asked is not None and not self.timed and "objective" in result and not result.get("finished"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a resumed trial repeats epochs
                asked.report(result["objective"], int(result["epoch"]))

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        """A trial finished, failed or was stopped."""
        asked = self._running.pop(trial_id)[1]
        if asked is None or self._study is None:
            return
        result = result or {}
        if result.get("finished"):
            values = [result["objective"], result["seconds"]] if self.timed else result["objective"]
            self._study.tell(asked, values)
        else:
            failed = error or "problem" in result
            self._study.tell(asked, state=_states().FAIL if failed else _states().PRUNED)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the journal has it all."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the journal has it all."""


def suggest(space: Space, trial: optuna.Trial) -> Point:
    """A point from Optuna, condition by condition."""
    point: Point = {}
    for item in space.parameters:
        if item.active(point):
            name, (kind, *ends) = item.name, _form(item)
            if kind == "choice":
                point[name] = trial.suggest_categorical(name, list(item.options))
            elif kind == "index":
                point[name] = list(item.options)[trial.suggest_int(name, 0, len(item.options) - 1)]
            elif kind == "share":
                point[name] = item.at(trial.suggest_float(name, 0.0, 1.0), point)
            elif kind == "int":
                point[name] = trial.suggest_int(name, int(ends[0]), int(ends[1]), log=item.log)
            else:
                value = trial.suggest_float(name, ends[0], ends[1], log=item.log)
                point[name] = item.at(_share(item, value, point), point)
    return point


def encode(space: Space, point: Mapping[str, Any]) -> dict[str, Any]:
    """A point as Optuna holds it: what `suggest` would have drawn."""
    drawn = {}
    for item in space.parameters:
        if item.name in point:
            value, kind = point[item.name], _form(item)[0]
            if kind == "index":
                value = list(item.options).index(value)
            elif kind == "share":
                value = _share(item, value, point)
            drawn[item.name] = value
    return drawn


def distributions(space: Space, point: Mapping[str, Any], natural: bool = False) -> dict[str, Any]:
    """Optuna's distributions of a point's parameters.

    Args:
        space: of the point.
        point: whose parameters count.
        natural: with the ranges that users know, for reports; else as `suggest` draws.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    found: dict[str, Any] = {}
    for item in space.parameters:
        if item.name not in point:
            continue
        kind, *ends = _form(item)
        if kind == "choice" or (natural and item.options and not all(isinstance(o, int) for o in item.options)):
            found[item.name] = CategoricalDistribution(list(item.options))
        elif kind == "index":
            low, high = (min(item.options), max(item.options)) if natural else (0, len(item.options) - 1)
            found[item.name] = IntDistribution(low, high)
        elif kind == "share" and not natural:
            found[item.name] = FloatDistribution(0.0, 1.0)
        elif kind == "int":
            found[item.name] = IntDistribution(int(ends[0]), int(ends[1]), log=item.log)
        else:
            found[item.name] = FloatDistribution(float(item.low or 0.0), float(item.high or 0.0), log=item.log)
    return found


def _form(item: Parameter) -> tuple[Any, ...]:
    if item.options:
        return ("index",) if item.ordered else ("choice",)
    if item.above:
        return ("share",)
    return ("int" if item.integer else "float", item.low, item.high)


def _share(item: Parameter, value: float, point: Mapping[str, Any]) -> float:
    """Where in its range a value is; the inverse of `Parameter.at`."""
    import math

    low, high = item.room(point)
    if item.log:
        low, high, value = math.log(low), math.log(high), math.log(value)
    return min(max((value - low) / (high - low), 0.0), 1.0) if high > low else 0.0


def _states() -> Any:
    from optuna.trial import TrialState

    return TrialState


def _study(space: Space, journal: Journal, seed: int, trials: int | None, timed: bool) -> optuna.Study:
    """A study that knows the trials that ended; the sampler's draws are not those of an earlier run."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    ended = journal.ended()
    startup = max(4, min(10, (trials or 30) // 3))
    sampler = optuna.samplers.TPESampler(n_startup_trials=startup, seed=seed + 1000 * len(journal.records))
    kinds = optuna.study.StudyDirection
    directions = [kinds.MAXIMIZE, kinds.MINIMIZE] if timed else [kinds.MAXIMIZE]
    study = optuna.create_study(directions=directions, sampler=sampler)
    for record in ended:
        if record.point is not None and (frozen := frozen_trial(space, record, timed)) is not None:
            study.add_trial(frozen)
    return study


def frozen_trial(space: Space, record: TrialRecord, timed: bool = False, natural: bool = False) -> Any:
    """A trial that ended as Optuna keeps it; None where there is no more to know than that it failed."""
    from optuna.trial import create_trial

    point = record.point or {}
    values = None
    if record.state == "finished":
        assert record.value is not None
        values = [record.value, record.seconds or 0.0] if timed else [record.value]
    state = {"finished": "COMPLETE", "pruned": "PRUNED", "failed": "FAIL"}[record.state]
    return create_trial(
        state=_states()[state],
        values=values,
        params=dict(point) if natural else encode(space, point),
        distributions=distributions(space, point, natural),
        intermediate_values={} if timed else dict(record.curve),
    )


class Halving(ASHAScheduler):
    """ASHA that knows the curves of earlier runs, never stops the config's own setting, and says whom it stopped.

    Args:
        epochs: of a whole trial.
        grace: epochs before the first decision.
        factor: the best 1/factor of the trials goes on at each rung.
        past: trials of earlier runs.
        begun: trials that an earlier run began and this one goes on with.
    """

    def __init__(
        self, epochs: int, grace: int, factor: float, past: Sequence[TrialRecord], begun: Sequence[TrialRecord] = ()
    ) -> None:
        # Who has come to the last epoch is let finish: its score costs less than its training did.
        super().__init__(
            time_attr="epoch",
            metric="objective",
            mode="max",
            max_t=max(grace, epochs - 1),
            grace_period=grace,
            reduction_factor=factor,
            stop_last_trials=False,
        )
        self.stopped: set[str] = set()
        self._begun = {record.number: list(record.curve) for record in begun}
        for record in past:
            trial: Any = SimpleNamespace(trial_id=f"past {record.number}")
            self.on_trial_add(None, trial)
            for epoch, value in record.curve:
                super().on_trial_result(None, trial, {"epoch": epoch, "objective": value})
            self.on_trial_remove(None, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Whether a trial goes on."""
        # The rungs that it passed in an earlier run would take the value of a later epoch. At its last one it may have
        # been stopped, which that run had no time to note.
        decision = str(self.CONTINUE)
        for epoch, value in self._begun.pop(trial.config["number"], ()):
            if epoch < result.get("epoch", 0):
                past = {"epoch": epoch, "objective": value}
                decision = str(super().on_trial_result(tune_controller, trial, past))
        if decision != self.STOP:
            decision = str(super().on_trial_result(tune_controller, trial, result))
        if decision == self.STOP and (trial.config["number"] == 0 or result.get("finished")):
            return str(self.CONTINUE)
        if decision == self.STOP:
            self.stopped.add(trial.trial_id)
        return decision
