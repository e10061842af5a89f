"""Pictures as uint8 in memory, random changes in batches, and which to draw when."""

from __future__ import annotations

import logging
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import IO

import numpy as np
import psutil
import torch
from PIL import Image, ImageOps
from torch import Generator, Tensor
from torch.nn import functional as F

from o2cap.data.images import ImageSet, open_picture
from o2cap.errors import InputError

logger = logging.getLogger("o2cap")

# Mean and standard deviation of ImageNet's colours: what torchvision's weights expect.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


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


@lru_cache(maxsize=16)
def _scale_and_shift(width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return factor and summand of a row of `width` pixels, each FloatTensor [3·W].

    Whole rows make long inner loops (4 times faster than three colours on a CPU),
    and a GPU is not waited for to receive six numbers.
    """
    mean, std = torch.tensor([MEAN, STD], dtype=torch.float64).repeat(1, width)
    return (1 / (255 * std)).float().to(device), (-mean / std).float().to(device)


def normalise(pixels: Tensor) -> Tensor:
    """Map [B, H, W, 3] in 0..255 to normalised float32 [B, 3, H, W] (channels last)."""
    scale, shift = _scale_and_shift(pixels.shape[2], pixels.device)
    rows = pixels.flatten(2).to(torch.float32, copy=True)
    return rows.mul_(scale).add_(shift).view(pixels.shape).permute(0, 3, 1, 2)


def augment(
    pixels: Tensor,
    generator: Generator,
    *,
    flip: float = 0.5,
    pad: float = 10 / 256,
    erase: float = 0.5,
    jitter: float = 0.0,
    rows: slice = slice(None),
) -> Tensor:
    """Change a batch at random and normalise it, on the device where it lies.

    Horizontal flip; shift within a black border (pad and random crop); colour
    jitter; normalisation; random erasing with the mean colour, which is 0 after
    normalisation (the public code fills an un-normalised value).

    Parameters
    ----------
    pixels : uint8 Tensor [B, H, W, 3]
        Decoded pictures.
    generator : Generator
        On the CPU: the same seed gives the same changes on every device.
    flip, erase : float
        Probabilities per picture.
    pad : float
        Border, as a share of the height.
    jitter : float
        Strength of brightness, contrast, saturation and tint changes; 0 for none.
    rows : slice
        The part of the batch to return; chance is drawn for all of it.

    Returns
    -------
    FloatTensor [B, 3, H, W]
        In the channels-last memory format; the chosen rows.
    """
    batch, height, width, _ = pixels.shape
    draw = torch.rand(batch, 12, generator=generator)[rows]
    pixels = pixels[rows]
    border = round(pad * height)

    start = (draw[:, :2] * (2 * border + 1)).long()
    changed = _moved(pixels, border, start, draw[:, 2] < flip)
    if jitter > 0:
        changed = _jitter(
            changed, draw[:, 3:9].to(pixels.device, non_blocking=True), jitter
        )
    pictures = normalise(changed)
    if erase > 0:
        tries = torch.rand(batch, 10, 2, generator=generator)[rows]
        _erase(pictures, _boxes(height, width, draw[:, 9:], tries, erase))
    return pictures


def _by_picture(device: torch.device) -> bool:
    # On a CPU slices, picture by picture, are several times faster than one gather;
    # on a GPU each would be a kernel to launch.
    return device.type == "cpu"


def _erase(pictures: Tensor, boxes: Tensor) -> None:
    """Set a rectangle in each picture to 0; `boxes` is as :func:`_boxes` returns it."""
    if _by_picture(pictures.device):
        for picture, box in zip(pictures, boxes.tolist(), strict=True):
            top, left, bottom, right = box
            if bottom > top:
                picture[:, top:bottom, left:right] = 0
        return
    height, width = pictures.shape[2:]
    boxes = boxes.to(pictures.device, non_blocking=True)[:, :, None]
    row = torch.arange(height, device=pictures.device)
    column = torch.arange(width, device=pictures.device)
    tall = (boxes[:, 0] <= row) & (row < boxes[:, 2])
    wide = (boxes[:, 1] <= column) & (column < boxes[:, 3])
    pictures.masked_fill_((tall[:, :, None] & wide[:, None])[:, None], 0)


def _moved(pixels: Tensor, border: int, start: Tensor, mirror: Tensor) -> Tensor:
    """Cut a window from each black-framed picture, and mirror some.

    `start`, [B, 2], is the top left corner within the frame; `mirror` is bool [B].
    """
    height, width = pixels.shape[1:3]
    framed = F.pad(pixels, (0, 0, border, border, border, border))
    if not _by_picture(pixels.device):
        across = torch.arange(width)
        row = start[:, :1] + torch.arange(height)
        column = start[:, 1:] + torch.where(mirror[:, None], across.flip(0), across)
        row = row.to(pixels.device, non_blocking=True)
        column = column.to(pixels.device, non_blocking=True)
        picture = torch.arange(len(pixels), device=pixels.device)
        return framed[picture[:, None, None], row[:, :, None], column[:, None]]
    windows = []
    for picture, (top, left), flip in zip(
        framed, start.tolist(), mirror.tolist(), strict=True
    ):
        window = picture[top : top + height, left : left + width]
        windows.append(window.flip(1) if flip else window)
    return torch.stack(windows)


def _jitter(pixels: Tensor, draw: Tensor, strength: float) -> Tensor:
    """Vary brightness, contrast, saturation and tint; `draw` is [B, 6].

    Maps [B, H, W, 3] in 0..255 to the same, as floats.
    """
    factor = (1 + strength * (2 * draw - 1))[:, None, None]
    x = pixels * factor[..., :1]
    x = torch.lerp(x.mean(dim=(1, 2, 3), keepdim=True), x, factor[..., 1:2])
    x = torch.lerp(x.mean(dim=3, keepdim=True), x, factor[..., 2:3])
    return (x * (1 + (factor[..., 3:] - 1) / 2)).clamp_(0, 255)


def _boxes(
    height: int, width: int, draw: Tensor, tries: Tensor, probability: float
) -> Tensor:
    """Return what to erase in each picture: top, left, bottom, right, [B, 4].

    A rectangle of 2-40 % of the area and an aspect ratio of 0.3-3.3; the first of
    the `tries`, [B, T, 2], that fits into the picture is taken, and if none fits or
    chance decides against it, an empty one. `draw` is [B, 3]; all are uniform.
    """
    area = height * width * (0.02 + 0.38 * tries[..., 0])
    aspect = 0.3 + 3.0 * tries[..., 1]
    tall = (area * aspect).sqrt().round()
    wide = (area / aspect).sqrt().round()
    fits = (tall < height) & (wide < width)
    first = fits.long().argmax(dim=1, keepdim=True)
    happens = fits.any(dim=1, keepdim=True) & (draw[:, :1] < probability)
    tall = tall.gather(1, first) * happens
    wide = wide.gather(1, first) * happens
    top = (draw[:, 1:2] * (height - tall + 1)).floor()
    left = (draw[:, 2:3] * (width - wide + 1)).floor()
    return torch.cat([top, left, top + tall, left + wide], dim=1).long()


def proxy_batches(
    label: Tensor,
    iterations: int,
    generator: Generator,
    *,
    proxies: int = 8,
    images: int = 4,
) -> Tensor:
    """Draw the batches of an epoch, balanced over proxies.

    A pass visits every proxy once, in shuffled order; a last partial batch of a
    pass is dropped; then the next pass. A proxy with fewer pictures than asked for
    gives some of them more than once. With fewer proxies than a batch wants, every
    batch holds them all. With more proxies than the epoch has draws, some are not
    visited in this epoch: kept as in the public code, and reported by the trainer.

    Parameters
    ----------
    label : LongTensor [N]
        Proxy of each picture, −1 for outliers; every number from 0 on is in use.
    iterations : int
        Number of batches.
    generator : Generator
        Decides everything random here.
    proxies, images : int
        Proxies in a batch, and pictures of each.

    Returns
    -------
    LongTensor [iterations, B]
        Pictures of each batch, those of a proxy together;
        B = min(proxies, P) × images.

    Raises
    ------
    ValueError
        When there is no proxy.

    Book: :eq:`proxy_batches`
    """
    count = label[label >= 0].bincount()
    if len(count) == 0:
        raise ValueError("there is no proxy to sample from")
    together = min(proxies, len(count))
    visits = _passes(len(count), together, iterations, generator).flatten()

    inside = (label >= 0).nonzero().flatten()
    members = inside[label[inside].argsort(stable=True)]
    n, begin = count[visits], (count.cumsum(0) - count)[visits]
    rand = torch.rand(len(visits), images, generator=generator)
    again = (rand * n[:, None]).long().minimum(n[:, None] - 1)
    pick = torch.where((n >= images)[:, None], _distinct(rand, n), again)
    return members[begin[:, None] + pick].reshape(iterations, -1)


def instance_batches(
    n_images: int, iterations: int, generator: Generator, *, images: int = 32
) -> Tensor:
    """Draw batches of different pictures, LongTensor [iterations, min(images, N)].

    Passes over all N pictures in shuffled order, a last partial batch dropped.
    """
    return _passes(n_images, min(images, n_images), iterations, generator)


def _passes(n: int, together: int, iterations: int, generator: Generator) -> Tensor:
    """Cut shuffled passes over range(n) into batches [iterations, together]."""
    in_pass = n // together
    order = torch.rand(-(-iterations // in_pass), n, generator=generator).argsort(1)
    return order[:, : in_pass * together].reshape(-1, together)[:iterations]


def _distinct(rand: Tensor, n: Tensor) -> Tensor:
    """Turn uniform draws [T, k] into k distinct numbers below n, [T] (n ≥ k).

    The j-th picks among the n − j numbers left: it steps over those already taken,
    in rising order. A Python loop over k² pairs of picks, not over the T visits.
    """
    k = rand.shape[1]
    taken = torch.empty_like(rand, dtype=torch.int64)
    for j in range(k):
        left = n - j
        pick = (rand[:, j] * left).long().clamp(min=0).minimum((left - 1).clamp(min=0))
        for earlier in taken[:, :j].sort(dim=1).values.unbind(dim=1):
            pick = pick + (pick >= earlier).long()
        taken[:, j] = pick
    return taken
