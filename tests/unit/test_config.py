import errno
import re

import pytest
import yaml

from pistoseg.arguments import resolved_config
from pistoseg.cli import build_parser
from pistoseg.config import (
    Config,
    EvaluationConfig,
    ScaleConfig,
    StorageConfig,
    TrackingConfig,
    describe,
    load_classes,
    load_config,
    load_services,
    presets,
    validate,
)
from pistoseg.errors import PistoSegError
from pistoseg.search.builtin import load_space


def test_every_problem_is_reported_at_once_with_its_key():
    wrong = [
        "synthesis.alpha=2",
        "precise.lr=fast",
        "synthesis.strateggy=mosaic",
        "sed=3",
        "classes.background_id=300",
        "preliminary.augmentation.rotate=-1",
    ]
    with pytest.raises(PistoSegError) as caught:
        load_config("wsss4luad", overrides=wrong)
    message = str(caught.value)
    assert "6 problem(s)" in message
    lines = message.splitlines()
    for key in ("synthesis.alpha", "precise.lr", "classes.background_id", "preliminary.augmentation.rotate"):
        assert sum(line.startswith(f"  {key}: ") for line in lines) == 1, key
    assert "synthesis.strateggy: unknown key; did you mean strategy?" in message
    assert "sed: unknown key; did you mean seed?" in message
    assert "config show" in caught.value.remedy


def test_an_unknown_key_that_resembles_nothing_gets_no_suggestion():
    with pytest.raises(PistoSegError, match=r"zzzz: unknown key$|zzzz: unknown key\."):
        load_config(overrides=["precise.zzzz=1"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("synthesis.alpha=0.9", "alpha (0.9) must be less than beta (0.8)"),
        ("synthesis={alpha: 0.501, beta: 0.502}", "lies between alpha (0.501) and beta (0.502) of 224 px"),
        ("scale.source_mpp=0.5", "source_mpp needs mpp"),
        ("scale.resize=0.5", "fit and resize contradict each other"),
        ("scale={fit: 224, mpp: 1.0, source_mpp: 0.5}", "without regard to scale.source_mpp, by which others"),
        ("synthesis.class_sampling={tumour: 1, stroma: 1, normal: 1}", "given for tumour, stroma, normal, but the"),
        ("synthesis.class_sampling={tumor: 2}", "given for tumor, but the classes are tumor, stroma, normal. Remedy"),
        ("synthesis.class_sampling={tumor: 1, Tumor: 2, stroma: 1, normal: 1}", "given for tumor, Tumor, stroma"),
        ("synthesis.class_sampling={tumor: 0, stroma: 0, normal: 0}", "not all 0"),
        ("evaluation.stride=225", "evaluation: stride (225) must be at most patch_size (224)"),
        ("pseudo_masks.stride=225", "pseudo_masks: stride (225) must be at most patch_size (224)"),
        ("cams.stride=225", "cams: stride (225) must be at most patch_size (224)"),
        ("refined_masks.stride=225", "refined_masks: stride (225) must be at most patch_size (224)"),
        ("precise.initial=preliminary", "needs the same architecture, encoder and decoder_attention"),
        ("classes.background_id=1", "background_id 1 is the id of class 'stroma'"),
        ("classes.classes=[{name: a, color: [0, 0, 0]}]", "at least 2"),
        ("seed=-1", "seed"),
        ("precise.lr=nan", "precise.lr"),
    ],
)
def test_contradictory_and_impossible_settings_are_refused(override, message):
    with pytest.raises(PistoSegError) as caught:
        load_config("wsss4luad", overrides=[override])
    assert message in str(caught.value)


def test_class_names_must_differ_whatever_their_case():
    classes = {"classes": [{"name": name, "color": [0, 0, 0]} for name in ("Tumor", "tumor")]}
    with pytest.raises(PistoSegError, match="class names must differ"):
        validate({"classes": classes})


def test_classes_and_background_must_differ_in_colour():
    classes = [{"name": "a", "color": [0, 0, 0]}, {"name": "b", "color": [9, 9, 9]}]
    for other, message in (("a", "c has the colour of a, [0, 0, 0]"), ("background", "colour of the background")):
        third = {"name": "c", "color": {"a": [0, 0, 0], "background": [255, 255, 255]}[other]}
        with pytest.raises(PistoSegError, match=re.escape(message)) as caught:
            validate({"classes": {"classes": [*classes, third]}}, source="mine.yaml")
        assert caught.value.file == "mine.yaml"
        assert "\n  classes: c has" in str(caught.value)
    validate({"classes": {"classes": [*classes, third], "background_color": [1, 1, 1]}})


def test_class_weights_go_by_name_whatever_its_case():
    config = load_config("wsss4luad", overrides=["synthesis.class_sampling={NORMAL: 0, ' Tumor': 1, stroma: 2}"])
    assert config.synthesis.class_sampling == {"tumor": 1, "stroma": 2, "normal": 0}
    assert load_config("wsss4luad", overrides=["cams.stride=224"]).cams.step == 224


def test_mpp_and_resize_contradict_each_other():
    with pytest.raises(PistoSegError, match="leave resize at 1"):
        load_config("glas", overrides=["scale.resize=0.5"])


def test_overrides_take_yaml_values():
    config = load_config(
        "wsss4luad",
        overrides=[
            "precise.lr=5e-5",  # YAML 1.1 reads this as a string
            "precise.weights=null",
            "scale.fit=",
            "synthesis.class_sampling={tumor: 1, stroma: 2.5, normal: 0}",
            "evaluation.scales=[1, 1.5]",
            "preliminary.augmentation.flip=false",
            "data.uri='a=b [1]: c'",
            " seed =7",
        ],
    )
    assert config.precise.lr == 5e-5
    assert config.precise.weights is None
    assert config.scale.fit is None
    assert config.synthesis.class_sampling == {"tumor": 1, "stroma": 2.5, "normal": 0}
    assert config.evaluation.scales == (1, 1.5)
    assert config.preliminary.augmentation.flip is False
    assert config.data.uri == "a=b [1]: c"
    assert config.seed == 7


@pytest.mark.parametrize("text", ["precise.lr", "=3", "seed=[1"])
def test_a_malformed_override_is_quoted(text):
    with pytest.raises(PistoSegError) as caught:
        load_config(overrides=[text])
    assert repr(text) in str(caught.value)
    assert caught.value.field == "--set"


def test_later_overrides_win():
    assert load_config(overrides=["seed=1", "seed=2"]).seed == 2


def test_the_paper_settings_are_in_the_faithful_presets():
    for name in ("wsss4luad", "bcss-wsss"):
        config = load_config(name)
        synthesis, preliminary, precise = config.synthesis, config.preliminary, config.precise
        assert (synthesis.strategy, synthesis.mode, synthesis.count) == ("mosaic", "stored", 20_000)
        assert (synthesis.alpha, synthesis.beta) == (0.2, 0.8)
        assert (synthesis.shift, synthesis.scale, synthesis.rotate) == (0.0625, 0.2, 45)
        assert synthesis.transform_probability == 0.8
        assert synthesis.class_sampling == "natural"
        assert config.scale.fit == 224
        for training in (preliminary, precise):
            assert (training.architecture, training.decoder_attention) == ("unetplusplus", "scse")
            assert (training.loss, training.epochs, training.batch_size) == ("bce", 15, 16)
            assert (training.weight_decay, training.lr_decay, training.keep) == (0.05, 0.9, "best")
            assert (training.weights, training.average_decay) == ("imagenet", 0)
        assert (preliminary.encoder, preliminary.lr) == ("efficientnet-b0", 1e-3)
        assert (precise.encoder, precise.lr) == ("efficientnet-b3", 5e-4)
        assert (precise.masks, precise.class_sampling, precise.patch_size) == ("refined_cnn", "natural", 224)
        assert precise.min_confidence == 0
        masks = config.pseudo_masks
        assert (masks.grid, masks.symmetries, masks.constrain, masks.patch_size) == (32, 8, True, 224)


def test_wsss4luad_is_the_papers():
    config = load_config("wsss4luad")
    synthesis = config.synthesis
    assert (synthesis.crop_height, synthesis.crop_width, synthesis.n_h, synthesis.n_w) == (32, 32, 7, 7)
    assert (synthesis.height, synthesis.width) == (224, 224)
    assert synthesis.background_threshold == 0.267
    assert (config.data.background, config.data.background_grey, config.data.background_min_area) == ("bright", 200, 50)
    classes = config.classes.tissue()
    assert classes.names == ["tumor", "stroma", "normal"]
    assert [tissue.color for tissue in classes.classes] == [(0, 64, 128), (64, 128, 0), (243, 152, 0)]
    assert (classes.background_id, classes.background_color) == (3, (255, 255, 255))
    assert config.evaluation.resolved() == {
        "tile": 224,
        "stride": 112,
        "scales": (1.0, 1.25, 1.5, 1.75, 2.0),
        "symmetries": 1,
        "window": "mean",
    }


def test_bcss_wsss_is_the_papers():
    config = load_config("bcss-wsss")
    synthesis = config.synthesis
    assert (synthesis.crop_height, synthesis.crop_width, synthesis.n_h, synthesis.n_w) == (112, 112, 2, 2)
    assert synthesis.background_threshold == 1.0
    assert config.data.background == "none"
    classes = config.classes.tissue()
    assert classes.names == ["tumor", "stroma", "lymphocytic infiltrate", "necrosis"]
    assert [tissue.color for tissue in classes.classes] == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (153, 0, 255)]
    assert classes.background_id == 4
    resolved = config.evaluation.resolved()
    assert (resolved["tile"], resolved["stride"], resolved["scales"]) == (224, 224, (1.0,))


def test_an_evaluation_setting_goes_before_its_protocol():
    resolved = EvaluationConfig(protocol="wsss4luad", stride=56, scales=(1.0,), symmetries=8).resolved()
    assert (resolved["stride"], resolved["scales"], resolved["symmetries"]) == (56, (1.0,), 8)


def test_a_profile_changes_what_it_names_and_nothing_else():
    plain, cpu = load_config("wsss4luad"), load_config("wsss4luad", "cpu")
    assert cpu.preliminary.encoder == "tu-tf_efficientnet_lite0"
    assert (cpu.scale.fit, cpu.synthesis.mode) == (None, "streamed")
    assert cpu.synthesis.background_threshold == plain.synthesis.background_threshold
    assert cpu.classes == plain.classes
    with pytest.raises(PistoSegError, match=r"no profile 'gpu'.*use one of: cpu"):
        load_config("wsss4luad", "gpu")


def test_a_profile_without_a_preset_is_refused_instead_of_ignored(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("classes: {classes: [{name: a, color: [0, 0, 0]}, {name: b, color: [9, 9, 9]}]}")
    assert load_config(file=str(file)).classes.tissue().names == ["a", "b"]
    with pytest.raises(PistoSegError, match="cpu"):
        load_config(profile="cpu", file=str(file))


def test_a_preset_without_profiles_is_said_to_have_none():
    with pytest.raises(PistoSegError, match=r"'demo' has no profile 'cpu'.*leave it out: this preset has no profiles"):
        load_config("demo", "cpu")


def test_a_file_without_classes_beside_no_preset_says_where_they_come_from(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("precise: {lrr: 0.01}\n")
    with pytest.raises(PistoSegError, match=r"(?s)2 problem.*add --preset NAME, or a section classes; .*config show"):
        load_config(file=str(file))
    with pytest.raises(PistoSegError, match=r"Remedy: `pistoseg config show"):
        load_config("demo", file=str(file))


def test_a_file_of_classes_is_no_config(tmp_path):
    file = tmp_path / "classes.yaml"
    file.write_text("classes: [{name: a, color: [1, 2, 3]}, {name: b, color: [4, 5, 6]}]\nbackground_id: 2\n")
    for preset in (None, "glas"):
        with pytest.raises(PistoSegError, match="this is a file of classes") as caught:
            load_config(preset, file=str(file))
        assert (caught.value.file, caught.value.remedy) == (str(file), f"give it with --set classes={file}")
    assert load_config("glas", overrides=[f"classes={file}"]).classes.tissue().names == ["a", "b"]


def test_file_goes_before_the_preset_and_overrides_before_the_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("preset: bcss-wsss\nprofile: cpu\nseed: 5\nprecise: {lr: 0.01, epochs: 3}\n")
    config = load_config(file=str(file), overrides=["precise.epochs=4"])
    assert config.classes.tissue().names[3] == "necrosis"
    assert config.scale.fit is None
    assert (config.seed, config.precise.lr, config.precise.epochs) == (5, 0.01, 4)


def test_classes_may_be_a_file_of_their_own(tmp_path):
    file = tmp_path / "classes.yaml"
    file.write_text("classes: [{name: Drüse, color: [1, 2, 3]}, {name: rest, color: [4, 5, 6]}]\n")
    classes = load_config("glas", overrides=[f"classes={file}"]).classes.tissue()
    assert classes.names == ["Drüse", "rest"]
    assert classes.background_id == 2


def test_more_or_fewer_classes_than_a_presets_have_a_background_of_their_own(tmp_path):
    file = tmp_path / "mine.yaml"
    for count in (2, 4, 5):
        classes = [{"name": f"c{i}", "color": [i, 0, 0]} for i in range(count)]
        file.write_text(yaml.safe_dump({"preset": "bcss-wsss", "classes": {"classes": classes}}))
        assert load_config(file=str(file)).classes.tissue().background_id == count
        assert load_config(file=str(file), overrides=["classes.background_id=9"]).classes.background_id == 9
        if count == 4:  # as written in artifacts that were made before
            assert load_config(file=str(file)).classes.background_id == 4
    assert load_config("bcss-wsss", overrides=["classes.codec=flags"]).classes.background_id == 4


def test_images_of_ones_own_at_the_pixel_size_of_a_preset_are_warned_of(tmp_path, caplog):
    classes, file = tmp_path / "classes.yaml", tmp_path / "mine.yaml"
    classes.write_text("classes: [{name: a, color: [1, 2, 3]}, {name: b, color: [4, 5, 6]}]\n")
    file.write_text(f"preset: glas\nprofile: cpu\nclasses: {classes}\nscale: {{mpp: 0.5}}\n")
    own = f"classes={classes}"
    load_config("glas", overrides=[own])
    load_config(file=str(file))
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    for message in caplog.messages:
        assert "0.62 um/px of preset glas" in message
        assert "set scale.source_mpp" in message
    caplog.clear()
    load_config("glas")
    load_config("glas", overrides=[own, "scale.source_mpp=0.62"])
    load_config("glas", overrides=[own, "scale.mpp=null", "scale.source_mpp=null"])
    load_config(file=str(file), overrides=["scale.source_mpp=0.25"])
    load_config("wsss4luad", overrides=[own])  # which has no pixel size
    windows = ["data", "windows", "--slides", "s", "--annotations", "a", "--out", "o.csv", "--preset", "glas", "--set"]
    resolved_config(build_parser().parse_args([*windows, own]))
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("content", "problems"),
    [
        ("classes: [TUM, STR]", ["classes.0: write {name: TUM, color: [r, g, b]}", "classes.1: write {name: STR, c"]),
        (
            "classes: [{name: TUM, colour: [1, 2, 3]}, {name: STR, color: [1, 2, 300]}]\nbackground: 2",
            [
                "classes.0.color: Field required",
                "classes.0.colour: unknown key; did you mean color?",
                "classes.1.color.2: Input should be less than or equal to 255",
                "background: unknown key; did you mean background_",
            ],
        ),
        ("classes: [{name: TUM, color: [1, 2, 3]}]", ["classes: Tuple should have at least 2 items"]),
    ],
)
def test_the_problems_of_a_file_of_classes_are_listed_under_its_name(tmp_path, content, problems):
    file = tmp_path / "classes.yaml"
    file.write_text(content)
    for read in (load_classes, lambda uri: load_config("glas", overrides=[f"classes={uri}", "seed=-1"])):
        with pytest.raises(PistoSegError) as caught:
            read(str(file))
        assert caught.value.file == str(file)
        title, *lines = caught.value.reason.splitlines()
        assert title == f"{len(problems)} problem(s) in the classes:"
        assert all(line.startswith(f"  {says}") for line, says in zip(lines, problems, strict=True))


def test_rules_about_several_keys_are_reported_beside_unknown_keys(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("preset: glas\nsynthesis: {alpha: 0.9, zzzz: 1, beta: 0.8}\nprecise: {lrr: 1}\nsed: 1")
    with pytest.raises(PistoSegError) as caught:
        load_config(file=str(file))
    title, *lines = caught.value.reason.splitlines()
    assert title.startswith(f"{len(lines)} problem(s)")
    assert len(set(lines)) == len(lines)
    for says in ("synthesis.zzzz: unknown key", "precise.lrr: unknown key", "sed: unknown key", "less than beta"):
        assert any(says in line for line in lines), says


@pytest.mark.parametrize(
    "overrides",
    [
        ["scale={source_mpp: 0.25, mp: 0.5}"],
        ["precise.initial=preliminary", "precise.encoder=xception", "preliminary.encodr=xception"],
    ],
)
def test_a_misspelled_key_is_not_said_to_be_missing_as_well(overrides):
    with pytest.raises(PistoSegError, match="unknown key; did you mean") as caught:
        load_config("wsss4luad", overrides=overrides)
    assert caught.value.reason.startswith("1 problem(s)")


def test_a_file_of_classes_that_is_not_there_is_named(tmp_path):
    file = tmp_path / "classes.yam"
    with pytest.raises(PistoSegError, match=r"classes\.yam: does not exist\. Remedy: give the path") as caught:
        load_config("glas", overrides=[f"classes={file}"])
    assert caught.value.file == str(file)


def test_a_section_that_is_no_mapping_is_said_in_the_words_of_yaml():
    with pytest.raises(PistoSegError, match=r"\n  data: must be a mapping of keys to values\."):
        load_config("glas", overrides=["data=3"])


@pytest.mark.parametrize("content", ["[1, 2]", "a: [1", "just text"])
def test_a_file_that_is_no_mapping_is_named(tmp_path, content):
    file = tmp_path / "bad.yaml"
    file.write_text(content)
    with pytest.raises(PistoSegError) as caught:
        load_config(file=str(file))
    assert caught.value.file == str(file)


TWICE = """preset: demo
synthesis: {alpha: 0.3}
data:
  uri: a
  window: 64
  uri: b
synthesis: {beta: 0.7}
"""


def test_keys_that_stand_twice_are_listed_with_their_lines(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(TWICE)
    expected = r"key 'synthesis' stands on lines 2 and 7; the key 'uri' stands on lines 4 and 6, and only the last"
    for read in (lambda: load_config(file=str(file)), lambda: load_space(str(file), load_config("demo"))):
        with pytest.raises(PistoSegError, match=expected) as caught:
            read()
        assert caught.value.file == str(file)
    with pytest.raises(PistoSegError, match=r"'uri' stands on lines 1 and 1") as caught:
        load_config("demo", overrides=["data={uri: a, uri: b}"])
    assert caught.value.field == "--set"


def test_a_key_that_is_merged_in_may_stand_once_more(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "preset: demo\nclassifier: &a {lr: 0.1, epochs: 3}\nrefiner: &b {<<: *a, lr: 0.2}\nprecise: {<<: *b, lr: 0.3}\n"
    )
    config = load_config(file=str(file))
    assert (config.refiner.lr, config.precise.lr, config.precise.epochs) == (0.2, 0.3, 3)


@pytest.mark.parametrize("value", ["2026-30-11", "[" * 3000 + "]" * 3000])
def test_what_yaml_can_not_read_is_no_defect(tmp_path, value):
    file = tmp_path / "mine.yaml"
    file.write_text(f"preset: demo\ntracking: {{experiment: {value}}}\n")
    with pytest.raises(PistoSegError, match=r"is not valid YAML: (month must be|it is nested too deeply)"):
        load_config(file=str(file))
    with pytest.raises(PistoSegError, match=r"is not valid YAML: (month must be|it is nested too deeply)") as caught:
        load_config("demo", overrides=[f"tracking.experiment={value}"])
    assert caught.value.field == "--set"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("preset: demo\nprecise:\n\tlr: 0.1\n", "line 3: has a tab where only spaces may stand; use spaces"),
        ("preset: demo\nclasses:\n  {a: [1\nseed: 2\n", r"line 4: .*, while parsing a flow .* begins on line 3"),
    ],
)
def test_what_is_no_yaml_is_said_with_its_line(tmp_path, content, message):
    file = tmp_path / "mine.yaml"
    file.write_text(content)
    with pytest.raises(PistoSegError, match=f"is not valid YAML: {message}") as caught:
        load_config(file=str(file))
    assert caught.value.file == str(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["profile: [cpu]", "profile: {cpu: 1}", "preset: [glas]", "profile: 1"])
def test_a_preset_or_profile_that_is_no_name_is_refused(tmp_path, content):
    file = tmp_path / "bad.yaml"
    file.write_text(content)
    with pytest.raises(PistoSegError, match="is no name") as caught:
        load_config(file=str(file))
    assert (caught.value.file, caught.value.field) == (str(file), content.split(":")[0])


def unreadable(tmp_path, monkeypatch):
    def refused(uri):
        raise PermissionError(errno.EACCES, "Permission denied", uri)  # root may read everything

    (tmp_path / "mine.yaml").touch()
    monkeypatch.setattr("pistoseg.storage.read_bytes", refused)
    return str(tmp_path / "mine.yaml"), "Permission denied"


@pytest.mark.parametrize("make", [lambda tmp_path, _: (str(tmp_path), "Is a directory"), unreadable])
def test_a_folder_or_a_file_that_may_not_be_read_is_named_with_a_remedy(tmp_path, monkeypatch, make):
    uri, reason = make(tmp_path, monkeypatch)
    config = load_config("glas")
    for read in (
        lambda: load_config(file=uri),
        lambda: load_classes(uri),
        lambda: load_config("glas", overrides=[f"classes={uri}"]),
        lambda: load_space(uri, config),
    ):
        with pytest.raises(PistoSegError, match=f"{uri}: can't be read: {reason}.*name a YAML file"):
            read()


def test_a_missing_file_and_an_unknown_preset_say_so(tmp_path):
    with pytest.raises(PistoSegError, match="does not exist"):
        load_config(file=str(tmp_path / "no.yaml"))
    with pytest.raises(PistoSegError, match=r"no preset 'wsss'.*bcss-wsss, demo, glas, wsss4luad"):
        load_config("wsss")


@pytest.mark.parametrize("preset", presets())
def test_what_config_show_prints_can_be_read_back(preset):
    config = load_config(preset)
    text = describe(config)
    assert validate(yaml.safe_load(text)) == config
    assert all("  # " in line for line in text.splitlines())  # every key has its doc line


def test_odd_values_survive_config_show():
    config = load_config(
        "glas",
        overrides=[
            "classes.classes=[{name: 'Drüse #1: x', color: [1, 2, 3]}, {name: 'no', color: [4, 5, 6]}]",
            "synthesis.class_sampling={'Drüse #1: x': 1, 'no': 3}",
            "data.uri='s3://bucket/a b [1, 0] # c'",
            "evaluation.scales=[0.5, 1]",
        ],
    )
    assert validate(yaml.safe_load(describe(config))) == config


def test_a_config_does_not_change_after_validation():
    config = load_config()
    with pytest.raises(ValueError, match="frozen"):
        config.precise.lr = 1.0


def test_scale_factor_is_network_px_per_image_px():
    assert ScaleConfig(mpp=1.0, source_mpp=0.5).factor() == 0.5
    assert ScaleConfig(mpp=1.0, source_mpp=0.5).factor(0.25) == 0.25
    assert ScaleConfig(resize=0.5).factor() == 0.5
    assert ScaleConfig().factor() == 1.0


def test_defaults_need_only_classes():
    classes = {"classes": [{"name": name, "color": [number, 0, 0]} for number, name in enumerate("ab")]}
    config = validate({"classes": classes})
    assert isinstance(config, Config)
    assert config.classes.tissue().background_id == 2
    with pytest.raises(PistoSegError, match="classes"):
        validate({})


def test_the_refining_module_of_the_faithful_presets_is_the_published_one():
    for preset in ("wsss4luad", "bcss-wsss"):
        config = load_config(preset)
        for section, lr in ((config.classifier, 1e-2), (config.refiner, 1e-3)):
            assert (section.encoder, section.output_stride, section.patch_size) == ("resnet38d", 8, 224)
            assert (section.optimizer, section.schedule, section.lr_power) == ("sgd", "polynomial", 0.9)
            assert (section.lr, section.new_layers_factor, section.weight_decay) == (lr, 10, 5e-4)
            assert (section.epochs, section.batch_size, section.initial) == (20, 16, "imagenet")
        refiner = config.refiner
        assert (refiner.attention_channels, refiner.normalize, refiner.feature_norm) == (192, "columns", False)
        assert refiner.lambda_pseudo == 0
        assert (refiner.lambda_cls, refiner.lambda_cons, refiner.lambda_cross) == (1, 1, 1)
        assert (refiner.hardest, refiner.min_pooling) == (1, False)
        assert (config.cams.method, config.cams.scales, config.cams.symmetries) == ("cam", (1, 1.25, 1.5, 1.75, 2), 2)
        assert config.cams.grid == config.refined_masks.grid == 32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"refiner": {"lambda_cls": 0, "lambda_cross": 0, "lambda_pseudo": 0}}, "nothing would be learned"),
        ({"classifier": {"encoder": "resnet38d", "output_stride": 16}}, "resnet38d has output_stride 8"),
        ({"classifier": {"patch_size": 112, "output_stride": 32}}, r"classifier: .*output_stride \(32\): 96 or 128"),
        ({"refiner": {"patch_size": 100}}, r"refiner: .*output_stride \(16\): 96 or 112"),
        ({"refiner": {"initial": "preliminary", "encoder": "resnet18"}}, "needs the encoder of preliminary"),
        ({"precise": {"masks": "refined"}}, "precise.masks"),
        ({"cams": {"scales": []}}, "cams.scales"),
    ],
)
def test_contradictions_of_the_refining_module_are_refused(settings, message):
    with pytest.raises(PistoSegError, match=message):
        load_config("demo", overrides=[f"{name}={values}" for name, values in flat(settings)])


def flat(settings):
    return [(f"{section}.{key}", value) for section, values in settings.items() for key, value in values.items()]


def test_weights_that_no_hub_has_are_asked_for_before_anything_runs():
    from pistoseg.pipeline import check_weights

    config = load_config("wsss4luad")
    with pytest.raises(PistoSegError, match="weights of resnet38d") as caught:
        check_weights(config, ("evaluation",))
    assert caught.value.field == "classifier.weights, refiner.weights"
    assert caught.value.remedy.startswith("add --profile cpu")
    check_weights(load_config("wsss4luad", overrides=["precise.masks=pseudo"]), ("evaluation",))
    given = ["classifier.weights=/data/res38d.pth", "refiner.weights=null"]
    check_weights(load_config("wsss4luad", overrides=given), ("evaluation",))


def test_the_sections_of_services_are_read_without_the_rest_of_a_config(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("preset: glas\nprofile: cpu\ntracking: {uri: 'http://a'}\nprecise: {epochs: 3}\n")
    tracking, storage = load_services(str(file), ["storage.anonymous=true"])
    assert (tracking.uri, storage.anonymous) == ("http://a", True)
    assert load_services() == (TrackingConfig(), StorageConfig())
    with pytest.raises(PistoSegError, match=r"tracking\.url: unknown key"):
        load_services(overrides=["tracking.url=http://a"])
    with pytest.raises(PistoSegError, match="unknown sections 1, trakcing"):
        load_services(overrides=["trakcing.uri=http://a", "1.x=2"])
