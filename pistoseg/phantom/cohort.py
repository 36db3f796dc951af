"""A synthetic cohort on disk or in a bucket, in the published layout."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pistoseg import __version__, storage
from pistoseg.errors import PistoSegError
from pistoseg.phantom.drawing import draw_image
from pistoseg.phantom.geometry import BACKGROUND, DOMAIN, PHANTOM_CLASSES, REFERENCE_MPP, draw_mask
from pistoseg.phantom.noise import stream
from pistoseg.phantom.slides import write_slide

FORMAT = 3
COMPLETE = "phantom.json"
BEGUN = ".phantom.json"
"""Format and settings of a cohort that is being drawn."""
MIN_SHARE = 0.02
"""A class is labelled present when it covers this share of a patch."""
SINGLE_SHARE = 0.58
_PER_CASE = 20
_PLANE = 12  # windows per side that a case is searched for
_MAX_EMPTY = 0.8  # share of background in a patch
_README = """Synthetic H&E, drawn by PistoSeg's phantom. No patient's tissue is in it, and a score on it says nothing
about real tissue. phantom.json holds the seed, the version and every setting.

1.training/<case>-<x>-<y>-[t, s, l, n, a].png   image-level labels: tumor, stroma, lymphocytes, necrosis, alveoli
training-masks/<same name>.png                  their masks, which no training sees: for `evaluate --stage`
2.validation/{img,mask}/<case>-<x>-<y>.png      masks: class ids 0-4, background 5; other cases than training
slides/<slide>.tiff                             pyramids, when slides were asked for
slide-masks/<same name>.tiff                    their masks
"""


def write_cohort(
    out: str,
    *,
    seed: int = 0,
    training: int = 300,
    validation: int = 24,
    slides: int = 0,
    patch_size: int = 128,
    validation_size: int = 256,
    mpp: float = REFERENCE_MPP,
    slide_size: tuple[int, int] = (4096, 4096),
) -> dict[str, Any]:
    """Draw a cohort: labelled training patches, validation images with masks, and slides with masks.

    `phantom.json` is written last: where it is, the cohort is complete. Until then `.phantom.json` says what is drawn.

    Args:
        out: folder or URI; see README.txt in it for the layout.
        seed: the same seed and settings give the same cohort.
        training: labelled patches; about 58 % show a single tissue, about 20 share a case.
        validation: images with pixel masks, two or more tissues each.
        slides: pyramidal TIFFs.
        patch_size: side of a training patch, px.
        validation_size: side of a validation image, px.
        mpp: micrometres per pixel of everything, slides' level 0 included.
        slide_size: (height, width) of a slide, px.
    Returns:
        The content of phantom.json: synthetic, version, settings, cases, patches per class and combination, slides.
    Raises:
        PistoSegError: for sizes or counts that can't be drawn, or where another cohort or anything else is.
    """
    _check(training, validation, slides, patch_size, validation_size, mpp)
    settings = {
        "seed": seed, "training": training, "validation": validation, "slides": slides, "patch_size": patch_size,
        "validation_size": validation_size, "mpp": mpp, "slide_size": list(slide_size),
    }  # fmt: skip
    _refuse_another(out, settings)
    begun = storage.join(out, BEGUN)
    storage.write_bytes(begun, json.dumps({"format": FORMAT, "settings": settings}).encode())
    labels: dict[str, int] = {}
    training_cases: set[int] = set()
    for case, y, x, mask in _patches(seed, 0, _wanted(training, SINGLE_SHARE), patch_size, mpp):
        flags = image_flags(mask)
        training_cases.add(case)
        labels[str(flags)] = labels.get(str(flags), 0) + 1
        name = f"{case:04d}-{x}-{y}-{flags}.png"
        picture = Image.fromarray(draw_image(mask, case_seed(seed, case), mpp, origin=(y, x)))
        storage.write_bytes(storage.join(out, "1.training", name), _png(picture, mpp))
        storage.write_bytes(storage.join(out, "training-masks", name), _png(_annotation(mask), mpp))
    validation_cases: set[int] = set()
    first = max(training_cases, default=-1) + 1
    for case, y, x, mask in _patches(seed, first, _wanted(validation, 0.0), validation_size, mpp, per_case=2):
        validation_cases.add(case)
        picture = Image.fromarray(draw_image(mask, case_seed(seed, case), mpp, origin=(y, x)))
        for folder, image in (("img", picture), ("mask", _annotation(mask))):
            uri = storage.join(out, "2.validation", folder, f"{case:04d}-{x}-{y}.png")
            storage.write_bytes(uri, _png(image, mpp))
    first = max(validation_cases, default=first - 1) + 1
    written = {f"slide-{case:04d}": _slide(out, seed, case, slide_size, mpp) for case in range(first, first + slides)}
    summary = {
        "synthetic": True,
        "version": __version__,
        "format": FORMAT,
        "settings": settings,
        "classes": PHANTOM_CLASSES.to_json(),
        "training_cases": sorted(training_cases),
        "validation_cases": sorted(validation_cases),
        "labels": dict(sorted(labels.items())),
        "slides": written,
    }
    storage.write_bytes(storage.join(out, "README.txt"), _README.encode())
    storage.write_bytes(storage.join(out, COMPLETE), json.dumps(summary, indent=1).encode())
    storage.remove_file(begun)
    return summary


def _check(training: int, validation: int, slides: int, patch_size: int, validation_size: int, mpp: float) -> None:
    for field, value, least in (
        ("training", training, 0),
        ("validation", validation, 0),
        ("slides", slides, 0),
        ("patch_size", patch_size, 32),
        ("validation_size", validation_size, 32),
    ):
        if value < least:
            raise PistoSegError(f"{value} is too small", field=field, remedy=f"give at least {least}")
    if not 0.1 <= mpp <= 4:
        raise PistoSegError(f"{mpp} um/px can't be drawn", field="mpp", remedy="give a value from 0.1 to 4")


def _refuse_another(out: str, settings: dict[str, Any]) -> None:
    """The images of two cohorts in one folder could not be told apart; the same cohort is drawn over itself.

    Nor could those of a cohort and of anything else: a folder without a cohort must be empty, but for hidden files.
    """
    markers = [name for name in (COMPLETE, BEGUN) if storage.exists(storage.join(out, name))]
    if not markers and any(not storage.name(item).startswith(".") for item in storage.list_dir(out)):
        raise PistoSegError("is not empty, and holds no cohort", file=out, remedy="give another folder")
    for name in markers:
        uri = storage.join(out, name)
        content = storage.read_bytes(uri)
        try:
            found = json.loads(content)
            same = (found["format"], found["settings"]) == (FORMAT, settings)
        except (ValueError, KeyError, TypeError):
            same = False
        if not same:
            part = "" if name == COMPLETE else "a part of "
            raise PistoSegError(
                f"holds {part}another cohort", file=out, remedy="give another folder, or delete this one"
            )


def case_seed(seed: int, case: int) -> int:
    """The seed that a case of a cohort is drawn with."""
    return stream(seed, f"case {case}") >> 16


def _annotation(mask: NDArray[np.uint8]) -> Image.Image:
    picture = Image.fromarray(mask, mode="P")
    picture.putpalette(PHANTOM_CLASSES.palette().tobytes())
    return picture


def image_flags(mask: NDArray[np.uint8]) -> list[int]:
    """Image-level label of a mask: L flags, 1 where a class covers at least MIN_SHARE of it."""
    shares = np.bincount(mask.ravel(), minlength=256) / mask.size
    return [int(shares[tissue] >= MIN_SHARE) for tissue in range(len(PHANTOM_CLASSES))]


def _wanted(count: int, single_share: float) -> list[tuple[bool, int]]:
    """(single tissue?, class that must be present) of each patch, mixed well."""
    singles = round(count * single_share)
    wanted = [(True, index % 5) for index in range(singles)] + [(False, index % 5) for index in range(count - singles)]
    order = np.random.default_rng(count).permutation(count)
    return [wanted[index] for index in order]


def _patches(
    seed: int, first_case: int, wanted: list[tuple[bool, int]], size: int, mpp: float, per_case: int = _PER_CASE
) -> Iterator[tuple[int, int, int, NDArray[np.uint8]]]:
    """Windows (case, y, x, mask) that show what is wanted, from as many cases as it takes."""
    domain = max(DOMAIN, size * mpp)  # so that single-tissue windows of any size exist
    case = first_case
    while wanted:
        if case > first_case + 20 + len(wanted) * 4:
            raise AssertionError(f"no window of {size} px shows {wanted[0]}")
        offered = list(_search(case_seed(seed, case), size, mpp, domain))
        for want in wanted[:per_case]:
            for y, x in _fitting(offered, want):
                mask = draw_mask(case_seed(seed, case), size, size, mpp, origin=(y, x), domain=domain)
                offered = [item for item in offered if item[:2] != (y, x)]
                if _shows(image_flags(mask), want) and (mask == BACKGROUND).mean() <= _MAX_EMPTY:
                    yield case, y, x, mask
                    wanted.remove(want)
                    break
        case += 1


def _search(seed: int, size: int, mpp: float, domain: float) -> Iterator[tuple[int, int, list[int]]]:
    """Windows (y, x, flags) of a case side by side, read off a coarse mask, in random order."""
    step = max(size // 24, 1)
    side = size // step
    coarse = draw_mask(seed, _PLANE * side, _PLANE * side, mpp, domain=domain, step=step)
    for cell in np.random.default_rng(seed).permutation(_PLANE**2).tolist():
        row, column = divmod(cell, _PLANE)
        view = coarse[row * side : (row + 1) * side, column * side : (column + 1) * side]
        yield row * side * step, column * side * step, image_flags(view)


def _fitting(offered: list[tuple[int, int, list[int]]], want: tuple[bool, int]) -> list[tuple[int, int]]:
    return [(y, x) for y, x, flags in offered if _shows(flags, want)][:6]


def _shows(flags: list[int], want: tuple[bool, int]) -> bool:
    single, tissue = want
    return flags[tissue] == 1 and (sum(flags) == 1 if single else 2 <= sum(flags) <= 3)


def _slide(out: str, seed: int, case: int, size: tuple[int, int], mpp: float) -> dict[str, Any]:
    name = f"slide-{case:04d}.tiff"
    uri, mask_uri = storage.join(out, "slides", name), storage.join(out, "slide-masks", name)
    return write_slide(uri, mask_uri, seed=case_seed(seed, case), size=size, mpp=mpp)


def _png(image: Image.Image, mpp: float) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=3, dpi=(25400 / mpp, 25400 / mpp))
    return buffer.getvalue()
