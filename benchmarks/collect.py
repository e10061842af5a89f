"""Run the benchmarks, one after another, and keep their numbers in one record.

The book shows what lies in the record. A benchmark that fails, or wants more memory
than is free, is left out with the reason; run it again with `--only`.

    OMP_NUM_THREADS=1 python -m benchmarks.collect
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import psutil
import tyro

from o2cap.files import replacing

# Name: module, options, GiB of memory that must be free.
BENCHMARKS: dict[str, tuple[str, list[str], float]] = {
    "clustering_12936": ("clustering", [], 4),
    "clustering_32621": ("clustering", ["--n", "32621", "--repeats", "1"], 15),
    "clustering_200000": (
        "clustering",
        [
            *("--n", "200000", "--dim", "256", "--cameras", "40"),
            *("--no-reference", "--repeats", "1"),
        ],
        5,
    ),
    "clustering_curve": (
        "clustering",
        ["--curve", "--n", "64000", "--dim", "256", "--no-reference"],
        2,
    ),
    "losses": ("losses", [], 3),
    "loading": ("loading", [], 1),
    "evaluation": ("evaluation", [], 3),
    "evaluation_msmt17": (
        "evaluation",
        ["--queries", "11659", "--gallery", "82161", "--no-reference"],
        2,
    ),
}
Name = Literal[
    "clustering_12936",
    "clustering_32621",
    "clustering_200000",
    "clustering_curve",
    "losses",
    "loading",
    "evaluation",
    "evaluation_msmt17",
]


@dataclass(frozen=True)
class Options:
    only: tuple[Name, ...] = ()
    """Run these, and keep the others as they are in the record; by default all."""
    output: Path = Path("reproduce/records/benchmarks.json")
    """The record."""


def run(name: str) -> dict[str, Any]:
    """Return the command, the load of the machine, and the numbers or the reason."""
    module, options, needed = BENCHMARKS[name]
    command = ["python", "-m", f"benchmarks.{module}", *options]
    result: dict[str, Any] = {
        "command": " ".join(command),
        "date": time.strftime("%Y-%m-%d"),
        "load": os.getloadavg()[0],  # processes that wanted a core, the minute before
    }
    free = psutil.virtual_memory().available / 2**30
    if free < needed:
        return result | {"not measured": f"{needed} GiB needed, {free:.1f} were free"}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "result.json")
        there = [sys.executable, *command[1:], "--output", str(output)]
        done = subprocess.run(there, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if done.returncode:
            return result | {"not measured": f"exit code {done.returncode}"}
        return result | {"result": json.loads(output.read_text())}


def main(options: Options) -> None:
    """Run, and write the record after each benchmark."""
    record: dict[str, Any] = {"benchmarks": {}}
    if options.only and options.output.is_file():
        record = json.loads(options.output.read_text())
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True
    )
    record |= {
        "what": "Speed and memory beside slow references of the same formulas, on one "
        "thread; each entry holds its command and the machine's load.",
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "device": "cpu",
        "commit": commit.stdout.strip() or None,
        "versions": {
            name: version(name)
            for name in ("o2cap", "torch", "torchvision", "numpy", "numba", "faiss-cpu")
        },
    }
    for name in options.only or BENCHMARKS:
        print(f"--- {name}", flush=True)
        record["benchmarks"][name] = run(name)
        with replacing(options.output) as part:
            part.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
