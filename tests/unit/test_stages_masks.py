"""From scores on a grid to masks: what the labels allow, how sure a mask is, and how it compares with the truth."""

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from pistoseg import parquet, storage
from pistoseg.artifacts import Workspace
from pistoseg.classes import IGNORE_ID, TissueClass, TissueClasses
from pistoseg.config import DataConfig
from pistoseg.errors import PistoSegError
from pistoseg.models.cams import normalize_cams
from pistoseg.patches.decode import decode_ids, encode_mask, encode_png
from pistoseg.patches.store import IMAGES_SCHEMA, WINDOWS_SCHEMA, PatchSet
from pistoseg.stages import mask_scores, masks, synthesis

CLASSES = TissueClasses(tuple(TissueClass(name, (0, 0, number)) for number, name in enumerate("abc")))


def patches(size=8, labels=((1, 1, 0),)):
    """Images of `size` px with one window each."""
    images = [
        {"image": number, "name": f"{number}.png", "width": size, "height": size, "mpp": 1.0, "sha256": ""}
        | {"png": encode_png(np.full((size, size, 3), 100 + number, np.uint8))}
        for number in range(len(labels))
    ]
    windows = [
        {"window": number, "image": number, "x": 0, "y": 0, "width": size, "height": size, "labels": list(flags)}
        for number, flags in enumerate(labels)
    ]
    return PatchSet(pa.Table.from_pylist(images, IMAGES_SCHEMA), pa.Table.from_pylist(windows, WINDOWS_SCHEMA))


def test_a_mask_is_the_best_class_that_the_labels_allow():
    scores = np.stack([np.full((2, 2), value, np.float32) for value in (0.1, 0.2, 0.9)])
    allowed = np.ones((3, 4, 4), bool)
    assert (masks.pixel_mask(scores, (4, 4), None) == 2).all()
    allowed[2] = False
    allowed[1, :2] = False
    allowed[:, 0] = False
    mask = masks.pixel_mask(scores, (4, 4), allowed)
    assert mask[:, 0].tolist() == [IGNORE_ID, 0, 1, 1]


def test_shares_of_logits_are_a_softmax_over_the_allowed_classes():
    scores = np.array([1.0, 2.0, 300.0], np.float32).reshape(3, 1, 1)
    allowed = np.array([True, True, False]).reshape(3, 1, 1)
    shares = masks.shares_of_scores(scores, allowed, logits=True).ravel()
    assert shares == pytest.approx([1 / (1 + np.e), np.e / (1 + np.e), 0])
    assert masks.shares_of_scores(scores, None, logits=True).ravel() == pytest.approx([0, 0, 1])


def test_shares_of_activations_are_parts_of_their_sum_and_even_where_nothing_is_active():
    scores = np.array([[1.0, 0.0], [3.0, 0.0], [4.0, 9.0]], np.float32).reshape(3, 1, 2)
    allowed = np.array([True, True, False]).reshape(3, 1, 1).repeat(2, 2)
    shares = masks.shares_of_scores(scores, allowed, logits=False)
    assert shares[:, 0, 0] == pytest.approx([0.25, 0.75, 0])
    assert shares[:, 0, 1] == pytest.approx([0.5, 0.5, 0])


def test_a_cell_allows_what_at_least_half_of_its_pixels_allow():
    allowed = np.zeros((3, 4, 4), bool)
    allowed[0, :, :2] = True
    allowed[1, :, 1:] = True
    allowed[2, 0, 0] = True
    found = masks.allowed_on_grid(allowed, (1, 2))
    assert found[:, 0].tolist() == [[True, False], [True, True], [False, False]]
    only = np.zeros((3, 4, 4), bool)
    only[2, 0, 0] = True
    assert masks.allowed_on_grid(only, (1, 1)).ravel().tolist() == [False, False, True], "what there is, is allowed"


def test_cells_outside_all_windows_and_in_windows_without_a_class_allow_none():
    allowed = np.zeros((3, 4, 8), bool)
    allowed[:2, :, :4] = True  # the right half lies in no window, or in one whose flags are all 0
    found = masks.allowed_on_grid(allowed, (1, 2))
    assert found[:, 0].tolist() == [[True, False], [True, False], [False, False]]
    scores = np.array([[1.0, 5.0], [3.0, 5.0], [9.0, 5.0]], np.float32).reshape(3, 1, 2)
    with np.errstate(all="raise"):
        for logits in (True, False):
            assert masks.shares_of_scores(scores, found, logits)[:, 0, 1].tolist() == [0, 0, 0]
            assert masks.confidence(scores, allowed, logits)[0, 1] == 0
        assert normalize_cams(scores, found)[:, 0, 0] == pytest.approx([1, 1, 0]), "peaks elsewhere must not count"


def test_a_row_holds_scores_confidence_and_mask_of_every_kind():
    writer = masks.MaskWriter(patches(), CLASSES, DataConfig(), constrain=True)
    scores = {
        "cam": np.stack([np.full((2, 2), value, np.float32) for value in (0.25, 0.75, 1.0)]),
        "cnn": np.stack([np.full((2, 2), value, np.float32) for value in (0.9, 0.1, 0.0)]),
    }
    row = writer.row(0, np.full((8, 8, 3), 100, np.uint8), scores, logits=False)
    assert pa.Table.from_pylist([row], masks.schema(("cam", "cnn"))).num_rows == 1
    assert (decode_ids(row["png_cam"]) == 1).all()
    assert (decode_ids(row["png_cnn"]) == 0).all()
    assert np.frombuffer(row["confidence_cam"], np.uint8).tolist() == [round(0.75 * 255)] * 4
    kept = np.frombuffer(row["scores_cnn"], np.float16).reshape(3, 2, 2)
    assert kept[:, 0, 0] == pytest.approx([0.9, 0.1, 0.0], abs=1e-3)


def test_without_a_constraint_any_class_with_a_score_may_appear_and_pixels_without_one_are_ignored():
    scores = np.zeros((3, 2, 2), np.float32)
    scores[:, :, 0] = np.array([0.1, 0.3, 0.6], np.float32)[:, None]  # no window is near the right half
    for constrain, best in ((True, 1), (False, 2)):
        writer = masks.MaskWriter(patches(), CLASSES, DataConfig(), constrain)
        row = writer.row(0, np.full((8, 8, 3), 100, np.uint8), {"": scores}, logits=False)
        mask = decode_ids(row["png"])
        assert (mask[:, :2] == best).all()
        assert (mask[:, 6:] == (0 if constrain else IGNORE_ID)).all()


def test_bright_pixels_become_background_in_every_kind():
    image = np.full((8, 8, 3), 100, np.uint8)
    image[:, :4] = 250
    data = DataConfig(background="bright", background_min_area=1)
    writer = masks.MaskWriter(patches(), CLASSES, data, constrain=True)
    row = writer.row(0, image, {"": np.ones((3, 2, 2), np.float32)}, logits=False)
    mask = decode_ids(row["png"])
    assert (mask[:, :4] == CLASSES.background_id).all()
    assert (mask[:, 4:] == 0).all()


def test_shares_of_classes_called_background_and_ignored_are_told_from_pixels_of_no_class():
    classes = TissueClasses(tuple(TissueClass(name, (0, 0, k)) for k, name in enumerate(("background", "ignored"))))
    mask = np.array([[0, 0, 0, 0, 1, 1, 2, IGNORE_ID]], np.uint8)
    assert masks._shares(pa.chunked_array([[encode_mask(mask, classes)]]), classes) == {
        "background": 0.5,
        "ignored": 0.25,
        "background (no class)": 0.125,
        "ignored (no class)": 0.125,
    }
    config = SimpleNamespace(classes=SimpleNamespace(tissue=lambda: classes))
    assert synthesis._shares([(np.zeros((1, 6, 3), np.uint8), mask[:, 1:7])], config) == {
        "background": 0.5,
        "ignored": 0.3333,
        "background (no class)": 0.1667,
    }


def artifact(root, scores, labels=((1, 1, 0), (1, 0, 0))):
    """A committed pseudo_masks artifact whose images have these scores (L, h, w)."""
    found = patches(labels=labels)
    writer = masks.MaskWriter(found, CLASSES, DataConfig(), constrain=True)
    rows = [writer.row(number, found.image(number), {"": values}, logits=True) for number, values in enumerate(scores)]
    workspace = Workspace(str(root))
    uri = workspace.folder("pseudo_masks", "k1")
    parquet.write(pa.Table.from_pylist(rows, masks.schema()), storage.join(uri, masks.FOLDER, "part-00000.parquet"))
    parts = {"version": 1, "summary": {}, "seconds": 0}
    source = workspace.commit("patches", "p1", settings={"classes": CLASSES.to_json()}, inputs={}, **parts)
    workspace.commit("pseudo_masks", "k1", settings={}, inputs={"patches": source}, **parts)
    return workspace, found


def test_logits_become_probabilities_for_the_refining_network(tmp_path):
    scores = [np.stack([np.full((2, 2), value, np.float32) for value in (0, 1, 5)])] * 2
    workspace, found = artifact(tmp_path, scores)
    maps = masks.read_maps(workspace.folder("pseudo_masks", "k1"), found, logits=True)
    first, second = (np.frombuffer(item.as_py(), np.float16).reshape(3, 2, 2)[:, 0, 0] for item in maps["maps"])
    assert first == pytest.approx([1 / (1 + np.e), np.e / (1 + np.e), 0], abs=1e-3)
    assert second == pytest.approx([1, 0, 0])
    with pytest.raises(PistoSegError, match="do not belong together"):
        masks.read_maps(workspace.folder("pseudo_masks", "k1"), patches(labels=((1, 1, 0),)), logits=True)


def test_masks_are_scored_against_the_true_ones_of_the_same_name(tmp_path):
    left = np.zeros((3, 8, 8), np.float32)
    left[0, :, :4], left[1, :, 4:] = 5, 5
    workspace, _ = artifact(tmp_path / "w", [left, left])
    truth = np.zeros((8, 8), np.uint8)
    truth[:, 6:] = 1
    truth[0] = CLASSES.background_id
    storage.write_bytes(str(tmp_path / "truth" / "0.png"), encode_mask(truth, CLASSES))
    reports = mask_scores.score_workspace(
        workspace, ("pseudo_masks",), str(tmp_path / "truth"), str(tmp_path / "out"), max_pixels=10**6, workers=2
    )
    report = reports["pseudo_masks/k1"]
    assert report["images"] == 1, "images without a true mask are left out"
    assert report["iou"]["a"] == pytest.approx(4 / 6)
    assert report["iou"]["b"] == pytest.approx(2 / 4)
    assert report["without_class"] == 0
    assert (tmp_path / "out" / "mask_scores.json").exists()


def test_a_folder_without_any_mask_of_a_training_image_is_refused(tmp_path):
    workspace, _ = artifact(tmp_path / "w", [np.zeros((3, 2, 2), np.float32)] * 2)
    storage.write_bytes(str(tmp_path / "truth" / "other.png"), encode_mask(np.zeros((8, 8), np.uint8), CLASSES))
    with pytest.raises(PistoSegError, match=r"name the masks like the images, e\.g\. 0\.png"):
        mask_scores.score_workspace(
            workspace, ("pseudo_masks",), str(tmp_path / "truth"), None, max_pixels=10**6, workers=1
        )


@pytest.mark.parametrize(
    ("truth", "scored"),
    [
        (["slideA/001"], {"slideA/001": "slideA/001"}),
        (["slideA/001", "slideB/001"], {"slideA/001": "slideA/001", "slideB/001": "slideB/001"}),
        (["slideA/001", "slideC/001"], {"slideA/001": "slideA/001"}),
        (["001", "002"], {"slideB/002": "002"}),
        (["new/002"], {"slideB/002": "new/002"}),
        (["new/002", "old/002"], {}),
    ],
)
def test_a_true_mask_is_given_to_the_image_of_its_name_and_to_no_other(tmp_path, capsys, truth, scored):
    for name in truth:
        storage.write_bytes(str(tmp_path / f"{name}.png"), b"")
    images = ["slideA/001.png", "slideB/001.png", "slideB/002.png"]
    found = mask_scores._truths(images, str(tmp_path), set())
    assert found == {f"{image}.png": str(tmp_path / f"{name}.png") for image, name in scored.items()}
    asked = {"slideC/001": "slideB/001.png", "001": "slideA/001.png, slideB/001.png", "old/002": "slideB/002.png"}
    unclear = next((names for name, names in asked.items() if name in truth), None)
    assert capsys.readouterr().out.endswith(f"name the masks like them: {unclear}\n" if unclear else "")


def test_of_two_images_of_one_name_in_two_folders_each_is_scored_by_its_own_mask(tmp_path):
    masks_of = {"slideA/001.png": 0, "slideB/001.png": 1}
    column = masks.column("png", "")
    rows = [{"name": name, column: encode_mask(np.full((8, 8), k, np.uint8), CLASSES)} for name, k in masks_of.items()]
    made = Workspace(str(tmp_path)).commit("cams", "k1", version=1, settings={}, inputs={}, summary={}, seconds=1)
    parquet.write(pa.Table.from_pylist(rows), made.path(masks.FOLDER, "part-00000.parquet"))
    mask = encode_mask(np.zeros((8, 8), np.uint8), CLASSES)
    storage.write_bytes(str(tmp_path / "truth" / "slideA" / "001.png"), mask)
    report = mask_scores.score_masks(made, str(tmp_path / "truth"), CLASSES, max_pixels=10**6, workers=1)[""]
    assert (report["images"], report["miou"]) == (1, 1.0)


def test_images_that_are_left_out_are_named_once_however_many_artifacts_have_them(tmp_path, capsys):
    column, mask = masks.column("png", ""), encode_mask(np.zeros((8, 8), np.uint8), CLASSES)
    rows = [{"name": name, column: mask} for name in ("0.png", "slideA/001.png", "slideB/001.png")]
    workspace, parts = Workspace(str(tmp_path / "w")), {"version": 1, "summary": {}, "seconds": 1}
    source = workspace.commit("patches", "p1", settings={"classes": CLASSES.to_json()}, inputs={}, **parts)
    for key in ("k1", "k2"):
        made = workspace.commit("cams", key, settings={}, inputs={"patches": source}, **parts)
        parquet.write(pa.Table.from_pylist(rows), made.path(masks.FOLDER, "part-00000.parquet"))
    for name in ("0.png", "001.png"):
        storage.write_bytes(str(tmp_path / "truth" / name), mask)
    reports = mask_scores.score_workspace(
        workspace, ("cams",), str(tmp_path / "truth"), None, max_pixels=10**6, workers=1
    )
    assert [report["images"] for report in reports.values()] == [1, 1]
    assert capsys.readouterr().out.count("2 images are left out") == 1
