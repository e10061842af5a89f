"""Random changes to a batch of pictures (augmentation), and normalisation."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

# Mean and standard deviation of ImageNet's colours: what torchvision's weights expect.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
PAD = 10 / 256


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


class Changes(NamedTuple):
    """The random changes to the pictures of some batches: columns of [n, B].

    They are drawn for a whole epoch and taken to the device at once, so that no step
    of the training has to wait for them.
    """

    start: Tensor
    """LongTensor [n, B, 2]: top left corner of the crop within the black border."""
    mirror: Tensor
    """bool [n, B]: whether the picture is flipped."""
    colour: Tensor
    """FloatTensor [n, B, 6]: uniform draws for the colour jitter."""
    box: Tensor
    """LongTensor [n, B, 4]: what is erased, as top, left, bottom, right."""

    def to(self, device: torch.device) -> Changes:
        """Return the same changes on `device`."""
        return Changes(*(column.to(device, non_blocking=True) for column in self))

    def select(self, index: Any) -> Changes:
        """Return the changes at `index`, such as a batch's number."""
        return Changes(*(column[index] for column in self))


def draw_changes(
    shape: tuple[int, int, int, int],
    generator: Generator,
    *,
    flip: float = 0.5,
    pad: float = PAD,
    erase: float = 0.5,
) -> Changes:
    """Draw the changes to n batches of B pictures.

    Parameters
    ----------
    shape : tuple
        n, B, and height and width of a picture.
    generator : Generator
        On the CPU: the same seed gives the same changes on every device.
    flip, erase : float
        Probabilities per picture.
    pad : float
        Border, as a share of the height.
    """
    n, batch, height, width = shape
    draw, tries = torch.empty(n, batch, 12), torch.ones(n, batch, 10, 2)
    for i in range(n):  # in the order in which single batches would draw
        torch.rand(batch, 12, generator=generator, out=draw[i])
        if erase > 0:
            torch.rand(batch, 10, 2, generator=generator, out=tries[i])
    start = (draw[..., :2] * (2 * round(pad * height) + 1)).long()
    box = _boxes(height, width, draw[..., 9:], tries, erase)
    return Changes(start, draw[..., 2] < flip, draw[..., 3:9], box)


def change(
    pixels: Tensor, changes: Changes, *, pad: float = PAD, jitter: float = 0.0
) -> Tensor:
    """Apply changes to a batch and normalise it, on the device where it lies.

    Horizontal flip; shift within a black border (pad and random crop); colour
    jitter; normalisation; random erasing with the mean colour, which is 0 after
    normalisation (the public code fills an un-normalised value).

    Parameters
    ----------
    pixels : uint8 Tensor [B, H, W, 3]
        Decoded pictures.
    changes : Changes
        Of this batch, columns of [B], on the same device.
    pad : float
        As they were drawn with.
    jitter : float
        Strength of brightness, contrast, saturation and tint changes; 0 for none.

    Returns
    -------
    FloatTensor [B, 3, H, W]
        In the channels-last memory format.
    """
    border = round(pad * pixels.shape[1])
    changed = _moved(pixels, border, changes.start, changes.mirror)
    if jitter > 0:
        changed = _jitter(changed, changes.colour, jitter)
    pictures = normalise(changed)
    _erase(pictures, changes.box)
    return pictures


def augment(
    pixels: Tensor, generator: Generator, *, jitter: float = 0.0, **how: float
) -> Tensor:
    """Change one batch at random: :func:`draw_changes`, then :func:`change`."""
    changes = draw_changes((1, *pixels.shape[:3]), generator, **how).select(0)
    pad = how.get("pad", PAD)
    return change(pixels, changes.to(pixels.device), pad=pad, jitter=jitter)


def _by_picture(device: torch.device) -> bool:
    # On a CPU slices, picture by picture, are several times faster than one gather;
    # on a GPU each would be a kernel to launch.
    return device.type == "cpu"


def _erase(pictures: Tensor, boxes: Tensor) -> None:
    """Set a rectangle in each picture to 0; `boxes` is as :func:`_boxes` returns it."""
    if _by_picture(pictures.device):
        for picture, box in zip(pictures, boxes.tolist(), strict=True):
            picture[:, box[0] : box[2], box[1] : box[3]] = 0
        return
    top, left, bottom, right = boxes.T[..., None]
    row = torch.arange(pictures.shape[2], device=pictures.device)
    column = torch.arange(pictures.shape[3], device=pictures.device)
    tall, wide = (top <= row) & (row < bottom), (left <= column) & (column < right)
    pictures.masked_fill_((tall[:, :, None] & wide[:, None])[:, None], 0)


def _moved(pixels: Tensor, border: int, start: Tensor, mirror: Tensor) -> Tensor:
    """Cut a window from each black-framed picture, and mirror some.

    `start`, [B, 2], is the top left corner within the frame; `mirror` is bool [B].
    """
    height, width = pixels.shape[1:3]
    framed = F.pad(pixels, (0, 0, border, border, border, border))
    if _by_picture(pixels.device):
        windows = []
        places = zip(framed, start.tolist(), mirror.tolist(), strict=True)
        for picture, (top, left), flip in places:
            window = picture[top : top + height, left : left + width]
            windows.append(window.flip(1) if flip else window)
        return torch.stack(windows)
    across = torch.arange(width, device=pixels.device)
    row = start[:, :1] + torch.arange(height, device=pixels.device)
    column = start[:, 1:] + torch.where(mirror[:, None], across.flip(0), across)
    picture = torch.arange(len(pixels), device=pixels.device)
    return framed[picture[:, None, None], row[:, :, None], column[:, None]]


def _jitter(pixels: Tensor, draw: Tensor, strength: float) -> Tensor:
    """Vary brightness, contrast, saturation and tint; `draw` is [B, 6].

    Maps [B, H, W, 3] in 0..255 to the same, as floats.
    """
    factor = (1 + strength * (2 * draw - 1))[:, None, None]
    x = pixels * factor[..., :1]
    x = torch.lerp(x.mean(dim=(1, 2, 3), keepdim=True), x, factor[..., 1:2])
    x = torch.lerp(x.mean(dim=3, keepdim=True), x, factor[..., 2:3])
    return (x * (1 + (factor[..., 3:] - 1) / 2)).clamp_(0, 255)


def _boxes(height: int, width: int, draw: Tensor, tries: Tensor, p: float) -> Tensor:
    """Return what to erase in each picture: top, left, bottom, right, [..., 4].

    A rectangle of 2-40 % of the area and an aspect ratio of 0.3-3.3; the first of
    the `tries`, [..., T, 2], that fits into the picture is taken, and if none fits or
    chance decides so (1 − p), an empty one. `draw` is [..., 3]; all are uniform.
    """
    area = height * width * (0.02 + 0.38 * tries[..., 0])
    aspect = 0.3 + 3.0 * tries[..., 1]
    tall = (area * aspect).sqrt().round()
    wide = (area / aspect).sqrt().round()
    fits = (tall < height) & (wide < width)
    first = fits.long().argmax(dim=-1, keepdim=True)
    happens = fits.any(dim=-1, keepdim=True) & (draw[..., :1] < p)
    tall = tall.gather(-1, first) * happens
    wide = wide.gather(-1, first) * happens
    top = (draw[..., 1:2] * (height - tall + 1)).floor()
    left = (draw[..., 2:3] * (width - wide + 1)).floor()
    return torch.cat([top, left, top + tall, left + wide], dim=-1).long()
