import os
import signal
import socket
import sys
import threading
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
from ray.exceptions import GetTimeoutError

from pistoseg import storage
from pistoseg.config import ComputeConfig, load_config
from pistoseg.errors import PistoSegError, UnavailableError
from pistoseg.stages import cluster, placement
from pistoseg.stages.cluster import available_cpus, node_threads  # themselves: tests with a local Ray replace them


@pytest.mark.parametrize(
    ("bundles", "nodes", "expected"),
    [
        ([], [], True),
        ([{"CPU": 1}], [], False),
        ([{"CPU": 2}] * 2, [{"CPU": 4}], True),
        ([{"CPU": 3}] * 2, [{"CPU": 4}, {"CPU": 2}], False),  # six CPUs, but not three on each of two nodes
        ([{"CPU": 1, "GPU": 1}] * 2 + [{"CPU": 0.1}], [{"CPU": 2, "GPU": 2}], False),
        ([{"CPU": 1, "GPU": 1}] * 2 + [{"CPU": 0.1}], [{"CPU": 2, "GPU": 2}, {"CPU": 1}], True),
        ([{"CPU": 1}, {"CPU": 1, "GPU": 1}], [{"CPU": 1, "GPU": 1}, {"CPU": 1}], True),  # the CPU bundle leaves the GPU
        ([{"CPU": 0.1}] * 10, [{"CPU": 1}], True),
    ],
)
def test_bundles_are_placed_whole_on_nodes(bundles, nodes, expected):
    assert placement.fits(bundles, nodes) is expected


@pytest.fixture
def nodes(monkeypatch):
    """Pretend that a cluster of some nodes is connected."""

    def make(*resources):
        alive = [{"Alive": True, "Resources": item} for item in resources]
        total = {key: sum(item.get(key, 0) for item in resources) for key in ("CPU", "GPU")}
        monkeypatch.setattr("ray.is_initialized", lambda: True)
        monkeypatch.setattr("ray.nodes", lambda: [*alive, {"Alive": False, "Resources": {"CPU": 64, "GPU": 8}}])
        monkeypatch.setattr("ray.cluster_resources", lambda: total)

    return make


def check(*overrides, stages=("patches", "synthesis", "preliminary", "evaluation")):
    said = []
    placement.check(load_config("demo", overrides=list(overrides)), stages, said.append)
    return said


def test_what_the_cluster_has_is_taken(nodes):
    nodes({"CPU": 2})
    assert check() == []
    nodes({"CPU": 1})  # one CPU: the trainer and the actor that makes samples share it
    check()
    nodes({"CPU": 8}, {"CPU": 8, "GPU": 4})
    check("compute.train_workers=4", "compute.device=cuda", "compute.workers=16")


def test_a_head_without_cpus_takes_no_threads_from_the_other_nodes(nodes):
    nodes({}, {"CPU": 8}, {"CPU": 16})
    assert node_threads() == 8
    nodes({"CPU": 0}, {"CPU": 0, "GPU": 1})
    assert node_threads() == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("compute.device=cuda", r"compute.device: cuda needs a GPU, and the cluster has 6 CPUs and 0 GPUs on 2 nodes"),
        ("compute.workers=7", r"compute.workers: 7 workers need a CPU each.*6 CPUs.*compute.workers=0"),
        ("compute.train_workers=40", r"compute.train_workers: 40 training workers need 0.5 CPU each.*fewer"),
    ],
)
def test_what_the_cluster_has_not_is_said_at_once(nodes, override, message):
    nodes({"CPU": 4}, {"CPU": 2})
    with pytest.raises(UnavailableError, match=message):
        check(override)


def test_more_gpu_workers_than_gpus_are_refused(nodes):
    nodes({"CPU": 16, "GPU": 2})
    check("compute.train_workers=2")
    with pytest.raises(PistoSegError, match=r"3 training workers need 1 CPU and 1 GPU each.*2 GPUs on 1 nodes"):
        check("compute.train_workers=3")
    check("compute.train_workers=3", stages=("evaluation",))  # nothing is trained


@pytest.mark.parametrize(
    ("workers", "there", "trainings"),
    [
        (1, [{"CPU": 16, "GPU": 4}], 4),
        (1, [{"CPU": 4, "GPU": 4}], 3),  # else all CPUs were held by workers that wait for samples
        (2, [{"CPU": 4, "GPU": 4}], 1),
        (1, [{"CPU": 16, "GPU": 16}], 14),
        (1, [{"CPU": 1, "GPU": 1}] * 3 + [{"CPU": 1}], 3),  # samples are made beside them
        (1, [{"CPU": 32}, {"CPU": 2, "GPU": 4}], 2),
        (3, [{"CPU": 16, "GPU": 2}], 0),
    ],
)
def test_trainings_on_gpus_at_a_time_leave_cpus_for_what_makes_their_samples(nodes, workers, there, trainings):
    from pistoseg.search.study import room

    nodes(*there)
    config = load_config("demo", overrides=[f"compute.train_workers={workers}"])
    assert placement.gpu_trainings(config.compute) == trainings
    assert room(config) == max(1, trainings)


def test_nodes_that_an_autoscaler_starts_are_waited_for(nodes, monkeypatch):
    asked = []

    def start(bundles):
        asked.append(bundles)
        nodes({"CPU": 4}, {"CPU": 4})

    monkeypatch.setattr(placement, "_request", start)
    monkeypatch.setattr(placement, "POLL_S", 0.01)
    nodes({"CPU": 4})
    (said,) = check("compute.workers=8", "compute.wait_for_nodes=60")
    assert "waiting up to 60 s for nodes: 8 workers need a CPU each" in said
    assert asked == [[{"CPU": 1}] * 8, []]


def test_a_wait_in_vain_ends(nodes, monkeypatch):
    monkeypatch.setattr(placement, "_request", lambda bundles: None)
    monkeypatch.setattr(placement, "POLL_S", 0.3)
    nodes({"CPU": 4})
    with pytest.raises(PistoSegError, match="8 workers need a CPU each"):
        check("compute.workers=8", "compute.wait_for_nodes=1")


@pytest.fixture
def autoscaler(nodes, monkeypatch):
    """Pretend that a cluster has a head without CPUs, and gets the nodes that are asked for."""

    def start(bundles):
        asked.append(bundles)
        nodes({"CPU": 0}, *({**bundle, "CPU": 8} for bundle in bundles))

    asked = []
    monkeypatch.setattr(placement, "_request", start)
    monkeypatch.setattr(placement, "POLL_S", 0.01)
    nodes({"CPU": 0})
    return asked


def test_a_training_on_cuda_waits_for_the_first_gpu_of_a_cluster_that_is_only_a_head(autoscaler):
    (said,) = check("compute.device=cuda", "compute.wait_for_nodes=60")
    assert "waiting up to 60 s for nodes: cuda needs a GPU, and the cluster has 0 CPUs and 0 GPUs on 1 nodes" in said
    assert autoscaler == [[{"GPU": 1, "CPU": 1}], []]


@pytest.mark.parametrize(("device", "bundle"), [("cuda", {"GPU": 1, "CPU": 1}), ("auto", {"CPU": 1})])
def test_networks_for_slides_wait_for_nodes_and_cuda_gets_a_gpu_for_each(autoscaler, device, bundle):
    compute = ComputeConfig(device=device, wait_for_nodes=60)
    said = []
    placement.check_networks(compute, 8, said.append)
    assert autoscaler == [[bundle] * 8, []]
    assert [text.partition(", and")[0] for text in said] == [
        f"waiting up to 60 s for nodes: 8 networks need {'1 GPU and ' if device == 'cuda' else ''}1 CPU each"
    ]


def test_networks_for_slides_share_what_is_there_where_no_autoscaler_is_said_to_be(nodes, monkeypatch):
    nodes({"CPU": 1})
    placement.check_networks(ComputeConfig(), 8, pytest.fail)
    monkeypatch.setattr(placement, "_request", lambda bundles: None)
    monkeypatch.setattr(placement, "POLL_S", 0.3)
    with pytest.raises(PistoSegError, match=r"--workers: 8 networks need 1 CPU each.*fewer --workers"):
        placement.check_networks(ComputeConfig(wait_for_nodes=1), 8, lambda text: None)


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "max 100000"}, 8),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ({}, 8),
    ],
)
def test_a_containers_limit_of_cpus_counts(tmp_path, monkeypatch, files, cpus):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    monkeypatch.setattr(cluster, "CGROUP", str(tmp_path))
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    assert available_cpus() == cpus


def test_a_containers_limit_of_memory_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "CGROUP", str(tmp_path))
    whole = cluster.available_memory()
    (tmp_path / "memory.max").write_text("1073741824\n")
    assert cluster.available_memory() == 1 << 30 < whole
    (tmp_path / "memory.max").write_text("max\n")
    assert cluster.available_memory() == whole


@pytest.mark.parametrize("address", ["127.0.0.1:9", "ray://127.0.0.1:9", "no-such-host.invalid:6379"])
def test_a_cluster_that_is_not_there_is_said_at_once(address, monkeypatch):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    config = load_config("demo", overrides=[f"compute.address={address}"]).compute
    message = r"compute.address: can't be connected to.*--submit"
    with pytest.raises(PistoSegError, match=message) as caught, cluster.connected(config):
        pass
    assert caught.value.file == address


@pytest.fixture
def listening(monkeypatch):
    """Make a server that answers the first bytes that it gets with some of its own; its address."""
    with ExitStack() as opened:

        def make(answer):
            server = opened.enter_context(socket.create_server(("127.0.0.1", 0)))

            def serve():
                connection, _ = server.accept()
                with connection:
                    got.append(connection.recv(1024))
                    if answer is None:
                        ended.wait()
                    else:
                        connection.sendall(answer)

            thread = threading.Thread(target=serve)
            thread.start()
            opened.callback(thread.join)
            opened.callback(ended.set)
            return f"127.0.0.1:{server.getsockname()[1]}"

        got, ended = [], threading.Event()
        yield make
    assert [sent.startswith(b"PRI * HTTP/2.0") for sent in got] == [True]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "something else than Ray listens there.*--submit"),
        (b"", "something else than Ray listens there"),
        (None, "timed out"),
    ],
    ids=["dashboard", "closes", "silent"],
)
def test_a_server_that_is_not_ray_is_said_in_time(listening, monkeypatch, answer, message):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", lambda **_: pytest.fail("waits for ever"))
    if answer is None:
        monkeypatch.setattr(cluster, "ANSWER_S", 0.5)
    config = load_config("demo", overrides=[f"compute.address={listening(answer)}"]).compute
    refused = pytest.raises(PistoSegError, match=f"compute.address: can't be connected to .{message}")
    with refused, cluster.connected(config):
        pass


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_server_that_answers_as_grpc_does_is_taken(listening, scheme):
    cluster.require_ray(scheme + listening(b"\0\0\6\4\0\0\0\0\0\0\3\0\0\0\1"))


def test_a_dashboard_as_rays_address_is_refused_by_its_scheme(monkeypatch):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")
    message = r"http://127.0.0.1:9: compute.address: is the address of a dashboard.*--submit.*HOST:6379"
    with pytest.raises(PistoSegError, match=message), cluster.connected(load_config("demo").compute):
        pass


@pytest.mark.parametrize("address", ["", "127.0.0.1:9"])
def test_only_of_a_local_ray_the_log_level_is_set(monkeypatch, address):
    rays = ("RAY_BACKEND_LOG_LEVEL", "RAY_ADDRESS")
    monkeypatch.setattr("os.environ", {key: value for key, value in os.environ.items() if key not in rays})
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", lambda **_: None)
    monkeypatch.setattr("ray.shutdown", lambda: None)
    monkeypatch.setattr(cluster, "require_ray", lambda address: None)
    with cluster.connected(load_config("demo", overrides=[f"compute.address={address}"] if address else []).compute):
        assert ("RAY_BACKEND_LOG_LEVEL" in os.environ) == (not address)  # of a cluster, Ray prints a line about it


def test_ray_does_not_take_the_place_of_the_handler_of_sigterm(monkeypatch):
    def ours(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", lambda **_: signal.signal(signal.SIGTERM, lambda *_: sys.exit(1)))
    monkeypatch.setattr("ray.shutdown", lambda: None)
    before = signal.signal(signal.SIGTERM, ours)
    try:
        with cluster.connected(load_config("demo").compute):
            assert signal.getsignal(signal.SIGTERM) is ours
    finally:
        signal.signal(signal.SIGTERM, before)


def test_sigterm_while_ray_starts_is_an_interrupt(monkeypatch):
    def init(**_):
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))  # as Ray does
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", init)

    def ours(*_):
        raise AssertionError

    before = signal.signal(signal.SIGTERM, ours)
    try:
        with pytest.raises(KeyboardInterrupt), cluster.connected(load_config("demo").compute):
            pass
        assert signal.getsignal(signal.SIGTERM) is ours
    finally:
        signal.signal(signal.SIGTERM, before)


class Answers:
    """Stands in for `ray.remote`: each node looks at what its own disk has."""

    def __init__(self, disks):
        self.disks, self.asked = disks, []

    def remote(self, **_):
        return lambda function: self

    def options(self, scheduling_strategy):
        def look(probes):
            self.asked.append(probes)
            sees = self.disks[scheduling_strategy.node_id]
            return [name for name, path in probes.items() if not sees(path)]

        return SimpleNamespace(remote=look)


@pytest.fixture
def disks(monkeypatch):
    def make(**disks):
        alive = [{"Alive": True, "NodeID": name, "NodeManagerHostname": f"host-{name}"} for name in disks]
        answers = Answers(disks)
        monkeypatch.setattr("ray.is_initialized", lambda: True)
        monkeypatch.setattr("ray.nodes", lambda: alive)
        monkeypatch.setattr("ray.get", lambda answer, timeout: answer)
        monkeypatch.setattr(placement.ray, "remote", answers.remote)
        monkeypatch.setattr(
            placement, "NodeAffinitySchedulingStrategy", lambda name, soft: SimpleNamespace(node_id=name)
        )
        return answers

    return make


def test_local_folders_that_all_nodes_see_are_taken_and_left_as_they_were(disks, tmp_path):
    answers = disks(a=os.path.exists, b=os.path.exists)
    (tmp_path / "data").mkdir()
    placement.check_shared(str(tmp_path / "runs"), {"data.uri": str(tmp_path / "data"), "data.validation": None})
    assert len(answers.asked) == 2
    assert list((tmp_path / "runs").iterdir()) == list((tmp_path / "data").iterdir()) == []


def test_a_folder_that_a_node_does_not_see_is_refused_before_the_run(disks, tmp_path):
    (tmp_path / "data").mkdir()
    # The other machine has folders of these names, but they are its own.
    disks(a=os.path.exists, b=lambda path: not path.endswith(".part"))
    with pytest.raises(UnavailableError, match=r"node host-b does not see it.*s3://") as caught:
        placement.check_shared(str(tmp_path / "runs"), {"data.uri": str(tmp_path / "data")})
    assert caught.value.file == str(tmp_path / "runs")
    disks(a=os.path.exists, b=lambda path: path.endswith(".part"))
    with pytest.raises(PistoSegError, match=r"data.uri: node host-b does not see it"):
        placement.check_shared(str(tmp_path / "runs"), {"data.uri": str(tmp_path / "data")})
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_process_on_a_node_that_does_not_see_what_the_driver_does_goes_no_further(tmp_path, monkeypatch):
    read = {name: str(tmp_path / name) for name in ("data.uri", "classifier.weights")}
    for path in read.values():
        storage.write_bytes(path, b"")
    places = placement.local_places(read | {"data.validation": None, "precise.weights": "s3://bucket/x.pth"})
    assert places == read
    placement.require_seen(places)
    (tmp_path / "classifier.weights").unlink()
    monkeypatch.setattr("socket.gethostname", lambda: "host-b")
    with pytest.raises(UnavailableError, match=r"classifier.weights: node host-b does not see it.*s3://") as caught:
        placement.require_seen(places)
    assert caught.value.file == read["classifier.weights"]


def test_every_node_is_asked_though_several_have_one_hosts_name(disks, tmp_path):
    answers = disks(a=lambda path: False, b=os.path.exists)
    for node in placement.ray.nodes():
        node["NodeManagerHostname"] = "host"
    with pytest.raises(PistoSegError, match="node host does not see it"):
        placement.check_shared(str(tmp_path / "runs"), {})
    assert len(answers.asked) == 2


def test_a_node_that_does_not_answer_is_named(disks, tmp_path, monkeypatch):
    disks(a=os.path.exists, b=os.path.exists)

    def get(answer, timeout):
        raise GetTimeoutError

    monkeypatch.setattr("ray.get", get)
    with pytest.raises(PistoSegError, match=r"node host-a did not say in 120 s.*`ray status`"):
        placement.check_shared(str(tmp_path / "runs"), {})
    assert list((tmp_path / "runs").iterdir()) == []


def test_object_storage_and_single_nodes_are_not_asked(disks, tmp_path):
    answers = disks(a=os.path.exists)
    placement.check_shared(str(tmp_path), {})
    answers.disks["b"] = os.path.exists
    placement.check_shared("s3://bucket/runs", {"data.uri": "s3://bucket/data", "--model": str(tmp_path / "none")})
    assert answers.asked == []
