"""What the stages that train have in common."""

import errno
import io
import json
import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import torch
from rich.console import Console
from torch import nn

from pistoseg import storage
from pistoseg.config import load_config
from pistoseg.errors import PistoSegError, UnavailableError
from pistoseg.graph import BY_NAME, StageContext
from pistoseg.models import bundle, encoders, segmentation
from pistoseg.models.segmentation import Normalization
from pistoseg.progress import Progress
from pistoseg.stages import segmentation as stage
from pistoseg.stages import trained
from pistoseg.stages.trained import (
    POOLED,
    check_batches,
    check_buildable,
    fetch_weights,
    first_weights,
    train_stage,
)
from pistoseg.tracking import StageRun
from pistoseg.training.loop import CHECKPOINT
from pistoseg.training.trainer import (
    SNAPSHOT,
    Trained,
    _interruptible,
    _last_history,
    remove_unreadable_checkpoints,
)


def test_the_seed_alone_decides_the_first_weights_and_later_draws_are_left_alone():
    def built(seed):
        with first_weights(seed):
            return nn.Linear(8, 8).weight

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = built(0)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(built(0), first)
    assert not torch.equal(built(1), first)


@pytest.fixture
def train_in(tmp_path, monkeypatch):
    """Runs a stage whose training only sees that it may write its checkpoints; what was said, and its context."""
    network = nn.Linear(2, 2)
    history = [{"epoch": 0, "loss": 1.0, "images_per_s": 2.0}]

    def train(*_, folder, **__):
        assert _last_history(folder) == []
        (tmp_path / "ray_train").mkdir(exist_ok=True)
        return Trained(network.state_dict(), 0, history)

    def run(*overrides, **named):
        config = load_config("demo", overrides=["data.uri=/data", *overrides])
        file = io.StringIO()
        context = StageContext(config, str(tmp_path), {}, Progress(Console(file=file)), StageRun(), **named)

        def save(lineage, metrics):
            (tmp_path / "model.json").write_text("{}")

        train_stage(context, network, SimpleNamespace(count=4), None, config.precise, save)
        return file.getvalue(), context

    monkeypatch.setattr(trained, "train", train)
    monkeypatch.setattr(trained.cluster, "training_resources", lambda compute: {})
    return run


def test_checkpoints_stay_until_the_artifact_is_finished(tmp_path, train_in):
    _, context = train_in()
    # What the stage does next may fail; run again, it goes on behind the training.
    assert (tmp_path / "ray_train").exists()
    for tidy in context.afterwards:
        tidy()
    assert not (tmp_path / "ray_train").exists()


@pytest.mark.parametrize(
    ("epochs", "decay", "said"),
    [
        (2, 0.99, "16 steps, fewer than 3/(1 - average_decay)"),
        (2, 0.99, "make up 85% of the model that is kept; set it to 0.81 or less, or to 0 for none"),
        (2, 0.81, ""),
        (2, 0, ""),
        (37, 0.99, "only 296 steps"),
        (38, 0.99, ""),
    ],
)
def test_a_running_average_of_too_few_steps_is_warned_of(train_in, epochs, decay, said):
    settings = [f"precise.epochs={epochs}", "precise.samples_per_epoch=64", f"precise.average_decay={decay}"]
    text, _ = train_in(*settings)
    text = " ".join(text.split())
    assert ("warning: precise.average_decay is" in text) == bool(said)
    assert said in text


def test_three_steps_or_fewer_are_for_no_average(train_in):
    text, _ = train_in("precise.epochs=3", "precise.samples_per_epoch=8", "precise.average_decay=0.5")
    assert "set it to 0 for none" in " ".join(text.split())


def test_a_training_that_was_taken_over_leaves_the_results_of_the_other_run_alone(tmp_path, train_in):
    def check():
        raise PistoSegError("another run took this over")

    train_in()
    results = [tmp_path / "model.json", tmp_path / "epochs.json"]
    for result in results:
        result.write_text("the other run's")
    with pytest.raises(PistoSegError, match="another run took this over"):
        train_in(check=check)
    assert [result.read_text() for result in results] == ["the other run's"] * 2


def models(encoder, weights):
    """Overrides that give the preliminary and the precise model one network, and weights of their own."""
    network = "{architecture: unet, encoder: %s, decoder_attention: null, weights: %s}"
    sections = zip(("preliminary", "precise"), weights, strict=True)
    return ["refiner.initial=imagenet", *(f"{name}={network % (encoder, own)}" for name, own in sections)]


def test_a_precise_model_that_starts_from_the_preliminary_one_gets_its_images_normalised_as_that_did(
    tmp_path, monkeypatch
):
    overrides = [*models("mobilenet_v2", ("null", "imagenet")), "precise.initial=preliminary"]
    config = load_config("demo", overrides=overrides)
    monkeypatch.setattr(encoders, "_hub", lambda encoder: pytest.fail("weights that are replaced were fetched"))
    classes = config.classes.tissue()
    first = segmentation.build("unet", "mobilenet_v2", len(classes), None, None)
    first.normalization = Normalization((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    bundle.save(str(tmp_path / "bundle"), first, classes=classes, patch_size=64)
    inputs = {
        "initial": SimpleNamespace(path=lambda name: str(tmp_path / name)),
        "validation": SimpleNamespace(summary={"images": 0}),
    }
    started = []
    monkeypatch.setattr(stage, "train_stage", lambda context, network, *_: started.append(network))
    stage._run(SimpleNamespace(config=config, inputs=inputs), config.precise, None)
    assert started[0].normalization == first.normalization
    assert torch.equal(next(started[0].parameters()), next(first.parameters()))


def test_only_weights_that_a_network_is_built_with_have_to_be_there():
    overrides = models("mobilenet_v2", ("null", "/none.pth"))
    check_buildable(load_config("demo", overrides=[*overrides, "precise.initial=preliminary"]), ["precise"])
    with pytest.raises(PistoSegError, match=r"/none\.pth: precise\.weights: is not there"):
        check_buildable(load_config("demo", overrides=[*overrides, "precise.initial=imagenet"]), ["precise"])


def test_imagenet_weights_are_fetched_once_for_the_networks_that_are_to_be_trained_with_them(monkeypatch):
    fetched = []
    monkeypatch.setattr(encoders, "_from_package", lambda encoder: None)
    monkeypatch.setattr(encoders, "_from_hub", fetched.append)
    encoders.fetch_imagenet.cache_clear()
    config = load_config("demo", overrides=models("mobilenet_v2", ("imagenet", "imagenet")))
    fetch_weights(config, ["patches", "evaluation"])
    assert fetched == []
    initial = load_config("demo", overrides=["precise.encoder=resnet18", "precise.initial=imagenet"])
    fetch_weights(initial, ["refiner"])  # which starts from the preliminary model
    assert fetched == []
    for _ in range(2):
        fetch_weights(config, ["preliminary", "subcategories", "precise"])
    encoders.fetch_imagenet.cache_clear()
    assert fetched == ["mobilenet_v2", config.classifier.encoder]


@pytest.mark.parametrize(
    ("encoder", "weights", "changed"),
    [
        ("xception", ("imagenet", "null"), True),
        ("xception", ("null", "imagenet"), True),
        ("xception", ("imagenet", "imagenet"), False),
        ("xception", ("null", "/a.pth"), False),
        ("tu-mobilenetv3_small_050", ("imagenet", "null"), False),
    ],
)
def test_only_precise_models_that_may_have_had_another_normalisation_are_trained_anew(
    tmp_path, encoder, weights, changed
):
    (tmp_path / "x+0[1 0 1 1].png").write_bytes(b"")
    for initial in ("preliminary", "imagenet"):
        overrides = [f"data.uri={tmp_path}", *models(encoder, weights), f"precise.initial={initial}"]
        config = load_config("demo", overrides=overrides)
        assert ("normalization" in BY_NAME["precise"].settings(config)) == (changed and initial == "preliminary")
        assert "normalization" not in BY_NAME["preliminary"].settings(config)


@pytest.mark.parametrize("cut_off", [b"", b'{"ray_version": "2.'])
def test_a_training_whose_list_of_checkpoints_was_cut_off_begins_anew_and_says_so(cut_off, tmp_path, train_in):
    (tmp_path / "ray_train").mkdir()
    (tmp_path / "ray_train" / SNAPSHOT).write_bytes(cut_off)
    said, _ = train_in()
    assert "list of the checkpoints was cut off; the training begins anew" in said.replace("\n", " ")
    assert not (tmp_path / "ray_train" / SNAPSHOT).exists()


@pytest.fixture
def checkpoints(tmp_path):
    """The files of two checkpoints, of epochs 1 and 2, in the list of an interrupted training, the better one last."""
    files, results = [], []
    for epoch in (1, 0):
        files.insert(0, tmp_path / "ray_train" / f"checkpoint_{epoch}" / CHECKPOINT)
        files[0].parent.mkdir(parents=True)
        history = [{"epoch": number} for number in range(epoch + 1)]
        torch.save({"network": torch.rand(20_000), "history": json.dumps(history)}, files[0])
        results.append({"version": 0, "checkpoint_dir_name": f"checkpoint_{epoch}", "metrics": {"epoch": epoch}})
    empty = ("pending_training_results", "pending_validation_specs", "validated_checkpoint_dir_names")
    empty += ("timed_out_validation_checkpoint_dir_names", "failed_validation_checkpoint_dir_names")
    state = {"ray_version": ray.__version__, "checkpoint_results": results, "checkpoint_report_indices": [1, 0]}
    state |= {"latest_checkpoint_result": results[0], "current_report_index": 2} | {name: [] for name in empty}
    (tmp_path / "ray_train" / SNAPSHOT).write_text(json.dumps(state))
    return files


def cut_off(file):
    file.write_bytes(file.read_bytes()[:5000])


def lose_a_page(file):
    content = file.read_bytes()
    file.write_bytes(content[:40960] + bytes(4096) + content[45056:])


def epochs(folder):
    return [row["epoch"] for row in _last_history(str(folder))]


def test_whole_checkpoints_are_left_alone(tmp_path, checkpoints):
    assert remove_unreadable_checkpoints(str(tmp_path)) == ""
    assert epochs(tmp_path) == [0, 1]
    assert remove_unreadable_checkpoints(str(tmp_path / "none")) == ""


@pytest.mark.parametrize("damage", [cut_off, lose_a_page, Path.unlink])
def test_a_training_whose_last_checkpoint_was_cut_off_goes_on_behind_the_one_before(damage, tmp_path, checkpoints):
    damage(checkpoints[1])
    assert (
        remove_unreadable_checkpoints(str(tmp_path)) == "a checkpoint was cut off; the training goes on behind epoch 1"
    )
    assert epochs(tmp_path) == [0]
    assert not checkpoints[1].parent.exists()
    assert remove_unreadable_checkpoints(str(tmp_path)) == ""


def test_a_training_whose_best_checkpoint_was_cut_off_goes_on_behind_the_last_one(tmp_path, checkpoints):
    cut_off(checkpoints[0])
    assert remove_unreadable_checkpoints(str(tmp_path)).endswith("goes on behind epoch 2")
    assert epochs(tmp_path) == [0, 1]


def test_a_training_without_a_whole_checkpoint_begins_anew_and_says_so(tmp_path, train_in, checkpoints):
    for file in checkpoints:
        cut_off(file)
    said, _ = train_in()
    assert "the checkpoints were cut off; the training begins anew" in said.replace("\n", " ")


@pytest.mark.parametrize("error", [UnavailableError("does not answer"), OSError(errno.EIO, "Input/output error")])
def test_checkpoints_that_cannot_be_read_now_are_not_taken_for_damaged(error, tmp_path, checkpoints, monkeypatch):
    read = storage.read_bytes

    def read_list(uri):
        if uri.endswith(CHECKPOINT):
            raise error
        return read(uri)

    monkeypatch.setattr(storage, "read_bytes", read_list)
    with pytest.raises(type(error), match=r"answer|Input"):
        remove_unreadable_checkpoints(str(tmp_path))
    assert all(file.exists() for file in checkpoints)


def batches(**settings):
    """What is said of batches before the first stage runs."""
    said = []
    config = load_config("demo", overrides=["data.uri=/data", *(f"{key}={value}" for key, value in settings.items())])
    check_batches(config, ["patches", "precise"], said.append)
    return said


def test_a_batch_that_the_workers_do_not_divide_is_told_once():
    assert batches(**{"precise.batch_size": 16, "compute.train_workers": 4}) == []
    assert batches(**{"precise.batch_size": 10, "preliminary.batch_size": 9, "compute.train_workers": 4}) == [
        "warning: precise.batch_size is 10, but 4 workers take 2 images each: 8 in a step"
    ]
    assert batches(**{"precise.batch_size": 2, "compute.train_workers": 4})[0].endswith("1 images each: 4 in a step")


@pytest.mark.parametrize("architecture", POOLED)
def test_an_architecture_that_cannot_learn_from_one_image_is_not_given_one(architecture):
    network = segmentation.build(architecture, "resnet18", 2, None).train()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        network(torch.rand(1, 3, 64, 64))
    one = {"precise.architecture": architecture, "precise.batch_size": 7, "compute.train_workers": 4}
    with pytest.raises(PistoSegError, match=r"precise\.batch_size: .* Remedy: set it to 8 or more"):
        batches(**one)
    assert batches(**one | {"precise.batch_size": 8}) == []


def test_ctrl_c_in_a_training_is_an_interrupt_as_it_is_afterwards():
    def fit():
        signal.signal(signal.SIGINT, lambda *_: sys.exit(1))  # as Ray Train does
        signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(KeyboardInterrupt), _interruptible():
            fit()
        assert signal.getsignal(signal.SIGINT) is before
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_training_in_a_thread_leaves_the_handlers_alone():
    before, ended = signal.getsignal(signal.SIGINT), []

    def train():
        with _interruptible():
            ended.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert ended == [before]
