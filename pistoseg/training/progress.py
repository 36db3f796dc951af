"""Where a training is: told by its workers, asked by the driver and by the actors that make its samples."""

from __future__ import annotations

import asyncio


class TrainingProgress:
    """An asyncio actor, one for a training; this module imports nothing that would make its process slow to start.

    A sample actor that is far enough ahead of the trainer waits here, in its task. Were it to go on, Ray Data would
    hold the finished blocks back at their memory limit, and its scheduler, which polls finished blocks that it may not
    take, would keep a whole CPU busy: half of a two-core machine.
    """

    def __init__(self) -> None:
        self.done, self.used, self.note = 0, 0, ""
        self.rows: list[dict[str, float]] = []
        self._moved = asyncio.Event()

    async def set_used(self, used: int) -> None:
        """Say how many samples, counted from epoch 0, are used."""
        self.used = used
        self._moved.set()
        self._moved = asyncio.Event()

    async def wait(self, used: int) -> None:
        """Return once at least `used` samples are used."""
        while self.used < used:
            await self._moved.wait()

    async def step(self, done: int, used: int, note: str) -> None:
        """Say that so many optimizer steps are done, with so many samples."""
        self.done, self.note = done, note
        await self.set_used(used)

    async def epoch(self, row: dict[str, float]) -> None:
        """Hand over the metrics of an epoch."""
        self.rows.append(row)

    async def fetch(self) -> tuple[int, str, list[dict[str, float]]]:
        """Steps done, the note of the last one, and the metrics of the epochs since the last call."""
        rows, self.rows = self.rows, []
        return self.done, self.note, rows
