"""The folder of a segmented slide: it appears whole or not at all, and slide.json says what it was made from."""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pistoseg import storage
from pistoseg.errors import PistoSegError, UnavailableError
from pistoseg.redaction import redact, redacted
from pistoseg.slides.files import extension
from pistoseg.slides.scratch import scratch_folder

RECORD = "slide.json"
FAILURE = "failure.json"
"""Record of a later try that failed, beside the complete results of an earlier one that were kept."""
FORMAT = "pistoseg slide 1"
PROBABILITIES = "probabilities.zarr"
_LIKE_SLIDES = {"mask.tif", "overview.png"}
_BESIDE_THEM = {RECORD, FAILURE, "regions.geojson", "areas.json"}
_FILES = {RECORD, "regions.geojson", "areas.json", *_LIKE_SLIDES}


def slide_folder(out: str, slide_id: str) -> str:
    """URI of a slide's folder in the output of a run."""
    return storage.join(out, "slides", slide_id)


def read_record(out: str, slide_id: str, name: str = RECORD) -> dict[str, Any] | None:
    """What slide.json says, or FAILURE; None where there is none in this format, so that the slide is done again.

    Raises:
        PistoSegError: it cannot be read, so that nobody knows whether the slide is done.
    """
    record = _read_json(storage.join(slide_folder(out, slide_id), name))
    return record if isinstance(record, dict) and record.get("format") == FORMAT else None


def carry_probabilities(target: str, folder: Path) -> bool:
    """Take the probabilities of a slide's results over into new ones; whether there are any.

    Args:
        target: URI of the results.
        folder: the new ones; on a disk, the same files get a second name.
    """
    old, new = storage.join(target, PROBABILITIES), folder / PROBABILITIES
    if place := storage.local_path(old):
        if place.is_dir():
            shutil.copytree(place, new, copy_function=_link)
        return place.is_dir()
    backend, root = storage.filesystem(old)
    names = [str(file).removeprefix(root).strip("/") for file in backend.find(root)]  # those that begin with a dot, too
    for name in names:
        (new / name).parent.mkdir(parents=True, exist_ok=True)
        with storage.open_file(storage.join(old, name)) as source, (new / name).open("wb") as copy:
            shutil.copyfileobj(source, copy, 2**22)
    return bool(names)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy2(source, target)


def read_areas(out: str, slide_id: str) -> dict[str, Any] | None:
    """What areas.json says; None where it is not there or damaged, so that the slide is done again.

    Raises:
        PistoSegError: it cannot be read, so that nobody knows whether it is damaged.
    """
    areas = _read_json(storage.join(slide_folder(out, slide_id), "areas.json"))
    return areas if isinstance(areas, dict) else None


def _read_json(uri: str) -> Any:
    """What a file says; None where there is none, or it is no JSON."""
    try:
        return json.loads(storage.read_bytes(uri))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        raise UnavailableError(
            f"cannot be read ({reason})",
            file=uri,
            remedy="check its rights and the disk; the same command goes on then",
        ) from error


def is_current(record: Mapping[str, Any] | None, made_from: Mapping[str, Any]) -> bool:
    """Whether a slide is done, and was made from what would be taken now."""
    return record is not None and record.get("status") == "completed" and record.get("made_from") == dict(made_from)


def has_same_mask(record: Mapping[str, Any] | None, made_from: Mapping[str, Any]) -> bool:
    """Whether a slide is done, and its mask is what would be made now, whatever its outlines are."""
    if record is None or record.get("status") != "completed":
        return False
    before = record.get("made_from", {})
    return all(before.get(key) == made_from.get(key) for key in ("etag", "model", "settings"))


def is_whole(out: str, slide_id: str, *, probabilities: bool) -> bool:
    """Whether the files of a completed slide are all there, for which its folder is listed."""
    wanted = _FILES | ({PROBABILITIES} if probabilities else set())
    return wanted <= {storage.name(item) for item in storage.list_dir(slide_folder(out, slide_id))}


def is_complete(out: str, slide_id: str) -> bool:
    """Whether there are complete results of a slide, whatever they were made from.

    Raises:
        PistoSegError: they cannot be read, so that nobody knows.
    """
    record = read_record(out, slide_id)
    if record is None or record.get("status") != "completed":
        return False
    return is_whole(out, slide_id, probabilities=False) and read_areas(out, slide_id) is not None


def not_results(uris: Sequence[str]) -> list[str]:
    """Files without the masks and overviews of segmented slides, which end like slides."""
    folders = {posixpath.dirname(uri) for uri in uris if storage.name(uri) in _BESIDE_THEM}
    return [uri for uri in uris if storage.name(uri) not in _LIKE_SLIDES or posixpath.dirname(uri) not in folders]


def refuse_another(out: str, slide_id: str, slide: str, made_from: Mapping[str, str]) -> None:
    """Refuse to replace the complete results of another slide, which had the same id.

    A slide that has changed is where it was, and one that was moved or copied has the size that it had, though perhaps
    another modification time or ETag: what is elsewhere and of another size is another slide.

    Args:
        out: URI of the run's output.
        slide_id: of the slide.
        slide: its URI.
        made_from: what its results would be made from.
    """
    record = read_record(out, slide_id)
    if record is None or record.get("status") != "completed":
        return
    before, now = (of.get("etag", "").partition("-")[0] for of in (record["made_from"], made_from))
    if now and now != before and _place(record["slide"]) != _place(redact(slide)):
        raise PistoSegError(
            f"has the results of another slide, {record['slide']}, and {redact(slide)} would replace them",
            file=slide_folder(out, slide_id),
            field="slide_id",
            remedy="give another output folder (--out), or a slide_id of its own (a column of a manifest)",
        )


def _place(uri: str) -> str:
    """Where a slide is: of a DICOM series, whose largest file stands for it, the folder."""
    return posixpath.dirname(uri) if extension(uri) == ".dcm" else uri


def settings_fingerprint(settings: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that change with any setting."""
    text = json.dumps(settings, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextmanager
def published(target: str) -> Iterator[tuple[Path, Path]]:
    """A local folder to fill, which becomes `target` when the block ends, and another one for scratch files.

    Where the block raises, nothing of it stays and what was at `target` is as before. A local folder is renamed. Object
    storage can't rename: there slide.json goes first from the old files and comes last of the new ones, so that whoever
    finds it finds all of them. An upload that is broken off leaves no complete results, neither old nor new ones.

    Args:
        target: URI of the folder.
    """
    place = storage.local_path(target)
    with scratch_folder() if place is None else _beside(place) as work:
        result, scratch = work / "result", work / "scratch"
        result.mkdir()
        scratch.mkdir()
        yield result, scratch
        if place is None:
            _upload(result, target)
        else:
            if place.exists():
                place.rename(work / "old")
            result.rename(place)


@contextmanager
def _beside(place: Path) -> Iterator[Path]:
    """A working folder on the same disk, while the context is open."""
    storage.make_folder(place.parent)
    for orphan in _orphans(place):
        shutil.rmtree(orphan, ignore_errors=True)
    work = place.parent / f".{place.name}.{uuid.uuid4().hex[:8]}.part"
    storage.make_folder(work)
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write slide.json into a local folder."""
    (folder / RECORD).write_bytes(_as_json(record))


def write_failure(out: str, slide_id: str, record: Mapping[str, Any]) -> None:
    """Write FAILURE beside what is there; the slide's next results replace both."""
    storage.write_bytes(storage.join(slide_folder(out, slide_id), FAILURE), _as_json(record))


def _as_json(record: Mapping[str, Any]) -> bytes:
    text = json.dumps({"format": FORMAT, **redacted(record)}, indent=2, ensure_ascii=False) + "\n"
    return text.encode(errors="backslashreplace")  # of names that are not UTF-8, as JSON escapes them


def _upload(folder: Path, target: str) -> None:
    old = storage.join(target, RECORD)
    if storage.exists(old):
        storage.remove_file(old)
    storage.remove_tree(target)
    # Whoever lists the folder meanwhile has to know by other files that the pictures are no slides.
    last = (*sorted(_LIKE_SLIDES), RECORD)
    files = (item for item in folder.rglob("*") if item.is_file())
    for file in sorted(files, key=lambda item: last.index(item.name) if item.name in last else -1):
        storage.put_file(storage.join(target, file.relative_to(folder).as_posix()), file)


def _orphans(place: Path) -> list[Path]:
    """Working folders that killed processes left of a slide, and of no other whose id begins with its id and a dot."""
    name = re.compile(rf"\.{re.escape(place.name)}\.[0-9a-f]{{8}}\.part")
    return [item for item in place.parent.iterdir() if name.fullmatch(item.name)]
