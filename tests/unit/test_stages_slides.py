"""What a run of `pistoseg segment` finds to do, before anything is segmented."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import botocore.exceptions
import fsspec
import pyarrow as pa
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from pistoseg import parquet, storage
from pistoseg.config import ComputeConfig
from pistoseg.errors import PistoSegError, UnavailableError
from pistoseg.outputs.summary import SlideRow
from pistoseg.printing import print_slides
from pistoseg.progress import Progress
from pistoseg.slides import results
from pistoseg.slides.network import SlideSettings
from pistoseg.slides.source import SlideEntry
from pistoseg.stages import slides
from pistoseg.tracking import StageRun

FILES = ("mask.tif", "regions.geojson", "overview.png", "areas.json")
MADE_FROM = {"etag": "70-1"}
AWAY = botocore.exceptions.EndpointConnectionError(endpoint_url="http://x")


class Network:
    """Stands in for `SlideNetwork`: `etag` and `error` are what looking at a slide leads to."""

    error: Exception | None = None
    etag = MADE_FROM["etag"]

    def made_from(self, entry: SlideEntry) -> dict[str, str]:
        if self.error:
            raise self.error
        return {"etag": self.etag}


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
    slide = str(tmp_path / "a.svs")
    record = {"format": results.FORMAT, "status": "completed", "slide": slide, "made_from": MADE_FROM}
    storage.write_bytes("memory://bucket/out/slides/a/slide.json", json.dumps(record).encode())
    for name in FILES:
        storage.write_bytes(f"memory://bucket/out/slides/a/{name}", b"{}" if name == "areas.json" else b"")
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
    record = {"format": results.FORMAT, "status": "failed", "slide": run.slides, "made_from": {}, "attempts": 2}
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


@pytest.mark.parametrize("out", [None, "local"])
@pytest.mark.parametrize("name", [*FILES, "probabilities.zarr"])
def test_a_slide_that_lacks_one_of_its_results_is_done_again(
    run: slides.SlideRun, tmp_path: Path, name: str, out: str | None
) -> None:
    if out:
        for item in (*FILES, "slide.json"):
            storage.write_bytes(f"{tmp_path}/{out}/slides/a/{item}", storage.read_bytes(f"{run.out}/slides/a/{item}"))
        run = replace(run, out=f"{tmp_path}/{out}")
    if name == "probabilities.zarr":
        run = replace(run, settings=SlideSettings(probabilities=True))
        storage.write_bytes(f"{run.out}/slides/a/{name}/zarr.json", b"")
        assert [entry.slide_id for entry, _ in slides.plan(run).done] == ["a"]
        storage.remove_tree(f"{run.out}/slides/a/{name}")
    else:
        assert [entry.slide_id for entry, _ in slides.plan(run).done] == ["a"]
        storage.remove_file(f"{run.out}/slides/a/{name}")
    assert [(entry.slide_id, attempt) for entry, attempt in slides.plan(run).todo] == [("a", 1)]
    results.write_failure(run.out, "a", {"status": "failed", "made_from": MADE_FROM, "attempts": 1})
    again = slides.plan(replace(run, only_failed=True))
    assert [(entry.slide_id, attempt) for entry, attempt in again.todo] == [("a", 2)]


@pytest.mark.parametrize("text", [b"", b'{"tissue_mm2": 1', b"\0\0", b"[]"])
def test_a_slide_whose_areas_are_damaged_is_done_again(run: slides.SlideRun, text: bytes) -> None:
    ((_, record),) = slides.plan(run).done
    assert record["areas"] == {}
    storage.write_bytes(f"{run.out}/slides/a/areas.json", text)
    assert [(entry.slide_id, attempt) for entry, attempt in slides.plan(run).todo] == [("a", 1)]


def test_a_limit_gets_past_slides_that_keep_failing(run: slides.SlideRun, tmp_path: Path) -> None:
    for name in "bcde":
        storage.write_bytes(str(tmp_path / f"{name}.svs"), b"")
    for name, attempts in (("b", 2), ("c", 1)):
        record = {"format": results.FORMAT, "status": "failed", "made_from": MADE_FROM, "attempts": attempts}
        storage.write_bytes(f"{run.out}/slides/{name}/slide.json", json.dumps(record).encode())
    run = replace(run, slides=str(tmp_path))

    def todo(**options: object) -> list[tuple[str, int]]:
        found = slides.plan(replace(run, **options))
        assert (len(found.done), len(found.todo) + found.left) == (1, 4)
        return [(entry.slide_id, attempt) for entry, attempt in found.todo]

    assert todo() == [("d", 1), ("e", 1), ("c", 2), ("b", 3)]
    assert todo(limit=3) == [("d", 1), ("e", 1), ("c", 2)]
    assert todo(limit=1) == [("d", 1)]
    assert todo(limit=1, only_failed=True) == [("c", 2)]


def test_a_new_slide_of_the_same_name_does_not_take_the_id_of_a_finished_one(
    run: slides.SlideRun, tmp_path: Path
) -> None:
    storage.write_bytes(str(tmp_path / "sub" / "A.svs"), b"")
    storage.write_bytes(str(tmp_path / "sub" / "a.tif"), b"")
    found = slides.plan(replace(run, slides=str(tmp_path)))
    assert [(entry.slide_id, entry.uri) for entry, _ in found.done] == [("a", run.slides)]
    (first, second) = sorted(entry.slide_id for entry, _ in found.todo)
    assert (first[:2], second[:2]) == ("A-", "a-")
    manifest = tmp_path / "m.csv"
    manifest.write_text("slide,slide_id\na.svs,\nsub/a.tif,A\n")
    assert [entry.slide_id for entry, _ in slides.plan(replace(run, slides=str(manifest))).todo][-1] == "A"
    assert not slides.plan(replace(run, slides=str(manifest))).done  # an id that is given goes before


def test_results_of_another_slide_with_the_same_id_are_not_replaced(
    run: slides.SlideRun, network: Network, tmp_path: Path
) -> None:
    other = tmp_path / "other" / "a.svs"
    storage.write_bytes(str(other), b"")
    moved = replace(run, slides=str(other))
    network.etag = "71-1"
    with pytest.raises(PistoSegError, match="results of another slide") as caught:
        slides.plan(moved)
    assert caught.value.file == "memory://bucket/out/slides/a"
    assert str(tmp_path / "a.svs") in caught.value.reason
    assert "--out" in caught.value.remedy
    assert [entry.uri for entry, _ in slides.plan(run).todo] == [run.slides]  # which has changed
    network.etag = "70-2"  # as a copy has it
    assert [entry.uri for entry, _ in slides.plan(moved).todo] == [moved.slides]
    network.etag = MADE_FROM["etag"]
    assert [entry.uri for entry, _ in slides.plan(moved).done] == [moved.slides]
    network.error = PistoSegError("does not exist")
    assert [entry.uri for entry, _ in slides.plan(moved).todo] == [moved.slides]  # a failed row


def test_a_dicom_series_that_has_grown_is_the_same_slide(
    run: slides.SlideRun, network: Network, tmp_path: Path
) -> None:
    series = tmp_path / "a" / "2.dcm"
    storage.write_bytes(str(series), b"")
    record = {"format": results.FORMAT, "status": "completed", "made_from": MADE_FROM}
    record["slide"] = str(series.with_name("1.dcm"))
    storage.write_bytes("memory://bucket/out/slides/a/slide.json", json.dumps(record).encode())
    network.etag = "71-1"
    assert [entry.slide_id for entry, _ in slides.plan(replace(run, slides=str(series))).todo] == ["a"]


@pytest.mark.parametrize(
    ("error", "ends"),
    [
        (UnavailableError("does not answer"), False),
        (OSError(errno.ESTALE, "Stale file handle"), False),
        (PistoSegError("was taken over"), True),
    ],
)
def test_a_claim_that_is_lost_ends_a_batch_and_a_storage_that_is_away_for_it_does_not(
    run: slides.SlideRun, network: Network, monkeypatch: pytest.MonkeyPatch, error: Exception, ends: bool
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


def test_a_picture_that_is_gone_damaged_or_not_given_is_left_out_of_what_mlflow_gets(tmp_path: Path) -> None:
    rows = [SlideRow(name, f"{name}.svs", "skipped", areas={}) for name in "abcd"]
    (tmp_path / "slides" / "c" / "overview.png").mkdir(parents=True)  # which can't be read
    storage.write_bytes(str(tmp_path / "slides" / "d" / "overview.png"), b"\x89PNG\r\n\x1a\n, and no more")
    record = {"slides": {}, "slides_per_hour": None, "cohort": {"tissue_mm2": 0.0, "classes": {}}}
    for name in ("summary.md", "summary.csv", "run.json"):
        storage.write_bytes(str(tmp_path / name), b"")
    given: dict[str, bytes] = {}
    tracked = SimpleNamespace(client=object(), metrics=lambda _: None, file=given.__setitem__)
    slides._track(str(tmp_path), rows, record, tracked)
    assert set(given) == {"summary.md", "summary.csv", "run.json"}
    picture = tmp_path / "slides" / "b" / "overview.png"
    picture.parent.mkdir(parents=True)
    Image.new("RGB", (40, 30)).save(picture)
    slides._track(str(tmp_path), rows, record, tracked)
    assert "overviews.png" in given


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


def test_nodes_look_for_a_slide_and_a_mask_of_every_folder_and_not_for_the_source(
    run: slides.SlideRun, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, str] = {}

    def check(written: str, read: dict[str, str]) -> None:
        asked.update(read)
        raise PistoSegError("asked")

    def look(*entries: SlideEntry) -> dict[str, str]:
        asked.clear()
        plan = slides.Plan(network, [(entry, 1) for entry in entries], [], 0)
        with pytest.raises(PistoSegError, match="asked"):
            slides.segment(replace(run, slides="/lists/cohort.csv"), plan, Progress(), StageRun())
        assert asked.pop("--model") == "model"
        return asked

    monkeypatch.setattr(slides.cluster, "connected", lambda _: nullcontext())
    monkeypatch.setattr(slides.placement, "check_networks", lambda *_: None)
    monkeypatch.setattr(slides.placement, "check_shared", check)
    assert look(SlideEntry("a", "s3://bucket/a.svs"), SlideEntry("b", "s3://bucket/b.svs")) == {}
    monkeypatch.setattr(storage, "exists", lambda uri: "gone" not in uri)
    masked = SlideEntry("b", "/x/b.svs", tissue_mask="/m/b.png")
    missing = SlideEntry("d", "/x/gone.svs", tissue_mask="/m/gone.png"), SlideEntry("e", "/z/gone.svs")
    assert look(*missing, SlideEntry("a", "/x/a.svs"), masked, SlideEntry("c", "/y/c.svs")) == {
        "slide a": "/x/a.svs",
        "tissue mask of b": "/m/b.png",
        "slide c": "/y/c.svs",
    }
    many = look(*(SlideEntry(str(number), f"/{number}/a.svs") for number in range(1000)))
    assert (len(many), many["slide 0"], many["slide 990"]) == (100, "/0/a.svs", "/990/a.svs")


@pytest.mark.parametrize(("gpus", "asked", "given"), [(2, "auto", "cuda"), (0, "auto", "auto"), (2, "cpu", "cpu")])
def test_a_network_with_a_gpu_set_aside_for_it_has_to_use_it(
    run: slides.SlideRun, network: Network, monkeypatch: pytest.MonkeyPatch, gpus: int, asked: str, given: str
) -> None:
    started: list[tuple[object, ...]] = []

    def pool(start: Callable[[], None], *_: object) -> SimpleNamespace:
        start()
        return SimpleNamespace(results=lambda _: iter(()))

    actor = SimpleNamespace(remote=lambda *arguments: started.append(arguments))
    remote = SimpleNamespace(options=lambda **_: actor)
    monkeypatch.setattr(slides.ray, "remote", lambda **_: lambda _: remote)
    monkeypatch.setattr(slides.ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 4.0}}])
    monkeypatch.setattr(slides.cluster, "cluster_gpus", lambda: gpus)
    monkeypatch.setattr(slides, "SlidePool", pool)
    compute = ComputeConfig.model_validate({"device": asked})
    plan = slides.Plan(network, [(SlideEntry("b", "b.svs"), 1)], [], 0)
    assert list(slides._records(replace(run, device=asked), plan, compute, Progress())) == []
    assert [arguments[3] for arguments in started] == [given]


def test_slides_that_failed_for_the_same_reason_are_one_line_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reasons = {f"p{number} [1]": "mpp: has no pixel size. Remedy: give mpp." for number in range(5)}
    reasons |= {"q": "is damaged.", "r": "is truncated.", "s": "is truncated."}
    failed = [
        {"slide_id": name, "slide": f"/in/{name}.png", "status": "failed", "reason": f"/in/{name}.png: {reason}"}
        for name, reason in reasons.items()
    ]
    done = {"slide_id": "t", "slide": "/in/t.svs", "status": "completed", "reason": ""}
    parquet.write(pa.Table.from_pylist([*failed, done]), str(tmp_path / "summary.parquet"))
    print_slides(str(tmp_path), {"slides": {"completed": 1, "failed": 8, "skipped": 0}})
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("failed: ")]
    assert printed == [
        "failed: 5 slides, p0 [1], p1 [1], p2 [1] and 2 more (see summary.csv): mpp: has no pixel size. "
        "Remedy: give mpp.",
        "failed: q: /in/q.png: is damaged.",
        "failed: 2 slides, r, s: is truncated.",
    ]
