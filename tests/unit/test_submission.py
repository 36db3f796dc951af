import contextlib
import errno
import io
import json
import os
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import aiohttp
import pytest
import yaml
from processes import STUCK_S
from ray.exceptions import RpcError

from pistoseg import submission
from pistoseg.cli import build_parser, main
from pistoseg.config import load_config
from pistoseg.errors import PistoSegError
from pistoseg.job_package import package
from pistoseg.printing import browse_lines

HEAD = "http://head:8265"
DATA = ["--data", "s3://bucket/data", "--workspace", "s3://bucket/runs"]


def packaged(folder, *arguments, address=HEAD):
    given = [*arguments, "--submit", address]
    return package(given, build_parser().parse_args(given), folder, submission.is_this_machine(address))


def test_the_package_and_the_resolved_settings_travel(tmp_path):
    folder, config = tmp_path / "job", tmp_path / "my.yaml"
    folder.mkdir()
    (tmp_path / "classes.yaml").write_text("classes: [{name: a, color: [1, 2, 3]}, {name: b, color: [4, 5, 6]}]")
    config.write_text(f"preset: glas\nseed: 7\nclasses: {tmp_path / 'classes.yaml'}\n")
    command = packaged(folder, "train", "--config", str(config), "--set", "precise.lr=0.5", *DATA, "--workers", "3")
    assert command == ["train", *DATA, "--workers", "3", "--config", "job.yaml"]
    assert (folder / "pistoseg" / "presets" / "glas.yaml").exists()
    assert not list(folder.rglob("__pycache__"))
    inside = load_config(file=str(folder / "job.yaml"))
    assert (inside.seed, inside.precise.lr) == (7, 0.5)
    assert [tissue.name for tissue in inside.classes.classes] == ["a", "b"]
    # What travelled is enough to run the verb: nothing of the checkout is needed.
    call = [sys.executable, "-m", "pistoseg", "config", "show", "--config", "job.yaml"]
    shown = subprocess.run(call, capture_output=True, cwd=folder, env={"PATH": ""}, timeout=STUCK_S, check=True)
    assert yaml.safe_load(shown.stdout)["seed"] == 7


def test_data_of_the_command_line_goes_before_what_the_settings_name(tmp_path):
    config = tmp_path / "my.yaml"
    config.write_text("preset: demo\ndata: {uri: cohort}\n")
    (tmp_path / "job").mkdir()
    command = packaged(tmp_path / "job", "train", "--config", str(config), *DATA)
    assert command == ["train", *DATA, "--config", "job.yaml"]
    assert load_config(file=str(tmp_path / "job" / "job.yaml")).data.uri == "s3://bucket/data"


def test_settings_in_object_storage_are_read_by_the_job(tmp_path):
    command = packaged(tmp_path, "train", "--config", "s3://bucket/config.yaml", "--set", "seed=4", *DATA)
    assert command == ["train", "--config", "s3://bucket/config.yaml", "--set", "seed=4", *DATA]
    assert not (tmp_path / "job.yaml").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--data", "cohort", "--workspace", "s3://bucket/runs"],
        ["train", "--data", "s3://bucket/data"],  # the default workspace is a folder of this machine
        ["train", *DATA, "--set", "classifier.weights=./resnet38d.pth"],
        ["ablate", "table1", *DATA, "--out=tables"],
        ["segment", "--model", "runs/bundle", "--slides", "s3://b/slides", "--out", "s3://b/maps"],
        ["evaluate", "--model", "s3://b/model", "--data=images", "--out", "s3://b/scores"],
        ["evaluate", "--stage", "all", "--data", "s3://b/masks"],
        ["synthesize", *DATA, "--preview", "16"],  # the default sheet is a file of the job's folder
        ["train", "--config", "s3://b/c.yaml", *DATA[2:], "--set", "data.uri=cohort"],
        ["train", "--config", "s3://b/c.yaml", *DATA, "--set=precise.weights=./enc.pth"],
    ],
)
def test_what_the_cluster_can_not_reach_is_refused(arguments, tmp_path):
    with pytest.raises(PistoSegError, match=r"on this machine.*give a URI.*or the absolute path"):
        packaged(tmp_path, *arguments)


@pytest.mark.parametrize("settings", [["--preset", "demo"], ["--config", "s3://bucket/config.yaml"]])
def test_a_database_of_this_machine_is_no_tracking_server_for_a_cluster(settings, tmp_path):
    given = ["train", *settings, *DATA, "--set", "tracking.uri=sqlite:///ml.db"]
    with pytest.raises(PistoSegError, match=r"tracking.uri: is on this machine.*MLFLOW_TRACKING_URI"):
        packaged(tmp_path / "first", *given)
    given[-1] = "tracking.uri=sqlite:////share/ml.db"
    packaged(tmp_path / "second", *given)


def test_a_file_of_classes_travels_beside_settings_in_object_storage(tmp_path):
    (tmp_path / "mine.yaml").write_text("classes: []")
    (tmp_path / "job").mkdir()
    where = ["train", "--config", "s3://bucket/config.yaml", *DATA]
    command = packaged(tmp_path / "job", *where, "--set", f"classes={tmp_path / 'mine.yaml'}", "--set", "seed=4")
    assert command == [*where, "--set", 'classes="classes.yaml"', "--set", "seed=4"]
    assert (tmp_path / "job" / "classes.yaml").read_text() == "classes: []"


def test_a_small_file_travels_with_the_job(tmp_path):
    (tmp_path / "job").mkdir()
    (tmp_path / "mine.yaml").write_text("classes: []")
    where = ["--model", "s3://b/model", "--data", "s3://b/test", "--out", "s3://b/scores"]
    command = packaged(tmp_path / "job", "evaluate", *where, "--classes", str(tmp_path / "mine.yaml"))
    assert command == ["evaluate", *where, "--classes", "classes.yaml"]
    assert (tmp_path / "job" / "classes.yaml").read_text() == "classes: []"


def test_shares_and_registered_models_are_taken_as_they_are(tmp_path):
    command = ["segment", "--model", "models:/pistoseg@best", "--slides", "/share/slides", "--out=/share/maps"]
    assert packaged(tmp_path, *command) == command


def test_a_container_or_a_user_in_a_uri_is_no_credential(tmp_path):
    command = [
        "segment",
        "--model",
        "abfs://c@account/m",
        "--slides",
        "sftp://me@host/slides",
        "--out",
        "hdfs://u@nn/o",
    ]
    assert packaged(tmp_path, *command) == command


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "localhost:8265", "auto"])
def test_a_cluster_on_this_machine_gets_absolute_paths(tmp_path, monkeypatch, address):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(submission, "_head_ip", lambda address: "127.0.0.1")
    (tmp_path / "job").mkdir()
    command = packaged(tmp_path / "job", "train", "--data", "cohort", address=address)
    expected = [
        "train",
        "--data",
        f"{tmp_path}/cohort",
        "--config",
        "job.yaml",
        "--workspace",
        f"{tmp_path}/runs/pistoseg",
    ]
    assert command == expected


def test_the_cluster_at_the_far_end_of_a_tunnel_is_not_on_this_machine(cluster, tmp_path, monkeypatch, capsys):
    made = cluster(0)
    monkeypatch.setattr(submission, "_head_ip", lambda address: "192.0.2.7")  # of no machine: RFC 5737
    command = ["train", "--preset", "demo", "--workspace", "s3://bucket/runs", "--submit", "http://127.0.0.1:8265"]
    assert main([*command, "--data", "cohort"]) == 2
    assert "cohort: --data: is on this machine, where the cluster can't reach it" in capsys.readouterr().err
    assert made.submitted is None
    assert main([*command, "--data", "s3://bucket/data"]) == 0
    assert made.submitted["entrypoint"].startswith("python -m pistoseg train ")


def test_a_head_that_was_started_anew_is_where_it_is_now(cluster, monkeypatch):
    def list_nodes(address, filters):
        assert filters == [("is_head_node", "=", True)]  # by state, Ray's raises where a node is dead
        heads = [("DEAD", "192.0.2.7"), ("ALIVE", "192.0.2.8"), ("DEAD", "192.0.2.9")]
        return [SimpleNamespace(state=state, node_ip=ip) for state, ip in heads]

    cluster(0)
    monkeypatch.setattr("ray.util.state.list_nodes", list_nodes)
    assert submission._head_ip("http://127.0.0.1:8265") == "192.0.2.8"


def test_places_in_settings_are_absolute_for_a_cluster_on_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job").mkdir()
    places = ["precise.weights=./enc.pth", "tracking.uri=sqlite:///ml.db", "data.validation=val"]
    overrides = [word for place in places for word in ("--set", place)]
    packaged(tmp_path / "job", "train", "--preset", "demo", "--data", "s3://b/data", *overrides, address="auto")
    inside = load_config(file=str(tmp_path / "job" / "job.yaml"))
    expected = (f"{tmp_path}/enc.pth", f"sqlite:///{tmp_path}/ml.db", f"{tmp_path}/val")
    assert (inside.precise.weights, inside.tracking.uri, inside.data.validation) == expected
    assert inside.preliminary.weights == load_config("demo").preliminary.weights
    # The same beside settings that only the job can read.
    command = packaged(tmp_path / "other", "train", "--config", "s3://b/c.yaml", *overrides, address="auto")
    values = [word for before, word in pairwise(command) if before == "--set"]
    inside = load_config("demo", overrides=values)
    assert (inside.precise.weights, inside.tracking.uri, inside.data.validation) == expected


@pytest.mark.parametrize(
    ("arguments", "added"),
    [
        (["segment", "--model", "models:/m@best", "--slides", "s3://b/s", "--out", "s3://b/o"], "--workspace"),
        (["evaluate", "--stage", "all", "--data", "s3://b/masks"], "--workspace"),
        (["evaluate", "--model", "models:/m@best", "--data", "s3://b/t", "--out", "s3://b/o"], "--workspace"),
        (["synthesize", "--config", "s3://b/c.yaml", "--preview", "4", "--workspace", "s3://b/runs"], "--out"),
    ],
)
def test_a_job_on_this_machine_finds_the_default_places_where_the_command_has_them(
    tmp_path, monkeypatch, arguments, added
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job").mkdir()
    default = {"--workspace": "runs/pistoseg", "--out": "mosaics.png"}[added]
    command = packaged(tmp_path / "job", *arguments, address="auto")
    assert command == [*arguments, added, str(tmp_path / default)]


def test_a_job_on_this_machine_that_segments_by_a_workspaces_model_has_its_run_there(tmp_path):
    (tmp_path / "w" / "precise").mkdir(parents=True)
    (tmp_path / "job").mkdir()
    arguments = ["segment", "--model", str(tmp_path / "w"), "--slides", "s3://b/s", "--out", "s3://b/o"]
    command = packaged(tmp_path / "job", *arguments, address="auto")
    assert command == [*arguments, "--workspace", str(tmp_path / "w")]


def test_credentials_do_not_become_part_of_a_job(tmp_path):
    with pytest.raises(PistoSegError, match="holds credentials") as caught:
        packaged(tmp_path, "train", "--data", "s3://me:hunter2@bucket/data", "--workspace", "s3://bucket/runs")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "section"),
    [
        ("data.validation", "data: {validation: 's3://me:hunter2@bucket/v'}"),
        ("tracking.uri", "tracking: {uri: 'http://me:hunter2@mlflow:5000'}"),
        ("precise.weights", "precise: {weights: 'https://host/b0.pth?X-Amz-Signature=hunter2'}"),
        ("data.table", "data: {table: 'https://host/windows.csv?token=hunter2'}"),
    ],
)
def test_credentials_in_settings_do_not_become_part_of_a_job(tmp_path, field, section):
    (tmp_path / "c.yaml").write_text(f"preset: demo\n{section}")
    with pytest.raises(PistoSegError, match=f"{field}: holds credentials") as caught:
        packaged(tmp_path / "job", "train", "--config", str(tmp_path / "c.yaml"), *DATA)
    assert "hunter2" not in str(caught.value)
    assert not (tmp_path / "job" / "job.yaml").exists()


def test_wrong_settings_are_refused_before_anything_is_submitted(tmp_path):
    with pytest.raises(PistoSegError, match="alpha"):
        packaged(tmp_path, "train", *DATA, "--set", "synthesis.alpha=3")


class Cluster:
    """Stands in for a dashboard: a log that breaks off once, and the end of the job."""

    def __init__(self, exit_code, breaks=1):
        self.exit_code, self.breaks, self.submitted = exit_code, breaks, None
        self.error = RuntimeError("WebSocket connection closed unexpectedly")

    def submit_job(self, **job):
        self.submitted = job
        self.files = sorted(item.name for item in Path(job["runtime_env"]["working_dir"]).iterdir())
        return job["submission_id"]

    async def tail_job_logs(self, job):
        yield "one\ntw"
        if self.breaks:
            self.breaks -= 1
            raise self.error
        yield "o\nthree\n"

    def get_job_info(self, job):
        from ray.job_submission import JobStatus

        status = JobStatus.FAILED if self.exit_code else JobStatus.SUCCEEDED
        code = None if self.exit_code == "lost" else self.exit_code
        return SimpleNamespace(status=status, driver_exit_code=code, message="Job supervisor\nactor died")


@pytest.fixture
def cluster(monkeypatch):
    def make(exit_code):
        made = Cluster(exit_code)
        monkeypatch.setattr(submission, "_client", lambda address: made)
        monkeypatch.setattr(submission, "POLL_S", 0.01)
        return made

    return make


def test_a_job_names_no_place_of_its_runs_that_goes_with_its_folder(cluster, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config, made = load_config("demo"), cluster(0)
    assert list(browse_lines(config, "memory://runs")) == ["browse:  pistoseg ui --workspace memory://runs"]
    main(["train", "--preset", "demo", *DATA, "--submit", HEAD])
    for name, value in made.submitted["runtime_env"]["env_vars"].items():
        monkeypatch.setenv(name, value)
    assert list(browse_lines(config, "memory://runs")) == []
    assert list(browse_lines(config, "/shared/runs")) == ["browse:  pistoseg ui --workspace /shared/runs"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert list(browse_lines(config, "memory://runs")) == ["browse:  pistoseg ui --workspace memory://runs"]


@pytest.mark.parametrize("code", [0, 2, 3])
def test_the_log_is_shown_once_and_the_jobs_exit_code_is_returned(cluster, capsys, code):
    made = cluster(code)
    assert main(["train", "--preset", "demo", *DATA, "--submit", HEAD]) == code
    assert capsys.readouterr().out == "one\ntwo\nthree\n"
    words = shlex.split(made.submitted["entrypoint"])
    assert words == ["python", "-m", "pistoseg", "train", *DATA, "--config", "job.yaml"]
    assert made.files == ["job.yaml", "pistoseg"]
    assert not Path(made.submitted["runtime_env"]["working_dir"]).exists()


def test_a_job_that_segments_without_a_workspace_says_where_its_run_is_kept(cluster, capsys):
    made = cluster(0)
    command = ["segment", "--model", "s3://b/m", "--slides", "s3://b/s", "--out", "s3://b/o"]
    assert main([*command, "--submit", HEAD]) == 0
    assert shlex.split(made.submitted["entrypoint"]) == ["python", "-m", "pistoseg", *command]
    assert "else name a --workspace" in capsys.readouterr().err
    assert main([*command, "--workspace", "s3://b/runs", "--submit", HEAD]) == 0
    assert "else name" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [aiohttp.ServerDisconnectedError(), aiohttp.WSServerHandshakeError(SimpleNamespace(real_url=HEAD), (), status=503)],
    ids=lambda error: type(error).__name__,
)
def test_a_head_that_restarts_behind_a_proxy_is_waited_for(cluster, capsys, monkeypatch, error):
    cluster(0).error = error
    assert main(["train", "--preset", "demo", *DATA, "--submit", HEAD]) == 0
    assert capsys.readouterr().out == "one\ntwo\nthree\n"
    monkeypatch.setattr(submission, "RECONNECT_S", -1)
    cluster(0).error = error
    assert main(["train", "--preset", "demo", *DATA, "--submit", HEAD]) == 2
    assert "can't be followed any more" in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.EPIPE, errno.ENOSPC])
def test_a_log_that_can_not_be_printed_is_no_lost_cluster(cluster, monkeypatch, number):
    class Closed(io.StringIO):
        def write(self, text):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(submission, "RECONNECT_S", -1)
    with contextlib.redirect_stdout(Closed()), pytest.raises(OSError, match=os.strerror(number)) as caught:
        submission._follow(cluster(0), "job")
    assert caught.value.errno == number


def test_a_job_whose_driver_was_lost_says_how_to_go_on(cluster, capsys):
    cluster("lost")
    assert main(["train", "--preset", "demo", *DATA, "--submit", HEAD]) == 1
    assert "Job supervisor actor died; submit the same command again" in capsys.readouterr().err


def test_a_job_whose_driver_was_killed_says_so_and_ends_as_in_a_shell(cluster, capsys):
    cluster(-9)
    assert main(["train", "--preset", "demo", *DATA, "--submit", HEAD]) == 137
    assert "the job ended: SIGKILL ended its process" in (said := capsys.readouterr().err)
    assert "submit the same command again" in said


def objects(text):
    return [json.loads(line) for line in text.splitlines()]


def test_a_log_of_json_holds_the_submission_and_the_jobs_lines_as_objects(cluster, capsys, monkeypatch):
    made = cluster("lost")

    async def tail(job):
        yield '{"event": "epoch", "epoch": 1}\n{"eve'
        yield 'nt": "slide"}\nA line of Ray, {not ours}\n{broken\n'

    made.tail_job_logs = tail
    command = ["train", "--preset", "demo", *DATA, "--log-format", "json", "--submit", HEAD]
    assert main(command) == 1
    written = capsys.readouterr()
    first, second, *others = objects(written.out)
    assert (first, second) == ({"event": "epoch", "epoch": 1}, {"event": "slide"})
    assert [item["text"] for item in others] == ["A line of Ray, {not ours}", "{broken"]
    assert [item["event"] for item in objects(written.err)] == ["submitted", "job_ended"]
    assert "--log-format json" in made.submitted["entrypoint"]

    def interrupt(job):
        raise KeyboardInterrupt

    made.get_job_info = interrupt
    assert main(command) == 130
    assert [item["event"] for item in objects(capsys.readouterr().err)] == ["submitted", "interrupted"]
    assert main([*command[:4], "cohort", *command[5:]]) == 2
    (refused,) = objects(capsys.readouterr().err)
    assert (refused["event"], refused["file"]) == ("error", "cohort")


def test_a_cluster_that_is_not_there(capsys):
    assert main(["train", "--preset", "demo", *DATA, "--submit", "http://127.0.0.1:9"]) == 2
    assert "http://127.0.0.1:9: --submit: can't be reached" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("address", "text"), [("", "--submit: is empty"), ("http://[::1", "http://[::1: --submit: is no address")]
)
def test_what_is_no_address_does_not_run_on_this_machine_instead(capsys, monkeypatch, address, text):
    monkeypatch.setattr("pistoseg.commands.train", lambda *_: pytest.fail("it ran here"))
    assert main(["train", "--preset", "demo", *DATA, f"--submit={address}"]) == 2
    assert f"pistoseg: {text}" in capsys.readouterr().err


def test_an_address_without_http_where_ray_is_not_is_no_traceback(capsys, monkeypatch):
    command = ["train", "--preset", "demo", *DATA, "--submit"]
    assert main([*command, "127.0.0.1:9"]) == 2
    assert f"127.0.0.1:9: --submit: can't be reached ([Errno {errno.ECONNREFUSED}]" in capsys.readouterr().err

    def lost(address):
        raise RpcError("Timed out while waiting for GCS")

    monkeypatch.setattr("ray.job_submission.JobSubmissionClient", lost)
    assert main([*command, HEAD]) == 2
    assert f"{HEAD}: --submit: can't be reached (Timed out while waiting for GCS)" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["train", "synthesize", "segment", "evaluate", "ablate", "search"])
def test_every_job_runs_its_verb(verb):
    script = Path(__file__).parents[2] / "jobs" / f"{verb}.py"
    call = subprocess.run(
        [sys.executable, str(script), "--help"], capture_output=True, text=True, timeout=STUCK_S, check=True
    )
    assert call.stdout.startswith(f"usage: pistoseg {verb} ")
    assert "--submit ADDRESS" in call.stdout
