import errno
import json
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from patch_files import CLASSES, config_of, encoded, mask_png, put, tissue

from pistoseg import storage
from pistoseg.classes import TissueClass, TissueClasses
from pistoseg.commands import data_check
from pistoseg.config import DataConfig, ScaleConfig, SynthesisConfig, load_config
from pistoseg.errors import PistoSegError
from pistoseg.outputs.pictures import sheet
from pistoseg.patches.check import check
from pistoseg.patches.decode import decode_rgb
from pistoseg.patches.digest import validation_folder
from pistoseg.patches.source import SourceImage, Window
from pistoseg.patches.store import ingest
from pistoseg.progress import Progress
from pistoseg.stages import validation

DATA = Path(os.environ.get("PISTOSEG_TEST_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
FLAGS = ("[1, 0, 0]", "[0, 1, 0]", "[0, 0, 1]", "[1, 1, 0]")


def write_good(root, each=3):
    for number in range(each):
        for place, flags in enumerate(FLAGS):
            put(root, f"training/{number}-{flags}.png", seed=10 * number + place)
    put(root, "validation/img/v.png", seed=1000)
    ids = np.tile(np.arange(4, dtype=np.uint8), (32, 10))
    put(root, "validation/mask/v.png", encoded(ids))


def run(root, out=None, **settings):
    return check(str(root), CLASSES, DataConfig(min_single_tissue=2, **settings), workers=2, out=out and str(out))


def test_a_good_data_set_is_counted_and_passes(tmp_path):
    write_good(tmp_path)
    report = run(tmp_path)
    assert report.ok
    assert report.warnings == []
    assert report.by_class == {"tumor": 6, "stroma": 6, "normal": 3}
    assert report.single_tissue == {"tumor": 3, "stroma": 3, "normal": 3}
    assert report.combinations == {"tumor": 3, "stroma": 3, "normal": 3, "tumor+stroma": 3}
    assert report.sizes == {"40x32": 12}
    assert report.splits["validation"].pixels == {
        "tumor": 320,
        "stroma": 320,
        "normal": 320,
        "background": 320,
        "unknown": 0,
    }


@pytest.mark.parametrize(
    ("share", "scored"),
    [
        (
            0,
            "not be scored; name some with --set data.validation=DIR, or hold labels out with "
            "--set data.label_holdout=0.2",
        ),
        (0.2, "be scored by the labels of held-out images only"),
    ],
)
def test_without_masks_a_check_says_what_models_will_be_scored_by(tmp_path, share, scored):
    put(tmp_path, "training/a[1, 0, 0].png")
    said = f"there are no images with masks (img/ and mask/): models will {scored}"
    assert said in run(tmp_path, label_holdout=share).warnings


def test_images_beside_a_split_are_checked_as_they_are_trained_on(tmp_path):
    write_good(tmp_path)
    for file in (tmp_path / "training").iterdir():
        file.rename(tmp_path / file.name)
    (tmp_path / "training").rmdir()
    report = run(tmp_path)
    assert report.ok, report.problems
    assert (report.images, report.splits["validation"].scored) == (12, 1)
    assert not report.leaks


def test_a_split_without_masks_is_said_and_no_problem(tmp_path):
    write_good(tmp_path)
    (tmp_path / "validation" / "mask" / "v.png").unlink()
    (tmp_path / "validation" / "mask").rmdir()
    report = run(tmp_path)
    assert report.ok, report.problems
    assert "validation/ has no img/ and mask/: nothing is scored on it" in report.warnings


def test_masks_in_the_training_folder_are_said_to_be_left_out(tmp_path):
    write_good(tmp_path)
    put(tmp_path, "training/masks/0-[1, 0, 0].png", mask_png())
    report = run(tmp_path)
    assert report.warnings == ["masks/ is taken for masks: nothing in it is trained on"]
    assert (report.images, report.rejected) == (12, [])


def test_windows_that_are_smaller_than_an_image_may_be_are_rejected_as_the_ingestion_does(tmp_path):
    uri = put(tmp_path, "training/a.png")
    rows = ["a.png,0,0,16,16,1,0,0", "a.png,10,10,5,20,0,1,0"]
    table = "\n".join(["image,x,y,width,height,tumor,stroma,normal", *rows])
    put(tmp_path, "training/patches.csv", table.encode())
    report = run(tmp_path)
    window = Window(10, 10, 5, 20, (0, 1, 0), 3)
    assert ingest(SourceImage("a.png", uri, (window,)), DataConfig(), ScaleConfig())[2] == report.rejected
    (rejected,) = report.rejected
    assert (report.windows, rejected.name, rejected.field) == (1, "row 3 (a.png)", "size")
    assert rejected.reason == "is 5x20 px, smaller than 16 px"
    assert run(tmp_path, min_size=5).windows == 2


def test_reports_and_pictures_are_written_to_the_given_folder_only(tmp_path):
    write_good(tmp_path / "data")
    before = storage.list_files(str(tmp_path / "data"))
    report = run(tmp_path / "data", tmp_path / "out")
    assert storage.list_files(str(tmp_path / "data")) == before
    saved = json.loads((tmp_path / "out" / "report.json").read_text())
    assert saved["ok"]
    assert saved["by_class"] == report.by_class
    assert len(report.pictures) == 5
    for picture in report.pictures:
        assert decode_rgb(Path(picture).read_bytes(), picture).std() > 10


def test_no_more_of_large_images_is_kept_for_a_picture_than_it_shows(tmp_path, monkeypatch):
    write_good(tmp_path / "data")
    kept = []

    def keep(rows, *arguments, **named):
        kept.extend(panel for row in rows for panel in row)
        return sheet(rows, *arguments, **named)

    monkeypatch.setattr("pistoseg.patches.check.sheet", keep)
    monkeypatch.setattr("pistoseg.outputs.pictures.LARGEST", 16)
    run(tmp_path / "data", tmp_path / "out")
    assert len(kept) == 12 + 2
    assert {max(panel.image.shape[:2]) for panel in kept} == {16}


def test_equal_pixels_in_different_files_are_found_with_contradicting_labels_and_leaks(tmp_path):
    write_good(tmp_path)
    put(tmp_path, "training/again-[1, 0, 0].tif", encoded(tissue(0), "TIFF"))
    put(tmp_path, "training/contradicts-[0, 1, 0].png", seed=11)
    put(tmp_path, "training/other-[1, 0, 0].png", seed=11)
    put(tmp_path, "validation/img/seen.png", seed=20)
    put(tmp_path, "validation/mask/seen.png", mask_png())
    report = run(tmp_path)
    assert ["0-[1, 0, 0].png", "again-[1, 0, 0].tif"] in report.duplicates
    assert [sorted(group) for group in report.conflicts] == [
        ["1-[0, 1, 0].png", "contradicts-[0, 1, 0].png", "other-[1, 0, 0].png"]
    ]
    assert report.leaks == [("2-[1, 0, 0].png", "validation/seen")]
    assert report.ok


def test_images_that_are_too_large_at_the_networks_pixel_size_are_rejected_as_the_ingestion_does(tmp_path, capsys):
    write_good(tmp_path)
    big = put(tmp_path, "training/big-[1, 0, 0].png", encoded(tissue(9, 64, 64)))
    settings = {"data.max_pixels": 10_000, "data.min_single_tissue": 2, "scale.fit": "null", "scale.resize": 2}
    config = load_config("wsss4luad", overrides=[f"{key}={value}" for key, value in settings.items()])
    assert data_check(str(tmp_path), config, str(tmp_path / "out"), workers=2) == 0
    (rejected,) = json.loads((tmp_path / "out" / "report.json").read_text())["rejected"]
    _, _, (rejection,) = ingest(SourceImage("big-[1, 0, 0].png", big, ()), config.data, config.scale)
    assert "128x128 px at the networks' pixel size" in rejection.reason
    assert rejected == asdict(rejection)
    assert "1 of 13" in capsys.readouterr().out


def test_a_class_called_background_is_told_from_pixels_without_a_class(tmp_path):
    write_good(tmp_path)
    names = ("tumor", "background", "unknown")
    classes = TissueClasses(tuple(TissueClass(name, (0, 0, k)) for k, name in enumerate(names)))
    put(tmp_path, "validation/mask/v.png", encoded(np.tile(np.array([0, 2, 3, 3], np.uint8), (32, 10))))
    report = check(str(tmp_path), classes, DataConfig(min_single_tissue=2), workers=2)
    others = {"background (no class)": 640, "unknown (no class)": 0}
    assert report.splits["validation"].pixels == {"tumor": 320, "background": 0, "unknown": 320} | others
    assert report.warnings == ["no mask of validation shows background: the IoU there is undefined"]


def test_bad_files_are_listed_and_too_many_of_them_are_a_problem(tmp_path):
    write_good(tmp_path)
    put(tmp_path, "training/text-[1, 0, 0].png", b"hello")
    put(tmp_path, "training/flags-[1, 0].png")
    report = run(tmp_path, max_rejected=0.5)
    assert {r.name: r.field for r in report.rejected} == {"text-[1, 0, 0].png": "", "flags-[1, 0].png": "label"}
    assert report.ok
    assert "text-[1, 0, 0].png" in report.to_text()
    assert not run(tmp_path, max_rejected=0.1).ok


def test_images_with_many_windows_count_as_images_when_they_can_not_be_read(tmp_path):
    rows = ["image,x,y,width,height,tumor,stroma,normal"]
    for number in range(10):
        name = f"{number}.png"
        put(tmp_path, f"training/{name}", b"broken" if number < 2 else None, seed=number)
        rows += [f"{name},{8 * x},0,16,32,{','.join('1' if x % 3 == k else '0' for k in range(3))}" for x in range(4)]
    put(tmp_path, "training/windows.csv", "\n".join(rows).encode())
    assert run(tmp_path, max_rejected=0.2).ok
    assert run(tmp_path, max_rejected=0.19).problems == [
        "2 of 10 images or slides can't be read, more than data.max_rejected (19%) allows"
    ]


def test_the_text_says_once_for_each_kind_of_bad_file_what_to_do(tmp_path):
    write_good(tmp_path)
    put(tmp_path, "training/text-[1, 0, 0].png", b"hello\nyou")
    put(tmp_path, "training/bytes-[1, 0, 0].png", b"\x00\x01\xff")
    put(tmp_path, "training/tumro___x.png")
    put(tmp_path, "training/cartilage___x.png")
    put(tmp_path, "validation/mask/v.png", b"no mask")
    text = run(tmp_path).to_text()
    assert "text-[1, 0, 0].png: is not a PNG, JPEG or TIFF (it starts with the text 'hello')" in text
    assert "bytes-[1, 0, 0].png: is not a PNG, JPEG or TIFF (it starts with 00 01 ff)" in text
    assert "v.png: is not a PNG, JPEG or TIFF (it starts with the text 'no mask')" in text
    assert "tumro___x.png: label: no class is called 'tumro'; did you mean tumor?\n" in text
    assert "cartilage___x.png: label: no class is called 'cartilage'\n" in text
    rejected, bad = text.split("rejected (4)")[1].split("bad evaluation images and masks (1)")
    assert rejected.count("  -> save it as an 8-bit RGB PNG, JPEG or TIFF (2)\n") == 1
    assert rejected.count("  -> label: rename the file, or add the class; the classes are tumor") == 1
    assert "tumor, stroma, normal (2)\n" in rejected
    assert bad.count("  -> save it as an 8-bit RGB PNG, JPEG or TIFF (1)\n") == 1


def test_rare_and_absent_single_tissue_classes_are_said(tmp_path):
    write_good(tmp_path)
    for number in range(3):
        (tmp_path / "training" / f"{number}-[0, 0, 1].png").unlink()
    put(tmp_path, "training/x-[0, 1, 1].png", seed=77)
    report = run(tmp_path)
    assert any("'normal' alone" in problem for problem in report.problems)
    put(tmp_path, "training/y-[0, 0, 1].png", seed=78)
    report = run(tmp_path)
    assert report.ok
    assert any("class 'normal' has 1 single-tissue images" in warning for warning in report.warnings)


def of_single_tissue(root, scale, **synthesis):
    """What a check says of images of a single tissue: problems and warnings."""
    settings = {"scale": ScaleConfig(**scale), "synthesis": SynthesisConfig(**synthesis)}
    report = check(str(root), CLASSES, DataConfig(min_single_tissue=3), **settings)
    return report.problems, [text for text in report.warnings if "alone" in text or "single-tissue" in text]


@pytest.mark.parametrize(("scale", "crop"), [({}, 64), ({"resize": 0.5}, 32)])
def test_images_smaller_than_half_a_crop_at_the_networks_pixel_size_are_not_counted(tmp_path, scale, crop):
    write_good(tmp_path)
    put(tmp_path, "training/large-[1, 0, 0].png", encoded(tissue(90, 64, 64)))

    def problems(height, **sampling):
        return of_single_tissue(tmp_path, scale, crop_height=height, crop_width=16, **sampling)

    assert problems(crop) == ([], [])  # of 32x40 px
    found, warnings = problems(crop + 1)
    assert [text[:30] for text in found] == ["no image shows 'stroma' alone,", "no image shows 'normal' alone,"]
    assert [text[:37] for text in warnings] == [
        "3 images that show 'tumor' alone are ",
        "class 'tumor' has 1 single-tissue ima",
    ]
    assert warnings[1].endswith("label more, or --set synthesis.class_sampling=natural")
    assert problems(crop + 1, class_sampling="natural")[1][1].endswith("repeat them: label more")
    assert problems(crop + 1, class_sampling={"tumor": 1, "stroma": 0, "normal": 0}) == ([], warnings)


def test_images_that_are_resized_to_fit_count_with_the_size_that_they_get(tmp_path):
    write_good(tmp_path)
    assert of_single_tissue(tmp_path, {"fit": 64}, crop_height=128, crop_width=128) == ([], [])
    (found, *others), _ = of_single_tissue(tmp_path, {"fit": 64}, crop_height=129, crop_width=128)
    part = "half of a crop of 129x128 px (synthesis.crop_height, synthesis.crop_width)"
    assert found == f"no image shows 'tumor' alone, but for 3 smaller than {part}: no mosaic could show it"
    assert len(others) == 2


def test_a_class_that_mosaics_are_not_to_show_needs_no_image_alone(tmp_path):
    write_good(tmp_path)
    for number in range(3):
        (tmp_path / "training" / f"{number}-[0, 0, 1].png").unlink()
    config = load_config("wsss4luad", overrides=["synthesis.class_sampling={tumor: 1, stroma: 1, normal: 0}"])
    assert data_check(str(tmp_path), config, None, workers=2) == 0
    assert data_check(str(tmp_path), load_config("wsss4luad"), None, workers=2) == 1


def test_masks_that_do_not_fit_are_problems_and_missing_ones_are_warnings(tmp_path):
    write_good(tmp_path)
    for name in ("size", "values", "nomask"):
        put(tmp_path, f"validation/img/{name}.png", seed=2000 + len(name))
    put(tmp_path, "validation/mask/size.png", mask_png(31, 40))
    put(tmp_path, "validation/mask/values.png", mask_png(value=7))
    put(tmp_path, "validation/mask/gone.png", mask_png())
    report = run(tmp_path)
    split = report.splits["validation"]
    assert [(storage.name(r.name), r.field) for r in split.bad] == [("size.png", "size"), ("values.png", "values")]
    assert "7" in split.bad[1].reason
    assert (split.missing_images, split.missing_masks) == (["gone"], ["nomask"])
    assert (split.images, split.scored) == (4, 1)
    assert not report.ok
    assert "incomplete" in report.to_text()


def test_a_split_of_which_no_image_has_a_mask_is_a_problem_as_it_ends_a_training(tmp_path):
    write_good(tmp_path)
    (tmp_path / "validation/mask/v.png").rename(tmp_path / "validation/mask/w.png")
    (problem,) = run(tmp_path).problems
    assert problem.startswith("validation has no image with a mask")
    with pytest.raises(PistoSegError, match="has no image with a mask"):
        validation.collect(
            str(tmp_path / "validation"), str(tmp_path), CLASSES, max_pixels=9999, actors=1, progress=Progress()
        )


def test_a_bad_image_without_a_mask_is_a_warning_as_nothing_reads_it(tmp_path):
    write_good(tmp_path)
    put(tmp_path, "validation/img/broken.png", b"no image")
    report = run(tmp_path)
    assert report.ok
    assert "1 images of validation without a mask are bad: nothing is scored on them" in report.warnings
    assert "is not a PNG" in report.to_text()


def test_masks_beside_a_training_folder_are_no_validation_split_as_none_is_scored_on(tmp_path):
    write_good(tmp_path)
    (tmp_path / "validation").rename(tmp_path / "more")
    for name in ("img", "mask"):
        (tmp_path / "more" / name).rename(tmp_path / name)
    report = run(tmp_path)
    assert (report.splits, validation_folder(config_of(tmp_path))) == ({}, None)
    assert report.by_class == {"tumor": 6, "stroma": 6, "normal": 3}


@pytest.mark.parametrize("beside", ["val", "."])
def test_what_training_takes_beside_masks_is_checked(tmp_path, beside):
    put(tmp_path / "set", f"{beside}/img/v.png", seed=1000)
    put(tmp_path / "set", f"{beside}/mask/v.png", mask_png())
    for number, name in enumerate(CLASSES.names):
        put(tmp_path, f"elsewhere/{name}.png", seed=number)
    rows = "image,tumor,stroma,normal\n../elsewhere/tumor.png,1,0,0\n../elsewhere/stroma.png,0,1,0\n"
    put(tmp_path / "set", "windows.csv", f"{rows}../elsewhere/normal.png,0,0,1\n".encode())
    assert run(tmp_path / "set").single_tissue == {"tumor": 1, "stroma": 1, "normal": 1}
    (tmp_path / "set/windows.csv").unlink()
    (tmp_path / "elsewhere").rename(tmp_path / "set/Tumor")
    assert run(tmp_path / "set").by_class["tumor"] == 3


def test_files_that_the_disk_does_not_give_are_a_problem_and_the_others_are_reported(tmp_path, monkeypatch):
    write_good(tmp_path)
    put(tmp_path, "validation/img/w.png", seed=1001)
    put(tmp_path, "validation/mask/w.png", mask_png())
    read_bytes = storage.read_bytes

    def read(uri):
        if storage.name(uri) in ("0-[1, 1, 0].png", "1-[1, 1, 0].png", "w.png"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), uri)
        return read_bytes(uri)

    monkeypatch.setattr(storage, "read_bytes", read)
    report = run(tmp_path)
    assert (report.images, report.splits["validation"].scored) == (10, 1)
    training, scored = report.problems
    assert training.startswith("2 files are not given by the disk; the first: ")
    assert "training/0-[1, 1, 0].png: cannot be read (Input/output error)" in training
    assert "validation/img/w.png: cannot be read (Input/output error)" in scored


def test_a_background_mask_counts_as_background(tmp_path):
    write_good(tmp_path)
    put(tmp_path, "validation/background-mask/v.png", mask_png(value=255))
    assert run(tmp_path).splits["validation"].pixels["background"] == 32 * 40


def test_the_limit_on_pixels_holds_for_background_masks(tmp_path):
    write_good(tmp_path)
    background = put(tmp_path, "validation/background-mask/v.png", mask_png(64, 64))  # its image has 1,280 px
    (bad,) = run(tmp_path, max_pixels=2000).splits["validation"].bad
    assert "more than the 2,000 px allowed" in bad.reason
    image, mask = (str(tmp_path / "validation" / kind / "v.png") for kind in ("img", "mask"))
    pair = {"name": "v", "image_uri": image, "mask_uri": mask, "background_uri": background}
    with pytest.raises(PistoSegError, match=r"more than the 2,000 px allowed.*raise data.max_pixels"):
        validation._Read(CLASSES, 2000)._read(pair)


def test_an_evaluation_folder_alone_can_be_checked(tmp_path):
    write_good(tmp_path)
    report = run(tmp_path / "validation")
    assert report.ok
    assert report.splits["validation"].scored == 1
    assert "no training images" in report.to_text()


@pytest.mark.parametrize(
    ("preset", "folder", "single"),
    [
        ("wsss4luad", "wsss4luad-mini", {"tumor": 54, "stroma": 136, "normal": 83}),
        ("glas", "glas", {"gland": 1123, "stroma": 1624}),
    ],
)
def test_real_data_sets_pass_with_their_documented_counts(preset, folder, single):
    if not (DATA / folder).is_dir():
        pytest.skip(f"the data set {folder} is not here (PISTOSEG_TEST_DATA)")
    config = load_config(preset)
    report = check(str(DATA / folder), config.classes.tissue(), config.data, workers=2)
    assert report.ok
    assert report.single_tissue == single
    assert report.rejected == []
