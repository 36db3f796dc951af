"""What each task makes of a batch, against the same computed by hand."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pistoseg.classes import IGNORE_ID, TissueClass, TissueClasses
from pistoseg.config import DataConfig, RefinerConfig, TrainingConfig
from pistoseg.models import classifier, segmentation
from pistoseg.models.refiner import Refined
from pistoseg.training.labelled_images import LabelledImages
from pistoseg.training.loop import _Training, build_optimizer, learning_rate
from pistoseg.training.tasks import ClassificationTask, RefiningTask, SegmentationTask, allowed_maps

CLASSES = TissueClasses(tuple(TissueClass(name, (0, 0, number)) for number, name in enumerate("abc")))


def halves(size=8):
    """Two windows, left and right, with a strip of one row that belongs to neither."""
    regions = np.zeros((size, size), np.uint8)
    regions[:, size // 2 :] = 1
    regions[0] = IGNORE_ID
    return torch.from_numpy(regions)


def test_a_segmentation_task_scores_by_the_sum_of_all_workers_counts():
    task = SegmentationTask(CLASSES, "bce", None)
    first, second = np.diag([5, 0, 1]), np.array([[0, 0, 0], [2, 3, 0], [0, 0, 4]])
    scores = task.scores([first, second])
    assert scores["validation_miou"] == pytest.approx(np.mean([5 / 7, 3 / 5, 1]))
    assert not task.validates


def test_validation_images_or_labels_without_any_class_give_no_score_instead_of_nan():
    assert SegmentationTask(CLASSES, "bce", "masks").scores([np.zeros((3, 3), np.int64)] * 2) == {}
    labels, areas = np.zeros((2, 3), np.uint8), np.full((2, 3), 0.5)
    task = SegmentationTask(CLASSES, "bce", None, labelled=LabelledImages("held out", DataConfig()))
    assert task.scores([(labels, areas)]) == {}
    labels[0, 1] = 1
    assert task.scores([(labels, areas)]) == {"validation_label_iou": pytest.approx(1 / 3)}


def test_windows_are_judged_by_the_mean_of_the_class_map_over_them():
    maps = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [255, 255, 255]]], dtype=torch.uint8)
    regions = torch.stack([halves(), torch.where(halves() == 1, IGNORE_ID, halves())])
    batch = {"image": torch.zeros(2, 8, 8, 3, dtype=torch.uint8), "regions": regions, "labels": labels}
    task = ClassificationTask(("a", "b", "c"), 2, None)
    losses = task.losses(lambda images: maps, batch)
    logits = torch.stack(
        [maps[0, :, 1:, :4].mean((1, 2)), maps[0, :, 1:, 4:].mean((1, 2)), maps[1, :, 1:, :4].mean((1, 2))]
    )
    truth = torch.tensor([[1.0, 0, 0], [0, 1, 1], [1, 1, 0]])
    assert float(losses["loss"]) == pytest.approx(float(F.multilabel_soft_margin_loss(logits, truth)), rel=1e-5)
    assert set(losses) == {"loss"}


def test_subcategories_add_their_weighted_loss():
    maps = torch.randn(1, 9, 8, 8, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([[[1, 0, 0, 1, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0, 1, 0, 0]]], dtype=torch.uint8)
    batch = {"image": torch.zeros(1, 8, 8, 3, dtype=torch.uint8), "regions": halves()[None], "labels": labels}
    losses = ClassificationTask(("a", "b", "c"), 2, None, subcategory_weight=3.0).losses(lambda images: maps, batch)
    assert float(losses["loss"]) == pytest.approx(float(losses["loss_cls"] + 3 * losses["loss_subcategories"]))


def test_a_classification_task_reports_average_precision_by_class():
    task = ClassificationTask(("a", "b"), 1, None)
    labels = np.array([[1, 0], [0, 0], [1, 0]], np.uint8)
    probabilities = np.array([[0.9, 0.1], [0.2, 0.7], [0.8, 0.2]], np.float32)
    scores = task.scores([(labels[:1], probabilities[:1]), (labels[1:], probabilities[1:])])
    assert scores["validation_map"] == scores["validation_average_precision/a"] == 1
    assert "validation_average_precision/b" not in scores, "a class without positives has none"


def test_cells_are_allowed_what_the_window_over_them_is_labelled():
    labels = torch.tensor([[[1, 0, 0], [0, 1, 1]]], dtype=torch.uint8)
    allowed = allowed_maps(halves()[None], labels, (8, 8))
    assert allowed.shape == (1, 3, 8, 8)
    assert (allowed[0, :, 1:, :4].permute(1, 2, 0) == torch.tensor([1.0, 0, 0])).all()
    assert (allowed[0, :, 1:, 4:].permute(1, 2, 0) == torch.tensor([0.0, 1, 1])).all()
    assert (allowed[0, :, 0] == 1).all(), "outside of all windows: what any of them names"
    unused = torch.tensor([[[0, 1, 0], [255, 255, 255]]], dtype=torch.uint8)
    outside = allowed_maps(torch.full((1, 4, 4), IGNORE_ID, dtype=torch.uint8), unused, (2, 2))
    assert (outside[0, :, 0, 0] == torch.tensor([0.0, 1, 0])).all(), "a region that is not there allows nothing"


def test_a_refining_task_hands_both_maps_on_and_counts_windows_only():
    generator = torch.Generator().manual_seed(2)
    maps = torch.rand(1, 6, 8, 8, generator=generator).half()
    seen = {}

    def forward(images, pseudo, cam, allowed):
        seen.update(pseudo=pseudo, cam=cam, allowed=allowed)
        zeros = torch.zeros(1, 3, 8, 8, requires_grad=True)
        ruined = cam.clone()
        ruined[:, :, 0] = 100  # outside of every window
        return Refined(zeros, pseudo, cam, cam, pseudo, ruined, cam, zeros)

    batch = {
        "image": torch.zeros(1, 8, 8, 3, dtype=torch.uint8),
        "regions": halves()[None],
        "labels": torch.tensor([[[1, 0, 0], [0, 1, 1]]], dtype=torch.uint8),
        "maps": maps,
    }
    losses = RefiningTask(3, RefinerConfig(regions=2)).losses(forward, batch)
    assert torch.equal(seen["pseudo"], maps[:, :3].float())
    assert torch.equal(seen["cam"], maps[:, 3:].float())
    difference = (maps[0, :3, 1:].float() - maps[0, 3:, 1:].float()).abs().mean()
    assert float(losses["loss_cons"]) == pytest.approx(float(difference), rel=1e-3)
    assert float(losses["loss_cls"]) == pytest.approx(np.log(2), rel=1e-5), "logits of 0"
    total = losses["loss_cls"] + losses["loss_cons"] + losses["loss_cross"]
    assert float(losses["loss"]) == pytest.approx(float(total), rel=1e-5)


@pytest.mark.parametrize(("finite", "named"), [([True, False], 1), ([False, False], 0), ([True, True], 0)])
def test_a_failure_names_the_batch_of_a_worker_whose_own_loss_is_not_finite(tmp_path, monkeypatch, finite, named):
    def gather(found, own):
        assert own == finite[0]
        found[:] = finite

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    training = object.__new__(_Training)
    training.job, training.rank, training.world = SimpleNamespace(folder=str(tmp_path)), 0, 2
    training.own_loss = torch.tensor(1.0 if finite[0] else np.nan)
    training._fail({"image": torch.zeros(1, 8, 8, 3)}, 0, 1, np.nan)
    reason = json.loads((tmp_path / "failure.json").read_bytes())
    assert reason == {"epoch": 0, "step": 1, "loss": "nan", "batch": f"failed-batch-rank{named}.safetensors"}
    assert (tmp_path / "failed-batch-rank0.safetensors").exists()


def test_a_training_says_when_it_validates_and_when_it_has(monkeypatch):
    said = []
    progress = SimpleNamespace(step=SimpleNamespace(remote=lambda *told: said.append(told)))
    training = object.__new__(_Training)
    training.job = SimpleNamespace(seed=0, steps=2, batch_size=3, progress=progress)
    training.config, training.task = TrainingConfig(epochs=2), SimpleNamespace(validates=True)
    training.rank, training.world, training.history = 0, 1, []
    training.model, training.optimizer = torch.nn.Identity(), SimpleNamespace(param_groups=[])
    monkeypatch.setattr(training, "_step", lambda *_: {"loss": 0.25})
    monkeypatch.setattr(training, "_validate", lambda: said.append("validated") or {})
    monkeypatch.setattr(training, "_report", lambda row: None)
    assert training.run_epoch(1, iter([{}, {}]))
    plain = "epoch 2, loss 0.250"
    assert said == [(3, 9, plain), (4, 12, plain), (4, 12, f"{plain}, validating"), "validated", (4, 12, plain)]


def test_learning_rates_follow_their_schedule():
    exponential = TrainingConfig(lr=0.1, lr_decay=0.5, epochs=3)
    assert [learning_rate(exponential, epoch, 7, 10) for epoch in range(3)] == pytest.approx([0.1, 0.05, 0.025])
    polynomial = TrainingConfig(lr=0.1, schedule="polynomial", lr_power=0.9, epochs=2)
    assert learning_rate(polynomial, 0, 0, 10) == pytest.approx(0.1)
    assert learning_rate(polynomial, 1, 0, 10) == pytest.approx(0.1 * 0.5**0.9)
    assert learning_rate(polynomial, 1, 9, 10) == pytest.approx(0.1 * 0.05**0.9)


@pytest.mark.parametrize("kind", ["segmentation", "classifier"])
def test_new_layers_learn_faster_than_the_pretrained_encoder(kind):
    if kind == "segmentation":
        network = segmentation.build("unet", "tu-mobilenetv3_small_050", 3, None, None)
    else:
        network = classifier.build("tu-mobilenetv3_small_050", 3, None)
    optimizer = build_optimizer(network, TrainingConfig(optimizer="sgd", momentum=0.8, new_layers_factor=10, lr=0.01))
    old, new = optimizer.param_groups
    assert (old["factor"], new["factor"]) == (1, 10)
    assert isinstance(optimizer, torch.optim.SGD)
    assert old["momentum"] == 0.8
    encoder = {id(parameter) for parameter in network.encoder.parameters()}
    assert {id(parameter) for parameter in old["params"]} == encoder
    assert len(old["params"]) + len(new["params"]) == len(list(network.parameters()))
    assert len(new["params"]) > 0
