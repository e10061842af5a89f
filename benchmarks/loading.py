"""Training pictures per second: batches from the uint8 cache against PIL + torchvision.

Both deliver what a training step takes: normalised float pictures, flipped, padded
and cropped, with random erasing, in batches. The rival opens each JPEG file, resizes
and transforms it, as every public code does in its workers; ours decodes once (timed
apart) and changes batches. CPU time of one thread, medians, one process.

    OMP_NUM_THREADS=1 python benchmarks/loading.py --output loading.json
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor
from torchvision import transforms

from o2cap.data.images import ImageSet
from o2cap.data.loading import decode
from o2cap.data.transforms import MEAN, STD, augment


def write_pictures(folder: Path, count: int, height: int, width: int) -> ImageSet:
    """Write smooth random JPEG files of the size of the benchmarks' (128×64)."""
    rng = np.random.default_rng(0)
    paths = []
    for i in range(count):
        coarse = rng.integers(0, 256, (16, 8, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize(
            (width, height), Image.Resampling.BICUBIC
        )
        paths.append(folder / f"{i:04}.jpg")
        picture.save(paths[-1], quality=90)
    return ImageSet(paths, torch.zeros(count, dtype=torch.int64))


def torchvision_batch(
    paths: list[Path], height: int, width: int, erase: float
) -> Callable[[], Tensor]:
    """Return what opens and transforms a batch the usual way."""
    pad = round(height * 10 / 256)
    pipeline = transforms.Compose(
        [
            transforms.Resize((height, width), transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.Pad(pad),
            transforms.RandomCrop((height, width)),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
            transforms.RandomErasing(erase, (0.02, 0.4), (0.3, 3.3)),
        ]
    )

    def run() -> Tensor:
        pictures = []
        for path in paths:
            with Image.open(path) as picture:
                pictures.append(pipeline(picture.convert("RGB")))
        return torch.stack(pictures)

    return run


def cpu_seconds(
    rivals: dict[str, Callable[[], object]], repeats: int
) -> dict[str, float]:
    """Return the median CPU seconds of each; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(repeats):
        for name, run in rivals.items():
            for _ in range(3):
                run()  # untimed: brings back the memory that the rival gave up
            start = time.process_time()
            run()
            times[name].append(time.process_time() - start)
    return {name: statistics.median(found) for name, found in times.items()}


@dataclass
class Arguments:
    """What to measure."""

    batch: int = 32
    """Pictures in a batch."""
    repeats: int = 15
    """Repetitions, of which the median is taken."""
    output: Path | None = None
    """JSON file to write."""


def measure(
    arguments: Arguments, images: ImageSet, height: int, width: int
) -> dict[str, float]:
    """Return pictures per CPU-second at one input size."""
    start = time.process_time()
    pixels, _ = decode(images, height, width, workers=1)
    decoding = time.process_time() - start
    generator = torch.Generator().manual_seed(0)
    n = arguments.batch
    index = torch.randperm(len(images), generator=generator)[:n]
    paths = [Path(images.paths[i]) for i in index.tolist()]
    times = cpu_seconds(
        {
            "ours": lambda: augment(pixels[index], generator),
            "ours_no_erasing": lambda: augment(pixels[index], generator, erase=0),
            "torchvision": torchvision_batch(paths, height, width, 0.5),
            "torchvision_no_erasing": torchvision_batch(paths, height, width, 0),
        },
        arguments.repeats,
    )
    row = {"height": height, "width": width, "decode": len(images) / decoding}
    row |= {name: n / seconds for name, seconds in times.items()}
    row["ratio"] = times["torchvision"] / times["ours"]
    row["ratio_no_erasing"] = times["torchvision_no_erasing"] / times["ours_no_erasing"]
    return row


def main(arguments: Arguments) -> None:
    """Measure, print, and write what was asked for."""
    with tempfile.TemporaryDirectory() as folder:
        images = write_pictures(Path(folder), 256, 128, 64)
        rows = [
            measure(arguments, images, height, width)
            for height, width in ((256, 128), (128, 64), (64, 32))
        ]
    print(f"Pictures per CPU-second, batches of {arguments.batch}, one core")
    print(
        "                   with erasing             without erasing      decode once"
    )
    print("   size      ours  torchvision  ratio   ours  torchvision  ratio")
    for row in rows:
        print(
            "{height:4}x{width:<4}{ours:8.0f} {torchvision:10.0f} {ratio:8.1f} "
            "{ours_no_erasing:8.0f} {torchvision_no_erasing:10.0f} "
            "{ratio_no_erasing:7.1f} {decode:11.0f}".format(**row)
        )
    if arguments.output is not None:
        record = {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "batch": arguments.batch,
            "rows": rows,
        }
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
