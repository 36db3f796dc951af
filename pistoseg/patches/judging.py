"""What the training images of a data set come to: their numbers, and whether they are fit for training."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pistoseg.classes import TissueClasses
from pistoseg.config import DataConfig, SynthesisConfig
from pistoseg.patches.report import Report
from pistoseg.patches.source import SlideSource, SourceImage, Window, count_unread, too_many_bad
from pistoseg.synthesis.bank import too_small
from pistoseg.synthesis.sampling import drawn_classes


@dataclass(frozen=True)
class ReadImage:
    """A training image that was read: its windows with their sizes filled in, what identifies its pixels, and those.

    `sizes` are height and width of the windows in network px, `title` is written above it on sheets.
    """

    source: SourceImage
    title: str
    width: int
    height: int
    windows: tuple[Window, ...]
    sizes: tuple[tuple[int, int], ...]
    sha256: str
    load: Callable[[], np.ndarray]


def sum_up(
    sources: Sequence[SourceImage | SlideSource],
    images: list[ReadImage],
    classes: TissueClasses,
    config: DataConfig,
    synthesis: SynthesisConfig,
    report: Report,
) -> None:
    """Fill in what a report says of training images.

    Args:
        sources: those that were found.
        images: those that could be read.
        classes: what windows are labelled with.
        config: limits.
        synthesis: what mosaics need.
        report: receives numbers, duplicates, problems and warnings; its rejections are there already.
    """
    count_windows([window for image in images for window in image.windows], classes, report)
    report.images = len(images)
    report.sizes = dict(Counter(f"{image.width}x{image.height}" for image in images).most_common())
    _find_duplicates(images, report)
    _judge(report, config, len(sources), count_unread(sources, (rejection.name for rejection in report.rejected)))
    if report.windows:
        _judge_single_tissue(images, classes, config, synthesis, report)


def count_windows(windows: Sequence[Window], classes: TissueClasses, report: Report) -> None:
    """Fill in a report's numbers of windows: all, by class, of a single tissue, and by combination."""
    flags = np.array([window.labels for window in windows], dtype=np.int64).reshape(len(windows), len(classes))
    single = flags[flags.sum(axis=1) == 1]
    report.windows = len(windows)
    report.by_class = dict(zip(classes.names, flags.sum(axis=0).tolist(), strict=True))
    report.single_tissue = dict(zip(classes.names, single.sum(axis=0).tolist(), strict=True))
    report.combinations = dict(Counter(combination(window, classes) for window in windows).most_common())


def _find_duplicates(images: list[ReadImage], report: Report) -> None:
    groups: dict[str, list[ReadImage]] = defaultdict(list)
    for image in images:
        groups[image.sha256].append(image)
    for group in groups.values():
        if len(group) > 1:
            names = [image.source.name for image in group]
            report.duplicates.append(names)
            labels = {frozenset((w.x, w.y, w.width, w.height, w.labels) for w in image.windows) for image in group}
            if len(labels) > 1:
                report.conflicts.append(names)


def _judge(report: Report, config: DataConfig, found: int, unread: int) -> None:
    refused, total = len(report.rejected), len(report.rejected) + report.windows
    if not report.windows:
        report.problems.append("no training image can be used")
        return
    counts = {"rejected": refused, "windows": report.windows, "found": found, "unread": unread}
    if (problem := too_many_bad(counts, config.max_rejected)) is not None:
        report.problems.append(problem)
    elif refused:
        report.warnings.append(f"{refused} of {total} images or windows are bad and will be left out")
    if "none" in report.combinations:
        report.warnings.append(f"{report.combinations['none']} images or windows show no class at all")
    if report.duplicates:
        report.warnings.append(
            f"{sum(len(g) - 1 for g in report.duplicates)} training images repeat the pixels of others"
        )
    if report.conflicts:
        report.warnings.append(f"{len(report.conflicts)} groups of equal images have labels that contradict each other")


def _judge_single_tissue(
    images: list[ReadImage], classes: TissueClasses, config: DataConfig, synthesis: SynthesisConfig, report: Report
) -> None:
    """Say of which classes mosaics would lack images, or have few; of those that they are to show."""
    crop = (synthesis.crop_height, synthesis.crop_width)
    sized = [item for image in images for item in zip(image.windows, image.sizes, strict=True)]
    small = Counter(
        classes.names[window.labels.index(1)]
        for window, size in sized
        if sum(window.labels) == 1 and too_small(*size, crop)
    )
    part = f"half of a crop of {crop[0]}x{crop[1]} px (synthesis.crop_height, synthesis.crop_width)"
    for name in drawn_classes(classes.names, synthesis.class_sampling):
        count = report.single_tissue[name] - small[name]
        if not count:
            why = f", but for {small[name]} smaller than {part}" if small[name] else ""
            report.problems.append(f"no image shows {name!r} alone{why}: no mosaic could show it")
            continue
        if small[name]:
            report.warnings.append(f"{small[name]} images that show {name!r} alone are smaller than {part}: left out")
        if count < config.min_single_tissue:
            report.warnings.append(few_single_tissue(name, count, config, synthesis))


def few_single_tissue(name: str, count: int, config: DataConfig, synthesis: SynthesisConfig) -> str:
    """What to say of a class with fewer single-tissue images than `data.min_single_tissue`."""
    natural = synthesis.class_sampling == "natural"
    remedy = "label more" if natural else "label more, or --set synthesis.class_sampling=natural"
    return (
        f"class {name!r} has {count} single-tissue images (fewer than data.min_single_tissue = "
        f"{config.min_single_tissue}); mosaics will repeat them: {remedy}"
    )


def combination(window: Window, classes: TissueClasses) -> str:
    """The names of a window's classes, as reports group them."""
    return "+".join(name for name, flag in zip(classes.names, window.labels, strict=True) if flag) or "none"
