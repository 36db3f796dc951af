"""Files on any file system: local paths and every fsspec URI, by exact name and written whole or not at all.

Names with brackets are ordinary here. fsspec's `cat`, `get`, `put` and `rm` read brackets as globs, so only its exact
calls (`open`, `info`, `find`, `ls`, `rm_file`) are used.
"""

from __future__ import annotations

import os
import posixpath
import shutil
import uuid
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pistoseg.errors import PistoSegError

if TYPE_CHECKING:
    import pyarrow as pa


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
    if uri.startswith("s3://"):
        return arrow_fs.FileSystem.from_uri(uri)  # reads AWS_* from the environment, endpoint included
    backend, inner = filesystem(uri)
    return arrow_fs.PyFileSystem(arrow_fs.FSSpecHandler(backend)), inner


def exists(uri: str) -> bool:
    """Whether a file or folder is there."""
    backend, path = filesystem(uri)
    return bool(backend.exists(path))


def is_dir(uri: str) -> bool:
    """Whether a folder (or prefix) is there."""
    backend, path = filesystem(uri)
    return bool(backend.isdir(path))


def file_size(uri: str) -> int:
    """Bytes in a file."""
    backend, path = filesystem(uri)
    return int(backend.info(path)["size"])


def open_file(uri: str, mode: str = "rb") -> IO[Any]:
    """Open one file by its exact name; the folders above it are made when writing."""
    backend, path = filesystem(uri)
    return backend.open(path, mode)


def read_bytes(uri: str) -> bytes:
    """The whole file."""
    with open_file(uri) as file:
        return bytes(file.read())


def read_text(uri: str) -> str:
    """The whole file as UTF-8 text."""
    try:
        return read_bytes(uri).decode("utf-8")
    except UnicodeDecodeError as error:
        raise PistoSegError(f"is not UTF-8 text: {error}", file=uri, remedy="save it as UTF-8") from error


def write_bytes(uri: str, data: bytes) -> None:
    """Write a file whole or not at all; what was there stays until the new one is complete."""
    path = local_path(uri)
    if path is None:
        with open_file(uri, "wb") as file:  # an object appears when its upload is complete
            file.write(data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def remove_parts(uri: str) -> None:
    """Delete what `write_bytes` began below a local folder and a kill kept it from finishing.

    Only for a folder that nobody else writes to. In object storage an upload that was broken off leaves no file.
    """
    path = local_path(uri)
    if path is not None:
        for part in path.rglob(".*.part"):
            if len(part.name) == len(f".{uuid.uuid4().hex}.part"):
                part.unlink(missing_ok=True)


def list_dir(uri: str) -> list[str]:
    """What is directly in a folder, sorted; an empty list where there is no such folder."""
    backend, path = filesystem(uri)
    try:
        entries = backend.ls(path, detail=False)
    except (FileNotFoundError, NotADirectoryError):
        return []
    below = (str(entry).rstrip("/") for entry in entries)
    return sorted(_uri_like(uri, backend, entry) for entry in below if entry != path.rstrip("/"))


def list_files(uri: str) -> list[str]:
    """Every file below a folder, sorted; hidden files and the second visit of a linked folder are left out."""
    path = local_path(uri)
    if path is not None:
        return sorted(_walk(path.absolute()))
    backend, inner = filesystem(uri)
    try:
        found = backend.find(inner)
    except FileNotFoundError:
        return []
    below = inner.rstrip("/") + "/"
    inside = (item for item in found if item.startswith(below))  # S3 servers may list an emptied folder itself
    visible = (item for item in inside if not any(part.startswith(".") for part in item[len(below) :].split("/")))
    return sorted(_uri_like(uri, backend, item) for item in visible)


def _walk(root: Path) -> list[str]:
    files: list[str] = []
    seen = {os.path.realpath(root)}
    for folder, folders, names in os.walk(root, followlinks=True):
        kept = []
        for child in sorted(folders):
            real = os.path.realpath(os.path.join(folder, child))
            if not child.startswith(".") and real not in seen:  # a link back up would never end
                seen.add(real)
                kept.append(child)
        folders[:] = kept
        files += [os.path.join(folder, item) for item in names if not item.startswith(".")]
    return files


def _uri_like(uri: str, backend: Any, path: str) -> str:
    return path if local_path(uri) is not None else str(backend.unstrip_protocol(path))


def remove_tree(uri: str) -> None:
    """Delete a folder and all below it; nothing happens where there is none."""
    path = local_path(uri)
    if path is not None:
        shutil.rmtree(path, ignore_errors=True)
        return
    backend, inner = filesystem(uri)
    if backend.exists(inner):
        for item in backend.find(inner):
            backend.rm_file(item)


def read_parquet(uri: str, columns: list[str] | None = None) -> pa.Table:
    """A Parquet file, or all `.parquet` files of a folder in the order of their names, as one table."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = [item for item in list_files(uri) if item.endswith(".parquet")] if is_dir(uri) else [uri]
    if not files:
        raise PistoSegError("has no Parquet files", file=uri)
    tables = []
    for item in files:
        with open_file(item) as file:
            tables.append(pq.read_table(file, columns=columns))
    return pa.concat_tables(tables)


def write_parquet(table: pa.Table, uri: str, row_group_size: int = 256) -> None:
    """Write a table whole or not at all, zstd-compressed."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", row_group_size=row_group_size)
    write_bytes(uri, sink.getvalue().to_pybytes())


def list_details(uri: str) -> list[tuple[str, int, str]]:
    """Relative name, size in bytes and version (modification time or ETag) of every file below a folder, sorted."""
    path = local_path(uri)
    if path is not None:
        root = path.absolute()
        found = []
        for item in _walk(root):
            try:
                stat = os.stat(item)
            except OSError:  # a dangling link; whoever opens it says so
                found.append((os.path.relpath(item, root), -1, ""))
            else:
                found.append((os.path.relpath(item, root), stat.st_size, str(stat.st_mtime_ns)))
        return sorted(found)
    backend, inner = filesystem(uri)
    below = inner.rstrip("/") + "/"
    details = backend.find(inner, detail=True).items()
    tags = ("ETag", "etag", "md5", "mtime", "LastModified", "created")
    return sorted(
        (key.removeprefix(below), int(info.get("size") or 0), str(next((info[tag] for tag in tags if tag in info), "")))
        for key, info in details
        if key.startswith(below)
    )


def remove_file(uri: str) -> None:
    """Delete one file by its exact name."""
    backend, path = filesystem(uri)
    backend.rm_file(path)
