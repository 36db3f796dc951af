"""`pistoseg data windows`: labelled windows of annotated slides, as a manifest to train on."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from pistoseg import storage
from pistoseg.classes import folded
from pistoseg.config import Config
from pistoseg.errors import PistoSegError, RefusedError, UnavailableError
from pistoseg.patches.crops import CutNote, annotated_windows, network_mpp, note_lines
from pistoseg.patches.judging import count_windows
from pistoseg.patches.manifest import write_manifest
from pistoseg.patches.report import Report
from pistoseg.patches.source import Rejection, SlideSource
from pistoseg.slides import files
from pistoseg.slides.source import SlideEntry, list_slides
from pistoseg.stages.slide_images import SlideOpener

_ENDINGS = (".geojson", ".json")
_NAMED = 5


def write_windows(slides: str, annotations: str, out: str, config: Config, *, workers: int = 4) -> Report:
    """Cut windows out of annotated slides and write their manifest.

    Args:
        slides: a slide, folder, prefix, pattern or manifest, see `pistoseg.slides.source.list_slides`.
        annotations: a folder of GeoJSON files named like the slides (`a.geojson` or `a.svs.geojson` for `a.svs`) or
            their ids, or one file.
        out: URI of the manifest, CSV or Parquet as its name ends.
        config: classes, `scale.mpp`, `data.window`, `data.window_stride` and `data.window_min_share`.
        workers: slides read at a time.
    Returns:
        What is in the manifest, and what is not: slides that failed are in `rejected`.
    Raises:
        PistoSegError: no slides or annotations, none that belong together, a GeoJSON named like several slides, or no
            window.
        UnavailableError: the storage is away, or this machine has no room for slides.
    """
    opener, classes = SlideOpener(network_mpp(config.scale)), config.classes.tissue()
    if not out.lower().endswith((".csv", ".parquet")):
        raise PistoSegError("is no manifest's name", field="--out", remedy="end it in .csv or .parquet")
    entries = list_slides(slides)
    pairs, warnings = _matched(entries, annotations)

    def cut(source: SlideSource) -> tuple[SlideSource, CutNote] | Rejection:
        try:
            with opener(source.uri, source.mpp) as view:
                windows, note = annotated_windows(source, view, classes, config.data)
        except PistoSegError as error:
            return _rejection(error, source)
        return replace(source, windows=windows), note

    with ThreadPoolExecutor(max(1, workers)) as pool:
        results = list(pool.map(cut, pairs))
    done = [result for result in results if not isinstance(result, Rejection)]
    found = [window for source, _ in done for window in source.windows]
    report = Report(out, classes.names, layout="slides", images=len(found))
    report.rejected = [result for result in results if isinstance(result, Rejection)]
    if report.rejected:
        report.problems.append(f"{len(report.rejected)} slides failed and are not in the manifest")
    report.warnings = warnings + note_lines([note for _, note in done], classes)
    report.sizes = {f"{config.data.window}x{config.data.window}": len(found)}
    count_windows(found, classes, report)
    if not found:
        why = [f"{item.name}: {item.reason}" for item in report.rejected] + report.warnings
        raise PistoSegError(
            "; ".join(["no window could be cut", *why[:_NAMED]]),
            file=annotations,
            remedy=(report.rejected[0].remedy if report.rejected else "")
            or "check the class names and the mpp, or cut smaller windows (--size, --stride)",
        )
    unseen = [name for name, windows in report.by_class.items() if not windows]
    report.warnings += [f"no window shows {name}: no model could learn it" for name in unseen]
    write_manifest(storage.absolute(out), [source for source, _ in done], classes)
    return report


def _rejection(error: PistoSegError, source: SlideSource) -> Rejection:
    """`Rejection.of`, also of a slide or GeoJSON that this machine's disk, or its rights, do not give.

    A training must not list those, as it keeps what it rejects; here the next run looks again.
    """
    own = [uri for uri in (source.uri, source.annotations) if uri and storage.is_local(uri)]  # of a disk, no storage
    if isinstance(error, UnavailableError) and (error.file in own or isinstance(error.__cause__, RefusedError)):
        error = PistoSegError(error.reason, file=error.file, field=error.field, remedy=error.remedy)
    return Rejection.of(error)


def _matched(entries: list[SlideEntry], annotations: str) -> tuple[list[SlideSource], list[str]]:
    """The slides that have annotations, and what is left over, in sentences."""
    uri = storage.absolute(annotations)
    if storage.is_dir(uri):
        found = [item for item in storage.list_files(uri) if item.lower().endswith(_ENDINGS)]
    elif storage.exists(uri):
        found = [uri]
    else:
        raise PistoSegError("does not exist", file=annotations, remedy="give a GeoJSON file or a folder with some")
    if len(entries) == len(found) == 1 and found == [uri]:
        return [SlideSource(entries[0].slide_id, entries[0].uri, entries[0].mpp, annotations=uri)], []
    by_name: dict[str, str] = {}
    for item in found:
        name = folded(storage.name(item).rpartition(".")[0])
        if name in by_name:
            raise PistoSegError(
                f"{by_name[name]} is named like it",
                file=item,
                remedy="keep one of the two, or name each like the slide_id of its slide",
            )
        by_name[name] = item
    matched = _by_slide(entries, by_name)
    pairs, without = [], []
    for entry in entries:
        if entry.slide_id in matched:
            file = matched[entry.slide_id]
            pairs.append(SlideSource(entry.slide_id, entry.uri, entry.mpp, annotations=file))
        else:
            without.append(entry.slide_id)
    if not pairs:
        raise PistoSegError(
            f"none of the {len(found)} GeoJSON files is named like one of the {len(entries)} slides "
            f"(e.g. {entries[0].slide_id})",
            file=annotations,
            remedy="name each like its slide: a.geojson for a.svs",
        )
    used = set(matched.values())
    spare = [storage.name(item) for item in found if item not in used]
    left = ((without, "slides have no annotations"), (spare, "GeoJSON files belong to no slide"))
    return pairs, [f"{len(names)} {text}: {', '.join(names[:_NAMED])}" for names, text in left if names]


def _by_slide(entries: list[SlideEntry], by_name: dict[str, str]) -> dict[str, str]:
    """GeoJSON by slide_id: the one named like the id, else like the slide's file, else like that without ending."""
    matched: dict[str, str] = {}
    left = dict(by_name)
    for kind in range(3):
        claims: dict[str, SlideEntry] = {}
        for entry in entries:
            name = folded((entry.slide_id, storage.name(entry.uri), files.stem(entry.uri))[kind])
            if entry.slide_id in matched or name not in left:
                continue
            other = claims.setdefault(name, entry)
            if other is not entry:
                raise PistoSegError(
                    f"{other.uri} and {entry.uri} are both named like it",
                    file=left[name],
                    remedy="name it like the slide_id of the one that it is of: "
                    f"{other.slide_id}.geojson or {entry.slide_id}.geojson",
                )
        matched |= {entry.slide_id: left.pop(name) for name, entry in claims.items()}
    return matched
