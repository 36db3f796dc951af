"""The workers of a batch of slides, seen from its driver: who does what next, and what is to be done when one dies.

Ray Data has pools of actors too. What it adds to them is of no use for tasks of minutes, and its loop, statistics and
autoscaling run all the time: on two CPUs they took a twentieth of these from the network.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from pistoseg.errors import PistoSegError, UnavailableError, below, explained
from pistoseg.redaction import first_line
from pistoseg.stages.slide_worker import SlideTask

ASK_S = 1.0
"""How often workers are asked how far they are."""
MAX_DEATHS = 2
"""A task at which that many workers died is given up."""
MAX_FAILED_STARTS = 3
"""A worker is given up when it and its replacements failed to load the model that many times in a row."""


class SlidePool:
    """Actors that take a task when they have room for one.

    A worker that dies is replaced. What it was at is begun again when all else is done, by a worker that has nothing
    else to do, so that a slide that kills its worker takes no other one with it a second time. Where neither
    a worker nor its replacements can load the model, as on a bad node, the others go on.

    Args:
        start: starts an actor like `SlideWorker`; called again for each that died.
        size: actors.
        together: tasks that one of them is given at a time.
        tasks: to do, in this order.
        say: told of workers that are given up.
    """

    def __init__(
        self,
        start: Callable[[], Any],
        size: int,
        together: int,
        tasks: Iterable[SlideTask],
        say: Callable[[str], None],
    ) -> None:
        self._start, self._together, self._say = start, together, say
        self._todo, self._suspects = deque(tasks), deque[SlideTask]()
        self._deaths: Counter[SlideTask] = Counter()
        self._has_loaded = False  # any worker, the model
        self._loads: dict[Any, list[SlideTask]] = {}  # loaded workers, and what each is at
        self._starting: dict[ray.ObjectRef, tuple[Any, int]] = {}  # and how many failed in its place before
        self._undecided: list[tuple[RayError, int]] = []  # failed before any has loaded, and how many there before
        self._running: dict[ray.ObjectRef, tuple[Any, SlideTask]] = {}
        self._asked: dict[ray.ObjectRef, Any] = {}
        self._asked_at = 0.0
        self._size = size

    def add_first(self, task: SlideTask) -> None:
        """Have this done next."""
        self._todo.appendleft(task)

    def drop(self, slide_id: str) -> None:
        """Forget what has not begun of a slide."""
        for tasks in (self._todo, self._suspects):
            kept = [task for task in tasks if task.entry.slide_id != slide_id]
            tasks.clear()
            tasks.extend(kept)

    def results(self, tell: Callable[[SlideTask, int, int], None]) -> Iterator[tuple[SlideTask, Any]]:
        """Do all tasks, and those that are added meanwhile.

        Args:
            tell: told of tasks in work: tiles of the slide, and how many are done by this task; of one whose worker
                died, 0 and 0.

        Yields:
            Tasks as they end, each with what its worker returned; or raised, or an error that says that workers died.

        Raises:
            PistoSegError: no worker can load the model, at first or any more.
        """
        try:
            for _ in range(self._size):
                self._add_worker()
            while self._todo or self._suspects or self._running:
                self._hand_out()
                waiting = [*self._starting, *self._running, *self._asked]
                ray.wait(waiting, timeout=ASK_S)  # for the first one; then all that are there
                for reference in ray.wait(waiting, num_returns=len(waiting), timeout=0)[0]:
                    yield from self._take(reference, tell)
                self._ask()
        finally:
            for worker in (*self._loads, *(starting for starting, _ in self._starting.values())):
                ray.kill(worker)

    def _add_worker(self, failed: int = 0) -> None:
        worker = self._start()
        self._starting[worker.load.remote()] = worker, failed

    def _hand_out(self) -> None:
        """Give tasks to workers: a first one to each, and a second one where enough are left for those without."""
        for worker, at in self._loads.items():
            if not at and (self._todo or self._suspects):
                self._give(worker, (self._todo or self._suspects).popleft())
        idle = len(self._starting) + sum(not at for at in self._loads.values())
        for worker, at in self._loads.items():
            while at and len(at) < self._together and len(self._todo) > idle:
                self._give(worker, self._todo.popleft())

    def _give(self, worker: Any, task: SlideTask) -> None:
        self._loads[worker].append(task)
        self._running[worker.segment.remote(task)] = worker, task

    def _take(
        self, reference: ray.ObjectRef, tell: Callable[[SlideTask, int, int], None]
    ) -> Iterator[tuple[SlideTask, Any]]:
        """What an answer means."""
        if reference in self._starting:
            self._take_start(reference)
        elif reference in self._asked:
            self._take_progress(reference, tell)
        else:
            yield from self._take_result(reference, tell)

    def _take_start(self, reference: ray.ObjectRef) -> None:
        worker, failed = self._starting.pop(reference)
        try:
            ray.get(reference)
        except RayError as error:
            ray.kill(worker)
            self._take_failed_start(error, failed)
        else:
            self._has_loaded = True
            self._loads[worker] = []
            while self._undecided:
                self._take_failed_start(*self._undecided.pop())

    def _take_failed_start(self, error: RayError, failed: int) -> None:
        """Try again in a worker's place, in which so many have failed before, or give it up while there are others.

        Until one has loaded the model, nobody knows whether the model is bad or a node: those still starting decide.
        """
        actor_error = error if isinstance(error, RayActorError) else None
        died = not isinstance(error, RayTaskError) and not (actor_error and actor_error.actor_init_failed)
        counted = failed + (not (actor_error and actor_error.preempted))
        may_try = counted < MAX_FAILED_STARTS and (died or self._has_loaded)
        if may_try:
            self._add_worker(counted)
        elif self._starting and not self._has_loaded:
            self._undecided.append((error, failed))
        elif self._loads or self._starting:
            problem = first_line(explained(error) or next(below(error)))
            self._say(f"warning: a worker is given up, the others go on: it could not load the model ({problem})")
        elif died:
            raise PistoSegError(
                f"{MAX_FAILED_STARTS} worker processes in a row died as they loaded the model",
                remedy="give the workers more memory, or take fewer --workers",
            ) from error
        else:
            raise error

    def _take_progress(self, reference: ray.ObjectRef, tell: Callable[[SlideTask, int, int], None]) -> None:
        worker = self._asked.pop(reference)
        try:
            found = ray.get(reference)
        except RayError:
            return  # its tasks say what became of it
        for task in self._loads.get(worker, ()):
            if task in found:
                tell(task, *found[task])

    def _take_result(
        self, reference: ray.ObjectRef, tell: Callable[[SlideTask, int, int], None]
    ) -> Iterator[tuple[SlideTask, Any]]:
        worker, task = self._running.pop(reference)
        try:
            result = ray.get(reference)
        except RayTaskError as error:
            result = error
        except RayError as error:
            if worker in self._loads:
                del self._loads[worker]
                ray.kill(worker)  # Ray may only have lost sight of it
                self._add_worker()
            preempted = isinstance(error, RayActorError) and error.preempted
            self._deaths[task] += not preempted
            tell(task, 0, 0)
            if self._deaths[task] < MAX_DEATHS:
                self._suspects.append(task)
                return
            result = UnavailableError(  # mostly for want of memory: it says nothing of the slide
                f"the worker process died {MAX_DEATHS} times at it",
                file=task.entry.uri,
                remedy="give the workers more memory, or a smaller --batch-size",
            )
            result.__cause__ = error  # in which Ray says what it knows of the end
        if worker in self._loads:
            self._loads[worker].remove(task)
        yield task, result

    def _ask(self) -> None:
        """Ask the workers how far they are, if the time has come; those that have not answered are not asked again."""
        if time.monotonic() - self._asked_at < ASK_S:
            return
        self._asked_at = time.monotonic()
        asked = set(self._asked.values())
        self._asked |= {worker.progress.remote(): worker for worker in self._loads if worker not in asked}
