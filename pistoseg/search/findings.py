"""What a search found, as files: the best config, the trials, a report in Markdown, and pictures."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping
from typing import Any

from pistoseg.config import Config, TrackingConfig, describe
from pistoseg.redaction import redacted
from pistoseg.search import pictures
from pistoseg.search.ablation import with_overrides
from pistoseg.search.confirmation import LEVEL, Confirmation, rank_correlation
from pistoseg.search.journal import State, TrialRecord
from pistoseg.search.study import Outcome

DIGITS = 4


def files(outcome: Outcome) -> dict[str, bytes]:
    """`best.yaml`, `trials.csv`, `report.md` and pictures, by name."""
    found = {"trials.csv": trials_csv(outcome).encode()}
    best = outcome.journal.best()
    if best is not None:
        found["best.yaml"] = best_yaml(outcome, best).encode()
    drawn = pictures.draw(outcome)
    found["report.md"] = report(outcome, list(drawn)).encode()
    return found | drawn


def metrics(outcome: Outcome) -> dict[str, float]:
    """Numbers for the search's MLflow run."""
    journal = outcome.journal
    values: dict[str, float] = {f"trials/{state}": journal.count(state) for state in ("finished", "pruned", "failed")}
    best = journal.best()
    if best is not None and best.value is not None:
        values["best"] = best.value
    own = journal.records.get(0)
    if own is not None and own.value is not None:
        values["own_setting"] = own.value
    values |= {f"importance/{name}": value for name, value in pictures.importance(outcome).items()}
    if outcome.confirmation and (interval := outcome.confirmation.interval):
        values |= {"confirmed/mean": interval.mean, "confirmed/low": interval.low, "confirmed/high": interval.high}
    return values


def best_yaml(outcome: Outcome, best: TrialRecord) -> str:
    """The best trial's whole config, as `pistoseg train --config` takes it; data and servers are not part of it."""
    config = with_overrides(outcome.search.config, best.overrides)
    config = Config.model_validate(redacted(config.model_dump(mode="json")))  # URLs of weights may be signed
    plain = config.model_copy(
        update={
            "data": config.data.model_copy(update={"uri": None, "validation": None}),
            "compute": config.compute.model_copy(update={"address": None}),
            "tracking": TrackingConfig(),
        }
    )
    title = f"# Trial {best.number} of the search {outcome.search.name}: {outcome.search.objective.title} "
    command = "# pistoseg train --config THIS_FILE --data DATA"
    if config.data.validation:
        command += " --set data.validation=DIR"
    return f"{title}{_number(best.value)}.\n{command}\n{describe(plain)}"


def trials_csv(outcome: Outcome) -> str:
    """A line per trial: state, objective, epochs, seconds, scores, parameters, computed stages, reason."""
    records = [item for _, item in sorted(outcome.journal.records.items())]
    names = [item.name for item in outcome.search.space.parameters]
    scores = list(dict.fromkeys(name for record in records for name in record.scores))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["trial", "state", "objective", "epochs", "seconds", *scores, *names, "computed", "reason"])
    for record in records:
        values = record.point or record.overrides
        row = [record.number, record.state, record.value, max((epoch for epoch, _ in record.curve), default=0)]
        row += [record.seconds, *(record.scores.get(name) for name in scores), *(values.get(name) for name in names)]
        writer.writerow([*row, " ".join(record.computed), record.reason])
    return out.getvalue()


def report(outcome: Outcome, drawn: list[str]) -> str:
    """The search in Markdown: what is best, whether that holds, what mattered, every trial."""
    search, journal = outcome.search, outcome.journal
    lines = [f"# Search {search.name}", ""]
    counts = ", ".join(f"{journal.count(state)} {word}" for state, word in _STATES if journal.count(state))
    lines += [f"Objective: {search.objective.title}. {len(journal.records)} trials: {counts or 'none'}.", ""]
    lines += [*_best(outcome), ""]
    lines += ["## Confirmation", "", confirmation_text(outcome), ""]
    importance = pictures.importance(outcome)
    if importance:
        lines += ["## Importance of the parameters", "", "| parameter | importance |", "| :-- | --: |"]
        lines += [f"| {name} | {value:.2f} |" for name, value in importance.items()]
        lines += ["", "fANOVA over the finished trials; parameters that only some trials have are left out.", ""]
    lines += [*_proxy(outcome), *_front(outcome), *_shared(outcome)]
    if search.space.notes:
        lines += ["## Notes", "", *(f"* {note}" for note in search.space.notes), ""]
    lines += ["## Trials", "", *_table(outcome), ""]
    lines += [f"![{name.removesuffix('.png')}]({name})" for name in drawn]
    return "\n".join(lines).rstrip() + "\n"


_STATES: tuple[tuple[State, str], ...] = (
    ("finished", "finished"),
    ("pruned", "stopped early"),
    ("failed", "failed"),
    ("running", "cut off"),
)


def _best(outcome: Outcome) -> list[str]:
    best, own = outcome.journal.best(), outcome.journal.records.get(0)
    if best is None:
        return ["No trial finished."]
    lines = [f"Best: trial {best.number}, {_number(best.value)} (`best.yaml`)."]
    if own is not None and own.value is not None:
        lines.append(f"The config's own setting, trial 0: {_number(own.value)}.")
    lines += ["", *(f"* `{key}`: {value}" for key, value in best.overrides.items())]
    return lines


def confirmation_text(outcome: Outcome) -> str:
    """One sentence or two on whether the best trial is better than the own setting."""
    best, found = outcome.journal.best(), outcome.confirmation
    if best is not None and best.number == 0:
        return "The config's own setting is the best: there is nothing to confirm."
    if found is None:
        return "Not done: whether the best trial is better than the own setting, or was lucky, is open."
    interval = found.interval
    if interval is None:
        return f"Needs two seeds at least. {_runs(found)}"
    verdict = "It holds" if found.holds else "It does not hold: the best trial may have been lucky"
    champion = f"; version {outcome.version} of the model became the champion" if outcome.version else ""
    if found.holds and not outcome.version and outcome.search.config.tracking.enabled:
        reason = "MLflow could not make the model the champion (the output says why)"
        champion = f", but {reason}: run the same command again when it can"
    return (
        f"{verdict}{champion}. Best minus own over {len(found.differences)} fresh seeds: {interval.mean:+.{DIGITS}f}, "
        f"{LEVEL:.0%} interval {interval.low:+.{DIGITS}f} to {interval.high:+.{DIGITS}f} (Student, paired by seed). "
        f"{_runs(found)}"
    )


def _runs(found: Confirmation) -> str:
    def mean(values: tuple[float | None, ...]) -> str:
        known = [value for value in values if value is not None]
        return _number(statistics.fmean(known) if known else None)

    failed = f"; failed: {'; '.join(found.problems)}" if found.problems else ""
    return f"Means: best {mean(found.best)}, own {mean(found.own)}; seeds {', '.join(map(str, found.seeds))}{failed}."


def _proxy(outcome: Outcome) -> list[str]:
    """How well the scores that need no masks rank the trials, where there are masks to say so."""
    rows = [record.scores for record in outcome.journal.finished()]
    lines = []
    for key in ("label_iou", "label_map"):
        pairs = [(row[key], row["miou"]) for row in rows if key in row and "miou" in row]
        rho = rank_correlation([one for one, _ in pairs], [two for _, two in pairs])
        if rho is not None:
            lines.append(f"* `{key}` ranks {len(pairs)} trials as mIoU does with Spearman's rho {rho:+.2f}")
    return ["## Scores from image-level labels alone", "", *lines, ""] if lines else []


def pareto(records: list[TrialRecord]) -> list[TrialRecord]:
    """Trials that no other one beats in both objective and time, by time."""
    known = [item for item in records if item.value is not None and item.seconds is not None]

    def beaten(item: TrialRecord) -> bool:
        mine = (item.value or 0.0, -(item.seconds or 0.0))
        others = ((other.value or 0.0, -(other.seconds or 0.0)) for other in known if other is not item)
        return any(theirs != mine and theirs[0] >= mine[0] and theirs[1] >= mine[1] for theirs in others)

    return sorted((item for item in known if not beaten(item)), key=lambda item: item.seconds or 0.0)


def _front(outcome: Outcome) -> list[str]:
    if not outcome.search.timed:
        return []
    lines = ["## Objective against time", "", "| trial | objective | seconds |", "| --: | --: | --: |"]
    front = pareto(outcome.journal.finished())
    return [*lines, *(f"| {item.number} | {_number(item.value)} | {item.seconds:.0f} |" for item in front), ""]


def _shared(outcome: Outcome) -> list[str]:
    """How often each stage was computed and reused."""
    records = [record for record in outcome.journal.records.values() if record.artifacts]
    if not records:
        return []
    lines = ["## What was computed", "", "| stage | artifacts | trials that have one |", "| :-- | --: | --: |"]
    for stage in (*outcome.search.sharing.shared, *outcome.search.sharing.varied):
        keys = {record.artifacts[stage] for record in records if stage in record.artifacts}
        if keys:
            lines.append(f"| {stage} | {len(keys)} | {sum(stage in record.artifacts for record in records)} |")
    return [*lines, ""]


def _table(outcome: Outcome) -> list[str]:
    names = [item.name for item in outcome.search.space.parameters]
    lines = [_row(["trial", "state", "objective", "epochs", *names]), _row(["--:", ":--", *["--:"] * (2 + len(names))])]
    words: Mapping[State, str] = dict(_STATES)
    for _, record in sorted(outcome.journal.records.items()):
        values = record.point or record.overrides
        value = record.value if record.value is not None else record.curve[-1][1] if record.curve else None
        state = words[record.state] + (f": {record.reason.splitlines()[0]}" if record.reason else "")
        cells = [record.number, state, _number(value), max((epoch for epoch, _ in record.curve), default=0)]
        lines.append(_row([*cells, *(values.get(name, "") for name in names)]))
    return lines


def _row(cells: list[Any]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.{DIGITS}f}"
