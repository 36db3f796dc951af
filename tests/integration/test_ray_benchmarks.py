"""That the benchmarks that want a Ray run; no times."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import feeding, harness, material, mosaics, startup

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture
def options(tmp_path):
    return harness.Options(None, tmp_path, tiny=True)


@pytest.mark.parametrize("module", [feeding, startup])
def test_a_benchmark_runs_at_a_tiny_size(module, options):
    report = module.benchmark(options)
    assert report.figures
    assert all(np.isfinite(value) for value in report.figures.values())


def test_a_pool_makes_mosaics_of_one_bank(options):
    report = harness.Report("mosaics")
    mosaics._pool(material.mosaics(options)[0], options, report)
    assert report.figures["pool_actors"] == 2
    assert report.figures["mosaic_7x32_pool_per_s"] > 0
