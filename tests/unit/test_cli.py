import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import time

import pytest
import yaml
from mlflow.server.security_utils import is_allowed_host_header, should_block_cors_request
from processes import STUCK_S

import pistoseg
from pistoseg.artifacts import Workspace
from pistoseg.cli import EPILOG, _config, build_parser, main
from pistoseg.config import TrackingConfig
from pistoseg.ending import _interrupt
from pistoseg.pipeline import check_weights
from pistoseg.slides.network import SlideSettings
from pistoseg.tracking import connect

HEAVY = ("torch", "ray", "mlflow", "cv2", "pandas", "pyarrow", "PIL", "numpy", "timm", "fsspec")


def imported_by(code):
    """Heavy modules that are loaded after running `code` in a process of its own, and what it printed."""
    script = (
        "import contextlib, sys\n"
        f"with contextlib.suppress(SystemExit):\n    {code}\n"
        f"print('HEAVY', *[name for name in {HEAVY!r} if name in sys.modules])"
    )
    call = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=STUCK_S, check=True)
    *printed, last = call.stdout.splitlines()
    return last.split()[1:], "\n".join(printed)


def test_help_is_instant_and_shows_the_first_steps():
    heavy, printed = imported_by("from pistoseg.cli import main; main(['--help'])")
    assert heavy == []
    assert "pistoseg demo" in printed
    for verb in ("train", "synthesize", "evaluate", "data", "config", "ui"):
        assert verb in printed


def test_the_first_steps_have_the_weights_that_they_need():
    steps = [line.split("   ")[0].split() for line in EPILOG.splitlines() if "--workspace" in line]
    assert [step[1] for step in steps] == ["train", "ablate", "search"]
    for step in steps:
        check_weights(_config(build_parser().parse_args(step[1:])), ("evaluation",))


def test_settings_are_shown_without_loading_what_they_set():
    heavy, printed = imported_by("from pistoseg.cli import main; main(['config', 'show', '--preset', 'glas'])")
    assert heavy == []
    assert "alpha: 0.2" in printed


def test_every_verb_has_help(capsys):
    verbs = ["train", "synthesize", "evaluate", "ablate", "search", "segment"]
    verbs += ["data check", "data windows", "config show", "cluster local", "doctor", "ui", "demo"]
    verbs += [f"models {verb}" for verb in ("list", "show", "promote", "export")]
    for verb in verbs:
        with pytest.raises(SystemExit) as caught:
            main([*verb.split(), "--help"])
        assert caught.value.code == 0
        assert f"pistoseg {verb}" in capsys.readouterr().out


def test_the_module_runs_like_the_command():
    call = subprocess.run(
        [sys.executable, "-m", "pistoseg", "--version"], capture_output=True, text=True, timeout=STUCK_S, check=False
    )
    assert (call.returncode, call.stdout.strip()) == (0, f"pistoseg {pistoseg.__version__}")


def test_the_whole_command_ends_with_2_and_a_message_without_a_traceback():
    command = [sys.executable, "-m", "pistoseg", "config", "show", "--preset", "wsss", "--set", "seed=1"]
    call = subprocess.run(command, capture_output=True, text=True, timeout=STUCK_S, check=False)
    assert call.returncode == 2
    assert call.stderr.startswith("pistoseg: --preset: there is no preset 'wsss'. Remedy: use one of: ")
    assert "Traceback" not in call.stderr
    assert call.stdout == ""


@pytest.mark.parametrize(
    ("words", "closed"),
    [
        (["config", "show", "--preset", "demo"], "stdout"),
        (["models", "list", "--workspace", "w"], "stdout"),  # a table, which rich prints
        (["config", "show", "--preset", "wsss"], "stderr"),
    ],
)
def test_a_command_whose_output_nobody_reads_ends_as_others_in_a_pipe(words, closed, put_database, tmp_path):
    put_database(tmp_path / "w")
    connect(TrackingConfig(), Workspace(str(tmp_path / "w"))).create_registered_model("tissue")
    reader, writer = os.pipe()
    os.close(reader)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | {closed: writer}
    command = [sys.executable, "-m", "pistoseg", *words]
    call = subprocess.run(command, **streams, text=True, timeout=STUCK_S, check=False, cwd=tmp_path)
    os.close(writer)
    assert (call.returncode, call.stdout or "", call.stderr or "") == (141, "", "")


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("config show --preset demo >&-", 0),
        ("data check nowhere 2>&-", 2),  # which would say that no preset is named
        ("train --data nowhere --log-format json >&- 2>&-", 2),
    ],
)
def test_a_command_that_cannot_say_anything_ends_as_others(words, code):
    command = f"{shlex.quote(sys.executable)} -m pistoseg {words}"
    call = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=STUCK_S, check=False)
    assert call.returncode == code
    assert "Traceback" not in call.stderr


@pytest.mark.parametrize(("encoding", "shown"), [("ascii", "T\\xfcm\\xf6r \\u7d44"), ("utf-8", "Tümör 組")])
def test_a_terminal_without_a_letter_shows_its_code(encoding, shown):
    command = [sys.executable, "-m", "pistoseg", "config", "show", "--preset", "demo"]
    command += ["--set", "tracking.experiment=Tümör 組"]
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "1"}
    call = subprocess.run(command, capture_output=True, timeout=STUCK_S, check=False, env=environment)
    assert (call.returncode, call.stderr) == (0, b"")
    assert f"experiment: {shown}  #" in call.stdout.decode(encoding)


def test_a_broken_connection_is_no_output_that_nobody_reads(monkeypatch):
    def broken(*_, **__):
        raise BrokenPipeError("a connection")

    monkeypatch.setattr("pistoseg.config.load_config", broken)
    with pytest.raises(BrokenPipeError, match="a connection"):
        main(["config", "show"])


@pytest.fixture
def no_ray(monkeypatch):
    monkeypatch.setattr("pistoseg.stages.cluster.connected", lambda config: contextlib.nullcontext())


def failed(arguments, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert "\npistoseg: " in f"\n{captured.err}"
    assert "Traceback" not in captured.err
    return captured.err


def test_config_show_prints_the_resolved_settings(capsys):
    assert main(["config", "show", "--preset", "wsss4luad", "--profile", "cpu", "--set", "precise.lr=1e-4"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["precise"]["lr"] == 1e-4
    assert shown["synthesis"]["n_h"] == 7
    assert shown["scale"]["fit"] is None


def test_wrong_settings_are_listed(capsys):
    message = failed(["config", "show", "--set", "precise.lrr=1", "--set", "synthesis.alpha=3"], capsys)
    assert "did you mean lr?" in message
    assert "synthesis.alpha" in message


@pytest.mark.parametrize("verb", ["train", "synthesize"])
def test_training_data_that_is_not_given_or_not_there(no_ray, capsys, tmp_path, verb):
    common = [verb, "--workspace", str(tmp_path / "w"), "--set", "tracking.enabled=false"]
    common += ["--set", "synthesis.mode=stored"]
    assert "add --data FOLDER" in failed(common, capsys)
    missing = tmp_path / "no [1, 0]: such"
    assert f"{missing}: data.uri: does not exist" in failed([*common, "--data", str(missing)], capsys)


def test_streamed_mosaics_can_not_be_written(no_ray, capsys, tmp_path):
    message = failed(["synthesize", "--data", str(tmp_path), "--set", "synthesis.mode=streamed"], capsys)
    assert "--preview 16" in message


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["synthesize", "--data", "d", "--out", "sheet.png"], "--out: does nothing without --preview"),
        (["evaluate", "--stage", "all", "--data", "d", "--protocol", "bcss-wsss"], "--protocol: does nothing with"),
        (["evaluate", "--stage", "all", "--data", "d", "--classes", "c.yaml"], "--classes: does nothing with --stage"),
        (["evaluate", "--stage", "all", "--data", "d", "--device", "cpu"], "--device: does nothing with --stage"),
    ],
)
def test_options_that_would_do_nothing_are_refused(no_ray, capsys, arguments, says):
    assert says in failed(arguments, capsys)
    assert says in failed([*arguments, "--submit", "http://head:8265"], capsys)


def test_a_model_that_is_none(no_ray, capsys, tmp_path):
    arguments = ["evaluate", "--model", str(tmp_path), "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    assert f"{tmp_path}: is no model bundle" in failed(arguments, capsys)


def test_a_workspace_without_runs_can_not_be_browsed(capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert "has no runs yet" in failed(["ui", "--workspace", str(tmp_path)], capsys)


def test_runs_of_a_workspace_on_object_storage_are_said_to_be_where_the_command_ran(capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    message = failed(["ui", "--workspace", "memory://runs"], capsys)
    assert f"no MLflow database at {tmp_path}/pistoseg-mlflow/mlflow.db" in message
    assert "set MLFLOW_TRACKING_URI" in message


@pytest.fixture
def served(put_database, monkeypatch, tmp_path):
    """Start `ui` of a workspace with runs; the variables of MLflow's server."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr("socket.getfqdn", lambda: "Node12.cluster.example")
    monkeypatch.setattr("socket.gethostname", lambda: "Node12")
    monkeypatch.setattr("pistoseg.tracking.browser._require_free", lambda host, port: None)  # whoever listens there
    put_database(tmp_path)

    def ui(*arguments):
        started = []
        monkeypatch.setattr("os.execve", lambda *call: started.append(call))
        monkeypatch.setattr("os.execv", lambda *call: pytest.fail("without an environment"))
        main(["ui", "--workspace", str(tmp_path), "--port", "5057", *arguments])
        ((_, command, environment),) = started
        assert command[1:4] == ["-m", "mlflow", "server"]
        return environment

    return ui


def test_runs_can_be_browsed_by_the_machines_name_where_other_machines_are_served(served, monkeypatch, capsys):
    environment = served("--host", "0.0.0.0")
    assert capsys.readouterr().out.startswith("http://node12.cluster.example:5057")
    hosts = environment["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
    origins = environment["MLFLOW_SERVER_CORS_ALLOWED_ORIGINS"].split(",")
    for name in ("node12.cluster.example", "node12"):
        assert is_allowed_host_header(hosts, f"{name}:5057")
        assert not should_block_cors_request(f"http://{name}:5057", "POST", origins)
    for name in ("localhost:8080", "[::1]:8080", "[::1]", "10.0.0.5:5057"):
        assert is_allowed_host_header(hosts, name)
    assert not is_allowed_host_header(hosts, "evil.example:5057")
    assert should_block_cors_request("http://evil.example:5057", "POST", origins)
    monkeypatch.setenv("MLFLOW_SERVER_ALLOWED_HOSTS", "mine.example")  # as behind a proxy
    assert served("--host", "0.0.0.0")["MLFLOW_SERVER_ALLOWED_HOSTS"] == "mine.example"


def test_options_of_another_server_than_mlflows_own_are_left_alone(served, monkeypatch):
    assert "MLFLOW_UVICORN_OPTS" in served()
    monkeypatch.setenv("MLFLOW_GUNICORN_OPTS", "--timeout 60")
    assert "MLFLOW_UVICORN_OPTS" not in served()


def test_the_pages_of_a_workspace_that_was_moved_begin_with_its_runs_since(served, tmp_path, capsys):
    client = connect(TrackingConfig(), Workspace(str(tmp_path)))
    for name, shown in (("pistoseg", 1), ("pistoseg in elsewhere", 1), (f"pistoseg in {tmp_path}", 3)):
        client.create_experiment(name, artifact_location="file:///no/such/workspace/mlflow")
        served()
        assert f"/#/experiments/{shown}/runs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("host", "port", "says"),
    [
        ("127.0.0.1", None, "--port: port {port} can't be listened on (Address already in use)"),
        ("127.0.0.1", 99999, "--port: 99999 is no port"),
        ("127.0.0.1", 0, "--port: 0 is no port"),
        ("no host", 5057, "--host: 'no host' can't be listened on"),
    ],
)
def test_no_url_is_shown_where_pages_can_not_be_served(monkeypatch, tmp_path, capsys, host, port, says):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    connect(TrackingConfig(), Workspace(str(tmp_path))).close()
    monkeypatch.setattr("os.execve", lambda *call: pytest.fail("started"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1] if port is None else port
        assert main(["ui", "--workspace", str(tmp_path), "--host", host, "--port", str(port)]) == 2
    printed = capsys.readouterr()
    assert says.format(port=port) in printed.err
    assert printed.out == ""


def test_runs_that_only_this_machine_browses_are_served_as_mlflow_does(served, capsys):
    assert "MLFLOW_SERVER_ALLOWED_HOSTS" not in served()
    assert capsys.readouterr().out.startswith("http://127.0.0.1:5057")


@pytest.mark.parametrize(
    "arguments", [["train", "--workers", "0"], ["evaluate"], [], ["evaluate", "--protocol", "best"], ["fly"]]
)
def test_wrong_arguments_end_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: pistoseg" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "usage", "says"),
    [
        (["trian"], "pistoseg [-h]", "; did you mean train?\n"),
        (["train", "--profil", "cpu"], "pistoseg train [-h]", "arguments: --profil cpu; did you mean --profile?\n"),
        (["data", "check", "x", "--outt=y"], "pistoseg data check [-h]", "arguments: --outt=y; did you mean --out?\n"),
        (["models", "lst"], "pistoseg models [-h]", "; did you mean list?\n"),
        (["ablate", "tabel1"], "pistoseg ablate [-h]", "; did you mean table1?\n"),
        (["search", "--space", "x", "--confirm-seeds", "1"], "pistoseg search [-h]", "must be 0, or 2 and more\n"),
        (["search", "--space", "x", "--hours", "inf"], "pistoseg search [-h]", "--hours: must be a number above 0\n"),
        (["segment", "--cache-gb", "inf"], "pistoseg segment [-h]", "--cache-gb: must be a number above 0\n"),
        (["segment", "--cache-gb", "nan"], "pistoseg segment [-h]", "--cache-gb: must be a number above 0\n"),
        (["segment", "--cache-gb=-1"], "pistoseg segment [-h]", "--cache-gb: must be a number above 0\n"),
        (["train", "x"], "pistoseg train [-h]", "unrecognized arguments: x\n"),
        (["train", "--zzz"], "pistoseg train [-h]", "unrecognized arguments: --zzz\n"),
    ],
)
def test_wrong_arguments_show_the_verbs_usage_and_what_was_probably_meant(arguments, usage, says, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    error = capsys.readouterr().err
    assert error.startswith(f"usage: {usage}")
    assert error.endswith(says)


def test_an_interrupt_says_how_to_go_on(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("pistoseg.commands.train", interrupted)
    assert main(["train", "--data", "somewhere"]) == 130
    assert "run the same command again" in capsys.readouterr().err


def test_a_sigterm_that_was_lost_makes_no_later_one_be_ignored(monkeypatch):
    monkeypatch.setattr("pistoseg.ending._interrupted", time.monotonic() - 60)
    with pytest.raises(KeyboardInterrupt):
        _interrupt()
    _interrupt()  # sent twice
    monkeypatch.setattr("pistoseg.ending._interrupted", time.monotonic() - 60)
    with pytest.raises(KeyboardInterrupt):
        _interrupt()


@pytest.mark.parametrize("times", [1, 2])
def test_sigterm_is_an_interrupt(times):
    code = (
        "import os, signal, sys, pistoseg.cli, pistoseg.commands\n"
        "def train(*_):\n"
        "    try:\n        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    finally:\n"
        f"        for _ in range({times - 1}):\n            os.kill(os.getpid(), signal.SIGTERM)\n"
        "        print('tidied up', flush=True)\n"
        "pistoseg.commands.train = train\n"
        "sys.exit(pistoseg.cli.main(['train', '--data', 'somewhere']))"
    )
    call = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=STUCK_S, check=False)
    assert (call.returncode, call.stdout) == (130, "tidied up\n")
    assert "run the same command again" in call.stderr


def test_the_handlers_of_a_process_that_calls_a_verb_stay_its_own(monkeypatch):
    seen = []
    monkeypatch.setattr("pistoseg.commands.train", lambda *_: seen.append(signal.getsignal(signal.SIGTERM)))
    before = signal.getsignal(signal.SIGTERM)
    try:
        for handler in (signal.SIG_DFL, signal.SIG_IGN, lambda *_: None):
            signal.signal(signal.SIGTERM, handler)
            assert main(["train", "--data", "somewhere"]) == 0
            assert signal.getsignal(signal.SIGTERM) is handler
            assert (seen[-1] is handler) == (handler is not signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_arguments_reach_the_config(monkeypatch):
    seen = []
    monkeypatch.setattr("pistoseg.commands.train", lambda config, workspace: seen.append((config, workspace)))
    data = "/data/a: [1, 0] #x 😀"
    assert (
        main(["train", "--preset", "glas", "--data", data, "--workers", "3", "--workspace", "w", "--set", "seed=4"])
        == 0
    )
    (config, workspace) = seen[0]
    assert (config.data.uri, config.compute.workers, config.seed, workspace) == (data, 3, 4, "w")


def test_what_outlines_leave_out_and_the_pixel_size_of_slides_reach_the_segmentation(monkeypatch):
    given = {}
    monkeypatch.setattr("pistoseg.commands.segment", lambda *_, **options: given.update(options) or 0)
    arguments = ["segment", "--model", "m", "--slides", "s", "--out", "o"]
    assert main(arguments) == 0
    assert (given["slide_mpp"], given["settings"]["min_area_um2"]) == (None, None)
    assert given["settings"]["tolerance_um"] == SlideSettings().tolerance_um
    assert given["settings"]["background"] == SlideSettings().background
    assert main([*arguments, "--min-area", "0", "--tolerance", "0.5", "--slide-mpp", "0.25"]) == 0
    assert (given["slide_mpp"], given["settings"]["min_area_um2"], given["settings"]["tolerance_um"]) == (0.25, 0, 0.5)
    assert main([*arguments, "--background", "none"]) == 0
    assert given["settings"]["background"] == "none"
    for wrong in (["--min-area", "-1"], ["--tolerance", "nan"], ["--slide-mpp", "0"], ["--background", "white"]):
        with pytest.raises(SystemExit):
            main([*arguments, *wrong])


def test_a_run_says_which_preset_it_takes_where_none_is_given(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("pistoseg.commands.train", lambda config, workspace: None)
    file = tmp_path / "own.yaml"
    file.write_text("preset: glas\n")
    for chosen in ([], ["--profile", "cpu"], ["--preset", "glas"], ["--config", str(file)]):
        assert main(["train", "--data", "somewhere", *chosen]) == 0
        said = capsys.readouterr().err.count("the preset is wsss4luad")
        assert said == (0 if {"--preset", "--config"} & set(chosen) else 1), chosen
    monkeypatch.setattr("pistoseg.submission.submit", lambda given, options: 0)
    for verb, times in ((["train", "--data", "s3://b/d"], 1), (["segment", "--model", "m", "--slides", "s"], 0)):
        assert main([*verb, "--submit", "auto", *(() if times else ("--out", "o"))]) == 0
        assert capsys.readouterr().err.count("the preset is wsss4luad") == times
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert "default: wsss4luad" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("name", ["my demo #2", "a: b", "Übung 😀"])
def test_the_workspace_of_the_demo_may_have_any_name(monkeypatch, tmp_path, name):
    seen, drawn = [], []
    monkeypatch.setattr("pistoseg.phantom.write_cohort", lambda cohort, **_: drawn.append(cohort))
    monkeypatch.setattr("pistoseg.commands.train", lambda config, workspace: seen.append(config.data.uri))
    assert main(["demo", "--workspace", str(tmp_path / name)]) == 0
    assert seen == drawn == [str(tmp_path / name / "cohort")]


def test_the_demo_draws_nothing_before_its_settings_are_known_to_be_right_and_hold(monkeypatch, capsys):
    monkeypatch.setattr("pistoseg.object_store._forwarded", {})
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://another:1")
    monkeypatch.setattr("pistoseg.storage.exists", lambda uri: False)
    drawn = []
    monkeypatch.setattr(
        "pistoseg.phantom.write_cohort", lambda cohort, **_: drawn.append((cohort, os.environ["AWS_ENDPOINT_URL_S3"]))
    )
    monkeypatch.setattr("pistoseg.commands.train", lambda config, workspace: None)
    command = ["demo", "--workspace", "s3://bucket/runs", "--set", "storage.endpoint=http://minio:9000"]
    assert "synthesis.alpha" in failed([*command, "--set", "synthesis.alpha=3"], capsys)
    assert drawn == []
    assert main(command) == 0
    assert drawn == [("s3://bucket/runs/cohort", "http://minio:9000")]


def test_a_defect_keeps_its_traceback(monkeypatch):
    def defect(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr("pistoseg.commands.train", defect)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["train", "--data", "somewhere"])


def test_data_check_tells_by_its_exit_code_whether_a_data_set_is_fit(capsys, tmp_path):
    from PIL import Image

    folder = tmp_path / "1.training"
    folder.mkdir()
    (folder / "notes.png").write_bytes(b"no image")
    assert main(["data", "check", str(tmp_path), "--workers", "1"]) != 0
    (folder / "notes.png").unlink()
    for number, flags in enumerate(("[1, 0, 0]", "[0, 1, 0]", "[0, 0, 1]")):
        Image.effect_noise((64, 64), 30 + number).convert("RGB").save(folder / f"{number}-{flags}.png")
    capsys.readouterr()
    assert main(["data", "check", str(tmp_path), "--workers", "1"]) == 0
    assert "tumor" in capsys.readouterr().out
