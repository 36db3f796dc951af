"""What `pistoseg data check` found, as data, as JSON and as text."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from pistoseg.patches.source import Rejection

_SHOWN = 10


@dataclass
class SplitReport:
    """The images of one split with masks.

    Args:
        images: found in img/.
        scored: of these, with a mask that fits.
        pixels: mask pixels by class name, `background` and `unknown`.
        missing_images: names of masks without their image: the ground truth is incomplete.
        missing_masks: names of images without a mask.
        bad: images and masks that cannot be used, with the reason.
    """

    images: int = 0
    scored: int = 0
    pixels: dict[str, int] = field(default_factory=dict)
    missing_images: list[str] = field(default_factory=list)
    missing_masks: list[str] = field(default_factory=list)
    bad: list[Rejection] = field(default_factory=list)


@dataclass
class Report:
    """A data set's contents and what is wrong with it.

    Args:
        data: its URI.
        classes: names of the L classes.
        layout: how its training labels are written; empty without training images.
        images: training images that can be used.
        windows: labelled windows in them.
        by_class: windows that show a class, alone or with others.
        single_tissue: windows that show a class alone.
        combinations: windows by the classes that they show, joined with `+`; `none` for no class.
        sizes: images by size, `WIDTHxHEIGHT` in px, the most frequent first.
        duplicates: groups of training images with the same pixels.
        conflicts: those groups whose labels differ.
        leaks: pairs of a training image and an evaluation image with the same pixels.
        rejected: images and table rows that cannot be used.
        splits: `validation` and `testing`, where they are.
        problems: what would stop a training or an evaluation.
        warnings: what makes them worse than they could be.
        pictures: URIs of the sheets that were written.
    """

    data: str
    classes: list[str]
    layout: str = ""
    images: int = 0
    windows: int = 0
    by_class: dict[str, int] = field(default_factory=dict)
    single_tissue: dict[str, int] = field(default_factory=dict)
    combinations: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    duplicates: list[list[str]] = field(default_factory=list)
    conflicts: list[list[str]] = field(default_factory=list)
    leaks: list[tuple[str, str]] = field(default_factory=list)
    rejected: list[Rejection] = field(default_factory=list)
    splits: dict[str, SplitReport] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing would stop a training or an evaluation."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain values for `json.dumps`."""
        return {"ok": self.ok, **asdict(self)}

    def to_text(self) -> str:
        """A readable summary; long lists are cut, and report.json has them whole."""
        lines = [f"data        {self.data}"]
        if self.layout:
            lines += self._training_lines()
        for name, split in self.splits.items():
            lines += ["", *_split_lines(name, split)]
        lines += _rejected("rejected", self.rejected)
        lines += _rejected("bad evaluation images and masks", [bad for s in self.splits.values() for bad in s.bad])
        lines += _listed("same pixels", [(group[0], ", ".join(group[1:])) for group in self.duplicates])
        lines += _listed("same pixels, other labels", [(group[0], ", ".join(group[1:])) for group in self.conflicts])
        lines += _listed("training images that are also evaluated", self.leaks)
        lines += ["", *(f"PROBLEM: {text}" for text in self.problems), *(f"warning: {text}" for text in self.warnings)]
        if self.pictures:
            lines.append(f"{len(self.pictures)} sheets of examples: {self.pictures[0].rpartition('/')[0]}")
        return "\n".join([*lines, self._verdict()])

    def _verdict(self) -> str:
        if self.problems:
            return "not fit for use as it is"
        number = len(self.warnings)
        return f"fit for use, {number} warning{'s' if number > 1 else ''}" if number else "no problem found"

    def _training_lines(self) -> list[str]:
        width = max([len(name) for name in [*self.classes, *self.combinations]] + [11])
        lines = [f"training    {self.images} images, {self.windows} labelled windows, layout {self.layout}", ""]
        lines.append(f"{'class':<{width}}  {'windows':>8}  {'alone':>8}")
        for name in self.classes:
            lines.append(f"{name:<{width}}  {self.by_class.get(name, 0):>8}  {self.single_tissue.get(name, 0):>8}")
        lines += ["", f"{'combination':<{width}}  {'windows':>8}"]
        combinations = list(self.combinations.items())
        lines += [f"{name:<{width}}  {count:>8}" for name, count in combinations[: 2 * _SHOWN]]
        lines += _more(combinations, 2 * _SHOWN)
        lines += ["", f"{'image size':<{width}}  {'images':>8}"]
        lines += [f"{size:<{width}}  {count:>8}" for size, count in list(self.sizes.items())[:_SHOWN]]
        return lines + _more(list(self.sizes), _SHOWN)


def _split_lines(name: str, split: SplitReport) -> list[str]:
    total = sum(split.pixels.values())
    shares = ", ".join(f"{key} {count / total:.1%}" for key, count in split.pixels.items() if count) if total else ""
    return [
        f"{name:<10}  {split.images} images, {split.scored} with a mask that fits" + (f": {shares}" if shares else "")
    ]


def _rejected(title: str, found: list[Rejection]) -> list[str]:
    """What was rejected and why, and below it what to do about each kind, with how many it is for."""
    lines = _listed(title, [(r.name, f"{r.field}: {r.reason}" if r.field else r.reason) for r in found])
    kinds = list(Counter((r.field, r.remedy) for r in found if r.remedy).most_common())
    lines += [f"  -> {field + ': ' if field else ''}{remedy} ({count})" for (field, remedy), count in kinds[:_SHOWN]]
    return lines + _more(kinds, _SHOWN)


def _listed(title: str, entries: list[tuple[str, str]]) -> list[str]:
    if not entries:
        return []
    lines = ["", f"{title} ({len(entries)})"]
    return lines + [f"  {name}: {text}" for name, text in entries[:_SHOWN]] + _more(entries, _SHOWN)


def _more(entries: list, shown: int) -> list[str]:
    return [f"  ... and {len(entries) - shown} more"] if len(entries) > shown else []
