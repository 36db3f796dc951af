"""Pictures of a search: its history, curves, slices, parallel coordinates, importance; drawn by Optuna."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from pistoseg.search.sampling import frozen_trial

if TYPE_CHECKING:
    import optuna

    from pistoseg.search.study import Outcome

LEAST = 4
"""Finished trials below which importance means nothing."""
DPI = 120


def draw(outcome: Outcome) -> dict[str, bytes]:
    """PNG files by name; none before two trials have finished."""
    study = _study(outcome)
    if sum(trial.state.name == "COMPLETE" for trial in study.trials) < 2:
        return {}
    import matplotlib

    matplotlib.use("Agg")
    from optuna.visualization import matplotlib as plots

    title = outcome.search.objective.title
    common = _common(study)
    drawn: dict[str, bytes] = {}
    with _quiet():
        drawn["history.png"] = _png(lambda: _whole(plots.plot_optimization_history(study, target_name=title)), title)
        if any(trial.intermediate_values for trial in study.trials):
            drawn["curves.png"] = _png(lambda: _by_epoch(plots.plot_intermediate_values(study), title), "by epoch")
        drawn["slices.png"] = _png(
            lambda: _legible(plots.plot_slice(study, params=sorted(_varied(study)), target_name=title))
        )
        if len(common) > 1:
            drawn["parallel.png"] = _png(
                lambda: _without_grids(plots.plot_parallel_coordinate(study, params=common, target_name=title))
            )
        if importance(outcome):
            drawn["importance.png"] = _png(
                lambda: plots.plot_param_importances(study, params=common, evaluator=_evaluator())
            )
    return drawn


def importance(outcome: Outcome) -> dict[str, float]:
    """Share of the objective's variance that each parameter explains, the largest first; empty where none is known."""
    study = _study(outcome)
    values = {trial.value for trial in study.trials if trial.state.name == "COMPLETE"}
    common = _common(study)
    if len(values) < LEAST or not common:
        return {}
    from optuna.importance import get_param_importances

    with _quiet():
        return dict(get_param_importances(study, params=common, evaluator=_evaluator()))


def _study(outcome: Outcome) -> optuna.Study:
    """The trials as Optuna keeps them, with the ranges that users know."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="maximize")
    for record in outcome.journal.ended():
        if record.point is not None:
            study.add_trial(frozen_trial(outcome.search.space, record, natural=True))
    return study


def _evaluator() -> Any:
    from optuna.importance import FanovaImportanceEvaluator

    return FanovaImportanceEvaluator(seed=0)


def _varied(study: optuna.Study) -> set[str]:
    """Parameters that have at least two values among the finished trials."""
    values: dict[str, set[Any]] = {}
    for trial in study.trials:
        if trial.state.name == "COMPLETE":
            for name, value in trial.params.items():
                values.setdefault(name, set()).add(value)
    return {name for name, found in values.items() if len(found) > 1}


def _common(study: optuna.Study) -> list[str]:
    """Those of them that every finished trial has."""
    finished: list[set[str]] = [set(trial.params) for trial in study.trials if trial.state.name == "COMPLETE"]
    return sorted(name for name in _varied(study) if all(name in params for params in finished))


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna calls its pictures experimental
        yield


def _by_epoch(axes: Any, title: str) -> Any:
    axes.set(xlabel="epoch", ylabel=title)
    return _whole(axes)


def _whole(axes: Any) -> Any:
    """Trials and epochs have no halves."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return axes


def _legible(axes: Any) -> Any:
    """Slices whose labels do not lie over each other: each is narrow, and matplotlib labels few decades densely."""
    from matplotlib.category import StrCategoryLocator
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

    for each in np.ravel(axes):
        if isinstance(each.xaxis.get_major_locator(), StrCategoryLocator):
            each.tick_params(axis="x", labelrotation=30)
        if each.get_xscale() != "log":
            continue
        each.xaxis.set_minor_formatter(NullFormatter())
        low, high = each.get_xlim()
        if high < 100 * low:
            each.xaxis.set_major_locator(MaxNLocator(2) if high < 4 * low else LogLocator(subs=(1, 3)))
            each.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    colours = np.ravel(axes)[0].figure.axes[-1]  # of the trials' numbers
    colours.yaxis.set_major_locator(MaxNLocator(integer=True))
    return axes


def _without_grids(axes: Any) -> Any:
    for each in axes.figure.axes:  # one a parameter, whose grids would lie over each other
        each.grid(False)
    return axes


def _png(plot: Callable[[], Any], title: str | None = None) -> bytes:
    """A plot of Optuna, whose axes may be one or many."""
    import matplotlib.pyplot as plt

    axes = np.ravel(plot())
    figure = axes[0].figure
    if len(axes) > 1:
        figure.set_size_inches(3.2 * len(axes), 4)
    if title and len(axes) == 1:
        axes[0].set_title(title)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=DPI, bbox_inches="tight")
    plt.close(figure)
    return out.getvalue()
