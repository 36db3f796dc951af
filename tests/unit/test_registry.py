"""The registry of a workspace's own database, with versions that no training had to make."""

import contextlib
import dataclasses
import fcntl
import functools
import json
import os
import shutil
import sqlite3
import time
import types
from pathlib import Path

import fsspec
import pytest
from rich.console import Console

import pistoseg
from pistoseg import models_command, storage
from pistoseg.artifacts import Workspace
from pistoseg.cli import main
from pistoseg.config import TrackingConfig, load_config
from pistoseg.errors import PistoSegError
from pistoseg.printing import mask_table, score_table
from pistoseg.tracking import Tracker, connect, tracking_uri
from pistoseg.tracking.registry import ModelVersion, Registry, bundle_uri, lineage, scored_by, set_alias, workspace_of
from pistoseg.tracking.server import database_file, database_uri

KEYS = ("aaaa", "bbbb", "cccc")


@pytest.fixture
def workspace(tmp_path_factory, put_database):
    """Three versions of the model `tissue`, each with a bundle, its inputs and its scores."""
    place = Workspace(str(tmp_path_factory.mktemp("models")))
    put_database(Path(place.root))
    client = connect(TrackingConfig(), place)
    client.create_registered_model("tissue")
    patches = place.commit("patches", "p0", version=1, settings={}, inputs={}, summary={}, seconds=1)
    for number, key in enumerate(KEYS):
        folder = place.folder("precise", key)
        for name in ("model.json", "model.safetensors"):
            storage.write_bytes(storage.join(folder, "bundle", name), f"{name} of {key}".encode())
        made = place.commit("precise", key, version=1, settings={}, inputs={"patches": patches}, summary={}, seconds=2)
        summary = {"metrics": {"miou": 0.5 + number / 10}, "pictures": ["predictions.png"]}
        place.commit("evaluation", key, version=1, settings={}, inputs={"model": made}, summary=summary, seconds=1)
        tags = {"pistoseg.bundle": made.path("bundle"), "pistoseg.fingerprint": key}
        client.create_model_version("tissue", source=made.path("bundle"), tags=tags)
    return place


@pytest.fixture
def registry(workspace):
    return Registry(TrackingConfig(), workspace)


def test_a_promotion_keeps_the_champion_before_as_previous(registry, workspace):
    assert registry.promote("tissue", "1") is None
    assert registry.promote("tissue", "3") == "1"
    assert registry.find("tissue@champion").version == "3"
    assert registry.find("models:/tissue@previous").version == "1"
    assert registry.promote("tissue", "3") is None  # again: nothing moves
    assert registry.find("tissue@previous").version == "1"
    assert registry.promote("tissue", "2", "candidate") is None
    assert registry.find("tissue@champion").version == "3"
    assert set_alias(connect(TrackingConfig(), workspace), "tissue", "1") == "3"
    assert {version.version: version.aliases for version in registry.versions("tissue")} == {
        "1": ("champion",),
        "2": ("candidate",),
        "3": ("previous",),
    }


@pytest.mark.parametrize("alias", ["latest", "v2", "bad alias/"])
def test_an_alias_that_mlflow_refuses_is_not_taken_for_a_server_that_is_away(workspace, capsys, alias):
    assert main(["models", "promote", "tissue", "1", "--alias", alias, "--workspace", workspace.root]) == 2
    printed = capsys.readouterr().err
    assert f"models:/tissue/1: the alias {alias!r} is refused" in printed
    assert "server runs" not in printed


def test_a_server_that_breaks_off_without_a_word_is_said_to_be_away(registry, monkeypatch):
    def silent(*_, **__):
        raise ConnectionResetError

    monkeypatch.setattr("mlflow.tracking.MlflowClient.get_model_version", silent)
    with pytest.raises(PistoSegError, match=r"can't be read \(ConnectionResetError\)"):
        registry.find("tissue/1")


@pytest.mark.parametrize(("model", "version"), [("tissue", "2"), ("new", "1")])
def test_a_registered_model_gets_its_tags_also_when_it_is_there_already(workspace, model, version):
    config = load_config("demo", overrides=[f"tracking.model={model}"])
    with Tracker.start(config, workspace) as tracker:
        assert tracker.register(workspace.find("precise", "bbbb"), {"pistoseg.search": "mine"}) == version
        status = tracker.client.get_run(tracker.run_id).info.status
    found = Registry(config.tracking, workspace).find(f"{model}/{version}")
    assert found.tags["pistoseg.search"] == "mine"
    assert found.tags["pistoseg.fingerprint"] == "bbbb"
    assert found.bundle == workspace.find("precise", "bbbb").path("bundle")
    assert status == "RUNNING"


def test_a_model_with_an_apostrophe_in_its_name_is_registered_once_and_found(workspace):
    config = load_config("demo", overrides=["tracking.model=o'neill"])
    for _ in range(2):
        with Tracker.start(config, workspace) as tracker:
            assert tracker.register(workspace.find("precise", "bbbb")) == "1"
    assert [item.version for item in Registry(config.tracking, workspace).versions("o'neill")] == ["1"]


def model_in(place):
    made = place.commit("precise", "dddd", version=1, settings={}, inputs={}, summary={}, seconds=2)
    storage.write_bytes(made.path("bundle", "model.json"), b"{}")
    return made


@pytest.mark.parametrize("place", ["memory://registered", "this disk", "a disk that others do not see"])
def test_a_known_model_whose_bundle_is_gone_is_led_to_the_one_that_was_made_again(
    workspace, tmp_path, monkeypatch, place
):
    root = place if place.startswith("memory:") else str(tmp_path / place)
    seen = place != "a disk that others do not see"
    if not seen:  # the database stands for a server, which other machines use, too
        monkeypatch.setattr("pistoseg.models.mlflow_flavor.database_file", lambda uri: None)
    server = f"tracking.uri=sqlite:///{workspace.root}/mlflow.db"
    config = load_config("demo", overrides=[server, f"tracking.model=again {place.partition(':')[0]}"])
    one, two = (model_in(Workspace(storage.join(root, name))) for name in ("one", "two"))
    client, registry = connect(config.tracking, workspace), Registry(config.tracking, workspace)
    client.create_registered_model(config.tracking.model)
    tags = {"pistoseg.bundle": one.path("bundle"), "pistoseg.fingerprint": "dddd"}
    client.create_model_version(config.tracking.model, source=one.path("bundle"), tags=tags)
    for bundle in (one.path("bundle"), (two if seen else one).path("bundle")):
        with Tracker.start(config, Workspace(str(tmp_path / "two"))) as tracker:
            assert tracker.register(two) == "1"
        assert registry.find(f"{config.tracking.model}/1").bundle == bundle
        storage.remove_tree(one.uri)


def test_a_model_is_found_by_name_version_or_alias(registry):
    assert registry.newest("tissue").version == "3"
    assert registry.newest("tissue/2").version == "2"
    for wrong in ("nothing", "tissue@nobody", "tissue/9"):
        with pytest.raises(PistoSegError, match="is not in the registry"):
            registry.newest(wrong)


def test_a_registered_model_whose_bundle_was_deleted_says_where_a_copy_is(workspace, monkeypatch):
    assert bundle_uri("models:/tissue/2", TrackingConfig(), workspace).endswith("/precise/bbbb/bundle")
    monkeypatch.setattr(storage, "exists", lambda uri: False)
    with pytest.raises(PistoSegError, match=r"not there.*models export tissue/2 --workspace /.* --out FOLDER"):
        bundle_uri("models:/tissue/2", TrackingConfig(), workspace)


def trained(place, key, created, metrics=None):
    """A model in a workspace, as a training leaves it; None: one that is still trained."""
    bundle = storage.join(place.folder("precise", key), "bundle")
    storage.write_bytes(storage.join(bundle, "model.json"), b"{}")
    if created:
        summary = {"metrics": metrics or {}}
        made = place.commit("precise", key, version=1, settings={}, inputs={}, summary=summary, seconds=1)
        storage.write_bytes(made.path("manifest.json"), json.dumps(made.manifest | {"created": created}).encode())
    return bundle


@pytest.mark.parametrize("root", ["{}/w", "memory://pistoseg-registry/w"])
def test_of_a_workspace_its_one_model_is_taken(root, tmp_path):
    place = Workspace(root.format(tmp_path))
    trained(place, "begun", None)
    only = trained(place, "aaaa", "2026-01-02T00:00:00Z")
    assert bundle_uri(place.root, TrackingConfig(), place) == only
    assert bundle_uri(only, TrackingConfig(), place) == only
    deleted = trained(place, "gone", "2026-01-04T00:00:00Z")
    storage.remove_tree(deleted)
    storage.write_bytes(storage.join(place.root, "precise", "damaged", "manifest.json"), b"{")
    assert bundle_uri(place.root, TrackingConfig(), place) == only


def test_a_model_that_a_workspace_on_a_disk_is_asked_for_has_its_runs_there_and_others_in_the_default_one(
    tmp_path, monkeypatch
):
    place, away = Workspace(str(tmp_path / "w")), Workspace("memory://pistoseg-registry/own")
    model, _ = (trained(at, "aaaa", "2026-01-02T00:00:00Z") for at in (place, away))
    monkeypatch.chdir(tmp_path)
    assert workspace_of(place.root) == workspace_of("w") == place.root
    others = (model, away.root, "models:/tissue@champion", str(tmp_path / "nowhere"), "memory://nowhere")
    assert {workspace_of(other) for other in others} == {"runs/pistoseg"}
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert workspace_of(place.root) == "runs/pistoseg"


def test_of_a_workspace_with_several_models_the_user_chooses_one(tmp_path):
    place = Workspace(str(tmp_path))
    older = trained(place, "aaaa", "2026-01-02T00:00:00Z", {"loss": 1.0, "validation_miou": 0.25})
    newer = trained(place, "bbbb", "2026-01-03T00:00:00Z")
    with pytest.raises(PistoSegError, match="has 2 models") as caught:
        bundle_uri(str(tmp_path), TrackingConfig(), place)
    assert caught.value.reason.splitlines()[1:] == [
        f"  {newer}, made 2026-01-03T00:00:00Z",
        f"  {older}, made 2026-01-02T00:00:00Z, validation_miou 0.250",
    ]


def test_of_a_workspace_with_several_models_the_champion_or_the_only_registered_one_is_taken(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    place, elsewhere = Workspace(str(tmp_path)), Workspace(str(tmp_path / "elsewhere"))
    bundles = [trained(place, key, f"2026-01-0{day}T00:00:00Z") for day, key in enumerate(KEYS, 1)]
    client = connect(TrackingConfig(), place)
    client.create_registered_model("tissue")

    def register(bundle):
        tags = {"pistoseg.bundle": bundle, "pistoseg.fingerprint": Path(bundle).parent.name}
        client.create_model_version("tissue", source=bundle, tags=tags)

    register("/no/longer/here/precise/dddd/bundle")
    with pytest.raises(PistoSegError, match="has 3 models"):
        bundle_uri(str(tmp_path), TrackingConfig(), elsewhere)
    register(bundles[2])
    assert bundle_uri(str(tmp_path), TrackingConfig(), elsewhere) == bundles[2]
    assert f"models:/tissue/2 is taken, the only one that is registered: {bundles[2]}" in capsys.readouterr().err
    register(bundles[0])
    with pytest.raises(PistoSegError, match=r"has 3 models[^R]*Remedy: give one of them, or models:/NAME@champion"):
        bundle_uri(str(tmp_path), TrackingConfig(), elsewhere)
    set_alias(client, "tissue", "3")
    assert bundle_uri(str(tmp_path), TrackingConfig(), elsewhere) == bundles[0]
    assert f"models:/tissue/3 is taken, its champion: {bundles[0]}" in capsys.readouterr().err
    (tmp_path / "mlflow.db").write_bytes(b"damaged")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/./mlflow.db")  # MLflow knows the other one
    with pytest.raises(PistoSegError, match="has 3 models"):
        bundle_uri(str(tmp_path), TrackingConfig(), elsewhere)


def test_of_a_workspace_an_older_model_that_alone_is_registered_is_taken_only_if_a_search_did_that(
    tmp_path, monkeypatch
):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    place = Workspace(str(tmp_path))
    older, _ = (trained(place, key, f"2026-01-0{day}T00:00:00Z") for day, key in enumerate(KEYS[:2], 1))
    client = connect(TrackingConfig(), place)
    client.create_registered_model("tissue")
    client.create_model_version("tissue", older, tags={"pistoseg.bundle": older, "pistoseg.fingerprint": "aaaa"})
    with pytest.raises(PistoSegError, match="has 2 models"):
        bundle_uri(str(tmp_path), TrackingConfig(), place)
    client.set_model_version_tag("tissue", "1", "pistoseg.search", "crops-2")
    assert bundle_uri(str(tmp_path), TrackingConfig(), place) == older


def test_the_champion_of_a_workspace_that_was_moved_or_has_another_path_is_taken_where_it_is_now(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    place = Workspace(str(tmp_path / "before"))
    older, _ = (trained(place, key, f"2026-01-0{day}T00:00:00Z") for day, key in enumerate(KEYS[:2], 1))
    client = connect(TrackingConfig(), place)
    client.create_registered_model("tissue")
    client.create_model_version("tissue", older, tags={"pistoseg.bundle": older, "pistoseg.fingerprint": "aaaa"})
    set_alias(client, "tissue", "1")
    client.close()
    shutil.copytree(place.root, tmp_path / "copied")
    (tmp_path / "link").symlink_to(place.root)
    for name in ("before", "copied", "link"):
        bundle = str(tmp_path / name / "precise" / "aaaa" / "bundle")
        assert bundle_uri(str(tmp_path / name), TrackingConfig(), place) == bundle
        assert f"models:/tissue/1 is taken, its champion: {bundle}" in capsys.readouterr().err


@pytest.mark.parametrize("verb", [["evaluate", "--data", "images"], ["segment", "--slides", "slides"]])
@pytest.mark.parametrize("name", ["tissue@champion", "tissue/3"])
def test_a_name_that_is_taken_for_a_folder_is_said_how_to_write(name, verb, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert main([*verb, "--model", name, "--out", "out"]) == 2
    assert f"models:/{name} if it is a registered model" in capsys.readouterr().err
    if "@" in name:  # as a job is given it
        with pytest.raises(PistoSegError, match=f"write models:/{name} if"):
            bundle_uri(str(tmp_path / name), TrackingConfig(), Workspace(str(tmp_path)))
    (tmp_path / name).mkdir(parents=True)
    assert bundle_uri(name, TrackingConfig(), Workspace(str(tmp_path))) == str(tmp_path / name)


def test_a_registered_model_can_be_evaluated_by_its_name(workspace, monkeypatch, tmp_path):
    seen = []

    def read(uri, protocol):
        seen.append(uri)
        raise PistoSegError("is none")

    monkeypatch.setattr("pistoseg.models.bundle.evaluation_config", read)
    command = ["evaluate", "--data", str(tmp_path), "--out", str(tmp_path / "out"), "--workspace", workspace.root]
    assert main([*command, "--model", "models:/tissue/2"]) == 2
    assert [uri.rpartition("/precise/")[2] for uri in seen] == ["bbbb/bundle"]


def test_python_loads_what_the_command_line_calls_a_model(workspace, monkeypatch, tmp_path):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr("pistoseg.models.bundle.load", lambda uri, device: (uri, device))
    only = trained(Workspace(str(tmp_path)), "aaaa", "2026-01-02T00:00:00Z")
    assert pistoseg.load(tmp_path) == (only, None)
    second = workspace.find("precise", "bbbb").path("bundle")
    assert pistoseg.load("models:/tissue/2", "cpu", workspace=workspace.root) == (second, "cpu")
    with pytest.raises(PistoSegError, match=r"in Python workspace="):
        pistoseg.load("models:/tissue/2", workspace=str(tmp_path))


def test_models_and_versions_are_all_listed_however_few_a_server_names_at_a_time(registry, workspace, monkeypatch):
    from mlflow.tracking import MlflowClient

    client = connect(TrackingConfig(), workspace)
    for name in ("page-a", "page-b"):
        client.create_registered_model(name)
        client.create_model_version(name, source="/no/such/bundle")
    for method in ("search_registered_models", "search_model_versions"):
        one = functools.partialmethod(getattr(MlflowClient, method), max_results=1)
        monkeypatch.setattr(MlflowClient, method, one)
    found = [f"{version.name}/{version.version}" for version in registry.versions()]
    wanted = ["page-a/1", "page-b/1", "tissue/3", "tissue/2", "tissue/1"]
    assert [version for version in found if version in wanted] == wanted
    with Tracker.start(load_config("demo", overrides=["tracking.model=tissue"]), workspace) as tracker:
        assert tracker.register(workspace.find("precise", "aaaa")) == "1"


def test_lineage_leads_from_the_bundle_to_the_images(registry):
    found = lineage(registry.newest("tissue").bundle)
    assert [(item["stage"], item["fingerprint"]) for item in found] == [("precise", "cccc"), ("patches", "p0")]
    assert lineage("/nowhere/precise/x/bundle") == []


def test_an_exported_bundle_is_the_versions_and_overwrites_no_other(registry, tmp_path, workspace, capsys):
    assert main(["models", "export", "tissue/2", "--out", str(tmp_path), "--workspace", workspace.root]) == 0
    assert (tmp_path / "model.safetensors").read_text() == "model.safetensors of bbbb"
    assert len(capsys.readouterr().out.split()) == 2
    registry.export(registry.newest("tissue/2"), str(tmp_path))  # the same again
    with pytest.raises(PistoSegError, match="holds another model"):
        registry.export(registry.newest("tissue/1"), str(tmp_path))


@pytest.mark.parametrize("made_by", ["train", "search", "train on a server"])
def test_a_bundle_that_is_gone_is_said_to_be_with_what_helps(registry, tmp_path, workspace, monkeypatch, made_by):
    gone = registry.newest("tissue/1")
    storage.remove_tree(gone.bundle)
    if made_by == "search":
        gone = dataclasses.replace(gone, tags=gone.tags | {"pistoseg.search": "s1"})
    if made_by == "train on a server":
        monkeypatch.setattr("pistoseg.tracking.registry.database_file", lambda uri: None)
    helps = "run `pistoseg train` with it again" if made_by == "train" else "give the bundle's URI where it is now"
    with pytest.raises(PistoSegError, match=rf"is not there.*Remedy: if its workspace was moved, {helps}"):
        registry.export(gone, str(tmp_path / "out"))


def test_the_terminal_shows_versions_scores_lineage_and_pictures(workspace, capsys):
    assert main(["models", "promote", "tissue", "1", "--workspace", workspace.root]) == 0
    assert main(["models", "list", "--workspace", workspace.root]) == 0
    listed = capsys.readouterr().out
    assert "0.7000" in listed
    assert "champion" in listed
    assert "0.5000" in listed
    assert main(["models", "show", "tissue/3", "--workspace", workspace.root]) == 0
    shown = capsys.readouterr().out
    assert "miou: 0.7000" in shown
    assert "precise/cccc, 2 s" in shown
    assert "patches/p0" in shown
    assert f"{workspace.root}/evaluation/cccc/predictions.png" in shown
    assert main(["models", "promote", "tissue", "2", "--workspace", workspace.root]) == 0
    assert "models:/tissue@champion is version 2" in capsys.readouterr().out


def scored(place, key, summary):
    model = place.find("precise", key)
    place.commit("evaluation", f"e{key}", version=1, settings={}, inputs={"model": model}, summary=summary, seconds=1)


def test_scores_are_shown_first_with_their_interval_and_how_a_training_ran_last(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    place, client = Workspace(str(tmp_path)), connect(TrackingConfig(), Workspace(str(tmp_path)))
    bundle = trained(place, "aaaa", "2026-01-01T00:00:00Z")
    report = {"images": 40, "confidence_interval_95": {"miou": [0.4, 0.6], "fwiou": [None, None]}}
    scored(place, "aaaa", {"metrics": {"miou": 0.5, "fwiou": 0.7, "iou/tumor": 0.5}, "report": report})
    run = client.create_run("0").info.run_id
    for name, value in {"epoch": 1, "gradient_norm": 2, "loss": 0.1, "validation_miou": 0.45, "miou": 0.5}.items():
        client.log_metric(run, name, value)
    client.create_registered_model("tissue")
    tags = {"pistoseg.bundle": bundle, "pistoseg.fingerprint": "aaaa"}
    client.create_model_version("tissue", bundle, run_id=run, tags=tags)
    assert main(["models", "show", "tissue", "--workspace", place.root]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[lines.index("scores by masks of 40 images") : lines.index("lineage")] == [
        "scores by masks of 40 images",
        "  miou: 0.5000 (95 %: 0.4000 to 0.6000)",
        "  fwiou: 0.7000",
        "  iou/tumor: 0.5000",
        "training",
        "  loss: 0.1000",
        "  validation_miou: 0.4500",
        "  epochs: 2",
        "  gradient_norm: 2.0000",
    ]


def test_a_champion_that_scores_below_another_model_is_said_to_when_it_is_taken_and_when_it_is_made(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    place, client = Workspace(str(tmp_path)), connect(TrackingConfig(), Workspace(str(tmp_path)))
    bundles = [trained(place, key, f"2026-01-0{day}T00:00:00Z") for day, key in enumerate(KEYS, 1)]
    client.create_registered_model("tissue")
    for bundle, key, miou in zip(bundles, KEYS, (0.4, 0.6, None), strict=True):
        scored(place, key, {"metrics": {} if miou is None else {"miou": miou}})
        client.create_model_version("tissue", bundle, tags={"pistoseg.bundle": bundle, "pistoseg.fingerprint": key})
    for version, said in (("1", False), ("2", False), ("1", True), ("3", False)):
        assert main(["models", "promote", "tissue", version, "--workspace", place.root]) == 0
        told = capsys.readouterr().err
        assert ("warning: version 1 has mIoU 0.4000, the champion before it 0.6000" in told) == said
        bundle_uri(place.root, TrackingConfig(), place)
        told = capsys.readouterr().err
        assert (f"its champion (mIoU 0.400): {bundles[0]}; {bundles[1]} has more, 0.600" in told) == (version == "1")
        assert ("has more" in told) == (version == "1")


def test_a_registry_without_models_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    connect(TrackingConfig(), Workspace(str(tmp_path))).search_registered_models()
    assert main(["models", "list", "--workspace", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert f"no model is registered at sqlite:///{tmp_path}/mlflow.db" in printed
    assert "--workspace" in printed


def test_brackets_in_names_and_paths_are_shown_as_they_are(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    place = Workspace(str(tmp_path / "runs [old]"))
    client = connect(TrackingConfig(), place)
    client.create_registered_model("tissue [red]")
    tags = {"pistoseg.bundle": "/w [old]/precise/k/bundle"}
    client.create_model_version("tissue [red]", source="/w [old]/precise/k/bundle", tags=tags)
    assert main(["models", "list", "--workspace", place.root]) == 0
    assert main(["models", "show", "tissue [red]", "--workspace", place.root]) == 0
    printed = "".join(capsys.readouterr().out.split())  # a title is folded
    assert "runs[old]/mlflow.db" in printed
    assert printed.count("tissue[red]") == 2
    assert printed.count("/w[old]/precise/k/bundle") == 2
    report = {"images": 1, "complete": True, "iou": {"tumor [red]": 0.5}, "miou": 0.5, "fwiou": 0.5}
    console = Console(width=100)
    console.print(score_table({"model [red]": report}))
    console.print(mask_table({"cams/k1": report | {"without_class": 0.0}}))
    printed = capsys.readouterr().out
    assert "model [red]" in printed
    assert printed.count("tumor [red]") == 2


@pytest.mark.parametrize("protocol", ["refusing", "no-such-protocol"])
def test_a_version_whose_storage_cannot_be_opened_hides_no_other(workspace, monkeypatch, capsys, protocol):
    opens = fsspec.core.url_to_fs

    def open_unless_refused(uri):
        if uri.startswith("refusing"):
            raise PermissionError("403")
        return opens(uri)

    monkeypatch.setattr("fsspec.core.url_to_fs", open_unless_refused)
    client = connect(TrackingConfig(), workspace)
    client.create_registered_model(protocol)
    bundle = f"{protocol}://bucket/w/precise/eeee/bundle"
    client.create_model_version(protocol, source=workspace.root, tags={"pistoseg.bundle": bundle})
    assert main(["models", "list", "--workspace", workspace.root]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if bundle in line]
    assert [cell.strip() for cell in row.split("│")][4] == "-"


@pytest.mark.parametrize("newest", ["a", "b"])
def test_of_several_evaluations_of_a_model_the_newest_is_shown(tmp_path, monkeypatch, newest):
    place = Workspace(str(tmp_path))
    model = model_in(place)
    for key in ("a", "b"):
        monkeypatch.setattr("pistoseg.artifacts.time.gmtime", lambda late=key == newest: time.localtime(9e8 + late))
        metrics = {"miou": 0.9, "fwiou": 0.8} if key != newest else {"miou": 0.5}
        summary = {"metrics": metrics}
        place.commit("evaluation", key, version=1, settings={}, inputs={"model": model}, summary=summary, seconds=1)
    version = ModelVersion("m", "1", (), {"pistoseg.bundle": model.path("bundle")}, None, 0)
    assert models_command._scores(version) == {"miou": 0.5}


def test_a_bundle_in_no_workspace_has_no_scores():
    assert [scored_by(bundle) for bundle in ("bundle", "/bundle", "/m/bundle/", "s3://models/bundle")] == [[]] * 4


def test_a_database_is_opened_by_one_at_a_time(tmp_path, monkeypatch):
    opened = []

    def opens(uri):
        opened.append(uri)
        with (tmp_path / ".mlflow.db.lock").open() as another, pytest.raises(BlockingIOError):
            fcntl.flock(another, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return types.SimpleNamespace(tracking_uri=uri)

    monkeypatch.setattr("mlflow.tracking.MlflowClient", opens)
    for _ in range(2):
        connect(TrackingConfig(), Workspace(str(tmp_path)))
    assert len(opened) == 2


def test_a_database_of_another_version_of_mlflow_is_upgraded_by_the_user(workspace, tmp_path, capsys):
    file = shutil.copy(storage.join(workspace.root, "mlflow.db"), tmp_path)
    with contextlib.closing(sqlite3.connect(file)) as database, database:
        database.execute("UPDATE alembic_version SET version_num = 'bd07f7e963c5'")
    for verb in (["models", "list"], ["ui"]):
        assert main([*verb, "--workspace", str(tmp_path)]) == 2
        assert f"`mlflow db upgrade sqlite:///{file}`" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["damaged.db", "damaged.db/mlflow.db"])
def test_a_database_that_cannot_be_opened_is_named(tmp_path, monkeypatch, place):
    (tmp_path / "damaged.db").write_bytes(b"no database")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / place}")
    with pytest.raises(PistoSegError, match=f"{place}: MLflow can't open it") as caught:
        connect(TrackingConfig(), Workspace(str(tmp_path / "w")))
    assert "folder that can be written" in caught.value.remedy


def test_the_folder_of_a_database_is_made(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/new/folder/mlflow.db")
    connect(TrackingConfig(), Workspace(str(tmp_path / "w")))
    assert (tmp_path / "new" / "folder" / "mlflow.db").exists()


def test_a_workspace_has_its_database_whatever_its_name_means_in_a_uri(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    place = Workspace(str(tmp_path / "50% of slides%20#1?x"))
    connect(TrackingConfig(), place).close()
    database = Path(place.root) / "mlflow.db"
    assert database.exists()
    assert database_file(tracking_uri(TrackingConfig(), place)) == database
    assert main(["models", "list", "--workspace", place.root]) == 0
    assert "is not there" not in capsys.readouterr().err
    # A name that means itself is not quoted: MLflow would make a folder of the quoted one.
    assert database_uri(Path("/50% of sl\u00e4s #1/mlflow.db")) == "sqlite:////50% of sl\u00e4s #1/mlflow.db"


def test_an_address_that_is_none_of_a_database_is_said_to_be_none():
    with pytest.raises(PistoSegError, match=r"is no URI of a SQLite database. Remedy: write sqlite:///FILE"):
        database_file("sqlite:ml.db")


@pytest.mark.parametrize(
    "arguments", [["list"], ["show", "tissue"], ["show", "tissue@champion"], ["promote", "tissue", "1"]]
)
def test_a_server_that_is_away_is_named_without_its_password(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hidden@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert main(["models", *arguments, "--workspace", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert "http://***@127.0.0.1:9" in printed.err
    assert "Remedy: see that the server runs" in printed.err
    assert "hidden" not in printed.out + printed.err


def test_where_models_and_runs_are_is_shown_without_a_password(workspace, monkeypatch, capsys):
    uri = "http://me:hidden@127.0.0.1:9"
    monkeypatch.setattr("pistoseg.tracking.registry.tracking_uri", lambda *_: uri)  # the versions are the workspace's
    assert main(["models", "list", "--workspace", workspace.root]) == 0
    assert "Models at http://***@127.0.0.1:9" in capsys.readouterr().out
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert main(["ui", "--workspace", workspace.root]) == 0
    assert capsys.readouterr().out == "runs are at http://***@127.0.0.1:9\n"


@pytest.mark.parametrize("verb", [["models", "list"], ["models", "show", "tissue"], ["ui"]])
def test_models_and_runs_are_those_of_the_server_that_the_settings_name(tmp_path, monkeypatch, capsys, verb):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:8")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    (tmp_path / "my.yaml").write_text("preset: demo\ntracking: {uri: 'http://127.0.0.1:9'}")
    for settings in (["--config", str(tmp_path / "my.yaml")], ["--set", "tracking.uri=http://127.0.0.1:9"]):
        main([*verb, "--workspace", str(tmp_path), *settings])
        printed = capsys.readouterr()
        assert "http://127.0.0.1:9" in printed.out + printed.err
        assert "127.0.0.1:8" not in printed.out + printed.err


def test_a_workspace_without_models_says_where_it_looked(tmp_path, capsys):
    assert main(["models", "list", "--workspace", str(tmp_path)]) == 2
    assert "mlflow.db is not there" in capsys.readouterr().err
    assert not json.dumps(list(map(str, tmp_path.iterdir()))).count("mlflow")
