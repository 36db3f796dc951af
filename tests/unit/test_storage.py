import errno
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from pistoseg import storage
from pistoseg.artifacts import Workspace
from pistoseg.errors import PistoSegError, UnavailableError
from pistoseg.tables import open_table

ODD_NAMES = [
    "x-[1, 0, 0].png",
    "a*b?.png",
    "Größe 3 µm 組織.png",
    "with space.png",
    "100%.png",
    "semi;colon#hash.png",
]


@pytest.fixture(params=["local", "file", "memory"])
def root(request, tmp_path):
    if request.param == "memory":
        uri = f"memory://pistoseg-{uuid.uuid4().hex}"
        yield uri
        storage.remove_tree(uri)
    else:
        yield f"file://{tmp_path}" if request.param == "file" else str(tmp_path)


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_file_of_any_name_is_written_listed_read_and_removed(root, name):
    uri = storage.join(root, "folder [1]", name)
    storage.write_bytes(uri, b"first")
    storage.write_bytes(uri, b"second")
    assert storage.read_bytes(uri) == b"second"
    assert storage.file_size(uri) == 6
    assert storage.exists(uri)
    assert not storage.is_dir(uri)
    listed = storage.list_files(root)
    assert [storage.name(item) for item in listed] == [name]
    assert storage.read_bytes(listed[0]) == b"second"
    (child,) = storage.list_dir(storage.join(root, "folder [1]"))
    assert storage.read_bytes(child) == b"second"
    assert [(where, size) for where, size, _ in storage.list_details(root)] == [(f"folder [1]/{name}", 6)]
    storage.remove_file(uri)
    assert not storage.exists(uri)


def test_a_name_with_brackets_does_not_match_other_files(root):
    for name in ("x[01].png", "x0.png", "x1.png"):
        storage.write_bytes(storage.join(root, name), name.encode())
    assert storage.read_bytes(storage.join(root, "x[01].png")) == b"x[01].png"
    storage.remove_file(storage.join(root, "x[01].png"))
    assert [storage.name(item) for item in storage.list_files(root)] == ["x0.png", "x1.png"]


def test_folders_list_their_children_sorted_and_files_recursively(root):
    for name in ("b/2.bin", "b/deep/3.bin", "a.bin", "b/1.bin"):
        storage.write_bytes(storage.join(root, name), b"x")
    assert [storage.name(item) for item in storage.list_dir(root)] == ["a.bin", "b"]
    assert [storage.name(item) for item in storage.list_files(root)] == ["a.bin", "1.bin", "2.bin", "3.bin"]
    assert storage.is_dir(storage.join(root, "b"))
    assert [item[0] for item in storage.list_details(root)] == ["a.bin", "b/1.bin", "b/2.bin", "b/deep/3.bin"]


def test_hidden_files_are_left_out(root):
    for name in (".DS_Store", ".git/config", "seen.png", "a/._seen.png"):
        storage.write_bytes(storage.join(root, name), b"x")
    assert [storage.name(item) for item in storage.list_files(root)] == ["seen.png"]


def test_what_is_not_there(root):
    missing = storage.join(root, "missing")
    assert not storage.exists(missing)
    assert not storage.is_dir(missing)
    assert storage.list_dir(missing) == []
    assert storage.list_files(missing) == []
    storage.remove_tree(missing)
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(missing)


def test_a_tree_is_removed_and_its_neighbours_stay(root):
    for name in ("gone/a/1", "gone/2", "gone-not/3"):
        storage.write_bytes(storage.join(root, name), b"x")
    storage.remove_tree(storage.join(root, "gone"))
    assert [storage.name(item) for item in storage.list_files(root)] == ["3"]


def test_text_must_be_utf8(root):
    uri = storage.join(root, "notes.txt")
    storage.write_bytes(uri, "µ".encode())
    assert storage.read_text(uri) == "µ"
    storage.write_bytes(uri, b"\xff\xfe")
    with pytest.raises(PistoSegError, match="not UTF-8") as caught:
        storage.read_text(uri)
    assert caught.value.file == uri


def test_arrow_reads_and_writes_the_same_files(root):
    file_system, path = storage.arrow_filesystem(storage.join(root, "arrow [1]"))
    file_system.create_dir(path)
    with file_system.open_output_stream(f"{path}/x.bin") as stream:
        stream.write(b"arrow")
    assert storage.read_bytes(storage.join(root, "arrow [1]", "x.bin")) == b"arrow"


def test_a_changed_file_changes_the_details(root):
    uri = storage.join(root, "x.png")
    storage.write_bytes(uri, b"12345")
    before = storage.list_details(root)
    assert storage.list_details(root) == before
    storage.write_bytes(uri, b"54321")
    if file := storage.local_path(uri):
        os.utime(file, ns=(1, 1))  # two writes may come within one tick of the file system's clock
    assert storage.list_details(root) != before


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch, failing):
    uri = str(tmp_path / "model [1].json")
    storage.write_bytes(uri, b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((os, "fsync", full) if failing == "fsync" else (type(tmp_path), "replace", full)))
    with pytest.raises(UnavailableError, match="no space is left"):
        storage.write_bytes(uri, b"new and longer")
    monkeypatch.undo()
    assert storage.read_bytes(uri) == b"old"
    assert os.listdir(tmp_path) == ["model [1].json"]


@pytest.mark.parametrize("write", [storage.write_bytes, storage.create_bytes])
def test_a_place_that_can_not_be_written_is_named_with_what_to_do(tmp_path, write):
    (tmp_path / "file").write_bytes(b"x")
    for place in ("file/x.json", "file/deeper/x.json", f"{'n' * 300}/x.json", f"new/{'n' * 300}"):
        with pytest.raises(UnavailableError, match=r"can't be written \(.*folder that you may write to") as caught:
            write(str(tmp_path / place), b"y")
        assert caught.value.file.startswith(str(tmp_path / place.split("/")[0]))
    assert (tmp_path / "file").read_bytes() == b"x"
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOENT, errno.ESTALE, errno.ENODEV])
def test_a_file_system_that_takes_no_folders_or_is_gone_is_named(tmp_path, monkeypatch, code):
    def refuse(path, *_, **__):
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(type(tmp_path), "mkdir", refuse)
    with pytest.raises(UnavailableError, match=r"can't be written \(.*folder that you may write to") as caught:
        storage.write_bytes(str(tmp_path / "new" / "x.json"), b"y")
    assert caught.value.file == str(tmp_path / "new")


def test_a_disk_that_only_reads_is_named_without_the_name_of_a_part(tmp_path, monkeypatch):
    def refuse(path, *_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UnavailableError, match="Read-only file system") as caught:
        storage.write_bytes(str(tmp_path / "x.json"), b"x")
    assert caught.value.file == str(tmp_path)


def test_what_lies_below_a_file_is_not_there(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(NotADirectoryError):
        storage.read_bytes(str(tmp_path / "file" / "x.json"))
    assert Workspace(str(tmp_path / "file")).find("patches", "0" * 16) is None


def test_links_in_a_circle_end(tmp_path):
    inner = tmp_path / "data" / "inner"
    inner.mkdir(parents=True)
    (inner / "x.png").write_bytes(b"x")
    (inner / "up").symlink_to(tmp_path / "data")
    (inner / "self").symlink_to(inner)
    (tmp_path / "data" / "dangling.png").symlink_to(tmp_path / "nowhere")
    names = [os.path.relpath(item, tmp_path / "data") for item in storage.list_files(str(tmp_path / "data"))]
    assert names == ["dangling.png", "inner/x.png"]
    details = storage.list_details(str(tmp_path / "data"))
    assert [item[:2] for item in details] == [("dangling.png", -1), ("inner/x.png", 1)]


def unlistable(monkeypatch, folder, number):
    """Let a disk not list a folder, as it would for root, too."""
    scandir = os.scandir

    def failing(path):
        if str(path) == str(folder):
            raise OSError(number, os.strerror(number), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", failing)


@pytest.mark.parametrize("reason", [errno.EACCES, errno.EIO])
@pytest.mark.parametrize("ask", [storage.list_files, storage.list_details])
def test_a_folder_that_can_not_be_listed_is_named_and_not_left_out(tmp_path, monkeypatch, reason, ask):
    for name in ("seen", "closed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(b"x")
    unlistable(monkeypatch, tmp_path / "closed", reason)
    with pytest.raises(UnavailableError, match=r"can't be listed .*Remedy") as caught:
        ask(str(tmp_path))
    assert caught.value.file == str(tmp_path / "closed")


def test_a_folder_that_can_not_be_listed_is_named_where_its_children_are_asked_for(tmp_path, monkeypatch):
    unlistable(monkeypatch, tmp_path, errno.EACCES)
    with pytest.raises(UnavailableError, match=r"can't be listed .*Remedy") as caught:
        storage.list_dir(str(tmp_path))
    assert caught.value.file == str(tmp_path)


def test_a_link_to_itself_is_no_folder_and_no_file(tmp_path):
    for name in ("loop", "loop.csv"):
        (tmp_path / name).symlink_to(tmp_path / name)
    assert storage.list_dir(str(tmp_path / "loop")) == []
    with pytest.raises(PistoSegError, match=r"loop.csv: cannot be read .*levels of symbolic links") as caught:
        open_table(str(tmp_path / "loop.csv"))
    assert not isinstance(caught.value, UnavailableError)


@pytest.mark.parametrize(("name", "reason"), [("vanished", errno.ENOENT), ("lost+found", errno.EACCES)])
def test_a_folder_that_vanishes_or_is_the_systems_is_left_out(tmp_path, monkeypatch, name, reason):
    (tmp_path / name).mkdir()
    (tmp_path / "x.png").write_bytes(b"x")
    unlistable(monkeypatch, tmp_path / name, reason)
    assert storage.list_files(str(tmp_path)) == [str(tmp_path / "x.png")]


def test_a_linked_folder_is_followed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.png").write_bytes(b"x")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    assert storage.list_files(str(tmp_path / "data")) == [str(tmp_path / "data" / "link" / "x.png")]


@pytest.mark.parametrize("target", ["tumor", "deep/tumor"])
def test_what_is_there_by_its_own_name_and_by_a_link_is_listed_by_its_own(tmp_path, target):
    folder = tmp_path / "data" / target
    folder.mkdir(parents=True)
    (folder / "x.png").write_bytes(b"x")
    for link in ("a_link", "z_link", "other/link"):
        (tmp_path / "data" / link).parent.mkdir(exist_ok=True)
        (tmp_path / "data" / link).symlink_to(folder)
    assert storage.list_files(str(tmp_path / "data")) == [str(folder / "x.png")]


def test_uris_are_joined_by_their_parts():
    assert storage.join("s3://bucket/a/", "/b/", "c d.png") == "s3://bucket/a/b/c d.png"
    assert storage.join("/", "a") == "/a"
    assert storage.name("s3://bucket/a/b/") == "b"
    assert storage.local_path("s3://bucket/a") is None
    assert str(storage.local_path("file:///tmp/x")) == "/tmp/x"


def test_relative_paths_become_absolute_and_uris_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("runs/mine") == str(tmp_path / "runs" / "mine")
    assert storage.absolute("s3://bucket/runs/") == "s3://bucket/runs"


def test_an_unknown_protocol_is_an_error_of_the_user():
    with pytest.raises(PistoSegError, match=r"can't be opened.*s3://"):
        storage.exists("gopher://host/data")


def test_files_that_a_kill_left_half_written_are_swept_and_no_others(tmp_path):
    folder = tmp_path / "a [1]"
    code = (
        "import os, signal; from pistoseg import storage; real = os.fsync\n"
        "os.fsync = lambda number: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"storage.write_bytes({str(folder / 'below' / 'part-00001.parquet')!r}, b'half')"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    (left,) = (item for item in folder.rglob("*") if item.is_file())
    assert left.name.endswith(".part")
    for name in ("part-00000.parquet", ".hidden", ".slide.0123abcd.part"):
        storage.write_bytes(str(folder / "below" / name), b"whole")
    storage.remove_parts(str(folder))
    found = {item.name for item in folder.rglob("*") if item.is_file()}
    assert found == {"part-00000.parquet", ".hidden", ".slide.0123abcd.part"}
    storage.remove_parts(str(tmp_path / "nowhere"))
    storage.remove_parts("memory://nowhere")
