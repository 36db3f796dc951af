"""How far the slides of a batch are."""

from __future__ import annotations

import time
from collections.abc import Callable

SHOW_S = 0.5
"""How often it is shown, at most."""


class SlideProgress:
    """Counts slides and tiles, those of slides in work included.

    What it keeps of a slide's tiles goes when the slide ends, so that it looks only at the slides in work.

    Args:
        total: slides.
        show: takes slides done, those in work in part; all slides; and a remark on tiles.
    """

    def __init__(self, total: int, show: Callable[[float, float, str], None]) -> None:
        self._total, self._show = total, show
        self._parts: dict[str, dict[int, tuple[int, int]]] = {}
        self._ended, self._tiles_of_ended = set[str](), 0
        self._began = self._shown = time.monotonic()

    def see(self, slide_id: str, part: int, planned: int, tiles: int) -> None:
        """A share of a slide, or all of it, has done that many tiles of those planned for the whole slide."""
        if slide_id in self._ended:
            return  # another share of it has failed
        self._parts.setdefault(slide_id, {})[part] = planned, tiles
        if time.monotonic() - self._shown >= SHOW_S:
            self._report()

    def end(self, slide_id: str, tiles: int | None = None) -> None:
        """A slide is completed or failed.

        Args:
            slide_id: which.
            tiles: that it had; None: as many as were seen.
        """
        seen = self._parts.pop(slide_id, {})
        self._tiles_of_ended += sum(done for _, done in seen.values()) if tiles is None else tiles
        self._ended.add(slide_id)
        self._report()

    def so_far(self) -> tuple[float, int]:
        """Slides done, those in work in part, and tiles done."""
        slides, tiles = float(len(self._ended)), self._tiles_of_ended
        for parts in self._parts.values():
            planned, done = max(planned for planned, _ in parts.values()), sum(done for _, done in parts.values())
            slides += min(0.99, done / planned) if planned else 0.0
            tiles += done
        return slides, tiles

    def _report(self) -> None:
        self._shown = time.monotonic()
        slides, tiles = self.so_far()
        self._show(slides, self._total, f"{tiles:,} tiles, {tiles / (self._shown - self._began):.1f} a second")
