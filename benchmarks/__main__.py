"""`python -m benchmarks [--only mosaics,slides] [--data DIR]`: all benchmarks, one table, one JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from benchmarks import harness

NAMES = ("startup", "mosaics", "feeding", "training", "inference", "slides", "growth")


def main() -> int:
    """Run them one after the other, each in a process of its own: threads and caches of one would disturb the next."""
    parser = harness.parser(__doc__)
    parser.add_argument("--only", default="", metavar="NAMES", help=f"some of {', '.join(NAMES)}")
    arguments = parser.parse_args()
    options = harness.options_of(arguments)
    names = [name.strip() for name in arguments.only.split(",") if name.strip()] or list(NAMES)
    unknown = sorted(set(names) - set(NAMES))
    if unknown:
        parser.error(f"there is no benchmark {', '.join(unknown)}; use {', '.join(NAMES)}")
    forwarded = [item for item in ("--data", str(options.data)) if options.data] + ["--out", str(options.out)]
    forwarded += ["--model", options.model] if options.model else []
    forwarded += ["--tiny"] if options.tiny else []
    failed = [
        name for name in names if subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *forwarded]).returncode
    ]
    merge(options.out, [name for name in names if name not in failed])
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def merge(out: Path, names: list[str]) -> None:
    """Put the JSON of several benchmarks into `all.json`."""
    parts = [json.loads((out / f"{name}.json").read_text(encoding="utf-8")) for name in names]
    if not parts:
        return
    benchmarks = {name: part["benchmarks"][name] for name, part in zip(names, parts, strict=True)}
    (out / "all.json").write_text(json.dumps(parts[-1] | {"benchmarks": benchmarks}, indent=2) + "\n", encoding="utf-8")
    missed = [f"{name}.{key}" for name, part in benchmarks.items() for key in part["missed"]]
    print(f"written: {out / 'all.json'}; " + (f"missed: {', '.join(missed)}" if missed else "every target is met"))


if __name__ == "__main__":
    sys.exit(main())
