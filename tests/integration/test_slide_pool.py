"""Workers of slides that die, fail, answer late or are in the way, with processes that really do."""

from __future__ import annotations

import os
import time
from collections import Counter
from contextlib import closing, suppress

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
        """Loads as it is told, and does what a slide's name says."""

        def __init__(self, folder, loads):
            self.folder, self.loads = folder, loads

        def load(self):
            number = 0
            while True:  # until this process has a number that no other one has
                with suppress(FileExistsError), (self.folder / f"load {number}").open("x") as file:
                    file.write(str(os.getpid()))
                    break
                number += 1
            how = self.loads[min(number, len(self.loads) - 1)]
            first = self.folder / "load 0"
            while how == "later" and (not first.stat().st_size or os.path.exists(f"/proc/{first.read_text()}")):
                time.sleep(0.05)
            if how == "fails":
                raise PistoSegError("is no model", file="model.json")
            if how == "dies":
                os._exit(1)

        def segment(self, task):
            name = task.entry.slide_id
            (self.folder / f"{name}.{time.monotonic_ns()}").write_text(str(os.getpid()))
            if name == "slow":
                time.sleep(2.5)
            while name.startswith("both") and len(list(self.folder.glob("both*"))) < 2:
                time.sleep(0.05)
            while name in ("waits", "asked") and not (self.folder / "told").exists():
                time.sleep(0.05)
            if name == "kills" or (name == "once" and len(list(self.folder.glob("once.*"))) == 1):
                time.sleep(0.5)  # until whoever is beside it has begun
                os._exit(1)
            if name == "raises":
                raise PistoSegError("is bad", file=name)
            return os.getpid()

        @ray.method(concurrency_group=ASKED)
        def progress(self):
            return {SlideTask(SlideEntry("asked", "asked.svs")): (10, 3)}

    return Worker


def begun(folder):
    """Processes in which each slide was begun, in the order of the beginnings."""
    found = {}
    for file in sorted(folder.glob("*.*"), key=lambda item: int(item.suffix[1:])):
        found.setdefault(file.stem, []).append(file.read_text())
    return found


def pool_of(folder, names, size=1, together=2, loads=("works",)):
    """A pool whose workers load one after the other as `loads` says, whose last word holds for all that come later."""
    actor = ray.remote(concurrency_groups={ASKED: 1})(worker_class()).options(max_concurrency=together, num_cpus=0)
    tasks = [SlideTask(SlideEntry(name, f"{name}.svs")) for name in names]
    say = (folder / "told").write_text
    return SlidePool(lambda: actor.remote(folder, loads), size, together, tasks, say)


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
    with pytest.raises(PistoSegError, match=r"model\.json: is no model"):
        run(pool_of(tmp_path, ["a"], loads=["fails"]))
    assert len(list(tmp_path.glob("load *"))) == 1


def test_a_node_whose_worker_fails_before_others_have_loaded_does_not_end_the_run(tmp_path):
    found = run(pool_of(tmp_path, ["waits"], size=2, loads=["fails", "later", "fails"]))
    assert isinstance(found["waits"], int)
    assert "a worker is given up, the others go on" in (tmp_path / "told").read_text()


@pytest.mark.parametrize("how", ["fails", "dies"])
def test_where_no_worker_can_load_none_is_said_to_be_given_up_for_others(tmp_path, how):
    with pytest.raises(PistoSegError, match="is no model" if how == "fails" else "3 worker processes in a row died"):
        run(pool_of(tmp_path, ["a"], size=3, loads=[how]))
    assert not (tmp_path / "told").exists()


def test_workers_that_die_as_they_start_end_the_run(tmp_path):
    with pytest.raises(PistoSegError, match="3 worker processes in a row died as they loaded"):
        run(pool_of(tmp_path, ["a"], loads=["dies"]))


def test_workers_that_die_together_as_with_their_node_are_no_row(tmp_path):
    found = run(pool_of(tmp_path, ["a"], size=3, loads=["dies", "dies", "dies", "works"]))
    assert isinstance(found["a"], int)


def test_the_others_go_on_without_a_worker_whose_replacements_can_not_load(tmp_path):
    found = run(pool_of(tmp_path, ["once", "waits"], size=2, together=1, loads=["works", "works", "fails"]))
    assert found["once"] == found["waits"]
    assert (tmp_path / "told").read_text() == (
        "warning: a worker is given up, the others go on: it could not load the model (model.json: is no model)"
    )
    assert len(list(tmp_path.glob("load *"))) == 5


def test_a_run_ends_when_no_worker_is_left_that_can_load(tmp_path):
    with pytest.raises(PistoSegError, match=r"model\.json: is no model"):
        run(pool_of(tmp_path, ["once"], loads=["works", "fails"]))
    assert len(list(tmp_path.glob("load *"))) == 4


def test_a_worker_whose_node_is_taken_away_while_it_loads_has_not_failed(tmp_path, monkeypatch):
    pool, failed = pool_of(tmp_path, ["a"]), []
    monkeypatch.setattr(pool, "_add_worker", failed.append)
    for preempted in (True, False):
        pool._take_failed_start(ray.exceptions.RayActorError(preempted=preempted), 1)
    assert failed == [1, 2]


def test_a_worker_takes_no_second_slide_that_another_one_could_begin(tmp_path):
    found = run(pool_of(tmp_path, ["both 0", "both 1"], size=2))
    assert found["both 0"] != found["both 1"]


def test_workers_are_asked_how_far_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(slide_pool, "ASK_S", 0.2)
    told = []

    def tell(*what):
        told.append(what)
        (tmp_path / "told").touch()  # the slide ends

    run(pool_of(tmp_path, ["asked"]), tell)
    assert {(task.entry.slide_id, *tiles) for task, *tiles in told} == {("asked", 10, 3)}


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
