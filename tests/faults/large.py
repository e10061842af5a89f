"""Many pictures: read, cached, clustered and trained on within 6 GiB.

    python tests/faults/large.py [--pictures 100000]

Writes tiny pictures in camera folders (32 × 16 pixels; as many files as there are
pictures), trains one short epoch on them as `o2cap train --dataset folders` would, and
reads a manifest of ten times as many lines. The last line is a summary: seconds and
peak memory.
"""

from __future__ import annotations

import argparse
import logging
import os
import resource
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import tiny
from PIL import Image

from o2cap.config import ClusteringConfig, WarmStartConfig
from o2cap.data import load_dataset
from o2cap.trainer import train

LIMIT = 6.0  # GiB
CAMERAS = 8


def write(folder: Path, number: int) -> None:
    """Write pictures of `number` / 20 identities, each two colours and some noise."""
    chance = np.random.default_rng(0)
    looks = chance.integers(20, 236, (max(1, number // 20), 2, 1, 1, 3))
    noise = chance.normal(0, 12, (64, 32, 16, 3))
    for camera in range(CAMERAS):
        (folder / f"cam{camera}").mkdir(parents=True)

    def one(i: int) -> None:
        upper, lower = looks[i % len(looks)]
        body = np.repeat(np.concatenate([upper, lower]), 16, axis=0) + noise[i % 64]
        body = np.broadcast_to(body, (32, 16, 3)) + i % 7
        picture = Image.fromarray(body.clip(0, 255).astype(np.uint8))
        picture.save(folder / f"cam{i // 3 % CAMERAS}/{i:06d}.bmp")

    with ThreadPoolExecutor() as pool:
        for _ in pool.map(one, range(number), chunksize=1000):
            pass


def main() -> int:
    """Run the campaign; exit code 1 when memory is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=100_000)
    number = parser.parse_args().pictures
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stdout)
    with tempfile.TemporaryDirectory() as top:
        place = Path(top)
        begun = time.monotonic()
        write(place / "pictures", number)
        written = time.monotonic()

        config = replace(
            tiny.config(place / "run", epochs=1, iterations=10),
            dataset="folders",
            root=place / "pictures",
            warm_start=WarmStartConfig(epochs=1, iterations=10, images=32),
            clustering=ClusteringConfig(),
        )
        run = train(config)
        trained = time.monotonic()

        table = place / "all.csv"
        with table.open("w") as file:
            file.write("split,path,pid,camid\n")
            for i in range(10 * number):  # nine of ten do not exist
                name = f"pictures/cam{i // 3 % CAMERAS}/{i:06d}.bmp"
                file.write(f"train,{name},{i % 5000},{i // 3 % CAMERAS}\n")
        found = load_dataset("manifest", table, skip_missing=True)
        assert len(found.train) == number
        read = time.monotonic()
    stages = ", ".join(f"{k} {v:.0f} s" for k, v in run.final["seconds"].items())
    unit = 1 if sys.platform == "darwin" else 1024  # bytes in ru_maxrss
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
    print(
        f"large: {number:,} pictures written in {written - begun:.0f} s; trained on in "
        f"{trained - written:.0f} s ({stages}; {run.final['clusters']} clusters); "
        f"manifest read in {read - trained:.0f} s; peak {peak:.2f} GiB of {LIMIT:g}"
    )
    return int(peak > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
