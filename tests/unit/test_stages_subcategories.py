from types import SimpleNamespace

import numpy as np
import pyarrow as pa

from pistoseg import parquet, storage
from pistoseg.stages import sharding, subcategories


def test_features_come_in_the_order_of_their_windows_from_however_many_parts(tmp_path, monkeypatch):
    expected = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)

    def run_networks(worker, arguments, shards, folder, **_):
        for number, windows in enumerate(([4, 0], [3, 1, 2])):
            rows = [{"window": window, "features": expected[window]} for window in windows]
            part = storage.join(folder, sharding.part_name(number))
            parquet.write(pa.Table.from_pylist(rows, subcategories.SCHEMA), part)

    monkeypatch.setattr(sharding, "run_networks", run_networks)
    artifact = SimpleNamespace(uri="", path=lambda name: name)
    context = SimpleNamespace(
        config=SimpleNamespace(compute=None),
        inputs={"patches": artifact, "classifier": artifact},
        path=lambda name: str(tmp_path / name),
        progress=None,
    )
    features = subcategories._features(context, 5)
    assert features.dtype == np.float32
    assert np.array_equal(features, expected)
