"""Jobs on a Ray of one node with a dashboard and token authentication."""

import os
import secrets
import subprocess
import sys

import pytest
from conftest import committed

pytestmark = pytest.mark.processes

CLUSTER = """
import socket
import sys
import ray
from ray.cluster_utils import Cluster
with socket.socket() as free:  # jobs are taken by an agent whose port is the same in every Ray of a machine
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
head = {"num_cpus": 2, "object_store_memory": 300_000_000, "include_dashboard": True, "dashboard_port": 0}
cluster = Cluster(initialize_head=True, head_node_args={**head, "dashboard_agent_listen_port": port})
print(ray.init(address=cluster.address).dashboard_url, flush=True)
sys.stdin.read()
ray.shutdown()
cluster.shutdown()
"""


@pytest.fixture(scope="module")
def cluster():
    """Address of the dashboard and the environment with the token."""
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16), "RAY_USAGE_STATS_ENABLED": "0"}
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | token
    with subprocess.Popen(
        [sys.executable, "-c", CLUSTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        url = process.stdout.readline().strip()
        assert url, "Ray did not start"
        yield f"http://{url}", environment
        process.stdin.close()
        process.wait(120)


def pistoseg(environment, *arguments, cwd):
    command = [sys.executable, "-m", "pistoseg", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment, cwd=cwd, check=False)


def test_a_verb_runs_as_a_job_with_a_token_and_again_for_nothing(cluster, cohort, tiny, tmp_path):
    address, environment = cluster
    command = ["synthesize", "--config", str(tiny), "--data", str(cohort), "--workspace", "work", "--submit", address]
    first = pistoseg(environment, *command, cwd=tmp_path)
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    assert "submitted pistoseg-synthesize-" in first.stderr
    assert "Making mosaics: done" in first.stdout
    made = committed(tmp_path / "work")
    assert sorted(made) == ["patches", "synthesis"]
    assert environment["RAY_AUTH_TOKEN"] not in first.stdout + first.stderr
    second = pistoseg(environment, *command, cwd=tmp_path)
    assert second.returncode == 0
    assert second.stdout.count("up to date, reused") == 2


def test_what_is_wrong_in_a_job_comes_back_with_its_exit_code(cluster, tmp_path):
    address, environment = cluster
    command = ["train", "--preset", "demo", "--data", "nowhere", "--workspace", "work", "--submit", address]
    call = pistoseg(environment, *command, cwd=tmp_path)
    assert call.returncode == 2
    assert f"{tmp_path / 'nowhere'}: data.uri: does not exist" in call.stdout


def test_a_wrong_token_is_refused_with_the_remedy(cluster, tmp_path):
    address, environment = cluster
    other = environment | {"RAY_AUTH_TOKEN": secrets.token_hex(16)}
    command = ["train", "--preset", "demo", "--data", "/d", "--workspace", "/w", "--submit", address]
    call = pistoseg(other, *command, cwd=tmp_path)
    assert call.returncode == 2
    assert "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN" in call.stderr
