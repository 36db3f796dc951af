import csv
import io
import json
import os
import statistics
import threading
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import ray.train
from patch_files import put
from processes import wait_for
from rich.console import Console

from pistoseg import claims, parquet, storage
from pistoseg.artifacts import Workspace
from pistoseg.cli import main
from pistoseg.config import load_config, presets
from pistoseg.errors import PistoSegError, UnavailableError
from pistoseg.graph import plan
from pistoseg.hooks import Hooks
from pistoseg.patches.store import IMAGES_SCHEMA, WINDOWS_SCHEMA
from pistoseg.progress import Progress
from pistoseg.search import ablation, report
from pistoseg.search.ablation import (
    AblationReport,
    Job,
    RowResult,
    RunResult,
    equal_budget,
    outline,
    prepare,
    with_overrides,
)
from pistoseg.search.tables import PUBLISHED, TABLES, PaperScores, Row, Table, published_data

CLASSES = ("tumor", "stroma", "normal")
NO_WEIGHTS = ("classifier.weights=null", "refiner.weights=null")
PAPER_ROWS = [(row, key) for table in TABLES.values() for row in table.rows for key in row.paper]


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
@pytest.mark.parametrize("preset", presets())
def test_every_row_is_a_valid_pipeline_of_every_preset(preset, table):
    config = load_config(preset, overrides=NO_WEIGHTS)
    jobs, left_out = prepare(table, config)
    assert len(jobs) + len(left_out) == len(table.rows)
    changed = [job.config.model_dump_json() for job in jobs]
    assert len(set(changed)) == len(jobs)
    for job in jobs:
        for key, value in job.row.overrides.items():
            section, field = key.split(".")
            assert getattr(getattr(job.config, section), field) == value


@pytest.mark.parametrize(("row", "key"), PAPER_ROWS, ids=[f"{row.label}-{key}" for row, key in PAPER_ROWS])
def test_the_papers_values_agree_with_each_other(row, key):
    scores = row.paper[key]
    if scores.iou:
        assert len(scores.iou) == len(PUBLISHED[key].classes)
        assert scores.miou == pytest.approx(statistics.fmean(scores.iou), abs=1.01e-4)
        assert min(scores.iou) < scores.fwiou < max(scores.iou)
    else:
        assert scores.fwiou is None
        assert 0.6 < scores.miou < 0.76


def test_the_whole_method_has_the_same_value_in_every_table():
    full = [table.rows[-1].paper["wsss4luad"].miou for name, table in TABLES.items() if name[-1] in "135y"]
    assert full == [0.7513] * 4


@pytest.mark.parametrize("key", PUBLISHED)
def test_paper_values_belong_to_the_published_data_alone(key):
    classes = load_config(key, overrides=NO_WEIGHTS).classes.tissue().names
    images = PUBLISHED[key].training_images
    assert published_data(classes, images) == key
    assert published_data([name.upper() for name in classes], images) == key
    assert published_data(classes, images - 1) is None
    assert published_data(classes[::-1], images) is None
    assert published_data(classes[:-1], images) is None


def test_losses_are_switched_and_every_other_setting_stays():
    jobs, _ = prepare(TABLES["table3"], load_config("glas"))
    weights = [(job.config.refiner.lambda_cls, job.config.refiner.lambda_cons) for job in jobs]
    assert weights == [(0, 1), (0, 1), (1, 1), (1, 0), (1, 1)]
    assert [job.config.refiner.lambda_cross for job in jobs] == [0, 1, 0, 1, 1]
    assert jobs[-1].config == load_config("glas")


def test_crop_sizes_keep_the_size_of_the_mosaic():
    jobs, left_out = prepare(TABLES["crop-size"], load_config("wsss4luad", "cpu", overrides=NO_WEIGHTS))
    assert left_out == []
    assert [job.config.synthesis.n_h for job in jobs] == [1, 2, 7, 14]
    assert {(job.config.synthesis.height, job.config.synthesis.width) for job in jobs} == {(224, 224)}


def test_crop_sizes_that_make_no_whole_mosaic_are_left_out_with_the_reason():
    config = load_config("demo", overrides=("synthesis.n_h=5", "synthesis.n_w=7"))  # 160 x 224 px
    jobs, left_out = prepare(TABLES["crop-size"], config)
    assert [(job.config.synthesis.n_h, job.config.synthesis.n_w) for job in jobs] == [(5, 7), (10, 14)]
    assert left_out[0] == "H_p = W_p = 224: 160x224 px mosaics are not made of whole crops of 224 px"
    with pytest.raises(PistoSegError, match="no row of crop-size fits"):
        prepare(TABLES["crop-size"], load_config("demo", overrides=("synthesis.crop_height=31",)))


def test_seeds_follow_the_configs_and_all_rows_come_before_the_next_seed():
    jobs, _ = prepare(TABLES["table5"], load_config("demo", overrides=("seed=7",)), seeds=2)
    assert [job.config.seed for job in jobs] == [7, 7, 7, 8, 8, 8]
    assert [job.name for job in jobs[::3]] == ["M_pseudo, refined, seed 7", "M_pseudo, refined, seed 8"]


def test_settings_that_no_row_can_run_with_are_reported_together_before_anything_starts():
    rows = (Row("good", {}), Row("steep", {"precise.lr": 2}), Row("steeper", {"precise.lr": 2}))
    with pytest.raises(PistoSegError) as caught:
        prepare(Table("own", "Own", rows), load_config("demo"))
    message = str(caught.value)
    assert "'steep', 'steeper': config: 1 problem(s) in the config:\n  precise.lr" in message
    with pytest.raises(PistoSegError, match=r"'PistoSeg': classifier\.weights, refiner\.weights: no hub") as caught:
        prepare(TABLES["table1"], load_config("wsss4luad"), seeds=2)
    assert "Synthesized" not in str(caught.value)


def run_of(seed=0, miou=None, problem=None, computed=60.0, reused=0.0):
    scores = {} if miou is None else {"iou/tumor": miou + 0.1, "iou/stroma": None, "iou/normal": miou, "miou": miou}
    scores |= {"fwiou": 0.5} if scores else {}
    return RunResult(seed, scores, {"precise": "ab"}, {"precise": computed}, {"patches": reused}, problem)


def report_of(*rows, published=None, left_out=()):
    seeds = tuple(range(len(rows[0].runs)))
    return AblationReport("own", "Own rows", CLASSES, seeds, rows, tuple(left_out), 10, 4, published, "")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.1, 0.3, 0.2], [None, 1, 2]),
        ([0.70001, 0.70002, 0.5, 0.5, 0.4], [1, 1, 2, 2, None]),  # equal as printed
        ([None, 0.3], [None, 1]),
        ([None, None], [None, None]),
    ],
)
def test_the_two_best_values_of_a_column_are_marked(values, expected):
    assert report.ranks(values) == expected


def test_a_score_is_a_mean_with_the_deviation_of_the_seeds_that_have_one():
    values = [0.7, 0.76, 0.715]
    row = RowResult("a", {}, (*(run_of(seed, value) for seed, value in enumerate(values)), run_of(3, problem="no")))
    assert report.cell(row, "miou") == f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}"
    assert report.cell(row, "iou/stroma") == "-"
    assert report.cell(RowResult("a", {}, (run_of(0, 0.5),)), "miou") == "0.5000"


def test_markdown_marks_the_best_and_has_the_papers_line_on_its_data():
    paper = PaperScores(0.7513, 0.7707, (0.8119, 0.7173, 0.7246))
    rows = (
        RowResult("a", {}, (run_of(0, 0.5, reused=3700.4),), paper),
        RowResult("b|c", {}, (run_of(0, 0.6),), PaperScores(0.6825)),
        RowResult("d", {}, (run_of(problem="it broke"),)),
    )
    text = report.to_markdown(report_of(*rows, published="wsss4luad", left_out=["e: too large"]))
    lines = text.splitlines()
    assert "|  | tumor | stroma | normal | mIoU | fwIoU | computed | reused |" in lines
    assert "| a | <u>0.6000</u> | - | <u>0.5000</u> | <u>0.5000</u> | **0.5000** | 0:01:00 | 1:01:40 |" in lines
    assert "| *paper* | 0.8119 | 0.7173 | 0.7246 | 0.7513 | 0.7707 |  |  |" in lines
    assert "| b\\|c | **0.7000** | - | **0.6000** | **0.6000** | **0.5000** | 0:01:00 | 0:00:00 |" in lines
    assert "| *paper* | - | - | - | 0.6825 | - |  |  |" in lines
    assert "| d (failed) | - | - | - | - | - | 0:01:00 | 0:00:00 |" in lines
    assert "* paper: its values, on the 80 test images of WSSS4LUAD" in lines
    assert "* failed: d, seed 0: it broke" in lines
    assert "* left out: e: too large" in lines


def test_the_terminal_shows_bold_and_underlined_values():
    rows = [RowResult(name, {}, (run_of(0, miou),)) for name, miou in (("low", 0.1), ("high", 0.3), ("middle", 0.2))]
    console = Console(width=120, file=io.StringIO(), force_terminal=True, color_system="standard")
    console.print(report.to_text(report_of(*rows)))
    text = console.file.getvalue()
    assert "\x1b[1m0.3000\x1b[0m" in text
    assert "\x1b[4m0.2000\x1b[0m" in text
    assert "\x1b[1m0.1000" not in text
    assert "paper" not in text


def test_csv_and_json_can_be_computed_with():
    paper = PaperScores(0.7, 0.8, (0.9, 0.7, 0.5))
    rows = (
        RowResult("a, b", {"seed": 1}, (run_of(0, 0.5), run_of(1, 0.6)), paper),
        RowResult("c", {}, (run_of(0),) * 2),
    )
    own = report_of(*rows, published="wsss4luad")
    (first, second) = csv.DictReader(io.StringIO(report.to_csv(own)))
    assert (first["row"], first["seeds"], float(first["miou"])) == ("a, b", "2", 0.55)
    assert float(first["miou_std"]) == pytest.approx(np.std([0.5, 0.6], ddof=1), abs=1e-6)
    assert (float(first["iou/normal_paper"]), first["iou/stroma"], second["miou"]) == (0.5, "", "")
    assert "miou_paper" not in report.to_csv(report_of(*rows)).splitlines()[0]
    values = json.loads(report.to_json(own))
    assert values["rows"][0]["mean"]["miou"] == pytest.approx(0.55)
    assert values["rows"][0]["runs"][1]["scores"]["miou"] == 0.6
    assert values["rows"][0]["paper"]["iou/tumor"] == 0.9
    assert values["rows"][1]["paper"] is None
    assert (values["published"], values["seeds"], values["classes"]) == ("wsss4luad", [0, 1], list(CLASSES))


def test_mosaics_are_trained_on_for_as_many_steps_as_real_images(tmp_path):
    sizes = [(64, 64), (130, 128), (20, 20)]
    images = [{"image": number, "height": h, "width": w, "png": b""} for number, (h, w) in enumerate(sizes)]
    windows = [
        {"window": number, "image": number, "x": 0, "y": 0, "width": w, "height": h, "labels": [1, 0, 0]}
        for number, (h, w) in enumerate(sizes)
    ]
    for name, rows, schema in (("images", images, IMAGES_SCHEMA), ("windows", windows, WINDOWS_SCHEMA)):
        parquet.write(pa.Table.from_pylist(rows, schema), str(tmp_path / name / "part-00000.parquet"))
    patches = SimpleNamespace(uri=str(tmp_path))
    base = ("precise.patch_size=64",)
    row = TABLES["table1"].rows[0]

    def budget(*overrides):
        job = Job(row, load_config("wsss4luad", overrides=(*base, *overrides)))
        return equal_budget(job, patches).config.precise.samples_per_epoch

    assert budget("precise.masks=synthesized") == 1 + 4 + 1
    assert budget("precise.masks=synthesized", "precise.samples_per_epoch=50") == 50
    assert budget("precise.masks=pseudo") is None


@pytest.fixture
def config(tmp_path):
    folder = tmp_path / "data" / "training"
    for number, flags in enumerate(("[1, 0, 0]", "[0, 1, 0]", "[0, 0, 1]")):
        put(folder, f"{number}-{flags}.png", seed=number)
    overrides = (f"data.uri={folder.parent}", "tracking.enabled=false", *NO_WEIGHTS)
    return load_config("wsss4luad", "cpu", overrides=(*overrides, "precise.samples_per_epoch=8"))


@pytest.fixture
def pipeline(monkeypatch):
    """A pipeline that computes nothing: a stage takes 2 s, the score of a run depends on what it is trained on."""
    calls = []

    def run_pipeline(config, workspace, targets, hooks=None, **_):
        artifacts, hooks = {}, hooks or Hooks()
        for step in plan(config, targets):
            name = step.stage.name
            found = step.find(workspace)
            if found is None:
                hooks.begun(step)
                if name == "refiner":
                    raise PistoSegError("it broke", field="refiner")
                calls.append((name, config.precise.masks, config.seed))
                miou = {"pseudo": 0.5, "synthesized": 0.4}.get(config.precise.masks, 0.3) + config.seed / 10
                summary = {
                    "patches": {"images": 10_000, "rejected": 91},
                    "validation": {"images": 4},
                    "evaluation": {"report": {"iou": dict.fromkeys(CLASSES, miou), "miou": miou, "fwiou": miou}},
                }.get(name, {})
                inputs = {role: artifacts[source] for role, source in step.inputs.items()}
                parts = {"version": 1, "settings": step.settings, "inputs": inputs, "summary": summary, "seconds": 2.0}
                found = workspace.commit(name, step.fingerprint, **parts)
            artifacts[name] = found
        return artifacts

    monkeypatch.setattr(ablation, "run_pipeline", run_pipeline)
    return calls


def test_rows_share_what_they_do_not_vary_and_a_broken_one_stops_no_other(config, pipeline, tmp_path):
    workspace = Workspace(str(tmp_path / "w"))
    (synthesized, pseudo, full) = TABLES["table1"].rows
    table = Table("own", "Own", (full, Row("again", full.overrides), pseudo, synthesized))
    result = ablation.run(table, config, workspace, seeds=2)
    stages = [call[0] for call in pipeline]
    assert {stage: stages.count(stage) for stage in ("patches", "synthesis", "preliminary", "precise")} == {
        "patches": 1,
        "synthesis": 2,
        "preliminary": 2,
        "precise": 4,
    }
    assert [row.label for row in result.rows] == ["PistoSeg", "again", pseudo.label, synthesized.label]
    assert [row.mean("miou") for row in result.rows] == [None, None, pytest.approx(0.55), pytest.approx(0.45)]
    assert result.failures[:2] == ["PistoSeg, seed 0: refiner: it broke.", "PistoSeg, seed 1: refiner: it broke."]
    assert result.failures[2] == "again, seed 0: needs refiner, which failed in PistoSeg, seed 0"
    # Both images stages came before all rows; the first row made the mosaics, and so on up to the refiner.
    first, _, second, third = (row.runs[0] for row in result.rows)
    assert set(first.computed) == {"synthesis", "preliminary", "pseudo_masks", "classifier", "cams"}
    assert set(first.reused) == {"patches", "validation"}
    assert set(second.computed) == {"precise", "evaluation"}
    assert set(third.reused) == {"patches", "validation", "synthesis"}
    assert result.rows[2].seconds("computed") == 8.0
    assert "preliminary" not in third.artifacts
    assert result.published == "wsss4luad"
    assert result.rows[2].paper.miou == 0.5735
    assert sorted(item.name for item in (tmp_path / "w" / "ablations" / "own").iterdir()) == [
        "ablation.csv",
        "ablation.json",
        "ablation.md",
    ]


def test_rows_whose_networks_cannot_be_trained_are_reported_together_before_the_first_one_runs(
    config, pipeline, tmp_path
):
    (synthesized, pseudo, full) = TABLES["table1"].rows
    table = Table("own", "Own", (synthesized, full, Row("again", full.overrides)))
    refiner = config.refiner.model_copy(update={"weights": "/nowhere/b.pth", "initial": "imagenet"})
    missing = config.model_copy(update={"refiner": refiner})
    workspace = Workspace(str(tmp_path / "w"))
    with pytest.raises(PistoSegError, match=r"'PistoSeg', 'again': /nowhere/b\.pth: refiner\.weights") as caught:
        ablation.run(table, missing, workspace, seeds=2)
    assert synthesized.label not in str(caught.value)
    assert {call[0] for call in pipeline} == {"patches", "validation"}
    assert ablation.run(Table("own", "Own", (synthesized, pseudo)), missing, workspace).failures == []


def test_an_outage_is_no_fault_of_a_row_whose_networks_are_looked_at(config, pipeline, tmp_path, monkeypatch):
    def check(*arguments):
        raise UnavailableError("the storage is away")

    monkeypatch.setattr(ablation, "check_trainings", check)
    with pytest.raises(UnavailableError, match=r"^the storage is away"):
        ablation.run(TABLES["table1"], config, Workspace(str(tmp_path / "w")))


def breaking(monkeypatch, mask, error):
    """A pipeline whose precise model with some masks ends with an error."""
    fake = ablation.run_pipeline

    def run_pipeline(config, workspace, targets, **named):
        if "evaluation" in targets and config.precise.masks == mask:
            fake(config, workspace, ("synthesis",), **named)
            named["hooks"].begun(plan(config, ("precise",))[-1])
            raise error
        return fake(config, workspace, targets, **named)

    monkeypatch.setattr(ablation, "run_pipeline", run_pipeline)


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory: RuntimeError: CUDA out of"),
        (ray.train.WorkerGroupError("workers failed", {0: PistoSegError("the loss is nan")}), "the loss is nan."),
    ],
)
def test_a_row_that_ends_with_any_error_is_a_failed_row_of_a_table_that_is_written(
    config, pipeline, tmp_path, monkeypatch, error, problem
):
    breaking(monkeypatch, "synthesized", error)
    out = tmp_path / "out"
    table = Table("own", "Own", TABLES["table1"].rows[:2])
    result = ablation.run(table, config, Workspace(str(tmp_path)), out=str(out))
    assert result.rows[0].runs[0].problem.startswith(problem)
    assert result.rows[1].mean("miou") == 0.5
    assert json.loads((out / "ablation.json").read_text())["rows"][1]["mean"]["miou"] == 0.5


@pytest.mark.parametrize(
    ("error", "tried"), [(ray.exceptions.NodeDiedError("gone"), True), (PistoSegError("the loss is nan"), False)]
)
def test_rows_that_want_what_a_lost_process_was_at_are_tried_all_the_same(
    config, pipeline, tmp_path, monkeypatch, error, tried
):
    breaking(monkeypatch, "synthesized", error)
    job = prepare(Table("own", "Own", TABLES["table1"].rows[:1]), config)[0][0]
    failed = {}
    for _ in range(2):
        last = ablation._run(job, Workspace(str(tmp_path)), Progress(), None, failed)
        assert last.problem
    assert last.problem.startswith("needs") != tried


def test_a_row_that_is_refused_before_its_first_stage_spoils_no_other_row(config, pipeline, tmp_path, monkeypatch):
    fake = ablation.run_pipeline

    def run_pipeline(config, workspace, targets, **named):
        if "evaluation" in targets and config.precise.masks == "synthesized":
            raise PistoSegError("it is refused")
        return fake(config, workspace, targets, **named)

    monkeypatch.setattr(ablation, "run_pipeline", run_pipeline)
    table = Table("own", "Own", TABLES["table1"].rows[:2])
    result = ablation.run(table, config, Workspace(str(tmp_path)))  # both rows need the mosaics
    assert result.rows[0].runs[0].problem == "it is refused."
    assert result.rows[1].mean("miou") == 0.5


@pytest.mark.parametrize("wrap", [lambda error: error, lambda error: ray.train.WorkerGroupError("failed", {0: error})])
def test_an_outage_ends_the_ablation_and_leaves_the_table_before(config, pipeline, tmp_path, monkeypatch, wrap):
    out = tmp_path / "out"
    table = Table("own", "Own", TABLES["table1"].rows[:2])
    ablation.run(table, config, Workspace(str(tmp_path)), out=str(out))
    before = (out / "ablation.json").read_bytes()
    breaking(monkeypatch, "pseudo", wrap(UnavailableError("no space is left on the disk")))
    with pytest.raises(UnavailableError):
        ablation.run(table, config, Workspace(str(tmp_path)), out=str(out))
    assert (out / "ablation.json").read_bytes() == before


def test_an_ablation_that_is_run_again_computes_nothing(config, pipeline, tmp_path):
    workspace, out = Workspace(str(tmp_path / "w")), str(tmp_path / "out")
    table = Table("own", "Own", TABLES["table1"].rows[:2])
    first = ablation.run(table, config, workspace, out=out)
    pipeline.clear()
    second = ablation.run(table, config, workspace, out=out)
    assert pipeline == []
    assert [row.runs[0].scores for row in second.rows] == [row.runs[0].scores for row in first.rows]
    assert {row.seconds("computed") for row in second.rows} == {0}


TWO_ROWS = Table("own", "Own", TABLES["table1"].rows[:2])


def test_a_table_of_other_settings_or_fewer_seeds_does_not_replace_one(config, pipeline, tmp_path):
    workspace, file = Workspace(str(tmp_path)), tmp_path / "ablations" / "own" / "ablation.json"
    ablation.run(TWO_ROWS, config, workspace)
    ablation.run(TWO_ROWS, config, workspace, seeds=2)
    before = file.read_bytes()
    pipeline.clear()
    for changed, seeds in (
        (with_overrides(config, {"precise.lr": 0.02}), 2),
        (with_overrides(config, {"data.validation": "s3://bucket/other"}), 2),
        (with_overrides(config, {"seed": 1}), 1),
        (config, 1),
    ):
        with pytest.raises(PistoSegError, match=r"holds a table of other settings.*another --out") as caught:
            ablation.run(TWO_ROWS, changed, workspace, seeds=seeds)
        assert caught.value.file == str(file.parent)
    assert pipeline == []
    assert file.read_bytes() == before
    elsewhere = with_overrides(config, {"compute.workers": 2, "tracking.experiment": "x", "storage.profile": "me"})
    ablation.run(TWO_ROWS, elsewhere, workspace, seeds=2)
    assert sorted(item.name for item in file.parent.iterdir()) == ["ablation.csv", "ablation.json", "ablation.md"]


def test_a_table_of_before_that_does_not_say_its_settings_is_replaced_and_a_damaged_one_named(
    config, pipeline, tmp_path
):
    ablation.run(TWO_ROWS, config, Workspace(str(tmp_path)))
    file = tmp_path / "ablations" / "own" / "ablation.json"
    values = json.loads(file.read_text())
    del values["settings"]
    file.write_text(json.dumps(values))
    ablation.run(TWO_ROWS, with_overrides(config, {"precise.lr": 0.02}), Workspace(str(tmp_path)))
    assert "settings" in json.loads(file.read_text())
    file.write_text("{")
    with pytest.raises(PistoSegError, match=r"ablation\.json: is damaged: .*delete that file"):
        ablation.run(TWO_ROWS, config, Workspace(str(tmp_path)))


def test_another_table_does_not_replace_one_in_the_same_folder(config, pipeline, tmp_path):
    workspace, out = Workspace(str(tmp_path / "w")), tmp_path / "out"
    ablation.run(TWO_ROWS, config, workspace, out=str(out))
    before = (out / "ablation.json").read_bytes()
    with pytest.raises(PistoSegError, match=r"holds a table of other settings.*another --out"):
        ablation.run(Table("other", "Other", TWO_ROWS.rows), config, workspace, out=str(out))
    assert (out / "ablation.json").read_bytes() == before
    (out / "ablation.json").write_text("{}")
    ablation.run(TWO_ROWS, config, workspace, out=str(out))
    assert json.loads((out / "ablation.json").read_text())["table"] == "own"


def test_of_two_ablations_into_one_folder_the_second_waits_and_is_then_refused(config, pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "POLL_S", 0.02)
    workspace, said, refused = Workspace(str(tmp_path)), [], []
    other = with_overrides(config, {"precise.lr": 0.02})

    def second():
        try:
            ablation.run(TWO_ROWS, other, workspace, progress=SimpleNamespace(say=said.append))
        except PistoSegError as error:
            refused.append(str(error))

    thread = threading.Thread(target=second)
    with monkeypatch.context() as patch:
        patch.setattr(ablation, "_check_trainings", lambda *_: (thread.start(), wait_for(lambda: said)))
        ablation.run(TWO_ROWS, config, workspace)
    thread.join()
    assert "holds a table of other settings" in refused[0]
    assert [text.partition(" on ")[0] for text in said] == [f"waiting: process {os.getpid()}"]
    assert json.loads((tmp_path / "ablations" / "own" / "ablation.json").read_text())["rows"][0]["mean"]["miou"] == 0.4


def test_an_ablation_that_was_cut_off_goes_on_and_one_that_was_taken_over_writes_no_table(
    config, pipeline, tmp_path, monkeypatch
):
    folder = tmp_path / "ablations" / "own"

    def interrupt(*_):
        raise KeyboardInterrupt

    def take_over(*_):
        (claim,) = (folder / ".claims").iterdir()
        storage.write_bytes(str(claim.parent / f"{int(claim.stem) + 1:06d}.json"), b"{}")

    with monkeypatch.context() as patch:
        patch.setattr(ablation, "_check_trainings", interrupt)
        with pytest.raises(KeyboardInterrupt):
            ablation.run(TWO_ROWS, config, Workspace(str(tmp_path)))
    assert ablation.run(TWO_ROWS, config, Workspace(str(tmp_path))).failures == []
    before = (folder / "ablation.json").read_bytes()
    monkeypatch.setattr(ablation, "_check_trainings", take_over)
    with pytest.raises(PistoSegError, match="took this over"):
        ablation.run(TWO_ROWS, config, Workspace(str(tmp_path)), seeds=2)
    assert (folder / "ablation.json").read_bytes() == before


def test_the_outline_says_what_is_there_and_what_is_computed_once(config, pipeline, tmp_path):
    workspace = Workspace(str(tmp_path / "w"))
    jobs, _ = prepare(TABLES["table1"], config)
    before = outline(jobs, workspace)
    assert before[0].computed == ("patches", "validation", "synthesis", "precise", "evaluation")
    assert before[1].shared == ("patches", "validation", "synthesis")
    assert before[1].computed == ("preliminary", "pseudo_masks", "precise", "evaluation")
    assert not any(item.reused for item in before)
    ablation.run(Table("own", "Own", TABLES["table1"].rows[:1]), config, workspace)
    after = outline(jobs, workspace)
    assert (after[0].computed, after[0].shared) == ((), ())
    assert set(after[0].reused) == set(before[0].computed)
    assert after[1].reused == ("patches", "validation", "synthesis")


def test_a_data_set_without_validation_images_is_refused(config, pipeline, tmp_path, monkeypatch):
    fake = ablation.run_pipeline

    def without(*arguments, **named):
        artifacts = fake(*arguments, **named)
        artifacts["validation"].summary["images"] = 0
        return artifacts

    monkeypatch.setattr(ablation, "run_pipeline", without)
    with pytest.raises(PistoSegError, match="no validation images"):
        ablation.run(TABLES["table5"], config, Workspace(str(tmp_path / "w")))
    assert {call[0] for call in pipeline} == {"patches", "validation"}


def test_a_dry_run_prints_the_stages_and_writes_nothing(config, tmp_path, capsys):
    arguments = ["ablate", "crop-size", "--preset", "demo", "--data", config.data.uri, "--set", "synthesis.n_h=5"]
    assert main([*arguments, "--workspace", str(tmp_path / "w"), "--dry-run", "--seeds", "2"]) == 0
    printed = capsys.readouterr().out
    assert "H_p = W_p = 32, seed 1" in printed
    assert "left out: H_p = W_p = 224: 160x128 px mosaics are not made of whole crops of 224 px" in printed
    assert not (tmp_path / "w").exists()


def test_an_ablation_of_data_that_is_not_there_says_so(tmp_path, capsys):
    missing = str(tmp_path / "none")
    assert main(["ablate", "table5", "--preset", "demo", "--data", missing, "--dry-run"]) == 2
    assert f"{missing}: data.uri: does not exist" in capsys.readouterr().err
