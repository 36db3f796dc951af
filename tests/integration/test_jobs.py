"""Jobs on a Ray of one node with a dashboard and token authentication."""

import os
import secrets
import signal
import subprocess
import sys

import pytest
from conftest import committed
from processes import STUCK_S, command_line, descendants, wait_for

pytestmark = pytest.mark.processes
EQUAL = {"RAY_worker_niceness": "0"}  # see conftest.py
COUNT = 6000  # mosaics, enough that some are made and some are not when the driver is killed

CLUSTER = """
import sys
import ray
from ray.cluster_utils import Cluster
from pistoseg.local_cluster import free_ports
port, = free_ports(1)  # jobs are taken by an agent whose port is the same in every Ray of a machine
head = {"num_cpus": 2, "object_store_memory": 300_000_000, "include_dashboard": True, "dashboard_port": 0}
cluster = Cluster(initialize_head=True, head_node_args={**head, "dashboard_agent_listen_port": port})
print(ray.init(address=cluster.address).dashboard_url, flush=True)
sys.stdin.read()
ray.shutdown()
cluster.shutdown()
"""


@pytest.fixture(scope="module")
def cluster():
    """Address of the dashboard, the environment with the token, and the process that everything is started by."""
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16), "RAY_USAGE_STATS_ENABLED": "0"}
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | token | EQUAL
    with subprocess.Popen(
        [sys.executable, "-c", CLUSTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        url = process.stdout.readline().strip()
        assert url, "Ray did not start"
        yield f"http://{url}", environment, process.pid
        process.stdin.close()
        process.wait(STUCK_S)


def pistoseg(environment, *arguments, cwd):
    command = [sys.executable, "-m", "pistoseg", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=STUCK_S, env=environment, cwd=cwd, check=False
    )


def test_a_job_whose_driver_is_killed_goes_on_when_it_is_submitted_again(cluster, cohort, tiny, tmp_path):
    address, environment, head = cluster
    command = ["synthesize", "--config", str(tiny), "--data", str(cohort), "--workspace", "work", "--submit", address]
    command += ["--set", f"synthesis.count={COUNT}"]
    with subprocess.Popen(
        [sys.executable, "-m", "pistoseg", *command], env=environment, cwd=tmp_path, stdout=subprocess.PIPE, text=True
    ) as first:
        wait_for(lambda: len(parts(tmp_path)) >= 2 or first.poll() is not None)
        (driver,) = (pid for pid in descendants(head) if b"-m\0pistoseg\0synthesize" in command_line(pid))
        os.kill(driver, signal.SIGKILL)
        first.communicate(timeout=STUCK_S)
    assert first.returncode == 128 + signal.SIGKILL
    done = parts(tmp_path)
    assert "synthesis" not in committed(tmp_path / "work")

    second = pistoseg(environment, *command, cwd=tmp_path)
    assert second.returncode == 0, second.stdout[-3000:] + second.stderr[-3000:]
    assert "submitted pistoseg-synthesize-" in second.stderr
    assert "Making mosaics: done" in second.stdout
    assert sorted(committed(tmp_path / "work")) == ["patches", "synthesis"]
    assert {name: parts(tmp_path)[name] for name in done} == done, "what was made before is not made again"
    assert environment["RAY_AUTH_TOKEN"] not in second.stdout + second.stderr


def parts(folder):
    """Modification times of the mosaics' files by name."""
    return {file.name: file.stat().st_mtime_ns for file in folder.glob("work/synthesis/*/mosaics/part-*.parquet")}


def test_what_is_wrong_in_a_job_comes_back_with_its_exit_code(cluster, tmp_path):
    address, environment, _ = cluster
    command = ["train", "--preset", "demo", "--data", "nowhere", "--workspace", "work", "--submit", address]
    call = pistoseg(environment, *command, cwd=tmp_path)
    assert call.returncode == 2
    assert f"{tmp_path / 'nowhere'}: data.uri: does not exist" in call.stdout


def test_a_wrong_token_is_refused_with_the_remedy(cluster, tmp_path):
    address, environment, _ = cluster
    other = environment | {"RAY_AUTH_TOKEN": secrets.token_hex(16)}
    command = ["train", "--preset", "demo", "--data", "/d", "--workspace", "/w", "--submit", address]
    call = pistoseg(other, *command, cwd=tmp_path)
    assert call.returncode == 2
    assert "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN" in call.stderr
