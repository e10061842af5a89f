"""Pictures, decoded once: uint8 in memory, or on the disk where they are too many."""

from __future__ import annotations

import logging
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import numpy as np
import psutil
import torch
from PIL import Image, ImageOps
from torch import Tensor

from o2cap.data.images import ImageSet, open_picture
from o2cap.errors import InputError

logger = logging.getLogger("o2cap")


def read_picture(path: Path, height: int, width: int) -> np.ndarray:
    """Return one picture, resized (bicubic), as uint8 [height, width, 3], RGB.

    A rotation noted in EXIF is applied, other colour modes are converted, and of an
    animation the first frame is taken.

    Raises
    ------
    InputError
        Names the file when it is missing, unreadable, truncated or absurdly large.
    """
    with open_picture(path) as picture:
        upright = ImageOps.exif_transpose(picture)
        if upright.mode.startswith("I;16"):
            # Pillow would clip 16 bits at 255, not scale them.
            scaled = np.asarray(upright, dtype=np.uint16) >> 8
            upright = Image.fromarray(scaled.astype(np.uint8))
        resized = upright.convert("RGB").resize(
            (width, height), Image.Resampling.BICUBIC
        )
        return np.asarray(resized)


def decode(
    images: ImageSet,
    height: int,
    width: int,
    *,
    workers: int = 0,
    skip_unreadable: bool = False,
) -> tuple[Tensor, ImageSet]:
    """Decode all pictures once, into memory or, if they are too many, onto disk.

    Parameters
    ----------
    images : ImageSet
        N pictures.
    height, width : int
        Size to bring them to, in pixels.
    workers : int
        Threads that decode (decoding lets other threads run); 0 means one a core.
        The result does not depend on it.
    skip_unreadable : bool
        Leave unreadable pictures out and say how many, instead of stopping.

    Returns
    -------
    pixels : uint8 Tensor [N, height, width, 3]
        In memory when a third of what is free holds it (of several processes on one
        machine, a share of that third), else mapped from an unnamed temporary file (in
        the folder TMPDIR names), which ends with the program.
    images : ImageSet
        The pictures that `pixels` holds, in their order.

    Raises
    ------
    InputError
        At the first unreadable pictures, named, unless they are to be skipped; when
        none is readable; or when they fit neither in memory nor on disk.
    """
    shape = (len(images), height, width, 3)
    size = int(np.prod(shape, dtype=np.int64))
    pixels: np.ndarray
    together = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # as torchrun says
    if size > psutil.virtual_memory().available / 3 / together:
        folder = tempfile.gettempdir()
        logger.info(
            "%.1f GiB of pictures: kept in %s, not in memory", size / 2**30, folder
        )
        try:
            with tempfile.TemporaryFile() as file:
                _reserve(file, size)
                pixels = np.memmap(file, np.uint8, "w+", shape=shape)
        except OSError as error:
            raise InputError(
                f"The decoded pictures need {together * size / 2**30:.1f} GiB, which "
                f"neither the memory nor {folder} has ({error.strerror or error}); set "
                "TMPDIR to a folder that has, or choose a smaller --height and --width."
            ) from error
    else:
        pixels = np.empty(shape, np.uint8)
    broken: dict[int, InputError] = {}

    def one(i: int) -> None:
        try:
            pixels[i] = read_picture(Path(images.paths[i]), height, width)
        except InputError as error:
            broken[i] = error

    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        for _ in pool.map(one, range(len(images))):
            pass
    tensor = torch.from_numpy(pixels)
    if not broken:
        return tensor, images
    first = min(broken)
    if not skip_unreadable:
        more = f" {len(broken) - 1} more cannot be read." if len(broken) > 1 else ""
        raise InputError(f"{broken[first]}{more}") from broken[first]
    if len(broken) == len(images):
        raise InputError(f"None of the {len(images)} pictures can be read: {broken[0]}")
    logger.warning(
        "%d of %d pictures cannot be read and are left out, the first being %s",
        len(broken),
        len(images),
        images.paths[first],
    )
    whole = [i for i in range(len(images)) if i not in broken]
    for place, i in enumerate(whole):  # in place: there may be no room for a copy
        pixels[place] = pixels[i]
    return tensor[: len(whole)], images.select(torch.tensor(whole))


def _reserve(file: IO[bytes], size: int) -> None:
    """Take the room on the disk now.

    A mapped file that finds none later kills the program without a word.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
        return
    block = bytes(2**24)
    for start in range(0, size, len(block)):
        file.write(block[: size - start])
    file.flush()
