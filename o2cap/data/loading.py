"""Pictures as uint8 in memory, random changes in batches, and which to draw when."""

from __future__ import annotations

import logging
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image, ImageOps
from torch import Generator, Tensor

from o2cap.data.images import ImageSet
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
    try:
        with Image.open(path) as picture:
            upright = ImageOps.exif_transpose(picture)
            if upright.mode.startswith("I;16"):
                # Pillow would clip 16 bits at 255, not scale them.
                scaled = np.asarray(upright, dtype=np.uint16) >> 8
                upright = Image.fromarray(scaled.astype(np.uint8))
            resized = upright.convert("RGB").resize(
                (width, height), Image.Resampling.BICUBIC
            )
            return np.asarray(resized)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(
            f"The picture {path} cannot be read ({error}); repair or remove it, or "
            "leave such pictures out with --skip-unreadable True."
        ) from error


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
        In memory when a third of what is free holds it, else mapped from an unnamed
        temporary file (in the folder TMPDIR names), which ends with the program.
    images : ImageSet
        The pictures that `pixels` holds, in their order.

    Raises
    ------
    InputError
        At the first unreadable pictures, named, unless they are to be skipped; or
        when none is readable.
    """
    shape = (len(images), height, width, 3)
    size = int(np.prod(shape, dtype=np.int64))
    if size > psutil.virtual_memory().available / 3:
        logger.info("%.1f GiB of pictures: kept on disk, not in memory", size / 2**30)
        with tempfile.TemporaryFile() as file:
            pixels = np.memmap(file, np.uint8, "w+", shape=shape)
    else:
        pixels = np.empty(shape, np.uint8)
    broken: dict[int, InputError] = {}

    def one(i: int) -> None:
        try:
            pixels[i] = read_picture(Path(images.paths[i]), height, width)
        except InputError as error:
            broken[i] = error

    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        for _ in pool.map(one, range(len(images)), chunksize=64):
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


def normalise(pixels: Tensor) -> Tensor:
    """Map uint8 [B, H, W, 3] to normalised float32 [B, 3, H, W] (channels last)."""
    scale = 1 / (255 * torch.tensor(STD, device=pixels.device))
    shift = -torch.tensor(MEAN, device=pixels.device) / torch.tensor(
        STD, device=pixels.device
    )
    return torch.addcmul(shift, pixels.float(), scale).permute(0, 3, 1, 2)


def augment(
    pixels: Tensor,
    generator: Generator,
    *,
    flip: float = 0.5,
    pad: float = 10 / 256,
    erase: float = 0.5,
    jitter: float = 0.0,
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

    Returns
    -------
    FloatTensor [B, 3, H, W]
        In the channels-last memory format.
    """
    batch, height, width, _ = pixels.shape
    device = pixels.device
    draw = torch.rand(batch, 12, generator=generator).to(device, non_blocking=True)
    border = round(pad * height)

    # One gather does border, crop and flip: where each output pixel comes from.
    rows = torch.arange(height, device=device)
    columns = torch.arange(width, device=device)
    down = (draw[:, 0] * (2 * border + 1)).long() - border
    right = (draw[:, 1] * (2 * border + 1)).long() - border
    flipped = draw[:, 2, None] < flip
    columns = torch.where(flipped, width - 1 - columns, columns) + right[:, None]
    rows = rows + down[:, None]
    one = torch.arange(batch, device=device)[:, None, None]
    moved = pixels[
        one, rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None]
    ]
    outside = ((rows < 0) | (rows >= height))[:, :, None] | (
        (columns < 0) | (columns >= width)
    )[:, None]
    moved.masked_fill_(outside[..., None], 0)

    pictures = normalise(moved) if jitter == 0 else _jitter(moved, draw[:, 3:9], jitter)
    if erase > 0:
        pictures.masked_fill_(_erased(pictures, erase, draw[:, 9:], generator), 0)
    return pictures


def _jitter(pixels: Tensor, draw: Tensor, strength: float) -> Tensor:
    """Vary brightness, contrast, saturation and tint; normalise. `draw` is [B, 6]."""
    factor = (1 + strength * (2 * draw - 1))[:, :, None, None]
    x = pixels.float().permute(0, 3, 1, 2) / 255
    x = x * factor[:, :1]
    x = torch.lerp(x.mean(dim=(1, 2, 3), keepdim=True), x, factor[:, 1:2])
    x = torch.lerp(x.mean(dim=1, keepdim=True), x, factor[:, 2:3])
    x = (x * (1 + (factor[:, 3:] - 1) / 2)).clamp(0, 1)
    mean, std = torch.tensor([MEAN, STD], device=x.device)[:, None, :, None, None]
    return (x - mean) / std


def _erased(
    pictures: Tensor, probability: float, draw: Tensor, generator: Generator
) -> Tensor:
    """Return the pixels to erase, bool [B, 1, H, W]. `draw` is [B, 3].

    A rectangle of 2-40 % of the area and an aspect ratio of 0.3-3.3; the first of
    ten tries that fits into the picture is taken, and none if none fits.
    """
    batch, _, height, width = pictures.shape
    device = pictures.device
    tries = torch.rand(batch, 10, 2, generator=generator).to(device, non_blocking=True)
    area = height * width * (0.02 + 0.38 * tries[..., 0])
    aspect = 0.3 + 3.0 * tries[..., 1]
    tall = (area * aspect).sqrt().round()
    wide = (area / aspect).sqrt().round()
    fits = (tall < height) & (wide < width)
    first = fits.float().argmax(dim=1, keepdim=True)
    tall, wide = tall.gather(1, first), wide.gather(1, first)
    happens = fits.any(dim=1, keepdim=True) & (draw[:, :1] < probability)
    top = (draw[:, 1:2] * (height - tall + 1)).floor()
    left = (draw[:, 2:3] * (width - wide + 1)).floor()
    rows = torch.arange(height, device=device)
    columns = torch.arange(width, device=device)
    in_rows = (rows >= top) & (rows < top + tall) & happens
    in_columns = (columns >= left) & (columns < left + wide)
    return (in_rows[:, :, None] & in_columns[:, None, :])[:, None]


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
