import pytest
from patch_files import CLASSES

from pistoseg.classes import TissueClasses
from pistoseg.errors import PistoSegError
from pistoseg.patches.labels import format_flags, parse_flags, parse_folder, parse_name


@pytest.mark.parametrize(
    "name",
    [
        "1003298-10924-38607-[1, 1, 0, 1].png",
        "TCGA-A1-A0SK-DX1_xmin45749[1101].png",
        "name[1 1 0 1].png",
        "name [1,1,0,1] .png",
        "[1, 1, 0, 1]",
        "TCGA+0[1101].PNG",
        "a.b.c-[1, 1, 0, 1].tiff",
        "slide [7] copy-[1,1,0,1].jpeg",
        "Gewebe ä 組織 (2)-[1;1;0;1].png",
    ],
)
def test_flags_are_read_however_a_release_writes_them(name):
    assert parse_flags(name, 4) == [1, 1, 0, 1]


@pytest.mark.parametrize("name", ["plain.png", "slide [copy].png", "open [1, 0.png", "TUM___x.jpg"])
def test_a_name_without_flags_has_no_label(name):
    assert parse_flags(name, 3) is None


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("x-[1, 0].png", "2 flags"),
        ("x[10011].png", "5 flags"),
        ("x-[].png", "0 flags"),
        ("x-[1, 2, 0].png", "value 2"),
        ("x[120].png", "value 2"),
        ("x-[1, -1, 0].png", "value -1"),
        ("x-[0.5, 0, 1].png", "value 0.5"),
        ("x-[1, a, 0].png", "value a"),
    ],
)
def test_flags_that_do_not_fit_are_refused_with_the_name_and_a_remedy(name, says):
    with pytest.raises(PistoSegError, match=says) as caught:
        parse_flags(name, 3)
    assert caught.value.file == name
    assert caught.value.field == "label"
    assert caught.value.remedy


def test_written_flags_are_read_back():
    assert parse_flags(f"x-{format_flags([0, 1, 1])}.png", 3) == [0, 1, 1]


def test_a_class_prefix_and_a_folder_name_are_read_in_any_case():
    assert parse_name("STROMA___x-[y].jpg", CLASSES) == [0, 1, 0]
    assert parse_folder("Normal", CLASSES) == [0, 0, 1]
    assert parse_folder("muscle", CLASSES) is None


def test_a_prefix_that_is_no_class_is_refused_and_names_the_classes():
    with pytest.raises(PistoSegError, match="tumor, stroma, normal"):
        parse_name("MUS___x.jpg", CLASSES)


def test_the_codec_decides_where_a_name_says_both():
    name = "tumor___x[011].png"
    assert parse_name(name, CLASSES) == [0, 1, 1]
    assert parse_name(name, TissueClasses(CLASSES.classes, 3, codec="prefix")) == [1, 0, 0]
    assert parse_name("tumor___x.png", TissueClasses(CLASSES.classes, 3, codec="flags")) is None
