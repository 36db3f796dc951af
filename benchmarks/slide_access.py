"""Slides in object storage: the whole file staged to the node's disk, or ranges of it read where they are needed.

    pip install tiffslide
    python -m benchmarks.slide_access SLIDE.svs

Uploads the slide to an S3 server of its own on this machine, then reads shares of its 1,024 px regions both ways, two
threads each. On a machine's own network a staged file costs next to nothing; what counts elsewhere is also how many
requests and bytes each way takes, which grow with the regions in one way and not in the other.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from pistoseg import storage
from pistoseg.local_cluster import S3Server
from pistoseg.slides.cache import SlideCache
from pistoseg.slides.reader import open_slide

REGION, THREADS, SHARES = 1024, 2, (0.02, 0.1, 0.5)


def main() -> int:
    try:
        import tiffslide
    except ImportError:
        sys.exit("pip install tiffslide")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slide", type=Path)
    slide: Path = parser.parse_args().slide
    with tempfile.TemporaryDirectory() as scratch, S3Server(Path(scratch) / "s3") as server:
        os.environ.update(server.environment())
        server.make_bucket("slides")
        uri = f"s3://slides/{slide.name}"
        storage.filesystem(uri)[0].put_file(str(slide), f"slides/{slide.name}")
        with open_slide(str(slide)) as opened:
            ys, xs = range(0, opened.height - REGION, REGION), range(0, opened.width - REGION, REGION)
        corners = [(x, y) for y in ys for x in xs]
        order = np.random.default_rng(0).permutation(len(corners))
        size = slide.stat().st_size / 1e6
        print(f"{slide.name}: {size:.0f} MB, {len(corners)} regions of {REGION} px, {THREADS} threads")
        for share in SHARES:
            chosen = [corners[number] for number in sorted(order[: max(1, round(share * len(corners)))])]
            staged, fetched = _staged(uri, chosen, Path(scratch) / f"cache-{share}")
            backend, path = storage.filesystem(uri)
            with backend.open(path, "rb", cache_type="background") as file, tiffslide.TiffSlide(file) as remote:
                ranged = _timed(lambda x, y, remote=remote: remote.read_region((x, y), 0, (REGION, REGION)), chosen, 1)
            print(
                f"{share:4.0%} of the regions: staged {staged:6.1f} s (of it {fetched:.1f} s to fetch), "
                f"ranges {ranged:6.1f} s, {ranged / staged:.1f} times as long",
                flush=True,
            )
    return 0


def _staged(uri: str, chosen: Sequence[tuple[int, int]], folder: Path) -> tuple[float, float]:
    """Seconds of fetching and reading, and of fetching alone."""
    cache, began = SlideCache(str(folder), 1 << 34), time.monotonic()
    with cache.get(uri) as path:
        fetched = time.monotonic() - began
        with open_slide(str(path)) as opened:
            return fetched + _timed(lambda x, y: opened.read_region(x, y, REGION, REGION), chosen, THREADS), fetched


def _timed(read: Callable[[int, int], object], chosen: Sequence[tuple[int, int]], threads: int) -> float:
    began = time.monotonic()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda corner: read(*corner), chosen))
    return time.monotonic() - began


if __name__ == "__main__":
    sys.exit(main())
