"""How far a batch of slides is said to be."""

from __future__ import annotations

import pytest

from pistoseg.stages import slide_progress
from pistoseg.stages.slide_progress import SlideProgress


@pytest.fixture
def shown():
    return []


@pytest.fixture
def progress(shown):
    return SlideProgress(4, lambda *what: shown.append(what))


def test_slides_in_work_count_in_part(progress):
    for slide_id, planned, tiles in (("a", 100, 90), ("b", 200, 50), ("c", 100, 300)):
        progress.see(slide_id, 0, planned, tiles)
    progress.end("a", 100)
    done, tiles = progress.so_far()
    assert done == pytest.approx(1 + 0.25 + 0.99)
    assert tiles == 450


def test_shares_of_a_slide_add_up_and_a_slide_that_failed_leaves_its_tiles(progress):
    progress.see("a", 0, 100, 20)
    progress.see("a", 1, 100, 30)
    assert progress.so_far() == (pytest.approx(0.5), 50)
    progress.end("a")
    assert progress.so_far() == (1, 50)


def test_a_share_that_is_begun_again_counts_anew(progress):
    progress.see("a", 0, 100, 80)
    progress.see("a", 0, 100, 0)
    assert progress.so_far() == (0, 0)


def test_a_slide_that_ended_stays_ended_whatever_its_other_shares_say(progress):
    progress.see("a", 0, 100, 7)
    progress.end("a")
    progress.see("a", 1, 100, 50)
    assert progress.so_far() == (1, 7)


def test_every_end_is_shown_and_what_lies_between_from_time_to_time(monkeypatch, shown):
    clock = [0.0]
    monkeypatch.setattr(slide_progress.time, "monotonic", lambda: clock[0])
    progress = SlideProgress(4, lambda *what: shown.append(what))
    for step in range(100):  # ten seconds
        clock[0] += 0.1
        progress.see("a", 0, 1000, 8 * step)
    assert 15 <= len(shown) <= 20
    shown.clear()
    progress.end("a", 1000)
    assert shown == [(1, 4, "1,000 tiles, 100.0 a second")]
