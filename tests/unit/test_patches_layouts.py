import errno
import threading
from types import SimpleNamespace
from unicodedata import normalize

import pyarrow as pa
import pytest
from patch_files import CLASSES, config_of, mask_png, put
from processes import STUCK_S

from pistoseg import object_store, parquet, storage
from pistoseg.classes import TissueClass, TissueClasses
from pistoseg.config import DataConfig
from pistoseg.errors import PistoSegError, UnavailableError
from pistoseg.patches.digest import files_digest, training_digest, validation_digest, validation_folder
from pistoseg.patches.layouts import (
    find_split,
    find_training,
    relative_files,
    scan_evaluation,
    scan_training,
    training_files,
)
from pistoseg.patches.source import WHOLE
from pistoseg.patches.table import from_folder, images_elsewhere
from pistoseg.slides.files import etag
from pistoseg.stages import validation

HEADER = "image,x,y,width,height,tumor,stroma,normal\n"


def scan(uri, **settings):
    return scan_training(str(uri), CLASSES, DataConfig(**settings))


def table(root, rows, header=HEADER, name="patches.csv"):
    put(root, name, (header + "\n".join(rows)).encode())


@pytest.fixture(params=["local", "memory"])
def root(request, tmp_path):
    if request.param == "local":
        yield str(tmp_path)
    else:
        uri = f"memory://{tmp_path.name}-{request.node.name.replace('[', '-').replace(']', '')}"
        yield uri
        storage.remove_tree(uri)


@pytest.mark.parametrize(
    ("names", "split"),
    [
        (("1.training", "2.validation", "3.testing"), "published by WSSS4LUAD"),
        (("training", "val", "test"), "published by BCSS-WSSS"),
        (("Train", "validation", "testing"), "others"),
    ],
)
def test_every_published_name_of_a_split_is_found(root, names, split):
    put(root, f"{names[0]}/x[100].png")
    for name in names[1:]:
        put(root, f"{name}/img/x.png")
        put(root, f"{name}/mask/x.png", mask_png())
    found = [storage.name(find_split(root, s)) for s in ("training", "validation", "testing")]
    assert found == list(names)


def test_a_folder_without_splits_is_itself_the_training_folder(tmp_path):
    put(tmp_path, "x[100].png")
    assert find_split(str(tmp_path), "training") == str(tmp_path)
    assert find_split(str(tmp_path), "validation") is None


def test_a_folder_of_evaluation_images_has_no_training_images(tmp_path):
    put(tmp_path, "img/a.png")
    put(tmp_path, "mask/a.png", mask_png())
    assert find_split(str(tmp_path), "training") is None


def put_split(root, name):
    """A split with masks, whose images' names carry flags like those of training images."""
    put(root, f"{name}/img/v[010].png")
    return put(root, f"{name}/mask/v[010].png", mask_png())


@pytest.mark.parametrize("name", ["validation", "2.Validation", "test"])
def test_images_beside_a_split_with_masks_are_the_training_images_and_those_in_it_are_not(root, name):
    put(root, "a[100].png")
    put(root, "more/b[100].png")
    put_split(root, name)
    assert find_training(root, CLASSES, DataConfig()) == root
    assert [image.name for image in scan(root).images] == ["a[100].png", "more/b[100].png"]


def test_a_table_beside_a_split_with_masks_labels_the_training_images(root):
    put(root, "images/a.png")
    put_split(root, "val")
    table(root, ["images/a.png,0,0,8,8,1,0,0"])
    assert find_training(root, CLASSES, DataConfig()) == root
    assert [image.name for image in scan(root).images] == ["images/a.png"]


def test_a_folder_of_training_images_without_other_splits_is_listed_once(tmp_path, monkeypatch):
    put(tmp_path, "a[100].png")
    monkeypatch.delattr(storage, "list_dir")
    assert list(training_files(str(tmp_path))) == ["a[100].png"]


def test_masks_in_a_training_folder_are_no_training_images(root):
    for folder in ("img", "Mask", "background-mask"):
        put(root, f"training/{folder}/a-[1, 0, 0].png")
    put(root, "training/b-[0, 1, 0].png")
    found = find_training(root, CLASSES, DataConfig())
    assert [image.name for image in scan(found).images] == ["b-[0, 1, 0].png", "img/a-[1, 0, 0].png"]


def test_the_digest_of_training_images_does_not_follow_their_masks_but_those_that_a_table_names(tmp_path):
    put(tmp_path, "training/img/a[10].png")
    alone = training_digest(config_of(tmp_path), etag)
    put(tmp_path, "training/mask/a[10].png", mask_png())
    assert training_digest(config_of(tmp_path), etag) == alone
    table(tmp_path / "training", ["mask/a[10].png,1,0"], "image,gland,stroma\n")
    named = training_digest(config_of(tmp_path), etag)
    put(tmp_path, "training/mask/a[10].png", b"another")
    assert training_digest(config_of(tmp_path), etag) != named


def test_splits_with_masks_alone_are_no_training_images(root):
    put_split(root, "val")
    put_split(root, "test")
    put(root, "readme.txt", b"")
    assert find_training(root, CLASSES, DataConfig()) is None


def test_the_digest_of_training_images_does_not_follow_a_split_beside_them(tmp_path):
    put(tmp_path, "a[10].png")
    alone = training_digest(config_of(tmp_path), etag)
    put_split(tmp_path, "validation")
    assert training_digest(config_of(tmp_path), etag) == alone
    assert files_digest(str(tmp_path), None, lambda name: name.startswith("validation/")) == alone
    put(tmp_path, "more/b[10].png")
    assert training_digest(config_of(tmp_path), etag) != alone


def test_the_digest_follows_an_image_of_a_split_that_a_table_names(tmp_path):
    put(tmp_path, "a.png")
    put_split(tmp_path, "val")
    table(tmp_path, ["a.png,1,0", "val/img/v[010].png,0,1"], "image,gland,stroma\n")
    first = training_digest(config_of(tmp_path), etag)
    put(tmp_path, "val/img/v[010].png", b"another")
    assert training_digest(config_of(tmp_path), etag) != first


def test_the_folders_of_training_images_themselves_are_no_splits(root):
    put(root, "train/a[100].png")
    put_split(root, "train/test")  # a site, a day, or whatever its owner calls so
    assert len(scan(storage.join(root, "train")).images) == 3


def test_a_split_without_masks_is_none_to_score_on_and_a_given_one_is_an_error(tmp_path):
    for split in ("train", "val"):
        for name in ("gland", "stroma"):
            put(tmp_path, f"{split}/{name}/1.png")
    config = config_of(tmp_path)
    assert (find_split(str(tmp_path), "validation"), validation_folder(config)) == (None, None)
    said = []
    context = SimpleNamespace(config=config, progress=SimpleNamespace(say=said.append))
    assert validation.run(context)["images"] == 0
    assert said == [f"warning: {tmp_path}/val has no img/ and mask/: models will not be scored"]
    context.config = config_of(tmp_path, label_holdout=0.1)
    validation.run(context)
    assert said[1] == (
        f"{tmp_path}/val has no img/ and mask/: models are scored by the labels of held-out images (data.label_holdout)"
    )
    assert validation_digest(config) == ""
    with pytest.raises(PistoSegError, match="no img/ and mask/"):
        scan_evaluation(validation_folder(config_of(tmp_path, validation=tmp_path / "val")))


def test_a_validation_split_within_another_folder_of_that_name_is_found(root):
    put_split(root, "2.validation/2.validation")
    assert storage.name(find_split(root, "validation")) == "2.validation"
    assert len(scan_evaluation(find_split(root, "validation")).scored) == 1


def test_flags_in_names_are_found_below_folders_with_every_character(root):
    put(root, "a-[1, 0, 1].png")
    put(root, "Fall 7 [alt]/Gewebe ä 組織 #1%20-[0, 1, 0].png")
    listing = scan(root)
    assert listing.layout == "flags"
    labels = {image.name: image.windows[0].labels for image in listing.images}
    assert labels == {"a-[1, 0, 1].png": (1, 0, 1), "Fall 7 [alt]/Gewebe ä 組織 #1%20-[0, 1, 0].png": (0, 1, 0)}
    assert all(storage.read_bytes(image.uri) for image in listing.images)
    assert listing.images[0].windows[0].width == WHOLE


def test_class_prefixes_are_found(root):
    put(root, "TUMOR___1.png")
    put(root, "stroma___2.png")
    put(root, "muscle___3.png")
    listing = scan(root)
    assert [image.windows[0].labels for image in listing.images] == [(1, 0, 0), (0, 1, 0)]
    assert listing.rejected[0].name == "muscle___3.png"


def test_a_folder_per_class_is_found_and_other_folders_are_rejected(root):
    put(root, "Tumor/1.png")
    put(root, "normal/sub/2.png")
    put(root, "muscle/3.png")
    put(root, "notes.txt", b"")
    listing = scan(root)
    assert listing.layout == "folders"
    assert [(i.name, i.windows[0].labels) for i in listing.images] == [
        ("Tumor/1.png", (1, 0, 0)),
        ("normal/sub/2.png", (0, 0, 1)),
    ]
    assert [(r.name, r.field) for r in listing.rejected] == [("muscle/3.png", "label")]


def test_flags_that_contradict_a_class_folder_are_rejected_unless_the_layout_is_given(root):
    for name in ("tumor/a-[1, 1, 0].png", "tumor/b-[1, 0, 0].png", "tumor/c [2].png", "stroma/d [copy].png"):
        put(root, name)
    listing = scan(root)
    assert listing.layout == "folders"
    names = ["stroma/d [copy].png", "tumor/b-[1, 0, 0].png", "tumor/c [2].png"]
    assert [image.name for image in listing.images] == names
    (rejection,) = listing.rejected
    assert (rejection.name, rejection.field) == ("tumor/a-[1, 1, 0].png", "label")
    assert "data.layout" in rejection.remedy
    assert [image.windows[0].labels for image in scan(root, layout="folders").images] == [(0, 1, 0), *[(1, 0, 0)] * 3]
    by_name = {image.name: image.windows[0].labels for image in scan(root, layout="flags").images}
    assert by_name["tumor/a-[1, 1, 0].png"] == (1, 1, 0)


def test_numbers_in_brackets_are_no_flags_of_two_classes_but_where_every_name_has_flags(root):
    classes = TissueClasses(CLASSES.classes[:2])
    for name in ("stroma/case [9].png", "stroma/case [10].png", "stroma/case [01].png", "tumor/case [11].png"):
        put(root, name)
    listing = scan_training(root, classes, DataConfig())
    assert listing.rejected == []
    assert [image.windows[0].labels for image in listing.images] == [(0, 1)] * 3 + [(1, 0)]
    put(root, "tumor/case [1, 1].png")
    (rejection,) = scan_training(root, classes, DataConfig()).rejected
    assert rejection.name == "tumor/case [1, 1].png"
    storage.remove_file(storage.join(root, "stroma/case [9].png"))
    rejected = [rejection.name for rejection in scan_training(root, classes, DataConfig()).rejected]
    assert rejected == ["stroma/case [10].png", "tumor/case [1, 1].png", "tumor/case [11].png"]


def test_flags_of_three_classes_may_not_contradict_a_folder_though_another_name_there_has_none(root):
    for name in ("tumor/a[101].png", "tumor/b[100].png", "stroma/c.png"):
        put(root, name)
    (rejection,) = scan(root).rejected
    assert rejection.name == "tumor/a[101].png"


ACCENTS = [("NFC", "NFD"), ("NFD", "NFC")]
"""How names of classes and tables, and those of files, write accents: Macs' zip files hold NFD."""


def accented(form):
    return TissueClasses((TissueClass(normalize(form, "Drüse"), (1, 2, 3)), TissueClass("stroma", (4, 5, 6))))


@pytest.mark.parametrize(("written", "filed"), ACCENTS)
def test_a_class_is_found_however_its_accents_are_written(root, written, filed):
    name = normalize(filed, "Drüse")
    put(root, f"folders/{name}/1.png")
    put(root, f"prefixes/{name}___1.png")
    for layout in ("folders", "prefixes"):
        (image,) = scan_training(storage.join(root, layout), accented(written), DataConfig()).images
        assert image.windows[0].labels == (1, 0)


@pytest.mark.parametrize(("written", "filed"), ACCENTS)
def test_a_table_names_classes_and_images_however_their_accents_are_written(root, written, filed):
    uri = put(root, f"{normalize(filed, 'Präparat')}.png")
    name = normalize(written, "Präparat")
    table(root, [f"{name}.png,1,0"], header=f"image,{normalize(filed, 'DRÜSE')},stroma\n")
    (image,) = scan_training(root, accented(written), DataConfig()).images
    assert (image.windows[0].labels, storage.read_bytes(image.uri)) == ((1, 0), storage.read_bytes(uri))


def test_an_image_that_a_table_names_in_two_ways_is_one(root):
    put(root, f"{normalize('NFD', 'Präparat')}.png")
    rows = [f"{normalize(form, 'Präparat')}.png,{labels}" for form, labels in (("NFC", "1,0"), ("NFD", "0,1"))]
    table(root, rows, header="image,Drüse,stroma\n")
    listing = scan_training(root, accented("NFC"), DataConfig())
    assert [image.windows[0].labels for image in listing.images] == [(1, 0)]
    assert len(listing.rejected) == 1


def test_windows_come_from_a_table_with_columns_in_any_case_and_order(root):
    put(root, "images/a [1].png")
    table(root, ["1,0,1,8,8,0,0,images/a [1].png,x", "0,1.0,0,16,16,4,4,images/a [1].png,y"],
          "Tumor,STROMA,normal,width,height,x,y,Image,comment\n")  # fmt: skip
    listing = scan(root)
    assert listing.layout == "table"
    assert [(w.x, w.width, w.labels) for w in listing.images[0].windows] == [(0, 8, (1, 0, 1)), (4, 16, (0, 1, 0))]


def test_a_parquet_table_without_boxes_labels_whole_images(root):
    put(root, "a.png")
    rows = {"image": ["a.png"], "tumor": [True], "stroma": [False], "normal": [0]}
    parquet.write(pa.table(rows), storage.join(root, "labels.parquet"))
    listing = scan(root)
    assert listing.images[0].windows[0].labels == (1, 0, 0)
    assert listing.images[0].windows[0].width == WHOLE


def test_a_table_names_images_above_its_folder(root):
    put(root, "images/a.png")
    header = "image,gland,stroma\n"
    table(root, ["../images/a.png,1,0", "../../../../../b.png,0,1"], header, "training/patches.csv")
    config = config_of(storage.join(root, "training"))
    listing = scan_training(storage.join(root, "training"), config.classes.tissue(), config.data)
    assert [storage.read_bytes(image.uri) for image in listing.images] == [storage.read_bytes(f"{root}/images/a.png")]
    assert [rejection.field for rejection in listing.rejected] == ["image"]
    first = training_digest(config, etag)
    put(root, "images/a.png", b"another")
    assert training_digest(config, etag) != first


def test_images_elsewhere_are_looked_up_at_the_same_time(tmp_path, monkeypatch):
    together, exists = threading.Barrier(2, timeout=STUCK_S), storage.exists

    def slow(uri):
        if "/images/" in uri:
            together.wait()  # breaks where one is asked after the other
        return exists(uri)

    images = [put(tmp_path, f"images/{name}.png") for name in "ab"]
    table(tmp_path / "training", [f"{image},0,0,8,8,1,0,0" for image in images])
    monkeypatch.setattr(storage, "exists", slow)
    assert len(scan(tmp_path / "training").images) == 2


@pytest.mark.parametrize("written", ["nothing://x/a.png", "s3://bad bucket/a.png"])
def test_a_place_that_can_not_be_asked_is_a_bad_row(tmp_path, written):
    put(tmp_path, "a.png")
    table(tmp_path, ["a.png,0,0,8,8,1,0,0", f"{written},0,0,8,8,1,0,0"])
    listing = scan(tmp_path)
    assert len(listing.images) == len(listing.rejected) == 1


def test_ids_count_images_and_windows_in_the_order_of_names(tmp_path):
    put(tmp_path, "b.png")
    put(tmp_path, "a.png")
    table(tmp_path, ["b.png,0,0,8,8,1,0,0", "a.png,0,0,8,8,1,0,0", "a.png,8,0,8,8,1,0,0"])
    images = scan(tmp_path).images
    assert [(i.name, i.index, i.first_window) for i in images] == [("a.png", 0, 0), ("b.png", 1, 2)]


@pytest.mark.parametrize(
    ("row", "field", "says"),
    [
        ("gone.png,0,0,8,8,1,0,0", "image", "does not exist"),
        (",0,0,8,8,1,0,0", "image", "empty"),
        ("a.png,x,0,8,8,1,0,0", "x", "no number"),
        ("a.png,0,NaN,8,8,1,0,0", "y", "no number"),
        ("a.png,0,inf,8,8,1,0,0", "y", "no number"),
        ("a.png,0,0,,8,1,0,0", "width", "empty"),
        ("a.png,0,0,8,0,1,0,0", "height", "at least 1"),
        ("a.png,-1,0,8,8,1,0,0", "x", "at least 0"),
        ("a.png,0.5,0,8,8,1,0,0", "x", "whole number"),
        ("a.png,1e300,0,8,8,1,0,0", "x", "whole number"),
        ("a.png,0,0,8,8,2,0,0", "tumor", "0 or 1"),
        ("a.png,0,0,8,8,1,,0", "stroma", "empty"),
        ("a.png,0,0,8,8,1,0", "normal", "empty"),
        ("a.png,0,0,8,8,1,0,0,9", "columns", "more fields"),
        ("a.png,0,0,20,20,1,0,0", "window", "repeats row 2"),
        ("a.png,0,0,20,20,0,1,0", "label", "row 2 with another label"),
    ],
)
def test_a_bad_row_is_rejected_with_its_line_and_the_others_are_kept(tmp_path, row, field, says):
    put(tmp_path, "a.png")
    table(tmp_path, ["a.png,0,0,20,20,1,0,0", row])
    listing = scan(tmp_path)
    assert [len(image.windows) for image in listing.images] == [1]
    (rejection,) = listing.rejected
    assert "patches.csv row 3" in rejection.name
    assert rejection.field == field
    assert says in rejection.reason
    assert rejection.remedy
    if "gone" in row:
        assert f"relative paths start at {tmp_path}" in rejection.remedy


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "lacks the columns image"),
        (b"image,x,y,width,height,tumor,stroma\na.png,0,0,8,8,1,0\n", "lacks the columns normal"),
        (HEADER.encode(), "no usable row"),
        (HEADER.encode() + b"gone.png,0,0,8,8,1,0,0\n", "gone.png does not exist"),
        (HEADER.encode() + b"a.png,0,0,,8,1,0,0\n", r"width: has no usable row; the first, .*row 2 .*: is empty"),
        (b"\xff\xfe\x00\x01", "UTF-8"),
        (HEADER.encode() + b'"' + b"x" * 200_000, "not valid CSV"),
        (b"x" * 200_000 + b",image\n", "row 1: is not valid CSV"),
    ],
)
def test_a_table_that_cannot_be_used_is_a_clear_error(tmp_path, content, says):
    put(tmp_path, "a.png")
    put(tmp_path, "patches.csv", content)
    with pytest.raises(PistoSegError, match=says) as caught:
        scan(tmp_path)
    assert "patches.csv" in (caught.value.file or "")


@pytest.mark.parametrize(
    ("header", "lacking"),
    [
        ("image,x,y,width,height,tumor,muscle", "stroma, normal"),
        ("image,x,y,width,height,T,S", "tumor, stroma, normal"),
        ("image,x,y,w,h,tumor,stroma,normal", "width, height"),
        ("image,tumor,stroma", "normal"),
    ],
)
def test_a_table_that_lacks_columns_is_not_ignored_for_labels_in_names(tmp_path, header, lacking):
    put(tmp_path, "a[100].png")
    table(tmp_path, [], header=header + "\n", name="labels.csv")
    for layout in ("auto", "table"):
        with pytest.raises(PistoSegError, match=f"lacks the columns {lacking} .it has image") as caught:
            scan(tmp_path, layout=layout)
        assert caught.value.file == str(tmp_path / "labels.csv")
    assert scan(tmp_path, layout="flags").layout == "flags"


def test_a_column_that_a_table_lacks_is_written_like_its_class(tmp_path):
    put(tmp_path, "a.png")
    table(tmp_path, [], header="image,rest\n")
    classes = TissueClasses((TissueClass("Drüse", (1, 2, 3)), TissueClass("REST", (4, 5, 6))))
    with pytest.raises(PistoSegError, match=r"lacks the columns Drüse \("):
        scan_training(str(tmp_path), classes, DataConfig())


@pytest.mark.parametrize("header", ["image,patient", "name,tumor,stroma", "x,y,width,height"])
def test_a_table_of_something_else_is_none_of_windows(tmp_path, header):
    put(tmp_path, "a[100].png")
    table(tmp_path, [], header=header + "\n", name="clinical.csv")
    assert scan(tmp_path).layout == "flags"


def test_blank_rows_of_spreadsheets_are_no_bad_rows_and_keep_their_numbers(tmp_path):
    put(tmp_path, "a.png")
    table(tmp_path, ["a.png,0,0,20,20,1,0,0", ",,,,,,,", "", " , ,,,,,,,,", "a.png,0,0,8,8,2,0,0", ",,,,,,,"])
    listing = scan(tmp_path)
    assert [len(image.windows) for image in listing.images] == [1]
    assert [rejection.name for rejection in listing.rejected] == ["patches.csv row 6 (a.png)"]


def test_rows_of_nulls_in_a_parquet_table_are_no_bad_rows(tmp_path):
    put(tmp_path, "a.png")
    rows = {"image": ["a.png", None], "tumor": [True, None], "stroma": [False, None], "normal": [0, None]}
    parquet.write(pa.table(rows), str(tmp_path / "labels.parquet"))
    listing = scan(tmp_path)
    assert (len(listing.images), listing.rejected) == (1, [])


def test_a_broken_parquet_table_is_a_clear_error(tmp_path):
    put(tmp_path, "patches.parquet", b"PAR1 nothing")
    with pytest.raises(PistoSegError, match="Parquet"):
        scan(tmp_path)


def test_a_table_elsewhere_is_named_by_a_setting_and_two_are_ambiguous(tmp_path):
    put(tmp_path, "training/a.png")
    table(tmp_path, ["training/a.png,0,0,8,8,1,0,0"], name="windows.csv")
    (image,) = scan(tmp_path / "training", table="windows.csv").images
    assert len(image.windows) == 1
    for name in ("one.csv", "two.csv"):
        table(tmp_path / "training", ["a.png,0,0,8,8,1,0,0"], name=name)
    with pytest.raises(PistoSegError, match=r"one\.csv, two\.csv"):
        scan(tmp_path / "training")
    with pytest.raises(PistoSegError, match="does not exist"):
        scan(tmp_path / "training", table="three.csv")


def test_a_table_beside_the_folder_above_is_named_by_a_relative_path(root):
    put(root, "set/training/a.png")
    table(storage.join(root, "tables"), ["../set/training/a.png,0,0,8,8,1,0,0"], name="w.csv")
    (image,) = scan(storage.join(root, "set/training"), table="../../tables/w.csv").images
    assert storage.read_bytes(image.uri) == storage.read_bytes(storage.join(root, "set/training/a.png"))


def test_a_table_names_nothing_out_of_its_bucket_but_by_a_whole_uri(tmp_path):
    bucket, other = (f"memory://{tmp_path.name}-{name}" for name in ("one", "other"))
    beside = storage.name(put(other, "b.png").removesuffix("/b.png"))
    put(bucket, "a.png")
    table(bucket, [f"{image},0,0,8,8,1,0,0" for image in ("a.png", f"../{beside}/b.png", f"{other}/b.png")])
    listing = scan(bucket)
    assert sorted(image.name for image in listing.images) == ["a.png", f"{other}/b.png"]
    assert [rejection.reason for rejection in listing.rejected] == [f"the image ../{beside}/b.png does not exist"]
    places = images_elsewhere(storage.join(bucket, "patches.csv"), bucket, lambda: relative_files(bucket))
    assert places == {f"../{beside}/b.png": [], f"{other}/b.png": [f"{other}/b.png"]}
    with pytest.raises(PistoSegError, match="leads out of the bucket of s3://bucket/set"):
        from_folder("s3://bucket/set", "../../other/a.svs")


def test_a_table_that_is_a_folder_of_parts_is_said_to_be_one(tmp_path):
    put(tmp_path, "patches.parquet/part-0.parquet", b"")
    with pytest.raises(PistoSegError, match="is a folder, and a table is one file"):
        scan(tmp_path, table="patches.parquet")


def put_table(root, columns, name="patches.parquet"):
    parquet.write(pa.table(columns), storage.join(str(root), name))


def test_a_parquet_tables_text_may_be_of_type_binary(tmp_path):
    put(tmp_path, "ä.png")
    image = pa.array(["ä.png".encode()], pa.large_binary())
    put_table(tmp_path, {"image": image, "Tumor": [b"1"], "stroma": [0], "normal": [0], "thumbnail": [b"\x89PNG"]})
    assert [image.name for image in scan(tmp_path).images] == ["ä.png"]


@pytest.mark.parametrize("content", [{"bytes": b"\x89PNG", "path": None}, b"\x89PNG", [b"\x89PNG"]])
def test_a_table_with_images_in_place_of_their_paths_is_refused_without_its_content(tmp_path, content):
    put(tmp_path, "a.png")
    put_table(tmp_path, {"image": [content], "tumor": [1], "stroma": [0], "normal": [0]})
    with pytest.raises(PistoSegError, match=r"is of type .*, and paths are text") as caught:
        scan(tmp_path)
    assert (caught.value.field, "PNG" in str(caught.value)) == ("column image", False)


def test_of_parquet_tables_that_may_be_one_of_windows_the_columns_are_read_alone(tmp_path, monkeypatch):
    put(tmp_path, "a.png")
    row = {"image": ["a.png"], "tumor": [1], "stroma": [0], "normal": [0]}
    put_table(tmp_path, {"patient": ["x"] * 10}, "cohort.parquet")
    put_table(tmp_path, row, "windows.parquet")
    read, opened = parquet.read, []
    monkeypatch.setattr(parquet, "read", lambda uri: opened.append(storage.name(uri)) or read(uri))
    assert len(scan(tmp_path).images) == 1
    assert opened == ["windows.parquet"]


@pytest.mark.parametrize(
    "header",
    [
        "image;Tumor, NOS;Stroma, loose",
        '"Tumor, NOS";"Stroma, loose";"a, b, c, d";image',
        '"sep=;"\r\nimage;Tumor, NOS;Stroma, loose',
        'image,"Tumor, NOS","Stroma, loose",a;b;c;d;e;f;g',
        "\ufeffIMAGE\tTumor, NOS\tStroma, loose\ta;b;c",
    ],
)
@pytest.mark.parametrize("end", ["\r\n", "\r"])
def test_columns_are_separated_by_what_gives_one_of_images(tmp_path, header, end):
    put(tmp_path, "a.png")
    separator = next(mark for mark in "\t;," if mark in header.partition("a;b")[0])
    row = separator.join(["1", "0", "x", "a.png"] if header.endswith("image") else ["a.png", "1", "0"])
    put(tmp_path, "patches.csv", end.join([header.replace("\r\n", end), row]).encode())
    classes = TissueClasses((TissueClass("Tumor, NOS", (1, 2, 3)), TissueClass("Stroma, loose", (4, 5, 6))))
    (image,) = scan_training(str(tmp_path), classes, DataConfig()).images
    assert (image.name, image.windows[0].labels) == ("a.png", (1, 0))


def test_the_line_that_names_the_separator_for_excel_is_no_header(tmp_path):
    put(tmp_path, "a,b.png")
    lines = ["\ufeffsep=;", "image;tumor;stroma;normal", "a,b.png;1;0;0", "gone.png;1;0;0"]
    put(tmp_path, "patches.csv", "\r\n".join(lines).encode())
    listing = scan(tmp_path)
    assert [image.name for image in listing.images] == ["a,b.png"]
    assert [rejection.name for rejection in listing.rejected] == ["patches.csv row 4 (gone.png)"]


@pytest.mark.parametrize(("name", "read"), [("labels.csv", "read_bytes"), ("labels.parquet", "open_file")])
def test_a_table_that_the_disk_does_not_give_is_not_ignored_for_labels_in_names(tmp_path, monkeypatch, name, read):
    put(tmp_path, "a-[1, 0, 0].png")
    put(tmp_path, name, b"")

    def refuse(uri, *_):
        raise PermissionError(errno.EACCES, "Permission denied", uri)

    monkeypatch.setattr(storage, read, refuse)
    with pytest.raises(UnavailableError, match=f"{name}: cannot be read .Permission denied"):
        scan(tmp_path)


@pytest.mark.parametrize(("name", "read"), [("labels.csv", "read_bytes"), ("labels.parquet", "open_file")])
def test_a_table_that_object_storage_refuses_is_not_ignored_for_labels_in_names(tmp_path, monkeypatch, name, read):
    put(tmp_path, "a-[1, 0, 0].png")
    put(tmp_path, name, b"")

    def refuse(uri, *_):
        raise object_store.explain(PermissionError("Access Denied"), uri)

    monkeypatch.setattr(storage, read, refuse)
    with pytest.raises(PistoSegError, match=f"{name}: AWS refuses access .*check the access key"):
        scan(tmp_path)


@pytest.mark.parametrize("column", ["Tumor", "IMAGE"])
def test_a_column_that_counts_and_is_there_twice_is_refused(tmp_path, column):
    put(tmp_path, "a.png")
    table(tmp_path, ["a.png,0,0,8,8,1,0,0,0"], header=f"{HEADER.strip()},{column}\n")
    with pytest.raises(PistoSegError, match=f"column {column.lower()}: is there twice"):
        scan(tmp_path)


def test_columns_that_do_not_count_may_be_there_twice(tmp_path):
    put(tmp_path, "a.png")
    table(tmp_path, ["a.png,1,0,0,x,y,,"], header="image,tumor,stroma,normal,note,Note,,\n")
    assert len(scan(tmp_path).images) == 1


@pytest.mark.parametrize("where", ["above", "beside", "at a URI"])
def test_the_digest_follows_a_table_and_images_outside_of_the_training_folder(tmp_path, where):
    folder = put(tmp_path, "set/training/a.png").rsplit("/", 1)[0]
    other = {"above": f"{tmp_path}/set", "beside": f"{tmp_path}/labels", "at a URI": f"memory://{tmp_path.name}"}[where]
    name = "labels.csv" if where == "above" else f"{other}/labels.csv"

    def digest():
        return training_digest(config_of(folder, table=name), etag)

    header = "image,gland,stroma\n"
    table(other, ["a.png,1,0", "b.png,0,1"], header, "labels.csv")
    found = [digest()]
    assert digest() == found[0]
    table(other, ["a.png,0,1", "b.png,0,1"], header, "labels.csv")  # of the same size
    found.append(digest())
    put(other, "b.png")  # was missing
    found.append(digest())
    put(other, "b.png", b"another")
    found.append(digest())
    put(folder, "a.png", b"another")
    assert len({*found, digest()}) == 5
    storage.remove_tree(other)


def test_the_digest_follows_images_elsewhere_that_a_table_within_the_folder_names(tmp_path):
    inside, outside = put(tmp_path, "training/sub/a.png"), put(tmp_path, "images/b.png")
    folder, header = tmp_path / "training", "image,gland,stroma\n"

    def digest():
        return training_digest(config_of(folder), etag)

    table(folder, ["sub/a.png,1,0", f"{inside},0,1"], header)
    assert digest() == files_digest(str(folder)), "as without a table: all of it lies in the folder"
    for written in (outside, "../images/b.png"):
        table(folder, ["sub/a.png,1,0", f"{written},0,1"], header)
        first = digest()
        put(tmp_path, "images/b.png", written.encode())
        assert digest() != first


def test_the_digest_asks_the_storage_once_for_an_image_elsewhere_and_leaves_out_what_is_not_there(
    tmp_path, monkeypatch
):
    folder, header, asked = tmp_path / "training", "image,gland,stroma\n", []

    def digest(*images):
        asked.clear()
        table(folder, [f"{image},0,1" for image in images], header)
        return training_digest(config_of(folder), etag)

    def counted(function):
        def call(uri, *arguments):
            if "/images" in uri:
                asked.append(uri)
            return function(uri, *arguments)

        return call

    images = [put(tmp_path, f"images/{number}.png") for number in range(20)]
    for name in ("exists", "is_dir", "info"):
        monkeypatch.setattr(storage, name, counted(getattr(storage, name)))
    digest(*images, "../images/0.png")
    assert sorted(asked) == sorted([*images, f"{folder}/../images/0.png"])
    useless = (
        f"{tmp_path}/images/gone.png",
        f"{tmp_path}/images",
        f"{images[0]}/a.png",
        "nothing://images/a.png",
        "../a\0.png",
    )
    assert digest(*useless) == files_digest(str(folder))
    put(tmp_path, "images/gone.png")
    assert digest(*useless) != files_digest(str(folder))


def test_images_without_any_label_say_what_was_looked_for(tmp_path):
    put(tmp_path, "plain-1.png")
    with pytest.raises(PistoSegError) as caught:
        scan(tmp_path)
    for part in ("plain-1.png", "[1, 0, 0]", "tumor___", "image, x, y, width, height"):
        assert part in str(caught.value)


def test_evaluation_images_and_masks_are_matched_by_stem_and_what_is_missing_is_listed(root):
    for name in ("a [1].png", "b.jpg"):
        put(root, f"2.validation/img/{name}")
    for name in ("a [1].png", "gone.png"):
        put(root, f"2.validation/mask/{name}", mask_png())
    put(root, "2.validation/background-mask/a [1].png", mask_png())
    listing = scan_evaluation(root)
    assert [pair.name for pair in listing.pairs] == ["a [1]", "b"]
    assert [pair.name for pair in listing.scored] == ["a [1]"]
    assert listing.pairs[0].background_uri
    assert (listing.missing_images, listing.missing_masks) == (["gone"], ["b"])


@pytest.mark.parametrize(("one", "other"), ACCENTS)
def test_an_image_and_its_mask_belong_together_however_their_accents_are_written(root, one, other):
    image = put(root, f"img/{normalize(one, 'Präparat')}.png")
    mask = put(root, f"mask/{normalize(other, 'Präparat')}.png", mask_png())
    (pair,) = scan_evaluation(root).scored
    assert storage.read_bytes(pair.image_uri) == storage.read_bytes(image)
    assert storage.read_bytes(pair.mask_uri) == storage.read_bytes(mask)


def test_evaluation_folders_may_be_called_images_and_masks(tmp_path):
    put(tmp_path, "images/a.tif")
    put(tmp_path, "masks/a.png", mask_png())
    assert scan_evaluation(str(tmp_path)).pairs[0].mask_uri


def test_a_folder_without_masks_says_what_is_needed(tmp_path):
    put(tmp_path, "img/a.png")
    with pytest.raises(PistoSegError, match="no img/ and mask/"):
        scan_evaluation(str(tmp_path))
