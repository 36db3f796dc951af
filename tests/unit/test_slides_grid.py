"""Every tile with tissue is read once, in bands, and nothing else is."""

from __future__ import annotations

import numpy as np
import pytest

from pistoseg.pixels import tile_starts
from pistoseg.slides.grid import TilePlan


def tiles_by_hand(width: int, height: int, tile: int, stride: int, tissue: np.ndarray) -> set[tuple[int, int]]:
    """Tiles whose area meets a tissue cell, cell by cell."""
    cell_y, cell_x = height / tissue.shape[0], width / tissue.shape[1]
    wanted = set()
    for y in tile_starts(height, tile, stride):
        for x in tile_starts(width, tile, stride):
            for j, i in np.argwhere(tissue):
                down = min(y + tile, height, (j + 1) * cell_y) - max(y, j * cell_y)
                right = min(x + tile, width, (i + 1) * cell_x) - max(x, i * cell_x)
                if down > 1e-9 and right > 1e-9:
                    wanted.add((x, y))
                    break
    return wanted


def planned(plan: TilePlan) -> list[tuple[int, int]]:
    return [(int(x), int(y)) for band in plan.bands for part in plan.super_tiles(band) for x, y in part.tiles]


@pytest.mark.parametrize(("tile", "stride"), [(224, 64), (224, 100), (224, 128), (224, 224)])
@pytest.mark.parametrize("size", [(1537, 1111), (900, 224), (150, 90)])
def test_the_tiles_are_those_that_touch_tissue(tile: int, stride: int, size: tuple[int, int]) -> None:
    tissue = np.random.default_rng(stride).random((13, 17)) < 0.04
    tissue[3, 5] = True
    plan = TilePlan(*size, tile, stride, tissue, super_tile=600)
    tiles = planned(plan)
    assert len(tiles) == len(set(tiles)) == plan.n_tiles == sum(band.n_tiles for band in plan.bands)
    assert set(tiles) == tiles_by_hand(*size, tile, stride, tissue)


def test_reads_cover_their_tiles_and_stay_small() -> None:
    plan = TilePlan(5000, 4000, 224, 100, np.ones((40, 50), bool), super_tile=700)
    assert plan.n_tiles == plan.n_all_tiles
    for band in plan.bands:
        for part in plan.super_tiles(band):
            assert max(part.width, part.height) <= 700
            assert (part.x, part.y) == (part.tiles[:, 0].min(), part.tiles[:, 1].min())
            assert (part.tiles.max(0) + 224 == (part.x + part.width, part.y + part.height)).all()
            assert band.y <= part.y
            assert part.y + part.height <= band.y + band.height


def test_parts_without_tissue_are_not_read() -> None:
    tissue = np.zeros((100, 100), bool)
    tissue[50, 50] = True
    plan = TilePlan(100_000, 100_000, 224, 224, tissue)
    reads = [part for band in plan.bands for part in plan.super_tiles(band)]
    assert sum(part.width * part.height for part in reads) < 2000 * 2000
    assert 0 < plan.n_tiles < 50
    empty = TilePlan(100_000, 100_000, 224, 64, np.zeros((100, 100), bool))
    assert empty.n_tiles == 0
    assert not planned(empty)


def test_rows_above_final_are_touched_by_no_later_band() -> None:
    plan = TilePlan(1500, 3000, 224, 64, np.ones((30, 15), bool), super_tile=500)
    assert len(plan.bands) > 3
    for band in plan.bands:
        later = [y for other in plan.bands[band.index + 1 :] for part in plan.super_tiles(other) for _, y in part.tiles]
        assert all(y >= band.final for y in later)
    assert plan.bands[-1].final == 3000
    assert [band.final for band in plan.bands] == sorted(band.final for band in plan.bands)
    assert max(band.height for band in plan.bands) <= 500


def test_a_stride_beyond_the_tile_is_refused() -> None:
    with pytest.raises(ValueError, match="stride is 300"):
        TilePlan(1000, 1000, 224, 300, np.ones((10, 10), bool))
