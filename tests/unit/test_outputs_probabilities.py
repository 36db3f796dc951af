import numpy as np
import pytest
import zarr

from pistoseg.classes import TissueClass, TissueClasses
from pistoseg.outputs import probabilities
from pistoseg.outputs.probabilities import ProbabilityWriter

CLASSES = TissueClasses((TissueClass("tumor", (200, 30, 3)), TissueClass("stroma", (0, 150, 110))))


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(probabilities, "CHUNK", 64)
    monkeypatch.setattr(probabilities, "SMALLEST_LEVEL", 60)


def write(path, values, rows):
    writer = ProbabilityWriter(path, *values.shape, 0.5, CLASSES)
    for top in range(0, values.shape[1], rows):
        writer.write(top, values[:, top : top + rows])
    writer.close()
    return zarr.open_group(str(path), mode="r")


@pytest.mark.parametrize("rows", [1, 50, 64, 1000])
def test_bands_of_any_height_make_the_same_pyramid(tmp_path, rows):
    values = np.random.default_rng(0).integers(0, 256, (2, 205, 151)).astype(np.uint8)
    group = write(tmp_path / "p.zarr", values, rows)
    assert np.array_equal(group["0"][:], values)
    padded = np.pad(values, ((0, 0), (0, 1), (0, 1)), mode="edge").astype(float)
    mean = padded.reshape(2, 103, 2, 76, 2).mean(axis=(2, 4))
    assert np.array_equal(group["1"][:], np.floor(mean + 0.5))
    assert [group[str(level)].shape for level in range(3)] == [(2, 205, 151), (2, 103, 76), (2, 52, 38)]
    assert "3" not in group


def test_metadata_are_ome_ngff_0_4(tmp_path):
    group = write(tmp_path / "p.zarr", np.zeros((2, 100, 80), np.uint8), 30)
    assert group.metadata.zarr_format == 2
    (multiscale,) = group.attrs["multiscales"]
    assert multiscale["version"] == "0.4"
    assert [axis["name"] for axis in multiscale["axes"]] == ["c", "y", "x"]
    assert {axis.get("unit") for axis in multiscale["axes"][1:]} == {"micrometer"}
    second = multiscale["datasets"][1]
    assert second["path"] == "1"
    assert second["coordinateTransformations"] == [
        {"type": "scale", "scale": [1.0, 1.0, 1.0]},
        {"type": "translation", "translation": [0.0, 0.25, 0.25]},
    ]
    channels = group.attrs["omero"]["channels"]
    assert [(channel["label"], channel["color"]) for channel in channels] == [("tumor", "C81E03"), ("stroma", "00966E")]


def test_chunks_lie_in_folders_and_empty_ones_are_not_written(tmp_path):
    values = np.zeros((2, 128, 128), np.uint8)
    values[1, 64:, 64:] = 9
    write(tmp_path / "p.zarr", values, 128)
    assert [str(item.relative_to(tmp_path)) for item in tmp_path.glob("p.zarr/0/[0-9]/*/*")] == ["p.zarr/0/1/1/1"]


def test_missing_rows_are_noticed(tmp_path):
    writer = ProbabilityWriter(tmp_path / "p.zarr", 2, 100, 80, 0.5, CLASSES)
    writer.write(0, np.zeros((2, 10, 80), np.uint8))
    with pytest.raises(ValueError, match="row 10"):
        writer.write(11, np.zeros((2, 10, 80), np.uint8))
    with pytest.raises(ValueError, match="row 10"):
        writer.write(10, np.zeros((2, 10, 79), np.uint8))
    with pytest.raises(ValueError, match="10 rows of 100"):
        writer.close()
