import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import pistoseg
from pistoseg.classes import TissueClass, TissueClasses
from pistoseg.config import EvaluationConfig
from pistoseg.errors import PistoSegError
from pistoseg.models import bundle, segmentation
from pistoseg.models.mlflow_flavor import LOADER_MODULE, signature
from pistoseg.models.segmentation import Normalization
from pistoseg.patches.background import BackgroundRule
from pistoseg.patches.decode import read_rgb
from pistoseg.tracking import default_server

CLASSES = TissueClasses((TissueClass("tumor", (0, 64, 128)), TissueClass("strôma", (64, 128, 0))), 2, (255, 255, 255))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    network = segmentation.build("unet", "tu-mobilenetv3_small_050", 2, None, None)
    network.normalization = Normalization((0.7, 0.5, 0.6), (0.2, 0.25, 0.3))
    return network.eval()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    uri = str(tmp_path_factory.mktemp("bundles") / "model [1]")
    bundle.save(
        uri,
        model,
        classes=CLASSES,
        patch_size=64,
        scale={"mpp": 1.0, "source_mpp": 0.5},
        evaluation={"protocol": "single-scale", "tile": 64, "stride": 64, "scales": (1.0,), "symmetries": 8},
        lineage={"patches": "3f2a"},
        metrics={"miou": np.float64(0.5)},
    )
    return uri


def picture(height=70, width=90):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)


def test_a_loaded_bundle_prints_what_it_is(folder):
    expected = "architecture='unet', encoder='tu-mobilenetv3_small_050', classes=['tumor', 'strôma'], mpp=1.0"
    assert repr(pistoseg.load(folder, device="cpu")) == f"Segmenter({expected})"


def test_a_bundle_is_two_files_and_gives_the_model_back(model, folder):
    assert sorted(item.name for item in Path(folder).iterdir()) == ["model.json", "model.safetensors"]
    loaded = pistoseg.load(folder, device="cpu")
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[key], value), key
    assert loaded.model.normalization == model.normalization
    assert loaded.classes == CLASSES
    assert loaded.info["metrics"] == {"miou": 0.5}
    assert loaded.info["lineage"] == {"patches": "3f2a"}
    assert loaded.info["pistoseg_version"] == pistoseg.__version__


def test_the_protocol_of_the_evaluation_is_the_default(folder):
    loaded = pistoseg.load(folder, device="cpu")
    default = loaded.predictor()
    assert (default.tile, default.stride, default.symmetries, default.scales) == (64, 64, 8, (1.0,))
    other = loaded.predictor(tile=96, symmetries=1)
    assert (other.tile, other.stride, other.symmetries) == (96, 48, 1)


def test_a_bundle_says_which_pixels_its_training_left_out(model, folder, tmp_path):
    rule = BackgroundRule(215, 0)
    bundle.save(str(tmp_path / "m"), model, classes=CLASSES, patch_size=64, background=rule)
    assert pistoseg.load(str(tmp_path / "m"), device="cpu").background == rule
    assert pistoseg.load(folder, device="cpu").background is None
    older = json.loads((tmp_path / "m" / "model.json").read_text())
    del older["background"]
    (tmp_path / "m" / "model.json").write_text(json.dumps(older))
    assert pistoseg.load(str(tmp_path / "m"), device="cpu").background is None


def test_pixels_that_the_training_left_out_have_no_class_unless_told_otherwise(model, folder, tmp_path):
    scale = {"mpp": 1.0, "source_mpp": 0.5}  # the rule's pixels are twice the image's
    bundle.save(
        str(tmp_path / "m"), model, classes=CLASSES, patch_size=64, scale=scale, background=BackgroundRule(200, 50)
    )
    loaded, plain = pistoseg.load(str(tmp_path / "m"), device="cpu"), pistoseg.load(folder, device="cpu")
    pixels = np.full((70, 90, 3), 120, np.uint8)
    pixels[10:40, 20:50] = 240
    pixels[50:60, 60:70] = 240  # 25 px of the rule's: a lumen
    glass = np.zeros((70, 90), bool)
    glass[10:40, 20:50] = True
    mask, classified = loaded.predict(pixels), loaded.predict(pixels, background="none")
    assert classified.max() < len(CLASSES)
    np.testing.assert_array_equal(mask == CLASSES.background_id, glass)
    np.testing.assert_array_equal(mask[~glass], classified[~glass])
    with_lumen = loaded.predict(pixels, mpp=1.0)  # 100 px of the rule's
    np.testing.assert_array_equal(with_lumen == CLASSES.background_id, pixels[..., 0] == 240)
    coarse = np.full((20, 20, 3), 120, np.uint8)
    coarse[5:12, 5:12] = 240  # 49 px, of the rule's 196 at 2 um, but for its blurred edge
    small, large = (loaded.predict(coarse, mpp=mpp) == CLASSES.background_id for mpp in (1.0, 2.0))
    assert not small.any()
    assert large[6:11, 6:11].all()
    assert large.sum() == large[4:13, 4:13].sum()
    np.testing.assert_array_equal(plain.predict(pixels), plain.predict(pixels, background="none"))
    with pytest.raises(PistoSegError, match=r"background: 'bright' is not known.*model or none"):
        loaded.predict(pixels, background="bright")


def test_masks_have_the_size_of_the_image_and_the_network_sees_its_own_pixel_size(folder):
    loaded = pistoseg.load(folder, device="cpu")
    assert loaded.factor() == 0.5
    assert loaded.factor(2.0) == 2.0
    pixels = picture()
    mask, maps = loaded.predict(pixels), loaded.probabilities(pixels)
    assert mask.shape == (70, 90)
    assert mask.dtype == np.uint8
    assert maps.shape == (2, 70, 90)
    np.testing.assert_array_equal(mask, maps.argmax(0))
    np.testing.assert_array_equal(mask, loaded.predict(pixels, mpp=0.5))
    np.testing.assert_allclose(maps, loaded.predictor().probabilities(pixels, 0.5))


def test_arrays_files_and_pil_images_give_the_same(folder, tmp_path):
    loaded = pistoseg.load(folder, device="cpu")
    pixels = picture()
    Image.fromarray(pixels).save(tmp_path / "x [1].png")
    expected = loaded.predict(pixels)
    opaque = Image.fromarray(pixels).convert("RGBA")
    for image in (tmp_path / "x [1].png", str(tmp_path / "x [1].png"), Image.fromarray(pixels), opaque):
        np.testing.assert_array_equal(loaded.predict(image), expected)


def test_any_fsspec_uri_holds_a_bundle(model):
    bundle.save("memory://models/a", model, classes=CLASSES, patch_size=64)
    assert pistoseg.load("memory://models/a", device="cpu").predict(picture()).shape == (70, 90)


def copy(folder, target, **changes):
    target.mkdir()
    info = json.loads((Path(folder) / "model.json").read_text()) | changes
    (target / "model.json").write_text(json.dumps(info))
    (target / "model.safetensors").write_bytes((Path(folder) / "model.safetensors").read_bytes())
    return target


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 99}, "format_version: the bundle has format 99.*upgrade"),
        ({"format": "other"}, "does not describe a PistoSeg model"),
        ({"encoder": "tu-mobilenetv3_small_100"}, "weights do not fit"),
        ({"encoder": "tu-no_such_encoder"}, "no_such_encoder"),
        ({"normalization": {}}, "is damaged"),
        ({"scale": {"mpp": -1}}, "is damaged: mpp: "),
        ({"patch_size": "64"}, "is damaged: patch_size: "),
        ({"background": {"grey": 300, "min_area": 50}}, "is damaged: grey: "),
        ({"background": {"grey": 200}}, "is damaged: min_area: "),
        ({"evaluation": None}, "is damaged: evaluation is None"),
        ({"evaluation": {"symmetries": 4}}, "is damaged: symmetries: "),
        ({"evaluation": {"tile": 64, "stride": 65}}, r"is damaged: stride \(65\) must be at most"),
        (
            {"scale": {"unit": "nm"}, "pistoseg_version": "0.0.9"},
            r"0\.0\.9, and .*: unit: .*again, or use PistoSeg 0\.0\.9\.$",
        ),
    ],
)
def test_a_description_that_does_not_fit_is_an_error_that_says_so(folder, tmp_path, changes, message):
    with pytest.raises(PistoSegError, match=message):
        pistoseg.load(str(copy(folder, tmp_path / "b", **changes)))


def test_a_bundle_whose_tile_no_evaluation_takes_says_so_beside_a_protocol_too(folder, tmp_path):
    small = str(copy(folder, tmp_path / "small", patch_size=16, evaluation={}))
    for protocol in (None, "wsss4luad"):
        with pytest.raises(PistoSegError, match=r"model\.json: is damaged: patch_size: .*greater than or equal to 32"):
            bundle.evaluation_config(small, protocol)


def test_a_bundle_of_a_newer_version_is_loaded_but_scored_only_where_its_settings_are_known(folder, tmp_path):
    def changed(name, **evaluation):
        return str(copy(folder, tmp_path / name, pistoseg_version="99", evaluation=evaluation))

    newer = changed("newer", tile=64, config={"patch_size": 64, "new_key": 1}, other=2)
    assert pistoseg.load(newer, device="cpu").predict(picture()).shape == (70, 90)
    with pytest.raises(
        PistoSegError, match=r"model\.json: was written by PistoSeg 99, .*: new_key: .*or give --protocol"
    ):
        bundle.evaluation_config(newer)
    assert bundle.evaluation_config(changed("known", config={"patch_size": 64})).patch_size == 64
    silent = bundle.evaluation_config(changed("silent"))
    assert silent == EvaluationConfig.model_validate({"patch_size": bundle.read_info(newer)["patch_size"]})
    window = {"patch_size": 64, "batch_size": 3, "protocol": "bcss-wsss"}
    newer = changed("window", tile=64, batch_size=3, config={"new_key": 1})
    assert bundle.evaluation_config(newer, "bcss-wsss") == EvaluationConfig.model_validate(window)


def test_another_protocol_has_the_window_of_the_bundle_and_its_own_stride_scales_and_symmetries(folder, tmp_path):
    section = {"patch_size": 544, "stride": 408, "scales": [1.0, 2.0], "symmetries": 1, "batch_size": 2, "bootstrap": 9}
    uri = str(copy(folder, tmp_path / "b", evaluation={"config": section}))
    own, other = bundle.evaluation_config(uri), bundle.evaluation_config(uri, "wsss4luad")
    assert bundle.evaluation_config(uri, "single-scale") == own
    assert (own.stride, own.scales, own.symmetries) == (408, (1.0, 2.0), 1)
    kept = {"protocol": "wsss4luad", "patch_size": 544, "batch_size": 2, "bootstrap": 9}
    assert other == EvaluationConfig.model_validate(kept)


def test_what_is_no_bundle_is_an_error_that_names_it(folder, tmp_path):
    with pytest.raises(PistoSegError, match=r"nowhere: is no model bundle.*/precise/.*models export"):
        pistoseg.load(str(tmp_path / "nowhere"))
    broken = copy(folder, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"PK\x03\x04")
    with pytest.raises(PistoSegError, match=r"model\.safetensors: is not a safetensors file"):
        pistoseg.load(str(broken))
    (broken / "model.safetensors").unlink()
    with pytest.raises(PistoSegError, match=r"model\.safetensors: is missing"):
        pistoseg.load(str(broken))
    (broken / "model.json").write_text("{")
    with pytest.raises(PistoSegError, match="not valid JSON"):
        pistoseg.load(str(broken))


def test_image_files_are_read_as_those_that_networks_are_trained_on(tmp_path, monkeypatch):
    lying, wide, pages = Image.new("RGB", (60, 40), "red"), tmp_path / "wide.png", tmp_path / "pages.tif"
    exif = lying.getexif()
    exif[0x0112] = 6  # to be turned
    lying.save(tmp_path / "lying.jpg", exif=exif)
    cv2.imwrite(str(wide), np.zeros((40, 40, 3), np.uint16))
    lying.save(pages, save_all=True, append_images=[lying])
    assert bundle.read_image(tmp_path / "lying.jpg").shape == read_rgb(str(tmp_path / "lying.jpg")).shape == (60, 40, 3)
    with Image.open(tmp_path / "lying.jpg") as opened:
        assert bundle.read_image(opened).shape == (60, 40, 3)
    for file, message in ((wide, "16-bit"), (pages, "page")):
        with pytest.raises(PistoSegError, match=message):
            bundle.read_image(file)
    monkeypatch.setattr(bundle, "MAX_PIXELS", 1000)
    with pytest.raises(PistoSegError, match=r"more than the 1,000 px allowed.*segment_slide"):
        bundle.read_image(tmp_path / "lying.jpg")


@pytest.mark.parametrize("mpp", [-1, 0, float("nan"), 1e9])
def test_a_pixel_size_that_no_microscope_has_is_refused(folder, mpp):
    with pytest.raises(PistoSegError, match=r"mpp: .* is no pixel size of a microscope"):
        pistoseg.load(folder, device="cpu").predict(picture(), mpp=mpp)


def test_bad_input_to_predict_is_an_error_that_names_it(model, folder, tmp_path):
    loaded = pistoseg.load(folder, device="cpu")
    (tmp_path / "text.png").write_text("no picture")
    deep = tmp_path / "deep.png"
    Image.fromarray(np.zeros((40, 40), np.uint16)).save(deep)
    for image, message in (
        (tmp_path / "none.png", r"none\.png: file: cannot be read"),
        (tmp_path / "text.png", r"text\.png: is not a PNG, JPEG or TIFF"),
        (deep, "8-bit RGB"),
        (np.zeros((40, 40), np.uint8), r"\(40, 40\) uint8"),
        (np.zeros((40, 40, 3)), "float64"),
    ):
        with pytest.raises(PistoSegError, match=message):
            loaded.predict(image)
    bundle.save(str(tmp_path / "unknown"), model, classes=CLASSES, patch_size=64)
    with pytest.raises(PistoSegError, match="pixel size is unknown"):
        pistoseg.load(str(tmp_path / "unknown"), device="cpu").predict(picture(), mpp=0.5)


@pytest.fixture
def _database(put_database, tmp_path):
    put_database(tmp_path)
    with default_server(f"sqlite:///{tmp_path / 'mlflow.db'}"):
        yield


@pytest.mark.usefixtures("_database")
def test_mlflow_keeps_a_bundle_as_a_model_with_a_signature(model, tmp_path):
    import mlflow

    folder, scale = str(tmp_path / "bundle"), {"mpp": 1.0, "source_mpp": 0.5}
    bundle.save(folder, model, classes=CLASSES, patch_size=64, scale=scale, background=BackgroundRule(200, 50))
    experiment = mlflow.create_experiment("bundles", artifact_location=(tmp_path / "artifacts").as_uri())
    with mlflow.start_run(experiment_id=experiment):
        logged = mlflow.pyfunc.log_model(
            name="model",
            loader_module=LOADER_MODULE,
            data_path=folder,
            signature=signature(),
            pip_requirements=["pistoseg"],
        )
    assert not [item for item in tmp_path.rglob("*") if item.suffix in (".pkl", ".pickle")]
    loaded = mlflow.pyfunc.load_model(logged.model_uri)
    images = np.stack([picture(), picture()[::-1]])
    images[0, 10:40, 10:40] = 240
    expected = pistoseg.load(folder)
    for given, arguments in (
        (None, {}),
        ({"mpp": 1.0}, {"mpp": 1.0}),
        ({"background": None}, {}),
        ({"background": "none"}, {"background": "none"}),
    ):
        masks = loaded.predict(images, params=given)
        np.testing.assert_array_equal(masks, np.stack([expected.predict(image, **arguments) for image in images]))
        assert (masks == CLASSES.background_id).any() == (arguments.get("background") is None)
    with pytest.raises(mlflow.MlflowException, match="uint8"):
        loaded.predict(images.astype(np.float64))


def test_a_bundle_may_have_a_pixel_size_beside_fit_which_configs_may_no_longer(folder, tmp_path):
    scale = {"mpp": 1.0, "source_mpp": 0.5, "fit": 224}
    bundle.save(str(tmp_path), bundle.load(folder, "cpu").model, classes=CLASSES, patch_size=64, scale=scale)
    assert bundle.load(str(tmp_path), "cpu").factor() == 0.5
