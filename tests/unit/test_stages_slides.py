"""What a run of `pistoseg segment` finds to do, before anything is segmented."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import botocore.exceptions
import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pistoseg import storage
from pistoseg.config import ComputeConfig
from pistoseg.errors import PistoSegError, UnavailableError
from pistoseg.progress import Progress
from pistoseg.slides import results
from pistoseg.slides.network import SlideSettings
from pistoseg.slides.source import SlideEntry
from pistoseg.stages import slides
from pistoseg.tracking import StageRun

MADE_FROM = {"etag": "1"}
AWAY = botocore.exceptions.EndpointConnectionError(endpoint_url="http://x")


class Network:
    """Stands in for `SlideNetwork`: `error` is what looking at a slide leads to."""

    error: Exception | None = None

    def made_from(self, entry: SlideEntry) -> dict[str, str]:
        if self.error:
            raise self.error
        return MADE_FROM


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Network:
    network = Network()
    monkeypatch.setattr("pistoseg.models.bundle.load", lambda *_: None)
    monkeypatch.setattr(slides, "SlideNetwork", lambda *_: network)
    return network


@pytest.fixture
def run(tmp_path: Path, network: Network) -> slides.SlideRun:
    """One slide, whose results are complete."""
    fsspec.filesystem("memory").store.clear()
    (tmp_path / "a.svs").write_bytes(b"")
    record = {"format": results.FORMAT, "status": "completed", "made_from": MADE_FROM}
    storage.write_bytes("memory://bucket/out/slides/a/slide.json", json.dumps(record).encode())
    return slides.SlideRun("model", str(tmp_path / "a.svs"), "memory://bucket/out", SlideSettings())


def test_a_storage_that_is_away_ends_the_run_and_is_not_taken_for_slides_to_do_again(
    run: slides.SlideRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [entry.slide_id for entry, _ in slides.plan(run).done] == ["a"]

    def cat_file(*_: object, **__: object) -> None:
        raise AWAY

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    with pytest.raises(UnavailableError, match="does not answer"):
        slides.plan(run)


def test_slides_whose_storage_is_away_end_the_run_and_one_that_is_not_there_is_its_own_problem(
    run: slides.SlideRun, network: Network
) -> None:
    network.error = PistoSegError("does not exist")
    assert [entry.slide_id for entry, _ in slides.plan(run).todo] == ["a"]
    record = {"format": results.FORMAT, "status": "failed", "made_from": {}, "attempts": 2}
    storage.write_bytes("memory://bucket/out/slides/a/slide.json", json.dumps(record).encode())
    assert [attempt for _, attempt in slides.plan(replace(run, only_failed=True)).todo] == [3]
    network.error = None
    storage.write_bytes(
        "memory://bucket/out/slides/a/slide.json", json.dumps(record | {"status": "completed"}).encode()
    )
    assert slides.plan(replace(run, only_failed=True)).left == 1  # of other files
    results.write_failure(run.out, "a", record | {"made_from": MADE_FROM})
    assert [attempt for _, attempt in slides.plan(replace(run, only_failed=True)).todo] == [3]
    network.error = UnavailableError("does not answer")
    with pytest.raises(UnavailableError):
        slides.plan(run)


@pytest.mark.parametrize(
    ("error", "ends"), [(UnavailableError("does not answer"), False), (PistoSegError("was taken over"), True)]
)
def test_a_claim_that_is_lost_ends_a_batch_and_a_storage_that_is_away_for_it_does_not(
    run: slides.SlideRun, network: Network, monkeypatch: pytest.MonkeyPatch, error: PistoSegError, ends: bool
) -> None:
    def check() -> None:
        raise error

    entries = [SlideEntry(name, f"{name}.svs") for name in "bc"]
    records = [
        {"slide_id": entry.slide_id, "slide": entry.uri, "status": "failed", "reason": "x", "seconds": 1}
        for entry in entries
    ]
    network.model, network.decisive, network.classes = "model", {}, ()
    monkeypatch.setattr(slides, "_records", lambda *_: (record for record in records))
    monkeypatch.setattr(slides.cluster, "connected", lambda _: nullcontext())
    monkeypatch.setattr(slides, "write_summary", lambda out, rows, *_: {"rows": rows})
    monkeypatch.setattr(slides, "_track", lambda *_: None)
    plan = slides.Plan(network, [(entry, 1) for entry in entries], [], 0)
    claim = SimpleNamespace(check=check)
    with pytest.raises(PistoSegError, match="taken over") if ends else nullcontext():
        assert len(slides.segment(run, plan, Progress(), StageRun(), claim)["rows"]) == 2


@pytest.mark.parametrize(("workers", "networks"), [(8, 8), (None, 1)])
def test_nodes_for_the_workers_are_waited_for_before_the_pool_is_planned(
    run: slides.SlideRun, network: Network, monkeypatch: pytest.MonkeyPatch, workers: int | None, networks: int
) -> None:
    def wait(compute: ComputeConfig, asked: int, say: object) -> None:
        assert (compute.device, compute.wait_for_nodes, asked) == ("cuda", 900, networks)
        raise PistoSegError("waited in vain")

    monkeypatch.setattr(slides.cluster, "connected", lambda _: nullcontext())
    monkeypatch.setattr(slides.placement, "check_networks", wait)
    plan = slides.Plan(network, [(SlideEntry("b", "b.svs"), 1)], [], 0)
    run = replace(run, device="cuda", workers=workers, wait_for_nodes=900)
    with pytest.raises(PistoSegError, match="waited in vain"):
        slides.segment(run, plan, Progress(), StageRun())
