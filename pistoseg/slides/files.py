"""Which files are slides, which files belong to one, and how to tell that a slide has changed."""

from __future__ import annotations

import hashlib
import posixpath
from functools import lru_cache

from pistoseg import storage
from pistoseg.errors import PistoSegError, RefusedError, UnavailableError, out_of_memory

PICTURES = (".png", ".jpg", ".jpeg")
TIFFS = (".tif", ".tiff", ".btf", ".qptiff")
VENDORS = (".svs", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide", ".dcm", ".czi")
EXTENSIONS = (*VENDORS, *TIFFS, *PICTURES)
"""Endings of slides; `.ome.tif` is one of TIFF's."""
_FOLDER_FORMATS = (".vms", ".vmu")  # an index in text beside its pictures, some of which are JPEG files
_HEADER = 2**16
_SERIES_TAG = b"\x20\x00\x0e\x00"  # (0020,000E) SeriesInstanceUID, little endian


def extension(uri: str) -> str:
    """The ending in lower case, with its dot."""
    return posixpath.splitext(storage.name(uri))[1].lower()


def stem(uri: str) -> str:
    """The file's name without its ending, `.ome.tif` included."""
    name = posixpath.splitext(storage.name(uri))[0]
    return name[:-4] if name.lower().endswith(".ome") and extension(uri) in TIFFS else name


def is_slide(uri: str) -> bool:
    """Whether a name ends like a slide's."""
    return extension(uri) in EXTENSIONS


def one_per_slide(uris: list[str]) -> list[str]:
    """Reduce files to one for each slide, in the order given.

    Files that are no slides are left out, so are the pictures that a `.vms` or `.vmu` file describes. Of a DICOM
    series, whose levels are files of their own, the largest file stays.
    """
    described = {posixpath.dirname(uri) for uri in uris if extension(uri) in _FOLDER_FORMATS}
    kept = [
        uri
        for uri in uris
        if is_slide(uri) and not (extension(uri) in PICTURES and posixpath.dirname(uri) in described)
    ]
    dicom = [uri for uri in kept if extension(uri) == ".dcm"]
    listed: dict[str, tuple[int, str]] = {}
    for parent in {posixpath.dirname(uri) for uri in dicom}:
        listed |= {storage.join(parent, name): (size, tag) for name, size, tag in storage.list_details(parent)}
    series: dict[tuple[str, str], list[str]] = {}
    for uri in dicom:
        series.setdefault((posixpath.dirname(uri), _series(uri, listed.get(uri))), []).append(uri)
    largest = {max(group, key=lambda uri: (listed[uri][0] if uri in listed else 0, uri)) for group in series.values()}
    return [uri for uri in kept if extension(uri) != ".dcm" or uri in largest]


def slide_files(uri: str) -> list[str]:
    """Every file of a slide, itself first: MIRAX has a folder, Hamamatsu's VMS and DICOM have siblings.

    Raises:
        PistoSegError: the slide does not exist or is a folder.
    """
    return [uri, *(storage.join(root, name) for root, name, _, _ in _companions(uri))]


def etag(uri: str) -> str:
    """A string that changes when any file of the slide does; no content is read, but the header of DICOM files.

    It is the ETag (or what the storage has instead) with the size, or size and modification time of a local file.

    Raises:
        RefusedError: the disk or the storage does not say what is there.
        PistoSegError: the slide does not exist or is a folder.
    """
    size, version = _stat(uri)
    companions = _companions(uri)
    if not companions:
        return f"{size}-{version}"
    digest = hashlib.sha256(repr((size, version, [item[1:] for item in companions])).encode())
    return f"{size + sum(item[2] for item in companions)}-{digest.hexdigest()[:32]}"


def _stat(uri: str) -> tuple[int, str]:
    """Size and version of one file."""
    try:
        info = storage.info(uri)
    except FileNotFoundError as error:
        raise missing(uri) from error
    except OSError as error:
        kind = PistoSegError if storage.is_no_file(error) else RefusedError
        reason = error.strerror or str(error) or type(error).__name__
        raise kind(
            f"cannot be read ({reason})", file=uri, remedy="check the path, its rights and the credentials"
        ) from error
    if info.get("type") == "directory":
        raise PistoSegError("is a folder, not a slide", file=uri, remedy="name a file in it")
    path_here = storage.local_path(uri)
    if path_here is not None:
        return int(info["size"]), str(path_here.stat().st_mtime_ns)
    tags = ("ETag", "etag", "md5", "mtime", "LastModified", "last_modified", "updated", "created")
    version = next((str(info[tag]) for tag in tags if info.get(tag)), "")
    return int(info.get("size") or 0), version.strip('"')


def missing(uri: str) -> PistoSegError:
    """The error about a slide that is not there."""
    return PistoSegError("does not exist", file=uri, remedy="check the path")


def unreadable(name: str, error: OSError | MemoryError) -> PistoSegError:
    """The error about a slide on this machine that can't be read; an `UnavailableError` where that is not its fault."""
    if isinstance(error, MemoryError):
        return out_of_memory(name)
    if isinstance(error, FileNotFoundError):
        return missing(name)
    kind = PistoSegError if storage.is_no_file(error) else UnavailableError
    remedy = "check its path, its rights and the disk"
    return kind(f"cannot be read ({error.strerror or error})", file=name, remedy=remedy)


def _companions(uri: str) -> list[tuple[str, str, int, str]]:
    """(folder, name in it, size, version) of a slide's other files."""
    kind, parent = extension(uri), posixpath.dirname(uri.rstrip("/"))
    if kind == ".mrxs":
        root = uri[: -len(kind)]
        try:
            return [(root, *item) for item in storage.list_details(root)]
        except UnavailableError as error:
            if not storage.is_local(uri):
                raise
            raise PistoSegError(error.reason, file=error.file, remedy=error.remedy) from error  # of this slide alone
    if kind not in (*_FOLDER_FORMATS, ".dcm"):
        return []
    own = storage.name(uri)
    beside = [item for item in storage.list_details(parent) if "/" not in item[0] and item[0] != own]
    if kind == ".dcm":
        series = _series(uri)
        beside = [
            (name, size, version)
            for name, size, version in beside
            if extension(name) == ".dcm" and _series(storage.join(parent, name), (size, version)) == series
        ]
    return [(parent, *item) for item in beside]


def _series(uri: str, version: tuple[int, str] | None = None) -> str:
    """The SeriesInstanceUID of a DICOM file, or its URI where none is found: opening it will say what is wrong.

    Args:
        uri: of the file.
        version: its size and version if it was listed; it is then read once for all slides in its folder.
    """
    try:
        return _read_series(uri) if version is None else _series_of_version(uri, version)
    except OSError:
        return uri


@lru_cache(2**16)
def _series_of_version(uri: str, version: tuple[int, str]) -> str:
    return _read_series(uri)


def _read_series(uri: str) -> str:
    with storage.open_file(uri) as file:
        header = file.read(_HEADER)
    at = header.find(_SERIES_TAG)
    if at < 0:
        return uri
    explicit = header[at + 4 : at + 6] == b"UI"
    length = int.from_bytes(header[at + 6 : at + 8] if explicit else header[at + 4 : at + 8], "little")
    return header[at + 8 : at + 8 + length].rstrip(b"\0 ").decode("ascii", "replace") or uri
