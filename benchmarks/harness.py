"""What all benchmarks share: options, interleaved timing, the table that is printed and the JSON that is written."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("pistoseg", "torch", "ray", "numpy", "opencv-python-headless", "segmentation-models-pytorch", "pyarrow")
RESULTS = "benchmarks/results"


@dataclass(frozen=True)
class Options:
    """What a benchmark is asked for.

    Args:
        data: folder with the published data sets (`wsss4luad-mini`, `glas`, `slides`); None: the phantom.
        out: folder of JSON, CSV and plots.
        tiny: whether it shall only show that it runs, at sizes whose figures mean nothing.
        model: folder of a trained bundle for `slides`; None: random weights.
    """

    data: Path | None
    out: Path
    tiny: bool = False
    model: str | None = None

    def size(self, normal: int, tiny: int) -> int:
        """A size that `tiny` makes small."""
        return tiny if self.tiny else normal


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, in several repeats.

    Args:
        wall: of the clock.
        cpu: of this process, all threads together.
    """

    wall: list[float]
    cpu: list[float]

    def per_s(self, count: float) -> float:
        """How many of `count` things a call does in a second of the clock, by the median."""
        return count / statistics.median(self.wall)

    def per_cpu_s(self, count: float) -> float:
        """The same by this process's time on a processor, which other processes hardly disturb."""
        return count / max(statistics.median(self.cpu), 1e-9)


def interleaved(
    variants: Mapping[str, Callable[[], Any]],
    repeats: int,
    around: Callable[[str], AbstractContextManager[None]] = lambda name: nullcontext(),
) -> dict[str, Timing]:
    """Time variants in turn, so that whatever else the machine does hits all of them.

    Args:
        variants: calls by name; each is made once before, unmeasured.
        repeats: measured calls of each.
        around: what a variant's turn is surrounded by, unmeasured.
    """
    timings = {name: Timing([], []) for name in variants}
    for call in variants.values():
        call()
    for number in range(repeats):
        names = list(variants) if number % 2 == 0 else list(reversed(variants))
        for name in names:
            with around(name):
                wall, cpu = time.perf_counter(), time.process_time()
                variants[name]()
                timings[name].cpu.append(time.process_time() - cpu)
                timings[name].wall.append(time.perf_counter() - wall)
    return timings


@dataclass
class Report:
    """Figures of one benchmark.

    Args:
        name: of the benchmark's module.
        figures: numbers by name; rates end in `per_s`, seconds in `_s`, shares and factors say so.
        targets: what a figure should reach: at least, or with a leading `<` at most.
        notes: sentences on how to read them.
    """

    name: str
    figures: dict[str, float] = field(default_factory=dict)
    targets: dict[str, tuple[str, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, key: str, value: float, *, least: float | None = None, most: float | None = None) -> None:
        """Add a figure, and what it should be at least or at most."""
        self.figures[key] = float(f"{value:.4g}")
        if least is not None:
            self.targets[key] = (">=", least)
        if most is not None:
            self.targets[key] = ("<", most)

    def compare(
        self, key: str, ours: Timing, other: Timing, *, least: float | None = None, counts: float = 1.0
    ) -> None:
        """Add how many times as fast ours is, by pairs of repeats: of the clock, and as `<key>_cpu` of the processor.

        Args:
            key: of the figure.
            ours: timing of a call.
            other: that of what it is compared with.
            least: target of the first figure.
            counts: things that our call makes for each that the other one makes.
        """
        for suffix, target in (("", least), ("_cpu", None)):
            pairs = zip(*((t.cpu if suffix else t.wall) for t in (other, ours)), strict=True)
            ratio = statistics.median(slow / max(fast, 1e-9) for slow, fast in pairs)
            self.add(f"{key}{suffix}", counts * ratio, least=target)

    def note(self, text: str) -> None:
        """Add a sentence."""
        self.notes.append(text)

    def missed(self) -> list[str]:
        """Figures that are not what they should be."""
        return [
            key
            for key, (sign, target) in self.targets.items()
            if not (self.figures[key] >= target if sign == ">=" else self.figures[key] < target)
        ]

    def table(self) -> str:
        """As text: figure, value, target."""
        width = max(map(len, self.figures), default=0)
        lines = [f"== {self.name}"]
        for key, value in self.figures.items():
            sign, target = self.targets.get(key, ("", 0.0))
            goal = f"   {sign} {target:g}{'   MISSED' if key in self.missed() else ''}" if sign else ""
            lines.append(f"{key:<{width}}  {value:>12,.4g}{goal}")
        return "\n".join([*lines, *(f"   {note}" for note in self.notes)])

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        targets = {key: f"{sign} {target:g}" for key, (sign, target) in self.targets.items()}
        return {"figures": self.figures, "targets": targets, "missed": self.missed(), "notes": self.notes}


Benchmark = Callable[[Options], Report]


def parser(description: str | None) -> argparse.ArgumentParser:
    """Options of every benchmark."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--data", type=Path, metavar="DIR", help="folder with wsss4luad-mini, glas and slides")
    options.add_argument("--out", type=Path, default=Path(RESULTS), metavar="DIR", help="default: %(default)s")
    options.add_argument("--model", metavar="BUNDLE", help="trained bundle for slides; default: random weights")
    options.add_argument("--tiny", action="store_true", help="only see whether it runs; its figures mean nothing")
    return options


def options_of(arguments: argparse.Namespace) -> Options:
    """What was asked for on the command line."""
    if arguments.data is not None and not arguments.data.is_dir():
        sys.exit(f"{arguments.data} is no folder")
    return Options(arguments.data, arguments.out, arguments.tiny, arguments.model)


def main(benchmark: Benchmark, description: str | None) -> None:
    """Run one benchmark from the command line."""
    options = options_of(parser(description).parse_args())
    write([timed(benchmark, options)], options)


def timed(benchmark: Benchmark, options: Options) -> Report:
    """Run a benchmark, print its table, and note how long it took."""
    began = time.monotonic()
    report = benchmark(options)
    report.add("benchmark_took_s", time.monotonic() - began)
    print(report.table(), flush=True)
    return report


def write(reports: list[Report], options: Options) -> Path:
    """Write `<name>.json` of one report, `all.json` of several."""
    options.out.mkdir(parents=True, exist_ok=True)
    name = reports[0].name if len(reports) == 1 else "all"
    path = options.out / f"{name}.json"
    content = {
        "machine": machine(),
        "data": str(options.data.name) if options.data else "phantom",
        "tiny": options.tiny,
        "benchmarks": {report.name: report.to_json() for report in reports},
    }
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"written: {path}")
    return path


def machine() -> dict[str, Any]:
    """Processor, memory, system and versions."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": _gpus(),
        "load": [round(value, 2) for value in os.getloadavg()],
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _gpus() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def peak_mib() -> float:
    """Largest resident memory of this process so far, MiB; `ru_maxrss` of a new process begins at its parent's."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def private_mib() -> float:
    """Memory that is this process's alone, MiB: what an object store shares between processes is not in it."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024
