"""What the verbs print."""

import shlex

import pytest

from pistoseg import commands, object_store
from pistoseg.artifacts import Artifact
from pistoseg.config import load_config
from pistoseg.errors import PistoSegError
from pistoseg.search.ablation import with_overrides
from pistoseg.search.command import search

LABEL_REPORT = {"windows": 9, "label_iou": 0.625, "label_map": None, "by_class": {"TUM": 0.625, "STR": None}}
REPORT = {"iou": {"TUM": 0.5}, "miou": 0.5, "fwiou": 0.5, "images": 3, "complete": True}


@pytest.fixture
def trained(tmp_path, monkeypatch, capsys):
    """Lines that `train` prints, by the number of validation images and the settings."""

    def train(images, *overrides):
        root = tmp_path / ("a long name, " * 8)
        data = tmp_path / f"data {images}"
        for folder in ("img", "mask") if images else ("",):
            (data / "validation" / folder).mkdir(parents=True, exist_ok=True)
            (data / "validation" / folder / "a.png").touch()

        def run(config, place, targets):
            summaries = {stage: {"images": images, "report": REPORT} for stage in targets}
            summaries |= {"validation": {"images": images}, "precise": {"metrics": {}}}
            if "label_scores" in targets:
                summaries |= {"patches": {"held_out": {"images": 7}}, "label_scores": {"report": LABEL_REPORT}}
            return {
                stage: Artifact(stage, "f" * 16, f"{root}/{stage}/{'f' * 16}", {"summary": summary})
                for stage, summary in summaries.items()
            }

        monkeypatch.setattr(commands, "_run", run)
        commands.train(load_config("glas", overrides=[f"data.uri={data}", *overrides]), str(root))
        return capsys.readouterr().out.splitlines()

    return train


def test_a_training_says_where_its_model_is_and_what_to_do_with_it(trained, tmp_path):
    lines = trained(3, "scale.mpp=null", "scale.source_mpp=null")
    (model,) = (line.removeprefix("model:").strip() for line in lines if line.startswith("model:"))
    assert model == f"{tmp_path / ('a long name, ' * 8)}/precise/{'f' * 16}/bundle"
    (command,) = (line.removeprefix("next:").strip() for line in lines if line.startswith("next:"))
    assert shlex.split(command)[:6] == ["pistoseg", "segment", "--model", model, "--mpp", "UM"]
    assert not any("--mpp" in line for line in trained(3, "scale.mpp=0.5"))


def test_a_training_with_validation_images_names_what_scores_them(trained):
    lines = trained(3)
    assert f"  evaluation/{'f' * 16}/  metrics.json per_image.csv predictions.png" in lines
    assert f"  validation/{'f' * 16}/  images/" in lines
    assert any("mIoU" in line for line in lines)
    assert not any("not scored" in line for line in lines)


def test_a_training_without_validation_images_names_no_files_of_scores_and_says_why(trained):
    lines = trained(0)
    for stage in ("validation", "preliminary_evaluation", "evaluation"):
        assert f"  {stage}/{'f' * 16}/" in lines
    (reason,) = (line for line in lines if line.startswith("not scored: "))
    assert "img/ and mask/" in reason
    assert "data.label_holdout" in reason


def test_a_training_without_validation_images_scores_by_the_labels_of_images_that_are_held_out(trained):
    lines = trained(0, "data.label_holdout=0.1")
    assert not any("not scored" in line for line in lines)
    assert f"  label_scores/{'f' * 16}/  label_scores.json windows/" in lines
    text = " ".join("\n".join(lines).split())
    assert "by labels of 7 held-out images" in text
    assert "TUM │ 0.625" in text
    assert "STR │ -" in text
    assert not any("held-out" in line or "label_scores" in line for line in trained(3, "data.label_holdout=0.1"))


@pytest.mark.parametrize(
    "verb", ["train", "train by labels", "synthesize", "ablate", "search", "data check", "data windows"]
)
def test_a_verb_that_python_calls_asks_the_storage_of_its_config_for_its_data(verb, tmp_path, monkeypatch):
    """A server that refuses connections says which one was asked."""
    monkeypatch.setattr(object_store, "_forwarded", {})
    monkeypatch.setattr(object_store, "RETRIES", 1)
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.setenv(name, "http://127.0.0.1:8")
    monkeypatch.setenv(object_store.ANONYMOUS, "1")
    config = load_config("demo", overrides=["data.uri=s3://b/x", "storage={endpoint: 'http://127.0.0.1:9'}"])
    by_labels = with_overrides(config, {"data.label_holdout": 0.1})
    place, options = str(tmp_path), {"name": None, "objective": "auto", "dry_run": True}
    calls = {
        "train": lambda: commands.train(config, place),
        "train by labels": lambda: commands.train(by_labels, place),
        "synthesize": lambda: commands.synthesize(config, place, 4, "x.png"),
        "ablate": lambda: commands.ablate("table1", config, place),
        "search": lambda: search(config, place, "crops", options),
        "data check": lambda: commands.data_check("s3://b/x", config, None, 1),
        "data windows": lambda: commands.data_windows("s3://b/x", "s3://b/y", f"{place}/x.csv", config, 1),
    }
    with pytest.raises(PistoSegError, match=r"http://127.0.0.1:9 does not answer"):
        calls[verb]()
