"""A long run: memory and open files stay flat over hundreds of epochs.

    python tests/faults/soak.py [--epochs 500]

After each epoch the resident memory and the open files of the process are noted. A
straight line through what follows the first fifth, while caches fill, must rise by less
than 8 KiB an epoch, which is 8 MiB in a thousand epochs; the number of open files may
not rise at all. The last line is a summary.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import psutil
import tiny

from o2cap.config import WarmStartConfig
from o2cap.trainer import train

MOST = 8.0  # KiB an epoch


def soak(epochs: int, place: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return resident memory in KiB, and open files, after each epoch."""
    data = tiny.as_dataset(place, tiny.write_pictures(place))
    config = replace(
        tiny.config(place / "run", epochs=epochs, iterations=1),
        warm_start=WarmStartConfig(epochs=1, iterations=3, images=16),
    )
    process = psutil.Process()
    memory, handles = [], []

    def look(record: dict[str, Any]) -> None:
        memory.append(process.memory_info().rss / 2**10)
        handles.append(process.num_fds())

    train(config, data, on_epoch=look)
    return np.array(memory), np.array(handles)


def slope(values: np.ndarray) -> float:
    """Return how much the values rise from one to the next, on average."""
    return float(np.polyfit(np.arange(len(values)), values, 1)[0])


def main() -> int:
    """Run the campaign; exit code 1 when something grows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=500)
    args = parser.parse_args()
    logging.getLogger("o2cap").setLevel(logging.ERROR)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        memory, handles = soak(args.epochs, Path(place))
    later = slice(args.epochs // 5, None)
    rise, more = slope(memory[later]), int(handles[-1] - handles[later][0])
    print(
        f"soak: {args.epochs} epochs in {time.monotonic() - begun:.0f} s, memory "
        f"{memory[later][0] / 1024:.0f} to {memory[-1] / 1024:.0f} MiB "
        f"({rise:+.2f} KiB an epoch, at most {MOST:g}), "
        f"open files {handles.max()} at most ({more:+d})"
    )
    return int(rise > MOST or more > 0)


if __name__ == "__main__":
    sys.exit(main())
