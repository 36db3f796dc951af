"""What the stages that train have in common."""

from types import SimpleNamespace

import torch
from torch import nn

from pistoseg.config import load_config
from pistoseg.pipeline import StageContext
from pistoseg.progress import Progress
from pistoseg.stages import trained
from pistoseg.stages.trained import first_weights, train_stage
from pistoseg.tracking import StageRun
from pistoseg.training.trainer import Trained


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


def test_checkpoints_stay_until_the_artifact_is_finished(tmp_path, monkeypatch):
    network = nn.Linear(2, 2)
    history = [{"epoch": 0, "loss": 1.0, "images_per_s": 2.0}]

    def train(*_, folder, **__):
        (tmp_path / "ray_train").mkdir()
        return Trained(network.state_dict(), 0, history)

    monkeypatch.setattr(trained, "train", train)
    monkeypatch.setattr(trained.cluster, "training_resources", lambda compute: {})
    config = load_config("demo", overrides=["data.uri=/data"])
    context = StageContext(config, str(tmp_path), {}, Progress(), StageRun())
    source = SimpleNamespace(count=4)
    train_stage(context, network, source, None, config.precise, lambda lineage, metrics: None)
    # What the stage does next may fail; run again, it goes on behind the training.
    assert (tmp_path / "ray_train").exists()
    for tidy in context.afterwards:
        tidy()
    assert not (tmp_path / "ray_train").exists()
