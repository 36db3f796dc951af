"""Files on any file system: local paths and every fsspec URI, by exact name and written whole or not at all.

Names with brackets are ordinary here. fsspec's `cat`, `get`, `put` and `rm` read brackets as globs, so only its exact
calls (`open`, `info`, `find`, `ls`, `cat_file`, `get_file`, `pipe_file`, `put_file`, `rm_file`) are used.
"""

from __future__ import annotations

import errno
import functools
import os
import posixpath
import shutil
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Concatenate, ParamSpec, TypeVar

from pistoseg import object_store
from pistoseg.errors import PistoSegError, UnavailableError, explained

_UNWRITABLE = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG),
    # Of a file system that takes no folders, as /proc, and of one whose server or disk is gone.
    *(errno.ENOENT, errno.ESTALE, errno.ENODEV),
}
_NO_FILE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG}
_OF_THE_SYSTEM = {"lost+found", "System Volume Information", "$RECYCLE.BIN"}
"""Folders at the root of a disk that mostly nobody may list."""

P = ParamSpec("P")
T = TypeVar("T")


def _explains(function: Callable[Concatenate[str, P], T]) -> Callable[Concatenate[str, P], T]:
    """Make errors of object storage, and of a full disk, say what the user can do."""

    @functools.wraps(function)
    def call(uri: str, *arguments: P.args, **named: P.kwargs) -> T:
        try:
            return function(uri, *arguments, **named)
        except PistoSegError:
            raise
        except Exception as error:
            problem = explained(error, uri) if is_local(uri) else object_store.explain(error, uri)
            if problem is None:
                raise
            raise problem from error

    return call


def is_no_file(error: OSError) -> bool:
    """Whether an error of reading says that there is no such file: none of the name, a folder, or a link to itself.

    What else a disk says, as of rights, can be mended without any change to the file.
    """
    no_file = isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError)
    return no_file or error.errno in _NO_FILE


def is_local(uri: str) -> bool:
    """Whether a URI is a path on this machine."""
    return "://" not in uri or uri.startswith(("file://", "local://"))


def local_path(uri: str) -> Path | None:
    """The local path of a URI, or None for object storage."""
    if not is_local(uri):
        return None
    return Path(uri.split("://", 1)[1] if "://" in uri else uri).expanduser()


def absolute(uri: str) -> str:
    """The URI with a local path made absolute: Ray's workers run in folders of their own."""
    path = local_path(uri)
    return uri.rstrip("/") if path is None else str(path.absolute())


def join(uri: str, *parts: str) -> str:
    """A URI below another one."""
    return posixpath.join(uri.rstrip("/") or "/", *(part.strip("/") for part in parts))


def name(uri: str) -> str:
    """The last part of a URI."""
    return posixpath.basename(uri.rstrip("/"))


def filesystem(uri: str) -> tuple[Any, str]:
    """The fsspec file system of a URI and the path in it."""
    import fsspec

    path = local_path(uri)
    if path is not None:
        return fsspec.filesystem("file", auto_mkdir=True), str(path.absolute())
    protocol, _, inner = uri.partition("://")
    if protocol in ("s3", "s3a"):
        object_store.check_bucket(uri)
        return object_store.filesystem(), inner.rstrip("/")
    try:
        backend, path_in_it = fsspec.core.url_to_fs(uri)
        return backend, str(path_in_it)
    except (ImportError, ValueError) as error:
        raise PistoSegError(
            f"can't be opened: {error}", file=uri, remedy="use a local path or a protocol that fsspec knows, e.g. s3://"
        ) from error


def arrow_filesystem(uri: str) -> tuple[Any, str]:
    """The pyarrow file system of a URI and the path in it, as Ray wants them."""
    import pyarrow.fs as arrow_fs

    path = local_path(uri)
    if path is not None:
        return arrow_fs.LocalFileSystem(), str(path.absolute())
    if _is_s3(uri):
        return object_store.arrow_filesystem(), filesystem(uri)[1]
    backend, inner = filesystem(uri)
    return arrow_fs.PyFileSystem(arrow_fs.FSSpecHandler(backend)), inner


def _is_s3(uri: str) -> bool:
    return uri.startswith(("s3://", "s3a://"))


@_explains
def exists(uri: str) -> bool:
    """Whether a file or folder is there."""
    backend, path = filesystem(uri)
    if not _is_s3(uri):
        return bool(backend.exists(path))
    try:
        backend.info(path)  # of a bucket, `exists` hides why it can't be seen
    except FileNotFoundError:
        return False
    return True


@_explains
def is_dir(uri: str) -> bool:
    """Whether a folder (or prefix) is there."""
    backend, path = filesystem(uri)
    return bool(backend.isdir(path))


@_explains
def info(uri: str) -> dict[str, Any]:
    """What the file system says of a file or folder: `type`, `size`, and more under names of its own."""
    backend, path = filesystem(uri)
    return dict(backend.info(path))


@_explains
def file_size(uri: str) -> int:
    """Bytes in a file."""
    backend, path = filesystem(uri)
    return int(backend.info(path)["size"])


@_explains
def open_file(uri: str, mode: str = "rb") -> IO[Any]:
    """Open one file by its exact name; the folders above it are made when writing."""
    backend, path = filesystem(uri)
    return backend.open(path, mode)


@_explains
def open_parts(uri: str) -> IO[bytes]:
    """Open a file of which little is read, each time in one piece; else object storage's client reads 50 MB ahead."""
    backend, path = filesystem(uri)
    return backend.open(path, "rb", cache_type="none")


@_explains
def read_bytes(uri: str) -> bytes:
    """The whole file."""
    backend, path = filesystem(uri)
    return bytes(backend.cat_file(path))


def read_text(uri: str) -> str:
    """The whole file as UTF-8 text."""
    try:
        return read_bytes(uri).decode("utf-8")
    except UnicodeDecodeError as error:
        raise PistoSegError(f"is not UTF-8 text: {error}", file=uri, remedy="save it as UTF-8") from error


@_explains
def write_bytes(uri: str, data: bytes) -> None:
    """Write a file whole or not at all; what was there stays until the new one is complete."""
    path = local_path(uri)
    if path is None:
        backend, inner = filesystem(uri)
        backend.pipe_file(inner, data)  # an object appears when its upload is complete
        return
    part = _part(path, data)
    try:
        with _writing(path):
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@_explains
def put_file(uri: str, path: Path) -> None:
    """Copy a local file into object storage, where it appears when its upload is complete."""
    backend, inner = filesystem(uri)
    backend.put_file(str(path), inner)


@_explains
def create_bytes(uri: str, data: bytes) -> bool:
    """Write a file that is not there yet, whole; False, and nothing is written, where it is.

    Of several processes that create one file, on whatever machines, one gets True: a hard link on file systems, a
    conditional put (`If-None-Match: *`) on S3.
    """
    path = local_path(uri)
    if path is None:
        backend, inner = filesystem(uri)
        try:
            backend.pipe_file(inner, data, mode="create")
        except OSError as error:
            if not isinstance(error, FileExistsError) and not object_store.is_precondition(error):
                raise
            # A put whose answer was lost is repeated, and then meets what it wrote itself.
            return _is_s3(uri) and read_bytes(uri) == data
        return True
    part = _part(path, data)
    try:
        with _writing(path):
            return _link(part, path, data)
    finally:
        part.unlink(missing_ok=True)


def _link(part: Path, path: Path, data: bytes) -> bool:
    try:
        os.link(part, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        return _create_without_links(path, data)
    return True


def _create_without_links(path: Path, data: bytes) -> bool:
    try:
        file = path.open("xb")
    except FileExistsError:
        return False
    try:
        with file:
            _write_through(file, data)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return True


def _part(path: Path, data: bytes) -> Path:
    """A hidden file with the data, on disk, beside a path."""
    make_folder(path.parent)
    part = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        with _writing(part.parent), part.open("wb") as file:
            _write_through(file, data)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return part


def _write_through(file: IO[bytes], data: bytes) -> None:
    """Write to the disk, whatever loses power then."""
    file.write(data)
    file.flush()
    os.fsync(file.fileno())


def make_folder(path: Path) -> None:
    """Make a local folder and those above it, where they are not there yet.

    Raises:
        UnavailableError: it can't be made.
    """
    with _writing(path):
        path.mkdir(parents=True, exist_ok=True)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Say what to do where a local path can't be written; of reading, every caller has its own to say."""
    try:
        yield
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        raise UnavailableError(
            f"can't be written ({error.strerror})",
            file=str(path),
            remedy="name a folder that you may write to, and that is no file, or mend its rights",
        ) from error


def remove_parts(uri: str) -> None:
    """Delete what `write_bytes` began below a local folder and a kill kept it from finishing.

    Only for a folder that nobody else writes to, but for its hidden folders, in which others make their claims. In
    object storage an upload that was broken off leaves no file.
    """
    path = local_path(uri)
    if path is not None:
        for part in path.rglob(".*.part"):
            if len(part.name) == len(f".{uuid.uuid4().hex}.part") and not part.parent.name.startswith("."):
                part.unlink(missing_ok=True)


@_explains
def list_dir(uri: str) -> list[str]:
    """What is directly in a folder, sorted; an empty list where there is no such folder.

    Raises:
        UnavailableError: it can't be listed.
    """
    backend, path = filesystem(uri)
    if _is_s3(uri):
        found = []
        for page in object_store.pages(backend, path, "/"):
            found += [folder["Prefix"].rstrip("/") for folder in page.get("CommonPrefixes", [])]
            found += [item["Key"] for item in page.get("Contents", []) if not item["Key"].endswith("/")]
        bucket = object_store.split(path)[0]
        return sorted(_uri_like(uri, backend, f"{bucket}/{key}") for key in found)
    try:
        entries = backend.ls(path, detail=False)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        if not is_local(uri):
            raise
        _refuse_unlisted(error)
        return []
    below = (str(entry).rstrip("/") for entry in entries)
    return sorted(_uri_like(uri, backend, entry) for entry in below if entry != path.rstrip("/"))


@_explains
def list_files(uri: str) -> list[str]:
    """Every file below a folder, sorted; hidden files and the second visit of a linked folder are left out.

    Raises:
        UnavailableError: a folder in it can't be listed, of whose files nobody would know.
    """
    path = local_path(uri)
    if path is not None:
        return sorted(_walk(path.absolute()))
    backend, inner = filesystem(uri)
    root = _uri_like(uri, backend, inner.rstrip("/"))
    return sorted(f"{root}/{name}" for name, _, _ in _remote_details(backend, inner, _is_s3(uri)))


def _walk(root: Path) -> list[str]:
    """Files below a folder; of what is there by a name of its own and by links, the names are its own."""
    files: list[str] = []
    seen: set[str] = set()

    def is_new(folder: str) -> bool:  # a link back up would never end
        real, before = os.path.realpath(folder), len(seen)
        seen.add(real)
        return len(seen) > before

    waiting = deque([str(root)])  # links, until all folders that they may lead to were visited
    while waiting:
        top = waiting.popleft()
        if not is_new(top):
            continue
        for folder, folders, names in os.walk(top, onerror=_refuse_unlisted):
            kept = [os.path.join(folder, child) for child in sorted(folders) if not child.startswith(".")]
            waiting += filter(os.path.islink, kept)
            folders[:] = [os.path.basename(path) for path in kept if not os.path.islink(path) and is_new(path)]
            files += [os.path.join(folder, item) for item in names if not item.startswith(".")]
    return files


def _refuse_unlisted(error: OSError) -> None:
    """Raise an error of listing a folder, unless the folder is not there or nobody's data are in it."""
    folder = str(error.filename)
    if isinstance(error, FileNotFoundError | NotADirectoryError) or error.errno == errno.ELOOP:
        return
    if os.path.basename(folder) in _OF_THE_SYSTEM:
        return
    raise UnavailableError(
        f"can't be listed ({error.strerror})",
        file=folder,
        remedy="mend its rights or the disk, or move it away; the same command goes on where this one stopped",
    ) from error


def _uri_like(uri: str, backend: Any, path: str) -> str:
    return path if local_path(uri) is not None else str(backend.unstrip_protocol(path))


@_explains
def remove_tree(uri: str) -> None:
    """Delete a folder and all below it; nothing happens where there is none."""
    path = local_path(uri)
    if path is not None:
        shutil.rmtree(path, ignore_errors=True)
        return
    backend, inner = filesystem(uri)
    if _is_s3(uri):
        object_store.remove_below(backend, inner)
    elif backend.exists(inner):
        for item in backend.find(inner):
            with suppress(FileNotFoundError):  # another process deletes it, too
                backend.rm_file(item)


def iter_details(uri: str) -> Iterator[tuple[str, int, str]]:
    """Relative name, size in bytes and version (modification time or ETag) of every file below a folder.

    Hidden files are left out. They come in the order of their names; of S3 one page at a time is in memory.
    """
    path = local_path(uri)
    if path is not None:
        yield from sorted(_local_details(path.absolute()))
        return
    backend, inner = filesystem(uri)
    try:
        yield from _remote_details(backend, inner, _is_s3(uri))
    except PistoSegError:
        raise
    except Exception as error:
        problem = object_store.explain(error, uri)
        if problem is None:
            raise
        raise problem from error


def list_details(uri: str) -> list[tuple[str, int, str]]:
    """What `iter_details` yields, as a list."""
    return list(iter_details(uri))


def _local_details(root: Path) -> Iterator[tuple[str, int, str]]:
    for item in _walk(root):
        try:
            stat = os.stat(item)
        except OSError:  # a dangling link; whoever opens it says so
            yield os.path.relpath(item, root), -1, ""
        else:
            yield os.path.relpath(item, root), stat.st_size, str(stat.st_mtime_ns)


def _remote_details(backend: Any, path: str, is_s3: bool) -> Iterator[tuple[str, int, str]]:
    below = path.rstrip("/") + "/"
    if is_s3:
        bucket = object_store.split(path)[0]
        for page in object_store.pages(backend, path):
            for item in page.get("Contents", []):
                name = f"{bucket}/{item['Key']}".removeprefix(below)
                if not name.endswith("/") and not _hidden(name):  # servers may list an emptied folder itself
                    yield name, int(item["Size"]), str(item.get("ETag", ""))
        return
    try:
        found = backend.find(path, detail=True)
    except FileNotFoundError:
        return
    tags = ("ETag", "etag", "md5", "mtime", "LastModified", "created")
    for key in sorted(found):
        name, info = key.removeprefix(below), found[key]
        if key.startswith(below) and not _hidden(name):
            yield name, int(info.get("size") or 0), str(next((info[tag] for tag in tags if tag in info), ""))


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


@_explains
def remove_file(uri: str) -> None:
    """Delete one file by its exact name."""
    backend, path = filesystem(uri)
    backend.rm_file(path)
