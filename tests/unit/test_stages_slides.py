"""What a run of `pistoseg segment` finds to do, before anything is segmented."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import botocore.exceptions
import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pistoseg import storage
from pistoseg.errors import PistoSegError, UnavailableError
from pistoseg.slides import results
from pistoseg.slides.network import SlideSettings
from pistoseg.slides.source import SlideEntry
from pistoseg.stages import slides

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
