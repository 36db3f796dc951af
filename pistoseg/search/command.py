"""The verb `search`: from the command line's values to a search, and from its outcome to the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from pistoseg import object_store, storage
from pistoseg.artifacts import Workspace
from pistoseg.config import Config
from pistoseg.errors import PistoSegError
from pistoseg.pipeline import check_weights
from pistoseg.places import with_absolute
from pistoseg.printing import browse_lines
from pistoseg.search.builtin import SPACES, load_space
from pistoseg.search.journal import digest
from pistoseg.search.objective import choose
from pistoseg.search.sharing import SETTLED, analyse

TRIALS = 32
"""Trials of a search without a budget."""


def search(config: Config, workspace: str, space: str, options: Mapping[str, Any]) -> int:
    """Search and print what came out; 2 when no trial finished.

    Args:
        config: whose own setting is trial 0.
        workspace: of artifacts and report.
        space: a name of `SPACES`, or path or URI of a YAML.
        options: `algorithm`, `trials`, `hours`, `objective`, `time`, `parallel`, `pruning`, `grace`, `reduction`,
            `confirm_seeds`, `name` and `dry_run`, as the command line has them.
    """
    from pistoseg.patches.digest import check_labels, training_folder

    _check_name(options["name"])
    object_store.use(config.storage)
    config = with_absolute(config)  # trials run in folders of their own
    training_folder(config)
    place = Workspace(storage.absolute(workspace))
    holdout = config.data.label_holdout
    objective, config = choose(options["objective"], config)
    wanted = load_space(space, config)
    check_weights(config, objective.targets)
    found, sharing = analyse(wanted, config, objective, config.seed)
    console = Console()
    if config.data.label_holdout != holdout:
        share = f"data.label_holdout is {config.data.label_holdout:g} in place of {holdout:g}"
        console.print(f"trials are compared by the {objective.title}: {share}", highlight=False, soft_wrap=True)
    if objective.kind == "labels" and objective.masks:
        console.print(SETTLED, highlight=False, soft_wrap=True)
    if options["dry_run"]:
        check_labels(config)
        console.print(_space_table(found, config))
        for title, stages in (("shared by all trials", sharing.shared), ("computed by trial", sharing.varied)):
            console.print(f"{title}: {', '.join(stages) or 'nothing'}", highlight=False)
        _, outside = found.place_of(config)
        notes = [f"the config's own setting is outside of the space: {'; '.join(outside)}"] if outside else []
        for note in (*notes, *found.notes):
            console.print(note, highlight=False, markup=False)
        return 0
    from pistoseg.search import study
    from pistoseg.stages import cluster

    pruning = None
    if options["pruning"] == "asha" and sharing.compared:
        first = getattr(config, sharing.compared[0]).epochs
        pruning = study.Pruning(options["grace"] or max(1, first // 3), options["reduction"])
    if objective.kind == "labels" and objective.masks:
        pruning = None  # trainings report mIoU, which the labels are not to know
    made = study.Search(
        options["name"] or "", config, found, sharing, objective, options["algorithm"], options["time"], pruning
    )
    if not made.name:
        kind = space if space in SPACES else found.name
        made = study.Search(**{**vars(made), "name": f"{kind}-{digest(made.identity())[:8]}"})
    trials = options["trials"] or (None if options["hours"] else TRIALS)
    budget = study.Budget(trials, options["hours"], options["parallel"], options["confirm_seeds"])
    with cluster.connected(config.compute):
        outcome = study.run(made, place, budget)
    _print(console, outcome, study.folder_of(place, made.name), workspace)
    return 0 if outcome.journal.best() else 2


def _check_name(name: str | None) -> None:
    """Refuse a name that is a path: its folder lies beside those of the other searches."""
    if name and (set(name) & set("/\\") or not name.strip(".")):
        raise PistoSegError(
            f"{name!r} is no name of a folder", field="--name", remedy="give one without / and \\, as crops-2"
        )


def _print(console: Console, outcome: Any, folder: str, workspace: str) -> None:
    from pistoseg.search.findings import confirmation_text

    journal = outcome.journal
    table = Table(title=f"Search {escape(outcome.search.name)}", title_justify="left")
    for title in ("", "trial", outcome.search.objective.title):
        table.add_column(title, overflow="fold")
    best, own = journal.best(), journal.records.get(0)
    for label, record in (("best", best), ("own setting", own)):
        if record is not None and record.value is not None:
            table.add_row(label, str(record.number), f"{record.value:.4f}")
    console.print(table)
    states = (("finished", "finished"), ("pruned", "stopped early"), ("failed", "failed"), ("running", "cut off"))
    console.print(", ".join(f"{journal.count(state)} {word}" for state, word in states), highlight=False)
    if best is not None:
        for key, value in best.overrides.items():
            console.print(f"  {key}: {value}", highlight=False, markup=False)
    console.print(confirmation_text(outcome), highlight=False, markup=False)
    console.print(folder, highlight=False, markup=False, soft_wrap=True)
    console.print("  report.md best.yaml trials.csv trials/ *.png", highlight=False)
    for line in browse_lines(outcome.search.config, workspace):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _space_table(space: Any, config: Config) -> Table:
    own, _ = space.place_of(config)
    table = Table(title=f"Space {escape(space.name)}", title_justify="left")
    for title in ("parameter", "from", "own setting", "counts when"):
        table.add_column(title, overflow="fold")
    for item in space.parameters:
        if item.options:
            # Of several keys, in brackets: one option, not two.
            values = ", ".join(f"({label})" if ", " in label else label for label in map(str, item.options))
        else:
            values = f"{item.above or f'{item.low:g}'} to {item.high:g}{', log' if item.log else ''}"
        when = "; ".join(f"{key} is {' or '.join(map(str, labels))}" for key, labels in item.when.items())
        table.add_row(*map(Text, (item.name, values, str(own.get(item.name, "-")), when)))
    return table
