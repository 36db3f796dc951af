"""Models scored by image-level labels: what is held out, what counts as right, and where it is used."""

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from pistoseg import parquet, storage
from pistoseg.classes import TissueClass, TissueClasses
from pistoseg.config import DataConfig, load_config
from pistoseg.errors import PistoSegError
from pistoseg.graph import BY_NAME
from pistoseg.metrics import label_agreement
from pistoseg.models import bundle, segmentation
from pistoseg.patches.decode import encode_png
from pistoseg.patches.store import IMAGES_SCHEMA, WINDOWS_SCHEMA, PatchSet
from pistoseg.search.ablation import with_overrides
from pistoseg.search.objective import LABEL_HOLDOUT, choose
from pistoseg.stages import label_scores
from pistoseg.stages.label_scores import _Score
from pistoseg.stages.patches import _parts
from pistoseg.training.labelled_images import LabelledImages, window_areas
from pistoseg.training.tasks import SegmentationTask

CLASSES = TissueClasses(tuple(TissueClass(name, (0, 0, number)) for number, name in enumerate("abc")))
SIZE = 64


def held_out(folder, count=3):
    """Images of noise with two windows each, side by side; written as an artifact has them."""
    rng = np.random.default_rng(0)
    images, windows = [], []
    for number in range(count):
        pixels = rng.integers(0, 255, (SIZE, SIZE, 3), np.uint8)
        row = {"image": number, "name": f"{number}.png", "width": SIZE, "height": SIZE, "mpp": 1.0, "sha256": ""}
        images.append(row | {"png": encode_png(pixels)})
        for side in range(2):
            box = {"x": side * SIZE // 2, "y": 0, "width": SIZE // 2, "height": SIZE}
            labels = [int(side == 0), int(side == 1), number % 2]
            windows.append({"window": 2 * number + side, "image": number, **box, "labels": labels})
    for name, rows, schema in (("images", images, IMAGES_SCHEMA), ("windows", windows, WINDOWS_SCHEMA)):
        parquet.write(pa.Table.from_pylist(rows, schema), str(folder / name / "part-00000.parquet"))
    return PatchSet.open(str(folder))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("model") / "bundle")
    network = segmentation.build("unet", "tu-mobilenetv3_small_050", 3, None, None)
    bundle.save(folder, network, classes=CLASSES, patch_size=SIZE, scale={"mpp": None, "resize": 1.0})
    return folder


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_a_share_of_the_images_is_held_out_by_name_whatever_their_order(share):
    sources = [SimpleNamespace(name=f"{number}.png") for number in range(40)]
    context = SimpleNamespace(config=load_config("demo", overrides=[f"data.label_holdout={share}"]), folder="/a")
    parts = dict(_parts(sources, context))
    assert set(parts) == ({"/a", "/a/held_out"} if share else {"/a"})
    assert len(parts["/a"]) == 40 - 40 * share
    assert sorted((item for part in parts.values() for item in part), key=sources.index) == sources
    shuffled = dict(_parts(sources[::-1], context))
    assert all({item.name for item in parts[key]} == {item.name for item in shuffled[key]} for key in parts)


def test_holding_images_out_makes_other_artifacts_and_not_doing_so_the_same_as_ever(tmp_path):
    (tmp_path / "x+0[1 0 1 1].png").write_bytes(b"")

    def settings(share):
        config = load_config("demo", overrides=[f"data.uri={tmp_path}", f"data.label_holdout={share}"])
        return BY_NAME["patches"].settings(config)

    assert "label_holdout" not in settings(0)["data"]
    assert settings(0.1)["data"]["label_holdout"] == 0.1


def test_areas_are_shares_of_the_tissue_in_a_window(tmp_path):
    patches = held_out(tmp_path)
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[: SIZE // 4] = 1
    mask[:, -1] = 2
    tissue = np.ones((SIZE, SIZE), bool)
    tissue[SIZE // 2 :, : SIZE // 2] = False  # the lower half of the left window
    labels, areas = window_areas(patches, 1, mask, tissue)
    assert labels.tolist() == [[1, 0, 1], [0, 1, 1]]
    width = SIZE // 2
    last = 1 / width
    assert areas[0] == pytest.approx([0.5, 0.5, 0])
    assert areas[1] == pytest.approx([0.75 * (1 - last), 0.25 * (1 - last), last])
    tissue[:, :width] = False
    assert len(window_areas(patches, 1, mask, tissue)[0]) == 1


def test_a_model_is_scored_on_every_window_as_it_segments_it(tmp_path, model):
    patches = held_out(tmp_path / "held")
    config = load_config("demo", overrides=["evaluation.patch_size=64", "data.background=none"])
    score = _Score(config, model, str(tmp_path / "held"))
    score(0, [0, 2], str(tmp_path / "part.parquet"))
    rows = parquet.read(str(tmp_path / "part.parquet")).to_pylist()
    assert [row["labels"] for row in rows] == [[1, 0, 0], [0, 1, 0]] * 2
    mask = score.predictor.predict(patches.image(2))
    assert rows[2]["areas"] == pytest.approx([(mask[:, : SIZE // 2] == c).mean() for c in range(3)])
    given = score.predictor.probabilities(patches.image(2))[:, :, SIZE // 2 :]
    assert rows[3]["probabilities"] == pytest.approx(given.mean((1, 2)), rel=1e-4)


def test_held_out_images_have_the_networks_pixel_size_and_are_not_resized_once_more(tmp_path, model):
    held_out(tmp_path / "held")
    loaded = bundle.load(model, "cpu")
    halving = str(tmp_path / "halving")
    bundle.save(halving, loaded.model, classes=CLASSES, patch_size=SIZE, scale={"mpp": 1.0, "source_mpp": 0.5})
    config = load_config("demo", overrides=["evaluation.patch_size=64", "data.background=none"])
    parts = []
    for uri in (model, halving):
        parts.append(str(tmp_path / f"{storage.name(uri)}.parquet"))
        _Score(config, uri, str(tmp_path / "held"))(0, [0, 1, 2], parts[-1])
    assert parquet.read(parts[0]) == parquet.read(parts[1])
    images = LabelledImages(str(tmp_path / "held"), config.data)
    assert (images.areas(bundle.load(halving, "cpu"))[1] == images.areas(loaded)[1]).all()


@pytest.mark.parametrize("masks", [False, True])
def test_the_version_of_the_agreement_is_a_setting_of_trainings_that_nothing_else_validates(tmp_path, masks):
    storage.write_bytes(str(tmp_path / "training" / "x+0[1 0 1 1].png"), b"")
    for folder in ("img", "mask") if masks else ():
        storage.write_bytes(str(tmp_path / "validation" / folder / "a.png"), b"")
    for share, version in ((0, None), (0.1, None if masks else 2)):
        config = load_config("demo", overrides=[f"data.uri={tmp_path}", f"data.label_holdout={share}"])
        assert BY_NAME["precise"].settings(config).get("label_agreement") == version


def test_without_images_held_out_the_scores_name_the_setting():
    with pytest.raises(PistoSegError, match=r"data\.label_holdout.*set it to 0\.1"):
        label_scores.run(SimpleNamespace(config=load_config("demo")))


def test_without_masks_a_training_is_validated_by_labels_and_workers_share_the_images(tmp_path, model):
    held_out(tmp_path)
    labelled = LabelledImages(str(tmp_path), DataConfig())
    task = SegmentationTask(CLASSES, "bce", None, labelled=labelled)
    assert task.validates
    assert task.score == "validation_label_iou"
    segmenter = bundle.load(model, "cpu")
    shares = [labelled.areas(segmenter, rank, 2) for rank in range(2)]
    together = labelled.areas(segmenter)
    assert [len(labels) for labels, _ in shares] == [4, 2]
    expected = np.nanmean(label_agreement(*together))
    assert task.scores(shares)["validation_label_iou"] == pytest.approx(expected)
    assert SegmentationTask(CLASSES, "bce", "uri", labelled=labelled).score == "validation_miou"


def test_the_objective_is_miou_where_there_are_masks_and_labels_elsewhere(tmp_path):
    data = tmp_path / "data"
    storage.write_bytes(str(data / "training" / "x+0[1 0 1 1].png"), b"")
    config = load_config("demo", overrides=[f"data.uri={data}"])
    objective, changed = choose("auto", config)
    assert (objective.kind, objective.targets) == ("labels", ("label_scores",))
    assert changed == with_overrides(config, {"data.label_holdout": LABEL_HOLDOUT})
    with pytest.raises(PistoSegError, match="no validation images with masks"):
        choose("miou", config)
    for folder in ("img", "mask"):
        storage.write_bytes(str(data / "validation" / folder / "a.png"), b"")
    objective, changed = choose("auto", config)
    assert (objective.kind, objective.targets) == ("miou", ("evaluation",))
    assert changed == config
    objective, changed = choose("labels", config)
    assert (objective.kind, objective.targets) == ("labels", ("evaluation", "label_scores"))
    # An epoch that is the best by the masks' mIoU would not be by labels alone.
    assert (config.precise.keep, changed.precise.keep, changed.preliminary.keep) == ("best", "last", "last")
