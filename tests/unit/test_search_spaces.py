import random

import pytest
import yaml

from pistoseg.config import load_config, presets
from pistoseg.errors import PistoSegError
from pistoseg.search.ablation import with_overrides
from pistoseg.search.builtin import SPACES, load_space
from pistoseg.search.objective import Objective
from pistoseg.search.sharing import analyse
from pistoseg.search.spaces import Parameter, Space, grid_points, read_space

MASKS = Objective("miou", masks=True, labels=False)


def config_of(preset, *overrides):
    return load_config(preset, overrides=("classifier.weights=null", "refiner.weights=null", *overrides))


def space_file(tmp_path, parameters):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"parameters": parameters}, sort_keys=False))
    return str(file)


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("preset", presets())
def test_every_point_of_a_space_is_a_valid_config_and_can_be_read_back_from_it(preset, name):
    config = config_of(preset)
    space, rng = load_space(name, config), random.Random(1)
    for _ in range(40):
        point = space.draw(rng)
        assert space.point_of(with_overrides(config, space.overrides(point))) == point


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("preset", presets())
def test_the_own_setting_is_a_point_of_every_space_that_ships(preset, name):
    config = config_of(preset)
    space = load_space(name, config)
    point = space.point_of(config)
    assert point is not None
    assert with_overrides(config, space.overrides(point)) == config


def test_mosaics_keep_their_size_and_alpha_stays_below_beta():
    config = config_of("wsss4luad")
    space, rng = load_space("synthesis", config), random.Random(2)
    sizes, pairs = set(), set()
    for _ in range(200):
        synthesis = with_overrides(config, space.overrides(space.draw(rng))).synthesis
        sizes.add((synthesis.n_h * synthesis.crop_height, synthesis.n_w * synthesis.crop_width))
        pairs.add((synthesis.alpha, synthesis.beta))
    assert sizes == {(224, 224)}
    assert all(alpha < beta for alpha, beta in pairs)
    assert len(pairs) > 20


def test_class_weights_are_drawn_only_where_the_sampling_is_by_weight():
    space, rng = load_space("synthesis", config_of("wsss4luad")), random.Random(3)
    seen = set()
    for _ in range(50):
        point = space.draw(rng)
        sampling = point["synthesis.class_sampling"]
        weights = space.overrides(point)["synthesis.class_sampling"]
        seen.add(sampling)
        assert isinstance(weights, dict) == (sampling == "weights")
        if sampling == "weights":
            assert set(weights) == {"tumor", "stroma", "normal"}
    assert seen == {"natural", "balanced", "weights"}


def test_a_users_space_may_name_any_key_with_ranges_scales_and_conditions(tmp_path):
    uri = space_file(
        tmp_path,
        {
            "precise.optimizer": {"values": ["adamw", "sgd"]},
            "precise.momentum": {"low": 0.5, "high": 0.99, "when": {"precise.optimizer": "sgd"}},
            "precise.lr": {"low": 1e-5, "high": 1e-2, "scale": "log"},
            "precise.batch_size": {"low": 4, "high": 8},
        },
    )
    space, rng = read_space(uri, config_of("wsss4luad")), random.Random(0)
    points = [space.draw(rng) for _ in range(300)]
    assert space.name == "mine"
    assert {point["precise.batch_size"] for point in points} == {4, 5, 6, 7, 8}
    assert all(("precise.momentum" in point) == (point["precise.optimizer"] == "sgd") for point in points)
    below = sum(point["precise.lr"] < 10**-3.5 for point in points) / len(points)
    assert 0.4 < below < 0.6  # the middle of a logarithmic range


def test_an_own_setting_between_whole_numbers_is_no_point_of_a_range_of_whole_numbers(tmp_path):
    uri = space_file(tmp_path, {"synthesis.rotate": {"low": 0, "high": 90}})
    for rotate, point in ((22.5, None), (22.0, {"synthesis.rotate": 22})):
        config = config_of("wsss4luad", f"synthesis.rotate={rotate}")
        assert read_space(uri, config).point_of(config) == point


def test_what_of_an_own_setting_lies_outside_of_a_space_is_said_and_the_rest_is_shown(tmp_path):
    crops = [{"synthesis.n_h": 7, "synthesis.crop_height": 32}, {"synthesis.n_h": 14, "synthesis.crop_height": 16}]
    parameters = {
        "crops": {"options": crops},
        "precise.lr": {"low": 1e-5, "high": 1e-2},
        "synthesis.rotate": {"low": 0, "high": 90},
        "synthesis.class_sampling.tumor": {"low": 0.5, "high": 2.0},
    }
    settings = ("synthesis.n_h=4", "synthesis.crop_height=56", "precise.lr=0.5", "synthesis.rotate=9")
    config = config_of("wsss4luad", *settings, "synthesis.class_sampling=natural")
    space = read_space(space_file(tmp_path, parameters), config)
    assert space.place_of(config) == (
        {"synthesis.rotate": 9},
        [
            "crops has no option with n_h=4, crop_height=56",
            "precise.lr can't be 0.5",
            "synthesis.class_sampling.tumor can't be nothing",
        ],
    )
    assert space.point_of(config) is None


def test_a_parameter_has_its_whole_range_where_the_one_that_it_must_exceed_does_not_count(tmp_path):
    parameters = {
        "synthesis.strategy": {"values": ["mosaic", "cutmix"]},
        "synthesis.alpha": {"low": 0.3, "high": 0.6, "when": {"synthesis.strategy": "mosaic"}},
        "synthesis.beta": {"low": 0.2, "high": 0.9, "above": "synthesis.alpha"},
    }
    space, rng = read_space(space_file(tmp_path, parameters), config_of("wsss4luad")), random.Random(0)
    points = [space.draw(rng) for _ in range(200)]
    betas = [point["synthesis.beta"] for point in points if point["synthesis.strategy"] == "cutmix"]
    assert min(betas) < 0.3
    assert all(point["synthesis.beta"] > point.get("synthesis.alpha", 0) for point in points)


def test_whole_numbers_exceed_those_that_they_must_exceed(tmp_path):
    parameters = {
        "preliminary.epochs": {"low": 2, "high": 5},
        "precise.epochs": {"low": 2, "high": 6, "above": "preliminary.epochs"},
    }
    space, rng = read_space(space_file(tmp_path, parameters), config_of("wsss4luad")), random.Random(0)
    for point in (*(space.draw(rng) for _ in range(200)), *space.grid(3)):
        assert point["preliminary.epochs"] < point["precise.epochs"] <= 6


@pytest.mark.parametrize(("low", "high"), [(0.9999, 0.99999), (100.0, 100.001), (-0.2, 0.3)])
def test_a_narrow_range_has_hundreds_of_values_and_none_outside(low, high):
    drawn = Parameter("precise.average_decay", low, high)
    rng = random.Random(0)
    values = {drawn.at(rng.random(), {}) for _ in range(3000)}
    assert len(values) > 500
    assert low <= min(values) < max(values) <= high
    assert max(len(repr(value)) for value in values) <= 10  # a person can type them


def test_a_condition_may_be_on_a_value_that_is_null_or_a_list(tmp_path):
    parameters = {
        "precise.weights": {"values": [None, "imagenet"]},
        "evaluation.scales": {"values": [[1.0], [1.0, 2.0]]},
        "precise.lr": {"low": 0.1, "high": 0.2, "when": {"precise.weights": None}},
        "precise.momentum": {"low": 0.1, "high": 0.2, "when": {"evaluation.scales": [[1.0]]}},
    }
    space, rng = read_space(space_file(tmp_path, parameters), config_of("wsss4luad")), random.Random(0)
    for point in (space.draw(rng) for _ in range(50)):
        values = space.overrides(point)
        assert ("precise.lr" in point) == (values["precise.weights"] is None)
        assert ("precise.momentum" in point) == (values["evaluation.scales"] == [1.0])


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"precise.lrr": {"low": 0.1, "high": 0.2}}, "is no key"),
        ({"precise.lr": {"low": 0.2, "high": 0.1}}, "low must be less than high"),
        ({"precise.lr": {"low": 0, "high": 0.1, "scale": "log"}}, "logarithmic"),
        ({"precise.lr": {"low": 0.1}}, "give low and high"),
        ({"precise.lr": {"low": 0.1, "high": 0.2, "when": {"precise.optimizer": "sgd"}}}, "come before"),
        (
            {
                "synthesis.alpha": {"low": 0.1, "high": 0.9},
                "synthesis.beta": {"low": 0.2, "high": 0.8, "above": "synthesis.alpha"},
            },
            "must exceed synthesis.alpha",
        ),
        (
            {
                "preliminary.epochs": {"low": 2, "high": 6},
                "precise.epochs": {"low": 2, "high": 6, "above": "preliminary.epochs"},
            },
            "must exceed preliminary.epochs, which may be 6",
        ),
        (
            {
                "precise.optimizer": {"values": ["adamw", "sgd"]},
                "precise.momentum": {"low": 0.5, "high": 0.9, "when": {"precise.optimizer": "SGD"}},
            },
            r"momentum: counts when precise\.optimizer is 'SGD', which it never is; did you mean sgd\?",
        ),
        (
            {
                "precise.weights": {"values": [None, "imagenet"]},
                "precise.lr": {"low": 0.1, "high": 0.2, "when": {"precise.weights": 7}},
            },
            r"is 7, which it never is; it may be None, imagenet",
        ),
        (
            {
                "precise.epochs": {"low": 2, "high": 6},
                "precise.lr": {"low": 0.1, "high": 0.2, "when": {"precise.epochs": [6, 7]}},
            },
            r"counts when precise\.epochs is 7, which it never is",
        ),
    ],
)
def test_a_space_that_makes_no_sense_is_refused_with_its_field(tmp_path, parameters, words):
    with pytest.raises(PistoSegError, match=words):
        read_space(space_file(tmp_path, parameters), config_of("wsss4luad"))


def test_all_that_is_wrong_with_a_space_is_listed_at_once(tmp_path):
    parameters = {
        "synthesis.alfa": {"low": 0.1, "high": 0.4},
        "precise.lr": {"low": 1, "high": 0.1},
        "precise.optimizer": {"values": ["sgd"]},
        "precise.epochs": 3,
        "precise.loss": {"value": ["bce", "dice"], "low": 1, "high": 2},
        "both": {"options": [{"refiner.lambda": 1}, {"precise.loss": "bce"}]},
    }
    with pytest.raises(PistoSegError) as caught:
        read_space(space_file(tmp_path, parameters), config_of("wsss4luad"))
    title, *lines = caught.value.reason.splitlines()
    assert title == "6 problem(s) in the space:"
    assert lines == [
        "  synthesis.alfa: is no key of the config; did you mean synthesis.alpha?",
        "  refiner.lambda: is no key of the config; did you mean refiner.lambda_cls?",
        "  precise.lr: low must be less than high",
        "  precise.optimizer: there is nothing to choose between",
        "  precise.epochs: must be a mapping with low and high, or values, or options",
        "  precise.loss.value: unknown key; did you mean values?",
    ]
    assert "config show" in caught.value.remedy


def test_a_wrong_key_of_the_file_itself_is_compared_with_the_files_keys(tmp_path):
    file = tmp_path / "space.yaml"
    file.write_text("paramters: {}\noption: 3\n")
    with pytest.raises(PistoSegError, match=r"paramters: unknown key; did you mean parameters\?") as caught:
        read_space(str(file), config_of("wsss4luad"))
    assert "options?" not in caught.value.reason


def test_parameters_in_a_wrong_order_are_listed_at_once(tmp_path):
    later = {"low": 0.5, "high": 0.9, "when": {"precise.optimizer": "sgd"}}
    parameters = {"precise.momentum": later, "synthesis.beta": {"low": 0.2, "high": 0.8, "above": "synthesis.alpha"}}
    with pytest.raises(PistoSegError, match=r"names precise\.optimizer, which(.|\n)*names synthesis\.alpha, which"):
        read_space(space_file(tmp_path, parameters), config_of("wsss4luad"))


def test_an_unknown_space_is_answered_with_those_that_there_are():
    with pytest.raises(PistoSegError, match=r"no space 'synthesi'.*use one of: synthesis, losses, optim; or a"):
        load_space("synthesi", config_of("wsss4luad"))


def test_points_that_the_config_refuses_stop_a_search_before_it_starts(tmp_path):
    config = config_of("wsss4luad", "data.uri=nowhere")
    space = read_space(space_file(tmp_path, {"precise.lr": {"low": 0.5, "high": 3.0}}), config)
    with pytest.raises(PistoSegError, match="config refuses"):
        analyse(space, config, MASKS)


@pytest.mark.parametrize("ways", [None, ["natural", "balanced"]])
def test_a_class_weight_beside_a_sampling_without_weights_is_refused_by_name(tmp_path, ways):
    config = config_of("wsss4luad", "synthesis.class_sampling=natural")
    parameters = {"synthesis.class_sampling": {"values": ways}} if ways else {}
    parameters["synthesis.class_sampling.tumor"] = {"low": 0.5, "high": 2.0}
    space = read_space(space_file(tmp_path, parameters), config)
    with pytest.raises(PistoSegError, match=r"class_sampling\.tumor.*class_sampling is '(natural|balanced)'"):
        analyse(space, config, MASKS)


def test_a_class_whose_name_has_dots_gets_its_weight():
    names = [{"name": name, "color": [number, 0, 0]} for number, name in enumerate(("T.1", "stroma"), 1)]
    config = config_of("wsss4luad", f"classes.classes={names}", "synthesis.class_sampling={T.1: 1, stroma: 1}")
    changed = with_overrides(config, {"synthesis.class_sampling.T.1": 2.5})
    assert changed.synthesis.class_sampling == {"T.1": 2.5, "stroma": 1}


def test_what_trials_share_and_what_changes_nothing_is_found_by_fingerprints():
    config = config_of("wsss4luad", "precise.masks=refined_cnn")
    space, sharing = analyse(load_space("losses", config), config, MASKS)
    assert len(space.parameters) == 4
    assert set(sharing.varied) == {"refiner", "refined_masks", "precise", "evaluation"}
    assert {"patches", "preliminary", "pseudo_masks", "classifier", "cams"} <= set(sharing.shared)
    assert sharing.compared == ("precise",)
    assert sharing.epochs(config) == config.precise.epochs

    config = config_of("wsss4luad", "precise.masks=pseudo")
    space, sharing = analyse(load_space("losses", config), config, MASKS)
    assert [item.name for item in space.parameters] == ["precise.loss"]
    assert sum("does not change the model" in note for note in space.notes) == 3
    assert set(sharing.varied) == {"precise", "evaluation"}


def test_a_space_is_analysed_without_a_look_at_the_data(tmp_path):
    where = [f"data.uri={tmp_path}/none", f"data.validation={tmp_path}/none", "data.label_holdout=0.2"]
    config = config_of("wsss4luad", "precise.masks=pseudo", *where)
    _, sharing = analyse(load_space("losses", config), config, Objective("labels", masks=False, labels=True))
    assert sharing.varied == ("precise", "label_scores")
    space = read_space(space_file(tmp_path, {"data.label_holdout": {"values": [0, 0.2]}}), config)
    _, sharing = analyse(space, config, MASKS)
    assert {"patches", "preliminary", "precise"} <= set(sharing.varied)


@pytest.mark.parametrize("kind", ["labels", "miou"])
def test_a_space_does_not_vary_what_a_search_by_labels_beside_masks_settles(tmp_path, kind):
    config = config_of("wsss4luad", "precise.masks=pseudo", "data.label_holdout=0.2")
    schedules = [{"preliminary.keep": keep, "preliminary.epochs": count} for keep, count in (("best", 9), ("last", 6))]
    parameters = {
        "precise.keep": {"values": ["best", "last"]},
        "precise.lr_decay": {"low": 0.5, "high": 0.9, "when": {"precise.keep": "last"}},
        "schedule": {"options": schedules},
        "precise.loss": {"values": ["bce", "dice"]},
    }
    space = read_space(space_file(tmp_path, parameters), config)
    space, _ = analyse(space, config, Objective(kind, masks=True, labels=True))
    kept = [item.name for item in space.parameters]
    assert kept == (["precise.loss"] if kind == "labels" else list(parameters))
    if kind == "labels":
        assert [note.partition(" is left out: ")[0] for note in space.notes] == list(parameters)[:3]
        why = "trainings keep their last epoch: the best one would be chosen by the masks"
        assert space.notes[0] == f"precise.keep is left out: {why}"
        assert space.notes[2] == f"schedule is left out: {why}; lost with it: preliminary.epochs"


def test_mosaics_are_compared_by_both_segmentation_models():
    config = config_of("wsss4luad", "precise.masks=pseudo")
    _, sharing = analyse(load_space("synthesis", config), config, MASKS)
    assert sharing.shared == ("patches", "validation")
    assert sharing.compared == ("preliminary", "precise")


def test_a_space_of_which_nothing_matters_is_refused(tmp_path):
    config = config_of("wsss4luad", "precise.masks=synthesized")
    space = read_space(space_file(tmp_path, {"refiner.lambda_cls": {"low": 0.1, "high": 1.0}}), config)
    with pytest.raises(PistoSegError, match="none of its parameters changes the model"):
        analyse(space, config, MASKS)


@pytest.mark.parametrize("seed", range(8))
def test_a_parameter_above_one_that_changes_nothing_keeps_its_whole_range_and_makes_no_other_pass_for_live(
    tmp_path, seed
):
    config = config_of("wsss4luad", "precise.masks=synthesized")
    parameters = {
        "refiner.lr": {"low": 0.001, "high": 0.005},
        "precise.lr": {"low": 0.001, "high": 0.01, "above": "refiner.lr"},
        "preliminary.lr": {"low": 0.001, "high": 0.02, "above": "precise.lr"},
    }
    space, sharing = analyse(read_space(space_file(tmp_path, parameters), config), config, MASKS, seed)
    assert [item.name for item in space.parameters] == ["precise.lr"]
    assert space.parameters[0].levels(2, {}) == [0.001, 0.01]
    assert "precise.lr has its whole range: refiner.lr, which it was to exceed, is left out" in space.notes
    assert sharing.varied == ("precise", "evaluation")


def test_a_parameter_that_another_barely_exceeds_is_no_dead_one(tmp_path):
    config = config_of("wsss4luad", "precise.masks=pseudo")
    parameters = {
        "preliminary.lr": {"low": 0.001, "high": 0.0099},
        "precise.lr": {"low": 0.001, "high": 0.0101, "above": "preliminary.lr"},
    }
    space = read_space(space_file(tmp_path, parameters), config)
    assert all(len(analyse(space, config, MASKS, seed)[0].parameters) == 2 for seed in range(8))


RARE = {
    "precise.architecture": {"values": ["unetplusplus", "unet", "fpn", "deeplabv3plus", "manet", "linknet", "pan"]},
    "precise.optimizer": {"values": ["adamw", "sgd"], "when": {"precise.architecture": ["fpn", "pan"]}},
    "precise.momentum": {"low": 0.5, "high": 0.9, "when": {"precise.optimizer": "sgd"}},
    "refiner.lambda_cls": {"low": 0.1, "high": 1.0, "when": {"precise.optimizer": "sgd"}},
    "precise.lr": {"low": 1e-4, "high": 1e-2, "when": {"precise.architecture": "unet", "precise.optimizer": "sgd"}},
}


@pytest.mark.parametrize("seed", range(8))
def test_a_parameter_that_rarely_counts_is_judged_where_it_counts(tmp_path, seed):
    config = config_of("wsss4luad", "precise.masks=synthesized")
    space = read_space(space_file(tmp_path, RARE), config)
    assert space.conditions("precise.momentum") == {
        "precise.optimizer": ("sgd",),
        "precise.architecture": ("fpn", "pan"),
    }
    assert space.conditions("precise.lr")["precise.architecture"] == ()
    found, _ = analyse(space, config, MASKS, seed)
    # The refining network is not used, and no optimizer is asked for with a UNet: these two never change the model.
    assert {item.name for item in space.parameters} - {item.name for item in found.parameters} == {
        "refiner.lambda_cls",
        "precise.lr",
    }


@pytest.mark.parametrize("seed", range(8))
def test_a_stage_that_one_of_many_options_varies_is_none_that_all_trials_share(tmp_path, seed):
    config = config_of("wsss4luad", "precise.masks=pseudo")
    usual = [{"precise.lr": 0.001 * step} for step in range(1, 40)]
    options = [*usual, {"precise.lr": 0.05, "preliminary.epochs": 3}]
    space = read_space(space_file(tmp_path, {"trained": {"options": options}}), config)
    _, sharing = analyse(space, config, MASKS, seed)
    assert {"preliminary", "pseudo_masks"} <= set(sharing.varied)
    assert sharing.compared == ("preliminary", "precise")


def test_a_grid_has_every_combination_once_and_no_inactive_value(tmp_path):
    uri = space_file(
        tmp_path,
        {
            "precise.optimizer": {"values": ["adamw", "sgd"]},
            "precise.momentum": {"low": 0.5, "high": 0.9, "when": {"precise.optimizer": "sgd"}},
            "precise.lr": {"low": 0.001, "high": 0.1, "scale": "log"},
        },
    )
    space = read_space(uri, config_of("wsss4luad"))
    points = grid_points(space, 3, None, seed=0)
    assert len(points) == len({str(sorted(point.items())) for point in points}) == 3 + 3 * 3
    assert {point["precise.lr"] for point in points} == {0.001, 0.01, 0.1}
    assert len(grid_points(space, 3, 5, seed=0)) == 5


def test_a_space_without_a_parameter_loses_those_that_count_only_beside_it_and_says_so():
    space = load_space("synthesis", config_of("wsss4luad"))
    left = space.without({"synthesis.class_sampling": "a reason", "synthesis.alpha": "another"})
    assert isinstance(left, Space)
    kept = {item.name: item for item in left.parameters}
    assert not any(name.startswith("synthesis.class_sampling") for name in kept)
    assert "synthesis.class_sampling is left out: a reason" in left.notes
    assert "synthesis.class_sampling.tumor is left out: it counts only beside synthesis.class_sampling" in left.notes
    assert kept["synthesis.beta"].above is None
    left = space.without({"synthesis.strategy": "a reason"})
    assert not {"synthesis.alpha", "synthesis.beta"} & {item.name for item in left.parameters}
