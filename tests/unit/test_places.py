from pistoseg.config import load_config
from pistoseg.places import data_places, with_absolute


def test_relative_places_are_the_same_from_every_folder_and_nothing_else_is_changed(tmp_path, monkeypatch):
    written = {
        "data.uri": "train",
        "data.validation": "s3://bucket/validation",
        "precise.weights": "w.pth",
        "tracking.uri": "sqlite:///runs.db",
    }
    config = load_config("demo", overrides=[f"{key}={value}" for key, value in written.items()])
    monkeypatch.chdir(tmp_path)
    settled = with_absolute(config)
    assert settled.data.uri == f"{tmp_path}/train"
    assert settled.precise.weights == f"{tmp_path}/w.pth"
    assert settled.tracking.uri == f"sqlite:///{tmp_path}/runs.db"
    others = {section: {"uri", "weights"} for section in ("data", "precise", "tracking")}
    assert settled.model_dump(exclude=others) == config.model_dump(exclude=others)
    monkeypatch.chdir("/")
    assert with_absolute(settled) == settled


def test_places_of_data_are_folders_and_files_of_weights_and_no_names_of_weights():
    written = {"data.uri": "s3://bucket/train", "classifier.weights": "/home/me/x.pth", "precise.weights": "imagenet"}
    config = load_config("demo", overrides=[f"{key}={value}" for key, value in written.items()])
    assert data_places(config) == {"data.uri": "s3://bucket/train", "classifier.weights": "/home/me/x.pth"}
