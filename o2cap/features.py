"""Features of pictures: evaluation mode, no random changes."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from o2cap import distributed
from o2cap.backbone import ReIDModel
from o2cap.config import Config
from o2cap.data.images import ImageSet
from o2cap.data.loading import decode
from o2cap.data.transforms import normalise
from o2cap.device import Hardware
from o2cap.errors import TrainingError
from o2cap.proxies import check_cameras


def autocast(
    device: torch.device, precision: Literal["bf16", "fp16", "off"], cache: bool = True
) -> torch.autocast:
    """Return the context in which the network runs at `precision`.

    `cache` keeps weights in half precision for several uses; no CUDA graph may do so.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    return torch.autocast(device.type, dtype, precision != "off", cache)


def upload(pixels: Tensor, device: torch.device) -> Tensor:
    """Return `pixels` on the device.

    To a GPU they go by way of pinned memory: from there they travel while the GPU
    computes, and the program does not wait for them.
    """
    if device.type == "cuda" and pixels.device.type == "cpu":
        pixels = pixels.pin_memory()
    return pixels.to(device, non_blocking=True)


@torch.no_grad()
def extract(
    model: ReIDModel,
    images: ImageSet | Tensor,
    *,
    height: int,
    width: int,
    device: torch.device | str = "cpu",
    precision: Literal["bf16", "fp16", "off"] = "off",
) -> Tensor:
    """Return the L2-normalised feature of every picture, FloatTensor [N, D].

    Parameters
    ----------
    model : ReIDModel
        Moved to `device`; its training or evaluation mode is restored afterwards.
    images : ImageSet or uint8 Tensor [N, height, width, 3]
        Pictures, or pictures already decoded by :func:`o2cap.data.loading.decode`.
    height, width : int
        Input size in pixels.
    device : torch.device or str
        Where the network runs, and where the features are returned.
    precision : str
        Mixed precision of the network; the features are float32 in any case.
    """
    device = torch.device(device)
    if isinstance(images, ImageSet):
        images, _ = decode(images, height, width)
    # On a CPU so few that their layers stay near the cache (MobileNetV2 at 128x64 is
    # twice as fast with 16 pictures as with 256); only rounding depends on it.
    size = max(16, 2**17 // (height * width)) if device.type == "cpu" else 256
    features = torch.empty(len(images), model.dim, device=device)
    was_training = model.training
    model.to(device).eval()
    starts = range(0, len(images), size)
    hidden = distributed.rank() > 0 or None  # None: on a terminal only
    try:
        for start in tqdm(starts, "extract", leave=False, disable=hidden):
            pixels = upload(images[start : start + size], device)
            with autocast(device, precision):
                features[start : start + size] = model(normalise(pixels))
    finally:
        model.train(was_training)
    return features


def extract_all(
    model: ReIDModel, pixels: Tensor, config: Config, hardware: Hardware
) -> Tensor:
    """Return the features of all pictures, each process extracting its share.

    Raises
    ------
    TrainingError
        When some are not finite.
    """
    n = len(pixels)
    # fp16 ends at 65504, which a network trained in bf16 may exceed. All processes have
    # all features, so they agree on whether it did.
    for precision in dict.fromkeys((hardware.extraction, "off")):
        features = extract(
            model,
            pixels[distributed.share(n)],
            height=config.height,
            width=config.width,
            device=hardware.device,
            precision=precision,
        )
        features = distributed.gather(features, n)
        if features.sum().isfinite():  # no temporary of the size of the features
            return features
    raise TrainingError(
        "The network's features are not finite: its weights are too large. Train again "
        "with a lower --optim.lr, or with --precision off."
    )


def standardise_by_camera(features: Tensor, camids: Tensor) -> Tensor:
    """Remove each camera's mean and spread: FloatTensor [N, D], L2-normalised.

    ``f̂_i = (f_i − mean of camera c_i) / (s.d. of camera c_i)``, per dimension, then
    divided by its length (arXiv 2502.10195; beyond the paper). A dimension in which a
    camera does not vary becomes 0 there, so the only picture of a camera becomes the
    zero vector: similar to nothing, and hardly ever in a cluster.

    Parameters
    ----------
    features : FloatTensor [N, D]
        L2-normalised, on any device.
    camids : LongTensor [N]
        Camera of each picture.

    Raises
    ------
    ValueError
        For camids that do not fit.

    Book: :eq:`standardise_by_camera`
    """
    check_cameras(camids, len(features))
    _, camera = camids.to(features.device).unique(return_inverse=True)
    count = camera.bincount()[:, None]
    zeros = features.new_zeros(len(count), features.shape[1])
    mean = zeros.index_add(0, camera, features) / count
    centred = features - mean[camera]
    sd = (zeros.index_add(0, camera, centred.square()) / count).sqrt()
    # Rounding leaves a spread of 1e-8 or so where there is none.
    scale = torch.where(sd > 1e-6, 1 / sd, 0)
    return F.normalize(centred * scale[camera])
