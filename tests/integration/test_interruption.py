"""SIGKILL at the worst moments: what was finished stays, what was begun goes on."""

import json
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from conftest import NETWORK, TINY, committed, contents
from processes import kill_when

from pistoseg.artifacts import CHECKPOINTS, Artifact, Workspace
from pistoseg.config import load_config
from pistoseg.pipeline import run_pipeline
from pistoseg.training.trainer import SNAPSHOT, _last_history

pytestmark = pytest.mark.processes
COUNT = 5000
EPOCHS = 8


@dataclass
class Story:
    """What was in the workspace when each run was killed, and at the end; and the training of one that was never."""

    workspace: Path
    parts: dict[str, tuple[int, str]] = field(default_factory=dict)
    epochs: list[dict[str, float]] = field(default_factory=list)
    finished: dict[str, dict[str, dict[str, tuple[int, str]]]] = field(default_factory=dict)
    whole: Artifact | None = None


@pytest.fixture(scope="module")
def story(local_ray, tmp_path_factory, cohort):
    """One workspace: killed while mosaics are made, and between a training's epochs; then trained to its end."""
    folder = tmp_path_factory.mktemp("killed")
    settings = TINY | {
        "synthesis": TINY["synthesis"] | {"count": COUNT},
        "preliminary": NETWORK | {"epochs": EPOCHS, "samples_per_epoch": 64},
        "precise": NETWORK | {"epochs": 1, "patch_size": 64, "masks": "synthesized"},
        "tracking": {"enabled": False},
        "compute": {"device": "cpu", "workers": 1},
    }
    (folder / "killed.yaml").write_text(yaml.safe_dump(settings))
    story = Story(folder / "workspace")
    overrides = [f"data.uri={json.dumps(str(cohort))}"]
    command = [sys.executable, "-m", "pistoseg", "train", "--config", str(folder / "killed.yaml")]
    command += ["--set", *overrides, "--workspace", str(story.workspace)]

    kill_when(command, folder, lambda: len(list(story.workspace.glob("synthesis/*/mosaics/part-*.parquet"))) >= 3)
    story.finished["synthesis"] = snapshot(story.workspace)
    (mosaics,) = story.workspace.glob("synthesis/*/mosaics")
    # One that was being written begins with a dot.
    story.parts = {name: part for name, part in contents(mosaics).items() if not name.startswith(".")}

    kill_when(command, folder, lambda: bool(list(story.workspace.glob(f"preliminary/*/{CHECKPOINTS}/{SNAPSHOT}"))))
    story.finished["epoch"] = snapshot(story.workspace)
    (training,) = story.workspace.glob("preliminary/*")
    story.epochs = _last_history(str(training))

    config = load_config(None, None, str(folder / "killed.yaml"), overrides)
    run_pipeline(config, Workspace(str(story.workspace)), ("preliminary",))
    story.finished["end"] = snapshot(story.workspace)

    other = folder / "never killed"
    for stage in ("patches", "validation", "synthesis"):
        shutil.copytree(story.workspace / stage, other / stage)
    story.whole = run_pipeline(config, Workspace(str(other)), ("preliminary",))["preliminary"]
    return story


def snapshot(workspace):
    return {stage: contents(folder) for stage, folder in committed(workspace).items()}


def test_a_kill_during_synthesis_keeps_the_parts_that_were_done(story):
    assert set(story.finished["synthesis"]) == {"patches", "validation"}
    assert 3 <= len(story.parts) < -(-COUNT // 256)
    (mosaics,) = story.workspace.glob("synthesis/*/mosaics")
    after = contents(mosaics)
    assert len(after) == -(-COUNT // 256)
    assert {name: after[name] for name in story.parts} == story.parts


def test_a_kill_in_an_epoch_goes_on_from_the_last_epoch(story):
    assert set(story.finished["epoch"]) == {"patches", "validation", "synthesis"}
    assert 1 <= len(story.epochs) < EPOCHS
    (file,) = story.workspace.glob("preliminary/*/epochs.json")
    rows = json.loads(file.read_text())
    assert [row["epoch"] for row in rows] == list(range(EPOCHS))
    assert rows[: len(story.epochs)] == story.epochs


@pytest.mark.parametrize("moment", ["synthesis", "epoch"])
def test_what_was_finished_is_never_touched_again(story, moment):
    end = story.finished["end"]
    assert {stage: end[stage] for stage in story.finished[moment]} == story.finished[moment]


def test_a_training_that_was_killed_ends_as_if_it_had_not_been(story):
    (file,) = story.workspace.glob("preliminary/*/epochs.json")
    killed, whole = (json.loads(Path(item).read_text()) for item in (file, story.whole.path("epochs.json")))
    assert str(file.parent.name) == story.whole.fingerprint
    # Not to the last bit: the killed run's commands train with other numbers of threads than the tests' own Ray.
    assert [row["loss"] for row in killed] == pytest.approx([row["loss"] for row in whole], rel=1e-2)


def test_the_end_has_what_a_run_that_was_never_killed_has(story):
    stages = ("patches", "validation", "synthesis", "preliminary")
    assert set(story.finished["end"]) == set(stages)
    for stage in stages:
        assert len(list(story.workspace.glob(f"{stage}/*"))) == 1, "resumed, not begun anew"
    assert list(story.workspace.glob(f"*/*/{CHECKPOINTS}")) == []
