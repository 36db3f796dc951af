"""What the trials of a space share, and which parameters change nothing at all; found by fingerprints, not by rules."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

from pistoseg.artifacts import fingerprint
from pistoseg.config import Config
from pistoseg.errors import PistoSegError
from pistoseg.graph import needed
from pistoseg.search.ablation import DATA, with_overrides
from pistoseg.search.objective import Objective
from pistoseg.search.spaces import Parameter, Point, Space

POINTS = 12
"""Points that are looked at for the space, and again for each of its parameters."""
SETTLED = "trainings keep their last epoch: the best one would be chosen by the masks"
COMPARED = ("preliminary", "precise")
"""Networks whose epochs can be compared: both segment, and are validated alike."""


@dataclass(frozen=True)
class Sharing:
    """What is computed once and what by trial.

    Args:
        shared: stages that are the same in all trials, in the order of running.
        varied: the other stages.
        compared: of these, the trainings whose epochs tell how good a trial is.
    """

    shared: tuple[str, ...]
    varied: tuple[str, ...]
    compared: tuple[str, ...]

    def epochs(self, config: Config) -> int:
        """Epochs of a whole trial, over the trainings that are compared."""
        return sum(getattr(config, name).epochs for name in self.compared)


def analyse(space: Space, config: Config, objective: Objective, seed: int = 0) -> tuple[Space, Sharing]:
    """Look at some points of a space.

    Returns:
        The space without the parameters that change nothing or what the objective settles, and what the trials share.
    Raises:
        PistoSegError: points are refused by the config, or nothing is left that varies.
    """
    rng = random.Random(seed)
    for _ in range(POINTS):
        _configured(space, space.draw(rng), config)
    space = space.without(_settled(space, objective))
    dead = {
        item.name: f"with these settings it does not change the model ({', '.join(objective.targets)})"
        for item in space.parameters
        if not _matters(space, item, config, objective, rng)
    }
    space = space.without(dead)
    if not space.parameters:
        raise PistoSegError(
            f"none of its parameters changes the model: {'; '.join(space.notes)}",
            field="--space",
            remedy="look at precise.masks: the stages that lead to it are those that count",
        )
    own = keys(config, objective.targets)
    points = [space.draw(rng) for _ in range(POINTS)]
    points += [point for item in space.parameters for point in _alternatives(space, item, rng)]
    others = [keys(_configured(space, point, config), objective.targets) for point in points]
    names = list(own)
    shared = tuple(name for name in names if all(other.get(name) == own[name] for other in others))
    varied = tuple(name for name in names if name not in shared)
    return space, Sharing(shared, varied, tuple(name for name in COMPARED if name in varied))


def keys(config: Config, targets: tuple[str, ...]) -> dict[str, str]:
    """Fingerprints by stage as the settings make them; the data set's files are not looked at."""
    found: dict[str, str] = {}
    # Where images are held out, a training's settings say whether there are masks, which takes a look at the folders
    # and is the same for all points; that images are held out, the patches' settings say.
    whole = config.model_copy(update={"data": config.data.model_copy(update={"label_holdout": 0.0})})
    for stage in needed(config, targets):
        if stage.name in DATA:
            settings = config.model_dump(mode="json", include={"classes", "scale", "data"})
        else:
            settings = stage.settings(whole)
        inputs = {role: found[source] for role, source in stage.inputs(config).items()}
        found[stage.name] = fingerprint(stage.name, stage.version, settings, inputs)
    return found


def _settled(space: Space, objective: Objective) -> dict[str, str]:
    """Parameters that set what the objective settles, each with the reason and what else it would have set."""
    found = {}
    for item in space.parameters:
        others = [key for key in item.keys if key not in objective.settled]
        if len(others) < len(item.keys):
            found[item.name] = SETTLED + (f"; lost with it: {', '.join(others)}" if others else "")
    return found


def _configured(space: Space, point: Mapping[str, object], config: Config) -> Config:
    try:
        return with_overrides(config, space.overrides(point))
    except PistoSegError as error:
        raise PistoSegError(
            f"has points that the config refuses ({', '.join(f'{key}={value}' for key, value in point.items())}): "
            f"{error.reason}",
            field="--space",
        ) from None


def _matters(space: Space, item: Parameter, config: Config, objective: Objective, rng: random.Random) -> bool:
    """Whether another value of a parameter alone changes the fingerprint of what is scored."""
    for _ in range(POINTS):
        points = _alternatives(space, item, rng)
        found = [keys(_configured(space, point, config), objective.targets) for point in points]
        scored = [tuple(own[target] for target in objective.targets) for own in found]
        for one, two in combinations(range(len(points)), 2):
            if scored[one] != scored[two] and _alone(item.name, points[one], points[two]):
                return True
    return False


def _alone(name: str, one: Point, two: Point) -> bool:
    """Whether two points differ in one parameter, and in those at most that count with one of its values only."""
    return all(value == two[key] for key, value in one.items() if key != name and key in two)


def _alternatives(space: Space, item: Parameter, rng: random.Random) -> list[Point]:
    """A random point in which a parameter is active, and with each of its options or both ends of its range.

    What the other parameters are stays where it can; none where nothing makes the parameter active.
    """
    point = space.draw(rng, space.conditions(item.name))
    if item.name not in point:
        return []
    kept = {name: (value,) for name, value in point.items()}
    return [point, *(space.draw(rng, kept | {item.name: (value,)}) for value in item.levels(2, point))]
