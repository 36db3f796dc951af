"""The train loop under Ray Train: two processes, and a loss that stops being a number."""

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from ray import cloudpickle
from safetensors.torch import load_file

from pistoseg.classes import TissueClass, TissueClasses
from pistoseg.config import AugmentationConfig, ComputeConfig, TrainingConfig
from pistoseg.errors import PistoSegError
from pistoseg.models import segmentation
from pistoseg.models.segmentation import Normalization
from pistoseg.search.trial import is_lost
from pistoseg.stages.trained import first_weights
from pistoseg.training.stream import SampleSource
from pistoseg.training.tasks import SegmentationTask
from pistoseg.training.trainer import _last_history, train

pytestmark = pytest.mark.usefixtures("local_ray")
cloudpickle.register_pickle_by_value(__import__("sys").modules[__name__])  # workers can't import a test module

CLASSES = TissueClasses((TissueClass("a", (200, 0, 0)), TissueClass("b", (0, 200, 0))))
ALL_USED = {"architecture": "unet", "encoder": "tu-mobilenetv3_small_050", "decoder_attention": None}
SOME_UNUSED = {"architecture": "unetplusplus", "encoder": "efficientnet-b0"}
OFF = AugmentationConfig(flip=False, crop_scale=1, rotate=0, scale=0, stain=0, brightness=0)


class Addresses:
    """Samples whose colour is their address."""

    def __init__(self, shared):
        pass

    def sample(self, epoch, index):
        image = np.full((32, 32, 3), (epoch, index, 100), np.uint8)
        return image, np.full((32, 32), index % 2, np.uint8)


@dataclass(frozen=True)
class Recording(Normalization):
    """Writes down which samples a training worker sees; spoils the one with the address `spoil`."""

    folder: str = ""
    spoil: tuple[int, int] = (-1, -1)
    die_at: tuple[int, int] = (-1, -1)

    def __call__(self, images, device=None):
        seen = images[:, 0, 0, :2].tolist()
        rank = ray.train.get_context().get_world_rank()
        with (Path(self.folder) / f"rank{rank}.jsonl").open("a") as file:
            file.write(json.dumps(seen) + "\n")
        died = Path(self.folder) / "died"
        if list(self.die_at) in seen and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        pixels = super().__call__(images, device)
        return (
            pixels
            * torch.tensor([float("nan") if tuple(item) == self.spoil else 1.0 for item in seen])[:, None, None, None]
        )


@dataclass(frozen=True)
class Statistics(SegmentationTask):
    """Scores whether all workers would validate with the same running statistics."""

    validates = True

    def validate(self, network, device, rank, world):
        return [float(buffer.double().sum()) for buffer in network.buffers()]

    def scores(self, shares):
        return {self.score: float(all(share == shares[0] for share in shares))}


@dataclass(frozen=True)
class Unscored(SegmentationTask):
    """A validation that has nothing to score, as one on masks without any class."""

    validates = True

    def validate(self, network, device, rank, world):
        return np.zeros((2, 2), np.int64)


def run(
    folder,
    workers=1,
    spoil=(-1, -1),
    die_at=(-1, -1),
    network_of=ALL_USED,
    task=SegmentationTask,
    max_failures=1,
    **changes,
):
    with first_weights(0):
        network = segmentation.build(n_classes=2, weights=None, **network_of)
    folder.mkdir(exist_ok=True)
    network.normalization = Recording(folder=str(folder), spoil=spoil, die_at=die_at)
    settings = {"batch_size": 8, "samples_per_epoch": 24, "epochs": 2, "precision": "fp32", "augmentation": OFF}
    rows = []
    trained = train(
        network,
        SampleSource(Addresses, ray.put(None), 24, (32, 32)),
        task(CLASSES, "bce", None),
        TrainingConfig(**settings | changes),
        ComputeConfig(train_workers=workers, max_failures=max_failures if die_at[0] >= 0 else 0),
        folder=str(folder),
        seed=0,
        actors=1,
        threads=1,
        gpus=False,
        on_step=lambda done, total, note: None,
        on_epoch=rows.append,
    )
    return trained, rows


def seen(folder):
    """Batches of addresses by rank."""
    return {file.stem: [json.loads(line) for line in file.open()] for file in sorted(folder.glob("rank*.jsonl"))}


def test_two_processes_share_every_epoch_and_see_each_sample_once(tmp_path):
    trained, rows = run(tmp_path, workers=2, task=Statistics)
    by_rank = seen(tmp_path)
    assert set(by_rank) == {"rank0", "rank1"}
    for batches in by_rank.values():
        assert [len(batch) for batch in batches] == [4] * 6
    for epoch in range(2):
        used = [
            tuple(item)
            for batches in by_rank.values()
            for batch in batches[3 * epoch : 3 * epoch + 3]
            for item in batch
        ]
        assert sorted(used) == [(epoch, index) for index in range(24)]
    assert [row["epoch"] for row in trained.history] == [0, 1]
    assert [row["epoch"] for row in rows] == [0, 1]
    assert [row["validation_miou"] for row in rows] == [1, 1]
    assert all(torch.isfinite(value).all() for value in trained.state.values())


def test_two_processes_train_a_network_that_does_not_use_all_its_parameters(tmp_path):
    trained, _ = run(tmp_path, workers=2, network_of=SOME_UNUSED, epochs=1, weight_decay=0)
    with first_weights(0):
        first = segmentation.build(n_classes=2, weights=None, **SOME_UNUSED).state_dict()
    changed = {name for name, value in trained.state.items() if not torch.equal(value, first[name])}
    used, unused = "network.segmentation_head.0.weight", "network.encoder._conv_head.weight"
    assert (used in changed, unused in changed) == (True, False)


def test_a_loss_that_is_no_number_ends_with_its_place_and_its_batch(tmp_path):
    with pytest.raises(PistoSegError, match=r"the loss is nan in epoch 2, step 2") as caught:
        run(tmp_path, spoil=(1, 11))
    assert caught.value.file == str(tmp_path)
    assert "precision=fp32" in caught.value.remedy
    batch = load_file(tmp_path / "failed-batch-rank0.safetensors")
    assert batch["image"][:, 0, 0, :2].tolist() == [[1, index] for index in range(8, 16)]
    assert batch["mask"].shape == (8, 32, 32)
    assert [row["epoch"] for row in _last_history(str(tmp_path))] == [0]  # the next run goes on from here


def test_a_worker_that_is_not_started_again_ends_its_training_with_a_remedy_and_counts_as_lost(tmp_path):
    with pytest.raises(PistoSegError, match=r"a worker process died, or its node\. Remedy: .* memory") as caught:
        run(tmp_path, die_at=(0, 3), max_failures=0)
    assert caught.value.file == str(tmp_path)
    assert is_lost(caught.value)  # a search begins such a trial again


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A training of two epochs without a score."""
    return run(tmp_path_factory.mktemp("whole"), task=Unscored)[0]


def test_of_epochs_that_have_no_score_the_last_one_is_kept(whole):
    assert whole.epoch == 1
    assert "validation_miou" not in json.loads(json.dumps(whole.history, allow_nan=False))[1]


def test_a_killed_worker_is_replaced_and_ends_every_epoch_as_if_it_had_lived(whole, tmp_path):
    trained, _ = run(tmp_path, die_at=(1, 11), task=Unscored)
    assert all(torch.equal(value, whole.state[name]) for name, value in trained.state.items())
    assert [row["epoch"] for row in trained.history] == [0, 1]
    order = [tuple(batch[0]) for batch in seen(tmp_path)["rank0"]]
    epochs = [[(epoch, start) for start in (0, 8, 16)] for epoch in range(2)]
    assert order[:5] == epochs[0] + epochs[1][:2]  # the last of these is lost with the worker
    # Epoch 0 is repeated where its checkpoint was not registered yet when the worker died.
    assert order[5:] in (epochs[1], epochs[0] + epochs[1])

    # As after a kill between the last checkpoint and the bundle.
    again, rows = run(tmp_path, die_at=(1, 11), task=Unscored)
    assert (again.history, rows) == (trained.history, [])
    assert [tuple(batch[0]) for batch in seen(tmp_path)["rank0"]] == order
    assert all(torch.equal(again.state[name], value) for name, value in trained.state.items())
