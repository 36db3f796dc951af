import json
import random
import shutil
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import ray
import yaml
from patch_files import put
from scipy.stats import ttest_rel

from pistoseg import claims, storage
from pistoseg.cli import main
from pistoseg.config import TrackingConfig, load_config
from pistoseg.errors import PistoSegError, UnavailableError
from pistoseg.metrics import label_agreement
from pistoseg.search import sampling
from pistoseg.search.builtin import load_space
from pistoseg.search.confirmation import Confirmation, paired_interval, rank_correlation
from pistoseg.search.findings import best_yaml, pareto, report, trials_csv
from pistoseg.search.journal import Journal, TrialRecord
from pistoseg.search.objective import Objective
from pistoseg.search.sharing import analyse
from pistoseg.search.spaces import Parameter, Space
from pistoseg.search.trial import Workers, explain
from pistoseg.tracking import StageRun

IDENTITY = {"identity": {"space": 1}, "spent_s": 0.0}


@pytest.fixture
def config():
    return load_config("demo", overrides=("precise.masks=synthesized", "precise.epochs=9"))


@pytest.fixture
def space(config):
    return load_space("synthesis", config)


def filled(folder, space, values, states=(), identity=IDENTITY["identity"]):
    """A journal with a finished trial per value, the first at no overrides; `states` replaces the last ones'."""
    journal, rng = Journal.open(str(folder), IDENTITY | {"identity": identity, "run_id": None}), random.Random(0)
    for number, value in enumerate(values):
        point = space.draw(rng)
        record = journal.start(point, space.overrides(point) if number else {})
        record.state, record.value, record.seconds = "finished", value, 10.0 * (number + 1)
        record.scores, record.curve = {"miou": value}, [(1, value / 2), (3, value)]
        record.artifacts, record.computed = {"patches": "p", "precise": str(number)}, ["precise"]
        journal.save(record)
    for record, state in zip(list(journal.records.values())[-len(states) :] if states else [], states, strict=True):
        record.state, record.value = state, None
        journal.save(record)
    return journal


def test_a_journal_is_read_back_as_it_was_written(tmp_path, space):
    journal = filled(tmp_path, space, [0.1, 0.4, 0.3, 0.2], ["pruned", "running"])
    again = Journal.open(str(tmp_path), IDENTITY)
    assert again.records == journal.records
    assert [record.number for record in again.ended()] == [0, 1, 2]
    assert [record.number for record in again.cut_off()] == [3]
    assert again.best().number == 1
    assert again.start({}, {}).number == 4


def test_a_journal_of_another_search_is_refused(tmp_path, space):
    filled(tmp_path, space, [0.1])
    with pytest.raises(PistoSegError, match="other settings"):
        Journal.open(str(tmp_path), {"identity": {"space": 2}})


@pytest.mark.parametrize(
    "content", [b"{", b"", b"[]", b"null", b"\xff\xfe\x00", b'{"number": 0}', b'{"number": 0, "news": 1}']
)
def test_a_damaged_journal_names_the_file(tmp_path, space, content):
    filled(tmp_path, space, [0.1])
    storage.write_bytes(str(tmp_path / "trials" / "00000.json"), content)
    with pytest.raises(PistoSegError, match=r"00000\.json: is damaged: .* delete that file and run again"):
        Journal.open(str(tmp_path), IDENTITY)


@pytest.mark.parametrize(("name", "number"), [("00001", "1"), ("00001", 1.0), ("00001", 0), ("00001 (1)", 1)])
def test_a_trial_whose_number_is_not_its_files_takes_no_others_place(tmp_path, space, name, number):
    filled(tmp_path, space, [0.1, 0.2])
    trials = tmp_path / "trials"
    (trials / f"{name}.json").write_text(
        json.dumps(json.loads((trials / "00001.json").read_text()) | {"number": number})
    )
    with pytest.raises(PistoSegError, match=r"00001.*\.json: is damaged: .* delete that file and run again"):
        Journal.open(str(tmp_path), IDENTITY)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe\x00"])
def test_a_damaged_search_is_no_reason_to_delete_what_says_which_search_its_trials_are_of(tmp_path, space, content):
    filled(tmp_path, space, [0.1])
    storage.write_bytes(str(tmp_path / "search.json"), content)
    with pytest.raises(PistoSegError, match=r"search\.json: is damaged: .* give another --name, or delete the folder"):
        Journal.open(str(tmp_path), IDENTITY)


def test_trials_of_a_search_whose_settings_are_gone_are_neither_taken_nor_overwritten(tmp_path, space):
    filled(tmp_path, space, [0.1, 0.4])
    (tmp_path / "search.json").unlink()
    with pytest.raises(PistoSegError, match=r"holds trials of a search whose search\.json is gone.*another --name"):
        Journal.open(str(tmp_path), IDENTITY)
    assert not (tmp_path / "search.json").exists()


def test_a_storage_that_is_away_is_no_damage(tmp_path, space, monkeypatch):
    filled(tmp_path, space, [0.1])

    def read_bytes(uri):
        raise UnavailableError("is away", file=uri)

    monkeypatch.setattr(storage, "read_bytes", read_bytes)
    with pytest.raises(UnavailableError):
        Journal.open(str(tmp_path), IDENTITY)


def test_a_trial_whose_damaged_file_was_deleted_is_run_anew_also_the_own_setting(tmp_path, config, space):
    filled(tmp_path, space, [0.1, 0.4, 0.3])
    for number in (0, 1):
        (tmp_path / "trials" / f"0000{number}.json").unlink()
    journal = Journal.open(str(tmp_path), IDENTITY)
    searcher = sampling.PointSearcher(space, journal, "random", 0, 3, space.point_of(config))
    found = [run_trial(searcher, f"t{number}", 0.2) for number in range(3)]
    assert found[0] == {"number": 0, "overrides": "{}"}
    assert (found[1]["number"], found[2]) == (1, searcher.FINISHED)


def test_files_that_are_no_trials_do_not_stop_a_search_from_going_on(tmp_path, space):
    journal = filled(tmp_path, space, [0.1, 0.2])
    for name in (".0123456789abcdef.part", ".DS_Store", "._00001.json", "notes.txt"):
        storage.write_bytes(str(tmp_path / "trials" / name), b"\x00\xff{")
    assert Journal.open(str(tmp_path), IDENTITY).records == journal.records


def test_an_epoch_that_is_reported_twice_counts_once():
    record = TrialRecord(0, {}, {})
    for epoch, value in ((1, 0.1), (3, 0.3), (1, 0.9), (2, 0.2)):
        record.report(epoch, value)
    assert record.curve == [(1, 0.1), (2, 0.2), (3, 0.3)]


def test_the_interval_of_the_difference_is_that_of_the_paired_t_test():
    best, own = [0.61, 0.64, 0.60, 0.66], [0.58, 0.60, 0.59, 0.60]
    expected = ttest_rel(best, own).confidence_interval(0.95)
    found = paired_interval([one - two for one, two in zip(best, own, strict=True)])
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize(
    ("best", "own", "holds"),
    [
        ((0.60, 0.61, 0.62), (0.50, 0.51, 0.52), True),
        ((0.60, 0.40, 0.62), (0.50, 0.51, 0.52), False),  # lucky on two seeds
        ((0.60,), (0.50,), False),  # one seed proves nothing
        ((0.60, None, 0.62), (0.50, 0.51, None), False),  # one pair is left
        ((0.50, 0.51, 0.52), (0.60, 0.61, 0.62), False),
    ],
)
def test_a_gain_holds_only_if_the_whole_interval_is_above_zero(best, own, holds):
    assert Confirmation(tuple(range(len(best))), best, own).holds is holds


def test_rank_correlation_is_spearmans_and_unknown_for_constants():
    assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 25]) == pytest.approx(0.8)
    assert rank_correlation([1, 1, 1], [1, 2, 3]) is None
    assert rank_correlation([1, 2], [1, 2]) is None


def test_agreement_with_labels_is_the_iou_where_windows_have_one_tissue():
    labels = np.array([[1, 0], [1, 0], [0, 1]])
    areas = np.array([[0.8, 0.2], [1.0, 0.0], [0.5, 0.5]])
    # class 0: 1.8 of 2 windows hit, 0.5 elsewhere; class 1: 0.5 of 1 hit, 0.2 elsewhere
    assert label_agreement(labels, areas) == pytest.approx([1.8 / 2.5, 0.5 / 1.2])


def test_agreement_with_labels_asks_nothing_of_how_tissues_share_a_window():
    mixed, single = [1, 1, 0], [0, 0, 1]
    even = label_agreement([mixed, single], [[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    uneven = label_agreement([mixed, single], [[0.9, 0.1, 0.0], [0.0, 0.0, 1.0]])
    assert even == pytest.approx([1, 1, 1])
    assert uneven == pytest.approx([1, 1, 1])
    assert np.isnan(label_agreement([[1, 0]], [[1.0, 0.0]])[1])


def test_a_class_that_is_named_beside_others_only_and_never_found_agrees_with_no_label():
    labels = [[1, 1], [1, 0], [1, 1]]
    assert label_agreement(labels, [[1.0, 0.0]] * 3).tolist() == [1, 0]


def test_the_places_of_a_trials_workers_are_freed_with_it_and_no_others(monkeypatch):
    freed = []
    monkeypatch.setattr("pistoseg.search.trial.remove_placement_group", freed.append)
    workers = Workers()
    for owner, group in (("1", "a"), ("2", "b"), ("1", "c")):
        workers.hold(owner, group)
    workers.release("1")
    workers.release("1")
    assert freed == ["a", "c"]


@pytest.mark.parametrize(
    ("overrides", "ends", "said"),
    [
        ({}, True, "8 training workers need"),
        ({"precise.lr": 0.1}, True, "8 training workers need"),
        ({"compute.train_workers": 4}, True, "4 training workers need"),
        ({"compute.train_workers": 8}, True, "8 training workers need"),
        ({"compute.train_workers": 9}, False, "9 training workers need"),
        ({"compute.device": "cuda"}, False, "cuda needs a GPU"),
    ],
)
def test_what_the_cluster_cannot_give_ends_a_search_unless_the_trials_own_setting_asks_for_it(
    config, tmp_path, monkeypatch, overrides, ends, said
):
    from pistoseg.search import trial
    from pistoseg.stages import placement

    nodes = [{"Alive": True, "Resources": {"CPU": 2.0}}]  # a node was preempted
    monkeypatch.setattr(trial.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(trial.ray, "nodes", lambda: nodes)
    monkeypatch.setattr(trial.ray, "cluster_resources", lambda: {"CPU": 2.0})
    reports = []
    monkeypatch.setattr(trial.tune, "report", reports.append)

    def run_pipeline(config, *arguments, **options):
        placement.check(config, ("precise",), print)

    monkeypatch.setattr(trial, "run_pipeline", run_pipeline)
    own = config.model_copy(update={"compute": config.compute.model_copy(update={"train_workers": 8})})
    objective = Objective("miou", masks=True, labels=False)
    job = trial.TrialJob(own, str(tmp_path), objective, (), frozenset(), None, 1, {})
    trial.run_trial({"number": 1, "overrides": json.dumps(overrides)}, job)
    (report,) = reports
    assert list(report) == [trial.UNAVAILABLE if ends else "problem"]
    assert said in next(iter(report.values()))


@pytest.mark.parametrize("overrides", [{}, {"classifier.weights": "imagenet"}])
def test_a_trial_on_a_node_that_joined_later_and_does_not_see_the_data_ends_the_search(
    config, tmp_path, monkeypatch, overrides
):
    from pistoseg.search import trial

    reports = []
    monkeypatch.setattr(trial.tune, "report", reports.append)
    objective = Objective("miou", masks=True, labels=False)
    places = {"classifier.weights": str(tmp_path / "x.pth")}
    job = trial.TrialJob(config, str(tmp_path), objective, (), frozenset(), None, 1, places)
    trial.run_trial({"number": 1, "overrides": json.dumps(overrides)}, job)
    assert "does not see it" in reports[0][trial.UNAVAILABLE]


def test_files_that_only_the_space_names_are_asked_of_all_nodes_too(config):
    from pistoseg.search import study

    key = "precise.weights"
    options = {name: {key: name} for name in ("imagenet", "/nets/a.pth", "s3://bucket/b.pth")}
    space = Space("own", (Parameter("precise.lr", 0.1, 0.2), Parameter(key, options=options)))
    own = config.model_copy(update={"data": config.data.model_copy(update={"uri": "/images"})})
    search = study.Search("mine", own, space, None, Objective("miou", True, False), "tpe", False, None)
    assert study._places(search) == {
        "data.uri": "/images",
        "precise.weights=/nets/a.pth": "/nets/a.pth",
        "precise.weights=s3://bucket/b.pth": "s3://bucket/b.pth",
    }


def test_failures_are_explained_in_a_line():
    assert explain(PistoSegError("the loss is nan", file="x", remedy="a smaller lr")).startswith("x: the loss is nan")
    assert explain(RuntimeError("CUDA out of memory. Tried\nmore")) == "out of memory: more"
    assert explain(ValueError("odd")) == "ValueError: odd"


def test_no_password_is_in_the_reason_of_a_failure_or_in_a_tag():
    url = "https://me:hunter2@host/weights.pth"
    for error in (OSError(f"{url} is away"), RuntimeError(f"out of memory\n{'-' * 490} {url}")):
        assert "hunter2" not in explain(error)
    tags = []
    client = SimpleNamespace(set_tag=lambda *values: tags.append(values))
    StageRun(client, "run").tags({"pistoseg.reason": f"{url} is away"})
    assert tags == [("run", "pistoseg.reason", "https://***@host/weights.pth is away")]


def outcome_of(journal, config, space, confirmation=None, timed=False):
    objective = Objective("miou", masks=True, labels=False)
    space, sharing = analyse(space, config, objective)
    search = SimpleNamespace(name="mine", config=config, space=space, sharing=sharing, objective=objective, timed=timed)
    return SimpleNamespace(search=search, journal=journal, confirmation=confirmation, version=None, shared={})


def test_the_best_config_is_one_that_train_takes(tmp_path, config, space):
    journal = filled(tmp_path, space, [0.1, 0.4, 0.3])
    config = load_config("demo", overrides=["precise.masks=synthesized", "data.uri=/secret", "tracking.uri=http://me"])
    text = best_yaml(outcome_of(journal, config, space), journal.best())
    storage.write_bytes(str(tmp_path / "best.yaml"), text.encode())
    read = load_config(file=str(tmp_path / "best.yaml"))
    assert space.point_of(read) == journal.best().point
    assert read.precise == config.precise
    assert (read.data.uri, read.tracking.uri) == (None, None)
    assert yaml.safe_load(text)["synthesis"]["rotate"] == journal.best().point["synthesis.rotate"]


def test_no_password_is_written_with_a_search(tmp_path, config, space):
    from pistoseg.search.study import Search

    signed = "https://host/b0.pth?X-Amz-Signature"
    overrides = ["data.uri=s3://me:hunter2@b/d", "data.validation=s3://me:hunter2@b/v"]
    secret = load_config(
        "demo", overrides=["precise.masks=synthesized", f"precise.weights={signed}=hunter2", *overrides]
    )
    outcome = outcome_of(filled(tmp_path, space, [0.1, 0.4]), secret, space)
    text = best_yaml(outcome, outcome.journal.best())
    assert "hunter2" not in text
    assert "--data DATA --set data.validation=DIR" in text
    storage.write_bytes(str(tmp_path / "best.yaml"), text.encode())
    read = load_config(file=str(tmp_path / "best.yaml"))
    assert (read.data.uri, read.data.validation, read.precise.weights) == (None, None, f"{signed}=***")

    def identity(config):
        return Search("mine", config, space, None, outcome.search.objective, "tpe", False, None).identity()

    assert "hunter2" not in json.dumps(identity(secret))
    assert identity(config)["config"] == config.model_dump(mode="json", exclude={"compute", "tracking"})


def test_trials_and_report_say_what_became_of_each(tmp_path, config, space):
    journal = filled(tmp_path, space, [0.1, 0.4, 0.3, 0.2], ["pruned", "failed"])
    journal.records[3].reason = "the loss is nan"
    confirmation = Confirmation((1, 2, 3), (0.4, 0.41, 0.42), (0.1, 0.12, 0.1))
    outcome = outcome_of(journal, config, space, confirmation)
    lines = trials_csv(outcome).splitlines()
    assert [line.split(",")[:2] for line in lines[1:]] == [
        ["0", "finished"],
        ["1", "finished"],
        ["2", "pruned"],
        ["3", "failed"],
    ]
    text = report(outcome, ["history.png"])
    assert "4 trials: 2 finished, 1 stopped early, 1 failed." in text
    assert "Best: trial 1, 0.4000" in text
    assert "It holds" in text
    assert "failed: the loss is nan" in text
    assert "| patches | 1 | 4 |" in text
    assert "| precise | 4 | 4 |" in text
    assert "![history](history.png)" in text


def test_a_report_says_that_the_champion_was_not_set_where_mlflow_is_away_but_not_where_it_is_off(
    tmp_path, config, space
):
    journal = filled(tmp_path, space, [0.1, 0.4])
    confirmation = Confirmation((1, 2, 3), (0.4, 0.41, 0.42), (0.1, 0.12, 0.1))
    outcome = outcome_of(journal, config, space, confirmation)
    text = "It holds, but MLflow could not make the model the champion (the output says why): run the same command"
    assert f"{text} again when it can." in report(outcome, [])
    outcome.search.config = config.model_copy(update={"tracking": TrackingConfig(enabled=False)})
    assert "champion" not in report(outcome, [])


def test_the_front_holds_what_nothing_beats_in_score_and_time():
    rows = [(0.5, 30.0), (0.4, 10.0), (0.45, 40.0), (0.4, 20.0), (0.6, 90.0)]
    records = [TrialRecord(number, {}, {}, "finished", value, seconds) for number, (value, seconds) in enumerate(rows)]
    assert [record.number for record in pareto(records)] == [1, 0, 4]


def test_labels_of_pictures_lie_apart_and_number_whole_trials(tmp_path, config, monkeypatch):
    from pistoseg.search import pictures

    figures = []
    monkeypatch.setattr("matplotlib.pyplot.close", figures.append)
    kinds = (("precise.lr", 3e-4, 9e-3), ("precise.weight_decay", 1e-3, 4e-3), ("precise.lr_decay", 1e-3, 0.9))
    space = Space("own", tuple(Parameter(name, low, high, log=True) for name, low, high in kinds))
    pictures.draw(outcome_of(filled(tmp_path, space, [0.2, 0.3, 0.4]), config, space))
    history, *_, slices = (figure for figure in figures if figure.axes[-1].get_ylabel() in ("Trial", "validation mIoU"))
    *panes, colours = slices.axes
    assert len(panes) == len(kinds)
    for axis in [pane.xaxis for pane in panes]:
        drawn = [label for label in axis.get_ticklabels(which="both") if label.get_text()]
        ends = sorted((box.x0, box.x1) for box in (label.get_window_extent() for label in drawn))
        assert all(end < begin for (_, end), (begin, _) in pairwise(ends))
    for axis in (history.axes[0].xaxis, colours.yaxis):
        assert all(float(value).is_integer() for value in axis.get_majorticklocs())


def run_trial(searcher, name, value=None, epochs=1, **result):
    """Let a searcher's next trial finish with a value, or be stopped without one."""
    found = searcher.suggest(name)
    if found == searcher.FINISHED:
        return found
    record = searcher.journal.records[found["number"]]
    if value is not None:
        searcher.on_trial_result(name, {"objective": value, "epoch": epochs})
        record.state, record.value = "finished", value
        result = {"objective": value, "finished": True, "seconds": 1.0, **result}
    else:
        record.state = "pruned"
    searcher.journal.save(record)
    searcher.on_trial_complete(name, result)
    return found


@pytest.mark.parametrize("algorithm", ["tpe", "random", "grid"])
def test_a_search_begins_with_the_own_setting_repeats_none_and_ends_by_itself(tmp_path, config, space, algorithm):
    journal = Journal.open(str(tmp_path), IDENTITY)
    searcher = sampling.PointSearcher(space, journal, algorithm, 0, 12, space.point_of(config))
    found = [run_trial(searcher, f"t{number}", 0.1 * number) for number in range(13)]
    assert found[0] == {"number": 0, "overrides": "{}"}
    assert found[-1] == searcher.FINISHED
    settings = {json.dumps(space.overrides(record.point), sort_keys=True) for record in journal.records.values()}
    assert len(settings) == len(journal.records) == 12


@pytest.mark.parametrize("algorithm", ["tpe", "random", "grid"])
def test_a_search_goes_on_with_what_was_cut_off_and_repeats_nothing_that_ended(tmp_path, config, space, algorithm):
    journal = Journal.open(str(tmp_path), IDENTITY)
    first = sampling.PointSearcher(space, journal, algorithm, 0, 8, space.point_of(config))
    for number in range(4):
        run_trial(first, f"a{number}", 0.1)
    cut = first.suggest("a4")
    journal = Journal.open(str(tmp_path), IDENTITY)
    second = sampling.PointSearcher(space, journal, algorithm, 0, 8, space.point_of(config))
    found = [run_trial(second, f"b{number}", 0.2) for number in range(5)]
    assert found[0] == cut
    assert [item["number"] for item in found[:4]] == [4, 5, 6, 7]
    assert found[4] == second.FINISHED
    assert len({record.key for record in journal.records.values()}) == 8


def test_a_grid_goes_on_however_many_of_its_points_are_known(tmp_path, config, space):
    journal = Journal.open(str(tmp_path), IDENTITY)
    trials = 2 * sampling.TRIES
    first = sampling.PointSearcher(space, journal, "grid", 0, trials, space.point_of(config))
    for number in range(trials - 10):
        record, _ = first._next()
        record.state, record.value = "finished", 0.001 * number
    second = sampling.PointSearcher(space, journal, "grid", 0, trials, space.point_of(config))
    found = [run_trial(second, f"b{number}", 0.2) for number in range(11)]
    assert [item["number"] for item in found[:10]] == list(range(trials - 10, trials))
    assert found[10] == second.FINISHED


@pytest.mark.parametrize("algorithm", ["tpe", "random"])
def test_a_space_of_options_is_searched_to_its_last_point_and_then_said_to_be_used_up(tmp_path, algorithm):
    sizes = {"synthesis.n_h": 4, "synthesis.n_w": 3, "precise.epochs": 3}
    parameters = [Parameter(name, options={size: {name: size} for size in range(n)}) for name, n in sizes.items()]
    space, said = Space("options", tuple(parameters)), []
    journal = Journal.open(str(tmp_path), IDENTITY)
    own = dict.fromkeys(sizes, 0)
    searcher = sampling.PointSearcher(space, journal, algorithm, 0, 30, own, say=said.append)
    while (found := searcher.suggest(name := f"t{len(journal.records)}")) != searcher.FINISHED:
        record = journal.records[found["number"]]
        record.state, record.value = "finished", 1 / (1 + sum(record.point.values()))  # the sampler settles on zeros
        searcher.on_trial_complete(name, {"objective": record.value, "finished": True, "seconds": 1.0})
    assert len(journal.records) == 30
    assert said == []
    searcher = sampling.PointSearcher(space, journal, algorithm, 0, None, own, say=said.append)
    while searcher.suggest(f"t{len(journal.records)}") != searcher.FINISHED:
        pass
    assert len({searcher._settings(record) for record in journal.records.values()}) == len(journal.records) == 36
    assert len(said) == 1
    assert "the space is used up" in said[0]


def test_tpe_knows_the_trials_of_earlier_runs(tmp_path, config, space):
    journal = filled(tmp_path, space, [0.1, 0.4, 0.3, 0.2, 0.2], ["pruned", "failed"])
    searcher = sampling.PointSearcher(space, journal, "tpe", 0, None, space.point_of(config))
    states = [trial.state.name for trial in searcher._study.trials]
    assert states == ["COMPLETE", "COMPLETE", "COMPLETE", "PRUNED", "FAIL"]
    assert searcher._study.best_value == 0.4
    assert searcher._study.best_params == sampling.encode(space, journal.best().point)


def test_optuna_is_given_a_point_and_draws_that_same_point(config, space):
    import optuna

    rng = random.Random(5)
    for _ in range(30):
        point = space.draw(rng)
        study = optuna.create_study()
        study.enqueue_trial(sampling.encode(space, point))
        drawn = sampling.suggest(space, study.ask())
        assert drawn.keys() == point.keys()
        for name, value in point.items():
            assert drawn[name] == (pytest.approx(value, rel=1e-3) if isinstance(value, float) else value)


def test_a_stopped_trial_is_pruned_for_optuna_and_time_is_a_second_value(tmp_path, config, space):
    journal = Journal.open(str(tmp_path), IDENTITY)
    searcher = sampling.PointSearcher(space, journal, "tpe", 0, None, space.point_of(config), timed=True)
    run_trial(searcher, "a", 0.3)
    run_trial(searcher, "b")
    run_trial(searcher, "c", problem="nan")
    trials = searcher._study.trials
    assert [trial.state.name for trial in trials] == ["COMPLETE", "PRUNED", "FAIL"]
    assert trials[0].values == [0.3, 1.0]


def trial_of(number):
    return SimpleNamespace(trial_id=f"id{number}", config={"number": number})


def test_bad_trials_are_stopped_at_the_rungs_but_never_the_own_setting():
    scheduler = sampling.Halving(9, grace=1, factor=3, past=[])
    decisions = {}
    for number, value in ((1, 0.5), (2, 0.2), (3, 0.6), (0, 0.1)):
        trial = trial_of(number)
        scheduler.on_trial_add(None, trial)
        decisions[number] = scheduler.on_trial_result(None, trial, {"epoch": 1, "objective": value})
    assert decisions == {1: "CONTINUE", 2: "STOP", 3: "CONTINUE", 0: "CONTINUE"}
    assert scheduler.stopped == {"id2"}


def test_rungs_remember_the_curves_of_earlier_runs():
    past = [TrialRecord(1, {}, {}, "finished", 0.5, curve=[(1, 0.5), (3, 0.7)])]
    for curves, decision in ((past, "STOP"), ([], "CONTINUE")):
        scheduler, trial = sampling.Halving(9, grace=1, factor=3, past=curves), trial_of(2)
        scheduler.on_trial_add(None, trial)
        assert scheduler.on_trial_result(None, trial, {"epoch": 1, "objective": 0.4}) == decision


def test_a_rung_gets_the_value_of_its_own_epoch_also_of_a_trial_that_goes_on_at_a_later_one():
    begun = [TrialRecord(1, {}, {}, curve=[(1, 0.1), (2, 0.5)])]
    scheduler = sampling.Halving(9, grace=1, factor=3, past=[], begun=begun)
    decisions = []
    for number, epoch, value in ((1, 2, 0.5), (2, 1, 0.2)):
        trial = trial_of(number)
        scheduler.on_trial_add(None, trial)
        decisions.append(scheduler.on_trial_result(None, trial, {"epoch": epoch, "objective": value}))
    assert decisions == ["CONTINUE", "CONTINUE"]  # 0.2 after an epoch is more than 0.1, not to be compared with 0.5


def test_a_trial_that_was_stopped_when_its_driver_was_killed_is_stopped_again():
    past = [TrialRecord(number, {}, {}, "finished", curve=[(1, 0.9)]) for number in (1, 2, 3)]
    begun = [TrialRecord(4, {}, {}, curve=[(1, 0.1)]), TrialRecord(5, {}, {}, curve=[(1, 0.1), (2, 0.95)])]
    scheduler = sampling.Halving(9, grace=1, factor=3, past=past, begun=begun)
    decisions = []
    for number, epoch in ((4, 2), (5, 3)):
        trial = trial_of(number)
        scheduler.on_trial_add(None, trial)
        decisions.append(scheduler.on_trial_result(None, trial, {"epoch": epoch, "objective": 0.95}))
    assert decisions == ["STOP", "CONTINUE"]  # the second one had been let pass
    assert len(scheduler.stopped) == 1


def test_a_trial_that_came_to_its_result_is_not_stopped_by_it():
    scheduler = sampling.Halving(4, grace=1, factor=2, past=[TrialRecord(1, {}, {}, "finished", curve=[(1, 0.9)])])
    trial = trial_of(2)
    scheduler.on_trial_add(None, trial)
    assert scheduler.on_trial_result(None, trial, {"epoch": 5, "objective": 0.1, "finished": True}) == "CONTINUE"
    assert scheduler.stopped == set()


@pytest.mark.parametrize(("gain", "holds", "away"), [(0.1, True, False), (0.0, False, False), (0.1, True, True)])
def test_the_best_model_is_the_champion_only_if_it_holds_on_fresh_seeds(
    tmp_path, config, space, monkeypatch, gain, holds, away
):
    from pistoseg.artifacts import Workspace
    from pistoseg.search import study

    journal = filled(tmp_path, space, [0.1, 0.4, 0.3])
    best = journal.best().overrides
    seen, promoted = [], []

    def run_pipeline(varied, workspace, targets, **options):
        won = space.overrides(journal.best().point) == space.overrides(space.point_of(varied))
        seen.append((won, varied.seed))
        miou = 0.5 + 0.01 * (varied.seed % 2) * (1 if won else 2) + gain * won
        precise = SimpleNamespace(fingerprint=f"model {varied.seed}")
        return {"evaluation": SimpleNamespace(summary={"metrics": {"miou": miou}}), "precise": precise}

    aliases = {}
    client = SimpleNamespace(get_registered_model=lambda name: SimpleNamespace(aliases=aliases))
    tracker = SimpleNamespace(
        run_id="parent",
        client=client,
        guard=lambda call, *arguments: None if away else call(*arguments),
        register=lambda artifact, tags: artifact.fingerprint,
        run=StageRun,
    )
    monkeypatch.setattr(study, "run_pipeline", run_pipeline)
    monkeypatch.setattr("pistoseg.tracking.registry.set_alias", lambda *arguments: promoted.append(arguments))
    outcome = outcome_of(journal, config, space)

    def confirm(journal, **budget):
        silent = SimpleNamespace(say=lambda text: None)
        return study._confirm(
            outcome.search, Workspace(str(tmp_path)), study.Budget(3, **budget), journal, tracker, silent
        )

    confirmation, version = confirm(journal)
    assert best
    assert confirmation.holds is holds
    assert sorted(seen) == [(False, 1), (False, 2), (False, 3), (True, 1), (True, 2), (True, 3)]  # not the search's 0
    assert promoted == ([(client, config.tracking.model, "model 1")] if holds and not away else [])
    assert version == ("model 1" if holds and not away else None)
    assert journal.settings["confirmation"]["holds"] is holds
    if holds:
        assert confirm(Journal.open(str(tmp_path), IDENTITY), confirm_seeds=0) == (confirmation, version)
    aliases["champion"] = "one that a user or another search promoted since"
    for count in (1, 2):
        if version:
            assert confirm(journal) == (confirmation, version)
            assert len(promoted) == count
        aliases.clear()  # as in a new registry


@pytest.mark.parametrize(
    ("known", "champion", "made"),
    [(None, 4, True), (None, None, True), ("3", None, True), ("3", 3, True), ("3", 4, False)],
)
def test_a_model_that_an_update_made_anew_replaces_the_searchs_own_champion_alone(monkeypatch, known, champion, made):
    from pistoseg.search import study

    promoted = []
    aliases = {} if champion is None else {"champion": champion}  # a database has versions as numbers
    client = SimpleNamespace(get_registered_model=lambda name: SimpleNamespace(aliases=aliases))
    monkeypatch.setattr("pistoseg.tracking.registry.set_alias", lambda *arguments: promoted.append(arguments))
    assert study._promote(client, "tissue", "5", known) == ("5" if made else "3")
    assert promoted == ([(client, "tissue", "5")] if made else [])


def test_a_confirmation_that_holds_again_without_mlflow_keeps_the_champion_and_one_that_does_not_hold_does_not(
    study_of, monkeypatch
):
    run, folder = study_of
    gain = 0.1

    def run_pipeline(config, *arguments, run_name, **options):
        own = run_name.startswith("confirmation: own setting")
        scores = {"miou": 0.5 + 0.001 * config.seed * (1 + own) + gain * (not own)}
        return {"evaluation": SimpleNamespace(summary={"metrics": scores}), "precise": None}

    def confirmation():
        return json.loads((folder / "search.json").read_text())["confirmation"]

    monkeypatch.setattr("pistoseg.search.study.run_pipeline", run_pipeline)
    assert run().version is None
    settings = json.loads((folder / "search.json").read_text())
    settings["confirmation"]["version"] = "7"  # as a run with MLflow leaves it
    (folder / "search.json").write_text(json.dumps(settings))
    assert run().version == run(seeds=0).version == run(seeds=4).version == confirmation()["version"] == "7"
    assert "version 7 of the model became the champion" in (folder / "report.md").read_text()
    gain = -0.1
    assert run().version is None
    assert confirmation()["version"] is None


@pytest.fixture
def study_of(tmp_path, config, space, monkeypatch):
    """A search of which only the confirmation is left, without MLflow; a function that runs it, and its folder."""
    from pistoseg.artifacts import Workspace
    from pistoseg.progress import Progress
    from pistoseg.search import study

    objective = Objective("miou", masks=True, labels=False)
    space, sharing = analyse(space, config, objective)
    image = tmp_path / "data" / "a-[1, 0].png"
    image.parent.mkdir()
    image.write_bytes(b"1")
    untracked = config.model_copy(
        update={
            "tracking": TrackingConfig(enabled=False),
            "data": config.data.model_copy(update={"uri": str(image.parent)}),
            "refiner": config.refiner.model_copy(update={"weights": "s3://bucket/x.pth"}),
        }
    )
    search = study.Search("mine", untracked, space, sharing, objective, "tpe", False, None)
    workspace = Workspace(str(tmp_path))
    folder = tmp_path / "search" / "mine"
    filled(folder, space, [0.1, 0.4, 0.3], identity=search.identity())
    monkeypatch.setattr(study, "_compute_shared", lambda *arguments: {})
    monkeypatch.setattr("pistoseg.search.pictures.draw", lambda outcome: {})  # takes seconds, see below

    def run(progress=None, seeds=3):
        return study.run(search, workspace, study.Budget(3, confirm_seeds=seeds), progress or Progress())

    return run, folder


def test_a_confirmation_that_runs_out_of_memory_is_part_of_the_report(study_of, monkeypatch):
    run, folder = study_of

    def run_pipeline(*arguments, **options):
        raise RuntimeError("CUDA out of memory. Tried\nmore")

    monkeypatch.setattr("pistoseg.search.study.run_pipeline", run_pipeline)
    outcome = run()
    assert outcome.confirmation.best == outcome.confirmation.own == (None, None, None)
    assert "own setting, seed 1: out of memory: more" in (folder / "report.md").read_text()


def test_a_confirmation_without_a_number_is_a_run_that_failed(study_of, monkeypatch):
    run, folder = study_of

    def run_pipeline(config, *arguments, **options):
        miou = float("nan") if config.seed == 1 else 0.5
        return {"evaluation": SimpleNamespace(summary={"metrics": {"miou": miou}}), "precise": None}

    monkeypatch.setattr("pistoseg.search.study.run_pipeline", run_pipeline)
    outcome = run()
    assert outcome.confirmation.best == outcome.confirmation.own == (None, 0.5, 0.5)
    assert "own setting, seed 1: the objective is no number" in (folder / "report.md").read_text()


def test_a_search_that_goes_on_without_mlflow_keeps_the_id_of_its_run(study_of, monkeypatch):
    run, folder = study_of
    settings = json.loads((folder / "search.json").read_text())
    (folder / "search.json").write_text(json.dumps(settings | {"run_id": "mine"}))
    monkeypatch.setattr("pistoseg.search.study.run_pipeline", lambda *arguments, **options: {})
    run()
    assert json.loads((folder / "search.json").read_text())["run_id"] == "mine"


@pytest.mark.parametrize("error", [UnavailableError("is away"), ray.exceptions.NodeDiedError("is away")])
def test_a_confirmation_that_is_cut_off_leaves_the_report_of_the_trials(study_of, monkeypatch, error):
    run, folder = study_of

    def run_pipeline(*arguments, **options):
        raise error

    monkeypatch.setattr("pistoseg.search.study.run_pipeline", run_pipeline)
    with pytest.raises(type(error), match="is away"):
        run()
    assert "Best: trial 1, 0.4000" in (folder / "report.md").read_text()
    assert (folder / "best.yaml").exists()


def test_a_search_does_not_go_on_with_other_data(study_of, tmp_path, monkeypatch):
    run, folder = study_of
    monkeypatch.setattr("pistoseg.search.study.run_pipeline", lambda *arguments, **options: {})
    run()  # one of an earlier version, which did not know its data
    run()
    (tmp_path / "data" / "a-[1, 0].png").rename(tmp_path / "data" / "a-[0, 1].png")  # a corrected label
    report = (folder / "report.md").stat().st_mtime_ns
    with pytest.raises(PistoSegError, match=r"other data: what the stage patches reads .* give another --name"):
        run()
    assert (folder / "report.md").stat().st_mtime_ns == report


class _WaitsError(Exception):
    pass


def test_a_search_that_is_running_is_waited_for(study_of):
    run, folder = study_of

    def say(text):
        assert text.startswith("waiting: process")
        raise _WaitsError

    before = sorted(folder.rglob("*"))
    with claims.claimed(str(folder)), pytest.raises(_WaitsError):
        run(SimpleNamespace(say=say))
    assert sorted(folder.rglob("*")) == before


def test_a_confirmed_report_stays_where_a_later_confirmation_is_cut_off(study_of, monkeypatch):
    run, folder = study_of

    def run_pipeline(*arguments, **options):
        raise RuntimeError("fails")

    monkeypatch.setattr("pistoseg.search.study.run_pipeline", run_pipeline)
    run()
    before = (folder / "report.md").read_text()
    monkeypatch.setattr("pistoseg.search.study._confirm", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run()
    assert (folder / "report.md").read_text() == before


def scored(config, *arguments, **options):
    """A pipeline whose score is by the seed."""
    scores = {"miou": 0.5 + 0.01 * config.seed}
    return {"evaluation": SimpleNamespace(summary={"metrics": scores}), "precise": None}


def add_trial(folder, value):
    """A finished trial, as a run with more `--trials` leaves it."""
    trials = sorted((folder / "trials").iterdir())
    known = json.loads(trials[-1].read_text())
    new = {"synthesis.rotate": 100 * value}
    changed = {"number": len(trials), "value": value}
    changed |= {"overrides": known["overrides"] | new, "point": known["point"] | new}
    (folder / "trials" / f"{len(trials):05d}.json").write_text(json.dumps(known | changed))


def test_a_report_of_more_trials_is_of_all_of_them_also_where_their_confirmation_is_cut_off(study_of, monkeypatch):
    run, folder = study_of
    monkeypatch.setattr("pistoseg.search.study.run_pipeline", scored)
    run()
    confirmed = (folder / "report.md").read_text()
    assert "Best: trial 1, 0.4000" in confirmed
    monkeypatch.setattr("pistoseg.search.study._confirm", lambda *_: 1 / 0)
    for value, text in ((0.3, "Best: trial 1, 0.4000"), (0.9, "Best: trial 4, 0.9000")):
        add_trial(folder, value)
        with pytest.raises(ZeroDivisionError):
            run()
        report = (folder / "report.md").read_text()
        assert text in report
        assert ("Best minus own over 3 fresh seeds" in report) == (value == 0.3)  # which was of trial 1
        number = len(list((folder / "trials").iterdir()))
        assert len((folder / "trials.csv").read_text().splitlines()) == 1 + number
    assert (folder / "best.yaml").read_text().startswith("# Trial 4 ")


def test_a_run_without_confirmation_keeps_what_one_before_confirmed_of_the_same_setting(study_of, monkeypatch):
    run, folder = study_of
    monkeypatch.setattr("pistoseg.search.study.run_pipeline", scored)
    run()
    confirmed = (folder / "report.md").read_text()
    run(seeds=0)
    assert (folder / "report.md").read_text() == confirmed
    add_trial(folder, 0.9)
    run(seeds=0)
    assert "Not done: whether the best trial is better" in (folder / "report.md").read_text()


def test_a_search_by_labels_does_not_go_on_with_scores_of_an_earlier_version(tmp_path, config, space):
    from pistoseg.search.study import Search

    def identity(kind):
        return Search("mine", config, space, None, Objective(kind, True, True), "tpe", False, None).identity()

    for kind, first in (("miou", "miou"), ("labels", "labels")):  # as the first version wrote it
        filled(tmp_path / kind, space, [0.1], identity=identity(kind) | {"objective": first})
    assert Journal.open(str(tmp_path / "miou"), {"identity": identity("miou")}).records
    with pytest.raises(PistoSegError, match=r"another score.*give another --name"):
        Journal.open(str(tmp_path / "labels"), {"identity": identity("labels")})


def test_a_search_is_the_same_over_another_way_to_its_storage_but_not_with_other_shares_of_the_batch(config, space):
    from pistoseg.search.study import Search

    def identity(*overrides):
        config = load_config("demo", overrides=["precise.masks=synthesized", "precise.epochs=9", *overrides])
        objective = Objective("miou", True, False)
        return Search("mine", config, space, None, objective, "tpe", False, None).identity()

    plain = identity("compute.train_workers=1")
    assert plain == identity("storage.profile=me", "storage.endpoint=http://host:1", "storage.region=eu-west-1")
    assert plain["config"] == config.model_dump(mode="json", exclude={"compute", "tracking"})  # as of journals before
    assert plain != identity("compute.train_workers=2") != identity("compute.train_workers=4")


def test_another_search_is_refused_before_it_waits(study_of):
    run, folder = study_of
    (folder / "search.json").write_text(json.dumps({"identity": "another"}))
    with claims.claimed(str(folder)), pytest.raises(PistoSegError, match="another space"):
        run()


def test_an_own_setting_that_cannot_be_trained_is_refused_before_there_is_a_search_of_its_name(tmp_path, monkeypatch):
    from pistoseg.artifacts import Workspace
    from pistoseg.search import study

    (tmp_path / "a-[1, 0].png").write_bytes(b"1")
    given = ["precise.masks=synthesized", "precise.encoder=efficientnet-b33", "tracking.enabled=false"]
    config = load_config("demo", overrides=[f"data.uri={tmp_path}", *given])
    objective = Objective("miou", masks=True, labels=False)
    space, sharing = analyse(load_space("losses", config), config, objective)
    assert "precise" not in sharing.shared  # whose networks are looked at when it is computed
    search = study.Search("mine", config, space, sharing, objective, "tpe", False, None)
    monkeypatch.setattr(study, "_run", lambda *arguments: pytest.fail("it began"))
    with pytest.raises(PistoSegError, match=r"precise\.encoder: encoder 'efficientnet-b33' can't be built"):
        study.run(search, Workspace(str(tmp_path / "w")), study.Budget(3))
    assert not (tmp_path / "w").exists()


def test_places_that_not_all_nodes_see_are_refused_before_there_is_a_search_of_its_name(study_of, monkeypatch):
    run, folder = study_of
    shutil.rmtree(folder)

    def check_shared(written, read):
        assert written == str(folder.parents[1])
        raise UnavailableError("does not see it", field=" ".join(read))

    monkeypatch.setattr("pistoseg.stages.placement.check_shared", check_shared)
    with pytest.raises(UnavailableError, match=r"^data\.uri refiner\.weights: does not see it"):
        run()
    assert not folder.exists()


def test_a_search_that_was_taken_over_writes_nothing_more(study_of, monkeypatch):
    run, folder = study_of

    def run_pipeline(*arguments, **options):
        storage.write_bytes(str(folder / ".claims" / "000002.json"), b"{}")
        (folder / "report.md").write_text("the other run's")
        raise ValueError

    monkeypatch.setattr("pistoseg.search.study.run_pipeline", run_pipeline)
    with pytest.raises(PistoSegError, match="took this over"):
        run()
    assert (folder / "report.md").read_text() == "the other run's"
    assert "confirmation" not in json.loads((folder / "search.json").read_text())


def test_pictures_and_importance_are_drawn_of_spaces_with_conditions(tmp_path, config, space):
    from pistoseg.search import pictures

    journal = filled(tmp_path, space, [0.1, 0.4, 0.3, 0.2, 0.25, 0.5], ["pruned"])
    outcome = outcome_of(journal, config, space)
    drawn = pictures.draw(outcome)
    assert set(drawn) >= {"history.png", "curves.png", "slices.png", "parallel.png", "importance.png"}
    assert all(content.startswith(b"\x89PNG") for content in drawn.values())
    values = pictures.importance(outcome)
    assert sum(values.values()) == pytest.approx(1)
    assert list(values.values()) == sorted(values.values(), reverse=True)


def test_what_mlflow_missed_of_a_trial_when_its_driver_was_killed_it_gets_from_the_next(
    tmp_path, put_database, config, space, monkeypatch
):
    from pistoseg.artifacts import Workspace
    from pistoseg.progress import Progress
    from pistoseg.search import recording
    from pistoseg.tracking import Tracker

    put_database(tmp_path)
    workspace, journal = Workspace(str(tmp_path)), Journal.open(str(tmp_path / "search"), IDENTITY)
    record, trial = journal.start({}, {}), SimpleNamespace(trial_id="t0", config={"number": 0}, last_result=None)
    workers = SimpleNamespace(release=SimpleNamespace(remote=lambda owner: None))
    monkeypatch.setattr(recording.ray, "get", lambda nothing: nothing)

    def recorder(tracker):
        objective = Objective("miou", masks=True, labels=False)
        ending = recording.Ending()
        found = recording.Recorder(journal, tracker, objective, workers, None, {}, Progress(), workspace, ending)
        found.on_trial_start(0, [], trial)
        return found

    def ends(tracker):
        details = {"scores": {"miou": 0.4}, "artifacts": {}, "computed": [], "curve": [(1, 0.1), (2, 0.2), (3, 0.3)]}
        last = {"finished": True, "objective": 0.4, "seconds": 2.0, "epoch": 4, "details": json.dumps(details)}
        trial.last_result = last
        recorder(tracker).on_trial_complete(0, [], trial)

    with Tracker.start(config, workspace, "search") as tracker:
        first = recorder(tracker)
        first.on_trial_result(0, [], trial, {"objective": 0.1, "epoch": 1})
        record.report(2, 0.2)  # killed when that was in the journal alone; the third epoch was in a checkpoint alone
        journal.save(record)
    with Tracker.start(config, workspace, "search", run_id=tracker.run_id) as tracker:
        monkeypatch.setattr(journal, "save", lambda record: None)  # killed again, before the journal had the end
        ends(tracker)
    with Tracker.start(config, workspace, "search", run_id=tracker.run_id) as tracker:
        monkeypatch.undo()
        monkeypatch.setattr(recording.ray, "get", lambda nothing: nothing)
        record.state = "running"
        ends(tracker)
    assert Journal.open(str(tmp_path / "search"), IDENTITY).records[0].state == "finished"
    run = tracker.client.get_run(record.run_id)
    assert run.data.tags["pistoseg.state"] == "finished"
    assert run.info.status == "FINISHED"
    curve = tracker.client.get_metric_history(record.run_id, "objective")
    assert sorted((item.step, item.value) for item in curve) == [(1, 0.1), (2, 0.2), (3, 0.3)] == record.curve
    for name in ("miou", "seconds"):
        assert len(tracker.client.get_metric_history(record.run_id, name)) == 1


@pytest.fixture
def recorder(tmp_path, monkeypatch):
    """A recorder without MLflow whose trial 0 was started, and that trial as Tune has it."""
    from pistoseg.artifacts import Workspace
    from pistoseg.progress import Progress
    from pistoseg.search import recording
    from pistoseg.tracking import Tracker

    journal, workspace = Journal.open(str(tmp_path / "search"), IDENTITY), Workspace(str(tmp_path))
    tracker = Tracker(load_config("demo"), workspace, None)
    workers = SimpleNamespace(release=SimpleNamespace(remote=lambda owner: None))
    monkeypatch.setattr(recording.ray, "get", lambda nothing: nothing)
    objective, ending = Objective("miou", masks=True, labels=False), recording.Ending()
    found = recording.Recorder(journal, tracker, objective, workers, None, {}, Progress(), workspace, ending)
    details = {"scores": {"miou": 0.4}, "artifacts": {"evaluation": "abc"}, "computed": [], "curve": []}
    last = {"finished": True, "objective": 0.4, "seconds": 2.0, "epoch": 4, "details": json.dumps(details)}
    trial = SimpleNamespace(trial_id="t0", config={"number": 0}, last_result=last)
    journal.start({}, {})
    found.on_trial_start(0, [], trial)
    return found, trial


def test_a_storage_that_is_away_as_a_trial_ends_ends_the_search_and_no_trial_fails(recorder, monkeypatch):
    recorder, trial = recorder
    away = UnavailableError("is away", file="s3://b", remedy="run again")
    assert not recorder.ending.stop_all()
    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_bytes", lambda uri, data: (_ for _ in ()).throw(away))
        recorder.on_trial_complete(0, [], trial)
        recorder.end_all()
    assert recorder.ending.problem is away
    assert recorder.ending.stop_all()
    assert Journal.open(recorder.journal.folder, IDENTITY).records[0].state == "running"  # the next run goes on with it


def test_a_picture_that_was_deleted_costs_no_trial(recorder, tmp_path, capsys):
    recorder, trial = recorder
    folder = tmp_path / "evaluation" / "abc"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"summary": {"pictures": ["gone.png"]}}))
    recorder._runs[0] = SimpleNamespace(
        run_id="run", tags=dict, metrics=lambda *values, **step: None, pictures=StageRun("client", None).pictures
    )
    recorder.tracker.client = SimpleNamespace(set_terminated=lambda run_id, status: None)
    recorder.on_trial_complete(0, [], trial)
    assert recorder.ending.problem is None
    assert Journal.open(recorder.journal.folder, IDENTITY).records[0].state == "finished"
    assert "MLflow lacks pictures of evaluation" in capsys.readouterr().err


def test_a_trial_of_a_search_of_which_mlflow_refused_something_is_ended(recorder, put_database, tmp_path):
    from pistoseg.tracking import Tracker

    put_database(tmp_path)
    recorder, trial = recorder
    with Tracker.start(load_config("demo"), recorder.workspace, "search") as recorder.tracker:
        recorder.on_trial_start(0, [], trial)
        recorder.tracker.run().metrics({"m" * 300: 1.0})
        recorder.on_trial_complete(0, [], trial)
    assert recorder.tracker.guard.broken
    assert recorder.tracker.client.get_run(recorder.journal.records[0].run_id).info.status == "FINISHED"


def test_runs_that_were_deleted_in_mlflow_are_made_anew_and_are_kept_while_tracking_is_off(
    recorder, put_database, tmp_path
):
    from pistoseg.tracking import Tracker

    put_database(tmp_path)
    recorder, trial = recorder
    config, workspace, record = load_config("demo"), recorder.workspace, recorder.journal.records[0]

    def begin(config):
        with Tracker.start(config, workspace, "search", run_id=parents[-1]) as tracker:
            recorder.tracker = tracker
            recorder.on_trial_start(0, [], trial)
            assert not tracker.guard.broken
            return tracker.run_id, record.run_id, tracker.client

    parents = [None]
    parent, child, client = begin(config)
    parents.append(parent)
    for run_id in (parent, child):
        client.delete_run(run_id)
    found = begin(config)[:2]
    assert {parent, child}.isdisjoint(found)
    assert client.get_run(found[1]).data.tags["mlflow.parentRunId"] == found[0]
    begin(config.model_copy(update={"tracking": TrackingConfig(enabled=False)}))
    assert Journal.open(recorder.journal.folder, IDENTITY).records[0].run_id == found[1]


def test_a_dry_run_of_a_search_refuses_data_without_usable_labels(tmp_path, capsys):
    put(tmp_path, "training/a.png")
    table = put(tmp_path, "training/patches.csv", b"image,gland,stroma\na.png,1,0\n")
    arguments = ["search", "--space", "losses", "--dry-run", "--data", str(tmp_path)]
    arguments += ["--workspace", str(tmp_path / "w")]
    assert main([*arguments, "--preset", "demo"]) == 2
    assert f"{table}: columns: lacks the columns tumor" in capsys.readouterr().err
    assert main([*arguments, "--preset", "glas"]) == 0
    said = capsys.readouterr().out
    assert "compared by the agreement with held-out labels: data.label_holdout is 0.2 in place of 0\n" in said
    assert main([*arguments, "--preset", "glas", "--set", "data.label_holdout=0.1"]) == 0
    assert "in place of" not in capsys.readouterr().out
    assert not (tmp_path / "w").exists()


def test_a_dry_run_of_a_search_keeps_options_apart_and_says_why_the_own_setting_is_none(tmp_path, capsys):
    put(tmp_path, "training/a.png")
    put(tmp_path, "training/patches.csv", b"image,gland,stroma\na.png,1,0\n")
    crops = [{"synthesis.n_h": 7, "synthesis.crop_height": 32}, {"synthesis.n_h": 14, "synthesis.crop_height": 16}]
    parameters = {"crops": {"options": crops}}
    space = put(tmp_path, "space.yaml", yaml.safe_dump({"parameters": parameters}, sort_keys=False).encode())
    arguments = ["search", "--space", space, "--dry-run", "--data", str(tmp_path), "--preset", "glas"]
    assert main([*arguments, "--set", "synthesis.n_h=4", "--set", "synthesis.crop_height=56"]) == 0
    said = capsys.readouterr().out
    for option in ("(n_h=7, crop_height=32)", "(n_h=14, crop_height=16)"):
        assert all(part in said for part in option.split())
    own = "crops has no option with n_h=4, crop_height=56"
    assert f"the config's own setting is outside of the space: {own}" in " ".join(said.split())
    assert main([*arguments, "--set", "synthesis.n_h=7", "--set", "synthesis.crop_height=32"]) == 0
    assert "outside" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["../../x", "/etc/x", "a/b", "a\\b", "..", "."])
def test_a_name_of_a_search_that_is_a_path_is_refused(tmp_path, capsys, name):
    arguments = ["search", "--space", "losses", "--dry-run", "--data", str(tmp_path), "--preset", "demo"]
    assert main([*arguments, "--workspace", str(tmp_path / "w"), "--name", name]) == 2
    assert "--name: " in capsys.readouterr().err
