"""Mosaics depend on (seed, epoch, index) alone: not on the number of actors, nor on being stored or streamed."""

import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import ray
from conftest import TINY
from processes import STUCK_S

from pistoseg import parquet, storage
from pistoseg.actors import TRIES, start_here
from pistoseg.artifacts import Workspace
from pistoseg.config import load_config
from pistoseg.patches.decode import decode_ids, decode_png
from pistoseg.pipeline import run_pipeline
from pistoseg.stages import synthesis
from pistoseg.training.progress import TrainingProgress
from pistoseg.training.samples import fresh_mosaics
from pistoseg.training.stream import PREFETCHED, SampleSource, sample_dataset

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers can't import a test module

pytestmark = pytest.mark.usefixtures("local_ray")
COUNT = 64


def settings(cohort, workers):
    import yaml

    return [
        f"data.uri={yaml.safe_dump(str(cohort), default_style=chr(34)).strip()}",
        f"synthesis.count={COUNT}",
        f"compute.workers={workers}",
        "tracking.enabled=false",
        f"data.min_single_tissue={TINY['data']['min_single_tissue']}",
        "synthesis.crop_height=16",
        "synthesis.crop_width=16",
        "synthesis.mode=stored",
    ]


@pytest.fixture(scope="module")
def stored(cohort, tmp_path_factory, local_ray):
    """The same mosaics from one actor and from four, in parts of 16; and the config."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthesis, "PART_MOSAICS", 16)
        results = {}
        for workers in (1, 4):
            config = load_config("demo", overrides=settings(cohort, workers))
            workspace = Workspace(str(tmp_path_factory.mktemp(f"actors{workers}")))
            results[workers] = run_pipeline(config, workspace, ("synthesis",))
    return config, results


def test_one_actor_and_four_write_the_same_bytes(stored):
    _, results = stored
    first, second = (results[workers]["synthesis"] for workers in (1, 4))
    assert first.fingerprint == second.fingerprint
    names = [storage.name(item) for item in storage.list_dir(first.path("mosaics"))]
    assert names == [f"part-{number:05d}.parquet" for number in range(4)]
    for name in (*(f"mosaics/{name}" for name in names), "preview.png"):
        assert storage.read_bytes(first.path(name)) == storage.read_bytes(second.path(name)), name


def test_stored_mosaics_are_those_that_the_synthesizer_makes(stored):
    config, results = stored
    table = parquet.read(results[4]["synthesis"].path("mosaics"))
    assert table.column_names == ["index", "image", "mask"]
    assert table["index"].to_pylist() == list(range(COUNT))
    synthesizer = fresh_mosaics(synthesis.mosaics(config, results[4]["patches"]))
    for row in table.to_pylist():
        image, mask = synthesizer.sample(0, row["index"])
        assert image.shape == (64, 64, 3)
        assert np.array_equal(decode_png(row["image"]), image)
        assert np.array_equal(decode_ids(row["mask"]), mask)


@pytest.mark.parametrize("actors", [1, 4])
def test_streamed_mosaics_are_the_same_on_any_number_of_actors(stored, monkeypatch, actors):
    config, results = stored
    monkeypatch.setattr("pistoseg.training.stream.BLOCK_BYTES", 8 * 64 * 64 * 4)  # blocks of 8 mosaics
    shared = synthesis.mosaics(config, results[1]["patches"])
    source = SampleSource(fresh_mosaics, ray.put(shared), COUNT, (64, 64))
    dataset = sample_dataset(source, first_epoch=1, epochs=3, per_epoch=COUNT // 2, actors=actors)
    rows = {(int(row["epoch"]), int(row["index"])): row for row in dataset.iter_rows()}
    assert sorted(rows) == [(epoch, index) for epoch in (1, 2) for index in range(COUNT // 2)]
    synthesizer = fresh_mosaics(shared)
    for address, row in rows.items():
        image, mask = synthesizer.sample(*address)
        assert np.array_equal(row["image"], image)
        assert np.array_equal(row["mask"], mask)


class Coded:
    """Samples of four arrays whose values are their address."""

    def __init__(self, shared):
        self.base = shared["base"]

    def sample(self, epoch, index):
        value = self.base + 10 * epoch + index
        return (
            np.full((8, 8, 3), value, np.uint8),
            np.full((8, 8), value + 1, np.uint8),
            np.full((2, 5), value + 2, np.uint8),
            np.full((4, 3, 3), value / 8, np.float16),
        )


def test_a_source_names_the_columns_of_its_stream():
    columns = ("image", "regions", "labels", "maps")
    source = SampleSource(Coded, ray.put({"base": 100}), 6, (8, 8), columns)
    dataset = sample_dataset(source, first_epoch=0, epochs=2, per_epoch=6, actors=1)
    (batch,) = dataset.iter_torch_batches(batch_size=12)
    assert batch.keys() == {"epoch", "index", *columns}
    assert {name: (tuple(batch[name].shape[1:]), str(batch[name].dtype)) for name in columns} == {
        "image": ((8, 8, 3), "torch.uint8"),
        "regions": ((8, 8), "torch.uint8"),
        "labels": ((2, 5), "torch.uint8"),
        "maps": ((4, 3, 3), "torch.float16"),
    }
    values = 100 + 10 * batch["epoch"] + batch["index"]
    assert sorted(values.tolist()) == [*range(100, 106), *range(110, 116)]
    for shift, name in enumerate(columns[:3]):
        assert (batch[name].flatten(1) == (values + shift)[:, None]).all()
    assert (batch["maps"].flatten(1).float() == (values / 8)[:, None]).all()


class Dying:
    """Ends its process at the first sample."""

    def __init__(self, log):
        self.log = Path(log)

    def sample(self, epoch, index):
        with self.log.open("a") as file:
            file.write("died\n")
        os.kill(os.getpid(), signal.SIGKILL)


def test_samples_at_which_every_process_dies_end_the_stream(tmp_path):
    source = SampleSource(Dying, ray.put(str(tmp_path / "log")), 1, (8, 8))
    with pytest.raises(ray.exceptions.RayActorError):
        list(sample_dataset(source, first_epoch=0, epochs=1, per_epoch=1, actors=1).iter_rows())
    assert (tmp_path / "log").read_text().count("died") == TRIES


def test_batches_arrive_in_order_when_a_later_one_is_ready_first(monkeypatch):
    monkeypatch.setattr("pistoseg.training.stream.BLOCK_BYTES", 8 * 8 * 4 * 2)  # blocks of two samples

    def slow_at_first(batch):
        if batch["index"][0] == 0:
            time.sleep(1)
        return batch["index"].tolist()

    source = SampleSource(Coded, ray.put({"base": 0}), 24, (8, 8), ("image", "regions", "labels", "maps"))
    dataset = sample_dataset(source, first_epoch=0, epochs=1, per_epoch=24, actors=1)
    batches = dataset.iter_torch_batches(batch_size=4, prefetch_batches=PREFETCHED, collate_fn=slow_at_first)
    assert [index for batch in batches for index in batch] == list(range(24))


def test_batches_larger_than_what_is_made_ahead_of_need_arrive(monkeypatch):
    monkeypatch.setattr("pistoseg.training.stream.BLOCK_BYTES", 8 * 8 * 4 * 2)  # blocks of two samples
    progress = start_here(TrainingProgress)
    source = SampleSource(Coded, ray.put({"base": 0}), 80, (8, 8), ("image", "regions", "labels", "maps"))
    dataset = sample_dataset(source, 0, 1, 80, actors=1, progress=progress, batch_size=20)
    batches = iter(dataset.iter_torch_batches(batch_size=20, prefetch_batches=PREFETCHED))
    pool = ThreadPoolExecutor(1)
    for number in range(4):
        batch = pool.submit(next, batches).result(timeout=STUCK_S)  # the trainer would wait for ever
        assert batch["index"].tolist() == list(range(20 * number, 20 * number + 20))
        ray.get(progress.set_used.remote(20 * number + 20))
    pool.shutdown()
    ray.kill(progress)
