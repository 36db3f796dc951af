"""A finished ablation as the paper prints a table: on the terminal, as Markdown, as CSV and as JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta

from rich.table import Table as TextTable
from rich.text import Text

import pistoseg
from pistoseg.search.ablation import AblationReport, JobPlan, RowResult
from pistoseg.search.tables import PUBLISHED, PaperScores

DIGITS = 4
"""Of a score, as in the paper."""


def files(report: AblationReport) -> dict[str, bytes]:
    """`ablation.json`, `ablation.csv` and `ablation.md`, by name."""
    texts = {"ablation.json": to_json(report), "ablation.csv": to_csv(report), "ablation.md": to_markdown(report)}
    return {name: text.encode() for name, text in texts.items()}


def ranks(values: Sequence[float | None]) -> list[int | None]:
    """1 for the highest values and 2 for the second highest, of values as they are printed; None for the others."""
    printed = [None if value is None else round(value, DIGITS) for value in values]
    distinct = sorted({value for value in printed if value is not None}, reverse=True)
    places = dict(zip(distinct, (1, 2), strict=False))
    return [None if value is None else places.get(value) for value in printed]


def cell(row: RowResult, score: str) -> str:
    """A score of a row: its mean, and over several seeds its standard deviation."""
    mean, deviation = row.mean(score), row.deviation(score)
    if mean is None:
        return "-"
    return f"{mean:.{DIGITS}f}" + ("" if deviation is None else f" ± {deviation:.{DIGITS}f}")


def notes(report: AblationReport) -> list[str]:
    """What a reader of the table must know."""
    several = len(report.seeds) > 1
    lines = [
        f"IoU on {report.validation_images} validation images"
        + (f"; mean ± standard deviation over the seeds {', '.join(map(str, report.seeds))}" if several else "")
        + "; the highest is bold, the second highest underlined"
    ]
    if report.published and any(row.paper for row in report.rows):
        data = PUBLISHED[report.published]
        lines.append(f"paper: its values, on the {data.test_images:,} test images of {data.title}")
    lines += [f"left out: {reason}" for reason in report.left_out]
    lines += [f"failed: {reason}" for reason in report.failures]
    return lines


def to_text(report: AblationReport) -> TextTable:
    """The table for a terminal; below a row the paper's values where it is the published data."""
    table = TextTable(title=f"{report.table}: {report.title}", title_justify="left")
    table.add_column("", overflow="fold")
    for title in (*_titles(report), "computed", "reused"):
        table.add_column(Text(title), justify="right", overflow="fold")
    styles = {1: "bold", 2: "underline", None: ""}
    for row, marks in zip(report.rows, _marks(report), strict=True):
        cells = [Text(cell(row, score), styles[mark]) for score, mark in zip(report.scores, marks, strict=True)]
        table.add_row(Text(_label(row)), *cells, _time(row, "computed"), _time(row, "reused"))
        if row.paper:
            table.add_row(Text("  paper"), *_paper(report, row.paper), "", "", style="dim")
    return table


def to_markdown(report: AblationReport) -> str:
    """The table and its notes as Markdown."""
    titles = ["", *_titles(report), "computed", "reused"]
    lines = [f"## {report.table}: {report.title}", ""]
    lines += [_markdown_row(titles), _markdown_row([":--", *["--:"] * (len(titles) - 1)])]
    forms = {1: "**{}**", 2: "<u>{}</u>", None: "{}"}
    for row, marks in zip(report.rows, _marks(report), strict=True):
        cells = [forms[mark].format(cell(row, score)) for score, mark in zip(report.scores, marks, strict=True)]
        lines.append(_markdown_row([_label(row), *cells, _time(row, "computed"), _time(row, "reused")]))
        if row.paper:
            lines.append(_markdown_row(["*paper*", *_paper(report, row.paper), "", ""]))
    return "\n".join([*lines, "", *(f"* {note}" for note in notes(report))]) + "\n"


def to_csv(report: AblationReport) -> str:
    """A line per row: `<score>`, `<score>_std` and `<score>_paper`, seconds, and why seeds failed."""
    out = io.StringIO()
    kinds = ("", "_std", "_paper") if report.published else ("", "_std")
    writer = csv.writer(out, lineterminator="\n")
    header = [f"{score}{kind}" for score in report.scores for kind in kinds]
    writer.writerow(["row", "seeds", *header, "computed_s", "reused_s", "problem"])
    for row in report.rows:
        values: list[float | str | None] = []
        for score in report.scores:
            values += [_rounded(row.mean(score)), _rounded(row.deviation(score))]
            if report.published:
                values.append(_paper_value(report, row.paper, score))
        seconds = [round(row.seconds(kind), 1) for kind in ("computed", "reused")]
        problems = "; ".join(run.problem for run in row.runs if run.problem)
        writer.writerow([row.label, sum(not run.problem for run in row.runs), *values, *seconds, problems])
    return out.getvalue()


def to_json(report: AblationReport) -> str:
    """Everything: per row its settings, mean, standard deviation, the paper's values, and every seed's run."""
    rows = []
    for row in report.rows:
        rows.append(
            {
                "label": row.label,
                "overrides": dict(row.overrides),
                "mean": {score: row.mean(score) for score in report.scores},
                "std": {score: row.deviation(score) for score in report.scores},
                "paper": {score: _paper_value(report, row.paper, score) for score in report.scores}
                if row.paper
                else None,
                "runs": [asdict(run) for run in row.runs],
            }
        )
    values = asdict(report) | {"rows": rows, "notes": notes(report), "pistoseg": pistoseg.__version__}
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def plan_text(plans: Sequence[JobPlan]) -> TextTable:
    """What an ablation would compute."""
    table = TextTable(title="Stages by run", title_justify="left", show_lines=True)
    for title in ("", "to compute", "shared with an earlier run", "in the workspace"):
        table.add_column(title, overflow="fold")
    for item in plans:
        table.add_row(Text(item.name), *("\n".join(names) for names in (item.computed, item.shared, item.reused)))
    return table


def _titles(report: AblationReport) -> list[str]:
    return [*report.classes, "mIoU", "fwIoU"]


def _label(row: RowResult) -> str:
    done = sum(not run.problem for run in row.runs)
    if done == len(row.runs):
        return row.label
    return f"{row.label} ({f'{done} of {len(row.runs)} seeds' if done else 'failed'})"


def _marks(report: AblationReport) -> list[tuple[int | None, ...]]:
    """By row, each score's rank in its column."""
    return list(zip(*(ranks([row.mean(score) for row in report.rows]) for score in report.scores), strict=True))


def _time(row: RowResult, kind: str) -> str:
    return str(timedelta(seconds=round(row.seconds(kind))))


def _paper(report: AblationReport, paper: PaperScores) -> list[str]:
    values = (_paper_value(report, paper, score) for score in report.scores)
    return ["-" if value is None else f"{value:.{DIGITS}f}" for value in values]


def _paper_value(report: AblationReport, paper: PaperScores | None, score: str) -> float | None:
    if paper is None:
        return None
    values = dict(zip(report.scores, (*paper.iou, paper.miou, paper.fwiou), strict=True)) if paper.iou else {}
    return {"miou": paper.miou, "fwiou": paper.fwiou, **values}.get(score)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
