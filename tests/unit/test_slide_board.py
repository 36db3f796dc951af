"""What the workers of a batch of slides tell each other and the driver."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from pistoseg.stages import slide_board
from pistoseg.stages.slide_board import Board, TileCount


def test_slides_in_work_count_in_part():
    board = Board()
    for slide_id, planned, tiles in (("a", 100, 100), ("b", 200, 50), ("c", 100, 300)):
        board.begin(slide_id, 0)
        board.plan(slide_id, planned)
        board.tiles(slide_id, 0, tiles)
    board.end("a")
    done, tiles = board.fetch()
    assert done == pytest.approx(1 + 0.25 + 0.99)
    assert tiles == 450


def test_tiles_of_a_worker_that_died_are_forgotten():
    board = Board()
    assert board.begin("a", 0) == 1
    board.plan("a", 100)
    board.tiles("a", 0, 80)
    board.tiles("a", 1, 5)
    assert board.begin("a", 0) == 2
    assert board.fetch() == (pytest.approx(0.05), 5)


def test_a_slide_that_ended_stays_ended_whatever_its_other_shares_say():
    board = Board()
    board.begin("a", 0)
    board.give_up("a")
    board.end("a")
    board.begin("a", 1)
    board.plan("a", 100)
    board.tiles("a", 1, 7)
    assert board.fetch() == (1, 7)


def test_the_last_share_hears_of_all():
    board = Board()
    assert board.share_done("a", 1, 2, {"tiles": 3}) is None
    assert sorted(work["tiles"] for work in board.share_done("a", 0, 2, {"tiles": 4})) == [3, 4]


def test_tiles_reach_the_board_in_few_messages(monkeypatch):
    clock, sent = [0.0], []
    monkeypatch.setattr(slide_board.time, "monotonic", lambda: clock[0])
    board = SimpleNamespace(tiles=SimpleNamespace(remote=lambda *message: sent.append(message)))
    count = TileCount(board, "a", 2)
    for _ in range(100):  # ten seconds
        clock[0] += 0.1
        count(8)
    count.send()
    assert 9 <= len(sent) <= 11
    assert {message[:2] for message in sent} == {("a", 2)}
    assert sum(message[2] for message in sent) == 800
