"""Pictures, decoded once: uint8 in memory, or on the disk where they are too many."""

from __future__ import annotations

import logging
import math
import os
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image, ImageOps
from torch import Tensor

from o2cap import distributed
from o2cap.data.images import ImageSet, open_picture
from o2cap.errors import InputError

logger = logging.getLogger("o2cap")

DEEP = ("I", "F")  # what the modes of more than 8 bits begin with: I;16, I, F


def read_picture(
    path: Path,
    height: int,
    width: int,
    grey_range: tuple[float, float] | None = None,
) -> np.ndarray:
    """Return one picture, resized (bicubic), as uint8 [height, width, 3], RGB.

    A rotation noted in EXIF is applied, as far as EXIF can be read, and of an animation
    the first frame is taken. What Pillow's modes become:

    ========================  =====================================================
    1, L, P, RGB, YCbCr, HSV  what they show; 1 is black and white
    CMYK, LAB                 Pillow's conversion, without a colour profile
    LA, PA, RGBA, RGBX        the colours alone: transparency is ignored
    16-bit colour             the upper 8 bits of each value
    I;16, I, F                grey: `grey_range` is black and white, beyond it the same
    La                        refused, as by Pillow
    ========================  =====================================================

    Raises
    ------
    InputError
        Names the file when it is missing, unreadable, truncated or absurdly large,
        and when it has more than 8 bits of grey and no range is given.
    """
    with open_picture(path) as picture:
        picture.load()
        with suppress(Exception):  # EXIF is damaged: the pixels are turned before that
            ImageOps.exif_transpose(picture, in_place=True)
        upright: Image.Image = picture
        if picture.mode.startswith(DEEP):
            grey = np.asarray(picture, np.float64)
            if grey_range is None:
                raise ValueError(
                    "it has more than 8 bits of grey, and neither data set nor run say "
                    "which are black and white"
                )
            if not np.isfinite(grey).all():
                raise ValueError("some of its values are no finite numbers")
            grey = np.interp(grey, grey_range, (0, 255)).round()
            upright = Image.fromarray(grey.astype(np.uint8))
        small = upright.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        return np.asarray(small)


def find_grey_range(paths: Iterable[Path]) -> tuple[float, float] | None:
    """Return which grey values are black and white in pictures of more than 8 bits.

    Their files do not say it: a thermal camera uses a small part of its 16 bits, and
    another part on a warm day. So it is the range of the whole set, by which its
    pictures stay comparable; of each picture the outermost thousandth at either end
    does not count, where dead and hot pixels are.

    Parameters
    ----------
    paths : iterable of Path
        The set. Pictures that cannot be read do not count.

    Returns
    -------
    (float, float) or None
        None when no .png or .tif file has more than 8 bits of grey (none of a thousand,
        in a larger set: :func:`read_picture` refuses what was missed).
    """

    def outermost(path: Path) -> np.ndarray | None:
        with suppress(InputError), open_picture(path) as picture:
            if picture.mode.startswith(DEEP):
                return np.percentile(np.asarray(picture, np.float64), (0.1, 99.9))
        return None

    deep = [p for p in paths if p.suffix.lower() in (".png", ".tif", ".tiff")]
    with ThreadPoolExecutor() as pool:
        # All, only if there is one among a sample.
        for some in (deep[:: len(deep) // 1000 + 1], deep):
            found = [e for e in pool.map(outermost, some) if e is not None]
            ends = [e for e in found if np.isfinite(e).all()]
            if not ends:
                return None
    low, high = float(min(e[0] for e in ends)), float(max(e[1] for e in ends))
    return low, high if high > low else low + 1


def read_pictures(
    images: ImageSet, pixels: np.ndarray, workers: int = 0
) -> dict[int, InputError]:
    """Read N pictures into `pixels`, uint8 [N, height, width, 3].

    Parameters
    ----------
    images : ImageSet
        N pictures.
    pixels : np.ndarray
        Is written to; its shape says the size to bring them to.
    workers : int
        As for :func:`decode`.

    Returns
    -------
    dict of int to InputError
        Which could not be read, in order, and why.
    """

    _, height, width, _ = pixels.shape

    def one(i: int) -> InputError | None:
        try:
            pixels[i] = read_picture(images.paths[i], height, width, images.grey_range)
        except InputError as error:
            return error
        return None

    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        faults = pool.map(one, range(len(images)))
        return {i: fault for i, fault in enumerate(faults) if fault is not None}


def decode(
    images: ImageSet,
    height: int,
    width: int,
    *,
    workers: int = 0,
    skip_unreadable: bool = False,
) -> tuple[Tensor, ImageSet]:
    """Decode all pictures once, into memory or, if they are too many, onto disk.

    Of several processes each makes this call. The first on a machine decodes, and all
    on it share the pixels.

    Parameters
    ----------
    images : ImageSet
        N pictures.
    height, width : int
        Size to bring them to, in pixels.
    workers : int
        Threads that decode (decoding lets other threads run); 0 means one a core. The
        result does not depend on it.
    skip_unreadable : bool
        Leave unreadable pictures out and say how many, instead of stopping.

    Returns
    -------
    pixels : uint8 Tensor [N, height, width, 3]
        In memory when a third of what is free holds it, else mapped from a temporary
        file (in the folder TMPDIR names), which ends with the program. Several
        processes always map a file, those of one machine the same; the system keeps
        it in memory as far as there is room.
    images : ImageSet
        The pictures that `pixels` holds, in their order. What one process cannot read
        no process keeps.

    Raises
    ------
    InputError
        At the first unreadable pictures, named, unless they are to be skipped; when
        none is readable; or when they fit neither in memory nor on disk.
    """
    reader, found = distributed.first_here(), {}
    pixels = _room((len(images), height, width, 3), reader)
    if distributed.rank() == reader:
        found = read_pictures(images, pixels, workers)
    broken = {i: x for part in distributed.everyones(found) for i, x in part.items()}
    if not broken:
        return torch.from_numpy(pixels), images
    first, *others = broken.values()
    if not skip_unreadable or len(broken) == len(images):
        more = f" {len(others)} more cannot be read." if others else ""
        raise InputError(f"{first}{more}") from first
    logger.warning(
        "%d of %d pictures cannot be read and are left out, the first being %s",
        *(len(broken), len(images), images.paths[min(broken)]),
    )
    whole = [i for i in range(len(images)) if i not in broken]
    if distributed.rank() == reader:
        for place, i in enumerate(whole):  # in place: there may be no room for a copy
            pixels[place] = pixels[i]
    distributed.everyones(None)  # all wait for it
    return torch.from_numpy(pixels)[: len(whole)], images.select(torch.tensor(whole))


def _room(shape: tuple[int, ...], maker: int) -> np.ndarray:
    """Return room for pictures, in memory or on the disk; see :func:`decode`.

    Process `maker` makes the file, if there are several on this machine.
    """
    size, alone = math.prod(shape), distributed.size() == 1
    if not size or (alone and size <= psutil.virtual_memory().available / 3):
        return np.empty(shape, np.uint8)
    folder = tempfile.gettempdir()
    logger.info("%.1f GiB of pictures: kept in a file in %s", size / 2**30, folder)

    def mapped(made: Any) -> np.ndarray:
        file = distributed.everyones(made)[maker]
        pixels = np.memmap(file, np.uint8, "r+", shape=shape)
        distributed.everyones(None)  # all have opened it: its name may go
        return pixels

    if distributed.rank() != maker:
        return mapped(None)
    # Without a name where nobody else looks for it: then no kill can leave it behind.
    make = tempfile.TemporaryFile if alone else tempfile.NamedTemporaryFile
    try:
        with make() as file:
            # Written now: a mapped file that finds the disk full later kills the
            # program without a word.
            for start in range(0, size, 2**24):
                file.write(bytes(min(2**24, size - start)))
            file.flush()
            return mapped(file if alone else file.name)
    except OSError as error:
        fault = InputError(
            f"The decoded pictures need {size / 2**30:.1f} GiB, which neither the "
            f"memory nor {folder} has ({error.strerror or error}); set TMPDIR to a "
            "folder that has, or choose a smaller --height and --width."
        )
        return mapped(fault)
