"""How far the slides of a batch are: told by their workers, asked by the driver.

This module imports nothing that would make the board's process slow to start: with PyTorch it took 618 MB.
"""

from __future__ import annotations

import time
from typing import Any

TELL_S = 1.0
"""How often a worker tells the board of its tiles."""


class Board:
    """An actor that collects what the workers say, for the driver to show and for workers of one slide to meet.

    What it keeps of a slide's progress goes when the slide ends, so that `fetch` looks only at the slides in work.
    """

    def __init__(self) -> None:
        self._begun: dict[tuple[str, int], int] = {}
        self._planned: dict[str, int] = {}
        self._tiles: dict[str, dict[int, int]] = {}
        self._tiles_of_ended = 0
        self._works: dict[str, dict[int, dict[str, Any]]] = {}
        self._given_up: set[str] = set()
        self._ended: set[str] = set()

    def begin(self, slide_id: str, part: int) -> int:
        """How often this share of a slide was begun, this time included."""
        key = (slide_id, part)
        self._begun[key] = self._begun.get(key, 0) + 1
        self._tiles.get(slide_id, {}).pop(part, None)  # of a worker that died at it
        return self._begun[key]

    def plan(self, slide_id: str, tiles: int) -> None:
        """Tiles of a whole slide."""
        if slide_id not in self._ended:
            self._planned[slide_id] = tiles

    def tiles(self, slide_id: str, part: int, count: int) -> None:
        """That many more tiles are done."""
        if slide_id in self._ended:  # a share of a slide whose other share failed
            self._tiles_of_ended += count
            return
        parts = self._tiles.setdefault(slide_id, {})
        parts[part] = parts.get(part, 0) + count

    def share_done(self, slide_id: str, part: int, parts: int, work: dict[str, Any]) -> list[dict[str, Any]] | None:
        """A share of a slide is there; what all shares took when it is the last one, otherwise None."""
        works = self._works.setdefault(slide_id, {})
        works[part] = work
        return list(works.values()) if len(works) == parts else None

    def give_up(self, slide_id: str) -> bool:
        """Whether this is the first time that the slide failed."""
        first = slide_id not in self._given_up
        self._given_up.add(slide_id)
        return first

    def given_up(self, slide_id: str) -> bool:
        """Whether a share of the slide has failed."""
        return slide_id in self._given_up

    def end(self, slide_id: str) -> None:
        """A slide is completed or failed."""
        self._ended.add(slide_id)
        self._planned.pop(slide_id, None)
        self._works.pop(slide_id, None)
        self._tiles_of_ended += sum(self._tiles.pop(slide_id, {}).values())

    def fetch(self) -> tuple[float, int]:
        """Slides done, those in work in part, and tiles done."""
        tiles = {slide_id: sum(parts.values()) for slide_id, parts in self._tiles.items()}
        shares = (tiles.get(slide_id, 0) / planned for slide_id, planned in self._planned.items() if planned)
        return len(self._ended) + sum(min(0.99, share) for share in shares), self._tiles_of_ended + sum(tiles.values())


class TileCount:
    """Finished tiles of a slide on their way to the board, in few messages: one actor hears of all workers.

    Args:
        board: the actor.
        slide_id: the slide.
        part: which share of it.
    """

    def __init__(self, board: Any, slide_id: str, part: int) -> None:
        self.board, self.slide_id, self.part = board, slide_id, part
        self.count, self.sent = 0, time.monotonic()

    def __call__(self, count: int) -> None:
        """That many more are done."""
        self.count += count
        if time.monotonic() - self.sent >= TELL_S:
            self.send()

    def send(self) -> None:
        """Tell the board what it has not heard of."""
        self.board.tiles.remote(self.slide_id, self.part, self.count)
        self.count, self.sent = 0, time.monotonic()
