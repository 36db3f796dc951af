"""Workers of slides that die, fail, answer late or are in the way, with processes that really do."""

from __future__ import annotations

import os
import time
from collections import Counter
from contextlib import closing

import pytest
import ray
from processes import wait_for

from pistoseg.errors import PistoSegError, UnavailableError, explained
from pistoseg.slides.source import SlideEntry
from pistoseg.stages import slide_pool
from pistoseg.stages.slide_pool import SlidePool
from pistoseg.stages.slide_worker import ASKED, SlideTask

pytestmark = pytest.mark.usefixtures("local_ray")


def worker_class():
    """A class that its processes get by value: they can't import this module."""

    class Worker:
        """Does what a slide's name says."""

        def __init__(self, folder):
            self.folder = folder

        def load(self):
            if (self.folder / "no model").exists():
                raise PistoSegError("is no model", file="model.json")
            if (self.folder / "dies at start").exists():
                os._exit(1)

        def segment(self, task):
            name = task.entry.slide_id
            (self.folder / f"{name}.{time.monotonic_ns()}").write_text(str(os.getpid()))
            if name.startswith("slow"):
                time.sleep(2.5)
            while name.startswith("both") and len(list(self.folder.glob("both*"))) < 2:
                time.sleep(0.05)
            if name == "kills" or (name == "once" and len(list(self.folder.glob("once.*"))) == 1):
                time.sleep(0.5)  # until whoever is beside it has begun
                os._exit(1)
            if name == "raises":
                raise PistoSegError("is bad", file=name)
            return os.getpid()

        @ray.method(concurrency_group=ASKED)
        def progress(self):
            return {SlideTask(SlideEntry("slow", "slow.svs")): (10, 3)}

    return Worker


def begun(folder):
    """Processes in which each slide was begun, in the order of the beginnings."""
    found = {}
    for file in sorted(folder.glob("*.*"), key=lambda item: int(item.suffix[1:])):
        found.setdefault(file.stem, []).append(file.read_text())
    return found


def pool_of(folder, names, size=1, together=2):
    actor = ray.remote(concurrency_groups={ASKED: 1})(worker_class()).options(max_concurrency=together, num_cpus=0)
    tasks = [SlideTask(SlideEntry(name, f"{name}.svs")) for name in names]
    return SlidePool(lambda: actor.remote(folder), size, together, tasks)


def run(pool, tell=lambda *_: None):
    return {task.entry.slide_id: result for task, result in pool.results(tell)}


def test_only_the_slide_that_kills_its_worker_is_given_up(tmp_path):
    told = []
    found = run(pool_of(tmp_path, ["a", "kills", "slow", "b", "once", "c"]), lambda *what: told.append(what))
    lost = Counter(task.entry.slide_id for task, *tiles in told if tiles == [0, 0])
    assert lost["kills"] == 2
    assert lost["once"] == 1
    killed = found.pop("kills")
    assert str(killed).startswith("kills.svs: the worker process died 2 times at it.")
    assert isinstance(killed, UnavailableError)  # which leaves earlier results
    assert isinstance(killed.__cause__, ray.exceptions.RayActorError)
    assert set(found) == {"a", "slow", "b", "once", "c"}
    assert all(isinstance(result, int) for result in found.values())
    times = Counter({name: len(processes) for name, processes in begun(tmp_path).items()})
    assert times["kills"] == times["once"] == 2
    # Whatever was beside one that died is begun again, but never a third time: the second time it is alone.
    assert max(times.values()) == 2


def test_what_a_task_raises_is_its_result_and_the_worker_goes_on(tmp_path):
    found = run(pool_of(tmp_path, ["raises", "a"], together=1))
    assert str(explained(found["raises"])) == "raises: is bad."
    assert begun(tmp_path)["raises"] == [str(found["a"])]


def test_a_model_that_can_not_be_loaded_ends_the_run(tmp_path):
    (tmp_path / "no model").touch()
    with pytest.raises(PistoSegError, match=r"model\.json: is no model"):
        run(pool_of(tmp_path, ["a"]))


def test_workers_that_die_as_they_start_end_the_run(tmp_path):
    (tmp_path / "dies at start").touch()
    with pytest.raises(PistoSegError, match="3 worker processes in a row died as they loaded"):
        run(pool_of(tmp_path, ["a"]))


def test_a_worker_takes_no_second_slide_that_another_one_could_begin(tmp_path):
    found = run(pool_of(tmp_path, ["both 0", "both 1"], size=2))
    assert found["both 0"] != found["both 1"]


def test_workers_are_asked_how_far_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(slide_pool, "ASK_S", 0.2)
    told = []
    run(pool_of(tmp_path, ["slow"]), lambda *what: told.append(what))
    assert told
    assert {(task.entry.slide_id, *tiles) for task, *tiles in told} == {("slow", 10, 3)}


def test_tasks_come_and_go_while_others_run(tmp_path):
    pool, seen = pool_of(tmp_path, ["a", "b", "b", "c"], together=1), []
    for task, _ in pool.results(lambda *_: None):
        seen.append(task.entry.slide_id)
        if seen == ["a"]:
            pool.drop("b")
            pool.add_first(SlideTask(SlideEntry("d", "d.svs")))
    assert seen == ["a", "d", "c"]


def test_no_worker_stays_when_nobody_wants_more(tmp_path):
    with closing(pool_of(tmp_path, ["a", "slow"]).results(lambda *_: None)) as results:
        _, process = next(results)
    wait_for(lambda: not os.path.exists(f"/proc/{process}"))
