"""`pistoseg data check`: reads every image and mask of a data set once and says whether it is fit for training."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import PurePosixPath
from typing import TypeVar

import numpy as np

from pistoseg import storage
from pistoseg.classes import IGNORE_ID, TissueClasses
from pistoseg.config import DataConfig, ScaleConfig, SynthesisConfig
from pistoseg.errors import PistoSegError, UnavailableError
from pistoseg.outputs.pictures import Panel, sheet, shrunk
from pistoseg.patches.crops import Crop, CutNote, Opener, crops, note_lines
from pistoseg.patches.decode import decode_background, decode_mask, encode_png, pixel_hash, read_file, read_rgb
from pistoseg.patches.judging import ReadImage, combination, sum_up
from pistoseg.patches.layouts import (
    IMAGE_FOLDERS,
    MASK_FOLDERS,
    find_split,
    find_training,
    masks_beside,
    scan_evaluation,
    scan_training,
    split_without_masks,
)
from pistoseg.patches.manifest import is_manifest, scan_slides
from pistoseg.patches.report import Report, SplitReport
from pistoseg.patches.source import (
    EvaluationPair,
    Rejection,
    SlideSource,
    SourceImage,
    Window,
    readable,
    unfit,
)
from pistoseg.patches.store import network_size, scaled

_EXAMPLES = 16
_SHEETS = 24
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class _Truth:
    """An evaluation image that was read: pixels of its mask by value; None without a mask."""

    pair: EvaluationPair
    sha256: str
    counts: np.ndarray | None


def check(
    data_uri: str,
    classes: TissueClasses,
    config: DataConfig,
    *,
    scale: ScaleConfig | None = None,
    synthesis: SynthesisConfig | None = None,
    workers: int = 4,
    out: str | None = None,
    opener: Opener | None = None,
) -> Report:
    """Validate a data set; nothing is changed in it.

    Args:
        data_uri: the data set, its training folder, a folder with img/ and mask/, or a manifest of slides.
        classes: what labels and masks must fit.
        config: layout, limits, and the validation folder where it lies elsewhere.
        scale: the networks' pixel size; None: that of the images. Slides have it from their opener.
        synthesis: what mosaics need; None: what they need by default.
        workers: threads that read.
        out: folder or URI for report.json, report.txt and sheets of examples; None writes nothing.
        opener: opens the slides of a manifest; needed for one.
    Raises:
        PistoSegError: data_uri is neither. Everything else that is wrong is in the report.
    """
    report = Report(data_uri, classes.names)
    read: list[ReadImage] = []
    scale, synthesis = scale or ScaleConfig(), synthesis or SynthesisConfig()
    slides = is_manifest(data_uri)
    training = data_uri if slides else find_training(data_uri, classes, config)
    with _problems_into(report):
        if slides:
            assert opener is not None, "a manifest of slides needs a way to open them"
            read = _check_slides(data_uri, classes, config, scale, synthesis, report, workers, opener)
        elif training is not None:
            read = _check_training(training, classes, config, scale, synthesis, report, workers)
    truths: dict[str, list[_Truth]] = {}
    evaluation = _evaluation_folders(data_uri, config, is_training=training is not None)
    report.warnings += _not_scored(data_uri, evaluation) if not slides else []
    for split, folder in evaluation.items():
        with _problems_into(report):
            truths[split] = _check_split(split, folder, classes, config, report, workers)
    if training is None:
        report.warnings.append("there are no training images: no 1.training, training or train folder")
    if not report.splits:
        scored = (
            "be scored by the labels of held-out images only"
            if config.label_holdout
            else "not be scored; name some with --set data.validation=DIR, or hold labels out with "
            "--set data.label_holdout=0.2"
        )
        report.warnings.append(f"there are no images with masks (img/ and mask/): models will {scored}")
    by_hash = {image.sha256: image.source.name for image in read}
    for split, found in truths.items():
        pairs = [(by_hash[t.sha256], f"{split}/{t.pair.name}") for t in found if t.sha256 in by_hash]
        report.leaks += pairs
        if pairs:
            report.warnings.append(f"{len(pairs)} images of {split} are also trained on: scores will be too good")
    if out is not None:
        _write(report, out, read, truths, classes, config)
    return report


@contextmanager
def _problems_into(report: Report) -> Iterator[None]:
    """Note what ends a part of the check, as it would end a training; the other parts go on."""
    try:
        yield
    except PistoSegError as error:
        report.problems.append(str(error))


def _evaluation_folders(data_uri: str, config: DataConfig, *, is_training: bool) -> dict[str, str]:
    """The splits with masks; a folder without training images may be one itself."""
    if is_manifest(data_uri):
        return {"validation": config.validation} if config.validation else {}
    folders = {split: find_split(data_uri, split) for split in ("validation", "testing")}
    names = {storage.name(child).lower() for child in storage.list_dir(data_uri)}
    if not is_training and names & set(IMAGE_FOLDERS) and names & set(MASK_FOLDERS):
        folders["validation"] = data_uri
    if config.validation:
        folders["validation"] = config.validation
    return {split: folder for split, folder in folders.items() if folder is not None}


def _not_scored(data_uri: str, evaluation: Container[str]) -> list[str]:
    """Of the splits of a data set that are none for lack of masks, what that means."""
    splits = [split for split in ("validation", "testing") if split not in evaluation]
    named = filter(None, (split_without_masks(data_uri, split) for split in splits))
    return [f"{storage.name(folder)}/ has no img/ and mask/: nothing is scored on it" for folder in named]


def _check_training(
    uri: str,
    classes: TissueClasses,
    config: DataConfig,
    scale: ScaleConfig,
    synthesis: SynthesisConfig,
    report: Report,
    workers: int,
) -> list[ReadImage]:
    listing = scan_training(uri, classes, config)
    unread: list[PistoSegError] = []

    def read(source: SourceImage) -> tuple[ReadImage | None, list[Rejection]]:
        try:
            pixels = read_rgb(source.uri, source.name, config.max_pixels, config.min_size)
            height, width = pixels.shape[:2]
            factor, size = network_size(height, width, config, scale)
        except PistoSegError as error:
            return None, _rejections(error, unread, source.name)
        windows = [window.resolved(width, height) for window in source.windows]
        judged = [unfit(source, window, width, height, config.min_size) for window in windows]
        kept = tuple(window for window, rejection in zip(windows, judged, strict=True) if rejection is None)
        refused = [rejection for rejection in judged if rejection is not None]
        if not kept:
            return None, refused
        boxes = [scaled(window, factor, size) for window in kept]
        sizes = tuple((box_height, box_width) for _, _, box_width, box_height in boxes)
        load = partial(read_rgb, source.uri, source.name, config.max_pixels)
        title = storage.name(source.name)
        return ReadImage(source, title, width, height, kept, sizes, pixel_hash(pixels), load), refused

    results = _in_threads(read, listing.images, workers)
    _note_unread(unread, report)
    images = [image for image, _ in results if image is not None]
    report.layout = listing.layout
    report.warnings += [f"{folder}/ is taken for masks: nothing in it is trained on" for folder in masks_beside(uri)]
    report.rejected = listing.rejected + [rejection for _, refused in results for rejection in refused]
    sum_up(listing.images, images, classes, config, synthesis, report)
    return images


def _check_slides(
    uri: str,
    classes: TissueClasses,
    config: DataConfig,
    scale: ScaleConfig,
    synthesis: SynthesisConfig,
    report: Report,
    workers: int,
    opener: Opener,
) -> list[ReadImage]:
    """Read every window of a manifest's slides; each is a training image."""
    listing = scan_slides(uri, classes)
    unread: list[PistoSegError] = []

    def read(source: SlideSource) -> Sequence[ReadImage | Rejection | CutNote]:
        try:
            return [
                _read_crop(source, item, opener, classes, config, scale.fit) if isinstance(item, Crop) else item
                for item in crops(source, opener, classes, config)
            ]
        except UnavailableError as error:
            return _rejections(error, unread)

    items = [item for found in _in_threads(read, listing.slides, workers) for item in found]
    _note_unread(unread, report)
    images = [item for item in items if isinstance(item, ReadImage)]
    report.layout = listing.layout
    report.rejected = listing.rejected + [item for item in items if isinstance(item, Rejection)]
    report.warnings += note_lines([item for item in items if isinstance(item, CutNote)], classes)
    sum_up(listing.slides, images, classes, config, synthesis, report)
    return images


def _read_crop(
    source: SlideSource, crop: Crop, opener: Opener, classes: TissueClasses, config: DataConfig, fit: int | None
) -> ReadImage:
    height, width = crop.pixels.shape[:2]
    whole = Window.whole(crop.window.labels).resolved(width, height)
    image = SourceImage(source.image_name(crop.window), source.uri, (whole,))
    alone = replace(source, windows=(crop.window,))

    def load() -> np.ndarray:  # not of `crop`, whose pixels would be kept
        (item,) = crops(alone, opener, classes, config)
        assert isinstance(item, Crop), item
        return item.pixels

    size = (fit or height, fit or width)
    title = f"{PurePosixPath(source.name).stem}/{storage.name(image.name)}"
    return ReadImage(image, title, width, height, (whole,), (size,), pixel_hash(crop.pixels), load)


def _check_split(
    split: str, uri: str, classes: TissueClasses, config: DataConfig, report: Report, workers: int
) -> list[_Truth]:
    listing = scan_evaluation(uri)
    unread: list[PistoSegError] = []

    def read(pair: EvaluationPair) -> _Truth | Rejection | None:
        try:
            pixels, mask = _read_pair(pair, classes, config)
        except PistoSegError as error:
            return next(iter(_rejections(error, unread)), None)
        counts = None if mask is None else np.bincount(mask.ravel(), minlength=256)
        return _Truth(pair, pixel_hash(pixels), counts)

    results = _in_threads(read, listing.pairs, workers)
    _note_unread(unread, report)
    truths = [result for result in results if isinstance(result, _Truth)]
    counted = [truth.counts for truth in truths if truth.counts is not None]
    total = sum(counted, np.zeros(256, np.int64))
    values = dict(enumerate(classes.names))
    for value, name in ((classes.background_id, "background"), (IGNORE_ID, "unknown")):
        values[value] = classes.no_class(name)
    found = SplitReport(
        images=len(listing.pairs),
        scored=len(counted),
        pixels={name: int(total[value]) for value, name in values.items()},
        missing_images=listing.missing_images,
        missing_masks=listing.missing_masks,
        bad=[result for result in results if isinstance(result, Rejection)],
    )
    report.splits[split] = found
    unscored = sum(
        isinstance(result, Rejection) and pair.mask_uri is None
        for pair, result in zip(listing.pairs, results, strict=True)
    )
    if len(found.bad) > unscored:
        bad = len(found.bad) - unscored
        report.problems.append(f"{bad} images or masks of {split} are bad: models can't be scored on them")
    if unscored:
        report.warnings.append(f"{unscored} images of {split} without a mask are bad: nothing is scored on them")
    if not listing.scored:
        report.problems.append(f"{split} has no image with a mask: give img/ and mask/ files the same names")
    for kind, names in (("masks have no image", found.missing_images), ("images have no mask", found.missing_masks)):
        if names:
            report.warnings.append(f"{split} is incomplete: {len(names)} {kind} ({', '.join(names[:5])})")
    absent = [name for name in classes.names if counted and not found.pixels[name]]
    if absent:
        report.warnings.append(f"no mask of {split} shows {', '.join(absent)}: the IoU there is undefined")
    return truths


def _rejections(error: PistoSegError, unread: list[PistoSegError], name: str | None = None) -> list[Rejection]:
    """`Rejection.of` an error, or none where a file is not given by this machine's disk: `unread` gets the error."""
    if isinstance(error, UnavailableError) and error.file is not None and storage.is_local(error.file):
        unread.append(error)
        return []
    return [Rejection.of(error, name)]


def _note_unread(unread: list[PistoSegError], report: Report) -> None:
    """Say which files this machine's disk does not give: a training ends at the first, the check reads the others."""
    if unread:
        report.problems.append(f"{len(unread)} files are not given by the disk; the first: {min(map(str, unread))}")


def _read_pair(
    pair: EvaluationPair, classes: TissueClasses, config: DataConfig
) -> tuple[np.ndarray, np.ndarray | None]:
    """Image (H, W, 3) and mask (H, W) uint8, background mask applied."""
    image = read_rgb(pair.image_uri, max_pixels=config.max_pixels)
    if pair.mask_uri is None:
        return image, None
    size = (image.shape[0], image.shape[1])
    mask = decode_mask(read_file(pair.mask_uri), pair.mask_uri, classes, size, config.max_pixels)
    if pair.background_uri is not None:
        background = decode_background(read_file(pair.background_uri), pair.background_uri, size, config.max_pixels)
        mask[background] = classes.background_id
    return image, mask


def _write(
    report: Report,
    out: str,
    read: list[ReadImage],
    truths: dict[str, list[_Truth]],
    classes: TissueClasses,
    config: DataConfig,
) -> None:
    for number, shown in enumerate(list(report.combinations)[:_SHEETS]):
        windows = [(i, w) for i in read for w in i.windows if combination(w, classes) == shown]
        panels = [[_window_panel(image, window)] for image, window in _spread(windows)]
        plain = re.sub(r"[^\w+-]+", "_", shown)[:80]
        report.pictures.append(storage.join(out, f"training-{number:02d}-{plain}.png"))
        storage.write_bytes(report.pictures[-1], encode_png(sheet(panels, classes, columns=4)))
    for split, found in truths.items():
        rows = []
        for truth in _spread([truth for truth in found if truth.counts is not None]):
            image, mask = _read_pair(truth.pair, classes, config)
            pair = (Panel(truth.pair.name, image), Panel("ground truth", image, mask))
            rows.append([shrunk(panel) for panel in pair])  # whole ones may be as large as slides
        if rows:
            report.pictures.append(storage.join(out, f"{split}.png"))
            storage.write_bytes(report.pictures[-1], encode_png(sheet(rows, classes)))
    as_json = json.dumps(report.to_json(), indent=2, ensure_ascii=False)
    # A folder's or a table's name need not be UTF-8: what of it is not becomes an escape, in JSON one of JSON's.
    storage.write_bytes(storage.join(out, "report.json"), as_json.encode(errors="backslashreplace"))
    storage.write_bytes(storage.join(out, "report.txt"), readable(report.to_text()).encode())


def _window_panel(image: ReadImage, window: Window) -> Panel:
    pixels = image.load()
    crop = pixels[window.y : window.y + window.height, window.x : window.x + window.width]
    place = f" {window.x},{window.y}" if window.row else ""
    return shrunk(Panel(image.title + place, crop.copy()))  # not to keep the whole image


def _spread(items: list[Item]) -> list[Item]:
    """At most _EXAMPLES of the items, evenly spaced."""
    places = np.linspace(0, len(items) - 1, min(_EXAMPLES, len(items))).astype(int)
    return [items[place] for place in places]


def _in_threads(work: Callable[[Item], Result], items: Sequence[Item], workers: int) -> list[Result]:
    """Results in the order of the items; decoding and hashing release the GIL."""
    with ThreadPoolExecutor(max(1, workers)) as pool:
        return list(pool.map(work, items))
