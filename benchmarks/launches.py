"""What a training step asks of a GPU, counted without one: launches and copies.

The device is torch's meta, whose tensors have no numbers: nothing is computed, each
operation is seen, and one that would have to look at a number fails. An operation
launches one kernel at least. Mixed precision adds a cast of each weight and back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from o2cap.backbone import build_model
from o2cap.config import Config
from o2cap.data.images import ImageSet
from o2cap.data.samplers import proxy_batches
from o2cap.data.transforms import augment
from o2cap.device import Hardware
from o2cap.learner import Learner
from o2cap.proxies import ProxyMemory
from o2cap.trainer import make_proxies, method_losses


class Watch(TorchDispatchMode):
    """Counts the launches on the device and the copies between it and the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.copies = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        # A single number from the CPU goes along with the launch.
        devices = {
            x.device.type
            for x in tree_leaves((args, kwargs, found))
            if isinstance(x, Tensor) and x.dim()
        }
        aliases = [x.alias_info for x in func._schema.returns]
        is_view = any(alias and not alias.is_write for alias in aliases)
        is_room = "empty" in func._schema.name
        self.launches += "meta" in devices and not is_view and not is_room
        self.copies += len(devices) > 1
        return found


def count(config: Config, clusters: Tensor, images: ImageSet) -> Iterator[Any]:
    """Train, and yield after each step what its parts did.

    Parameters
    ----------
    config : Config
        Its method, network, sizes and number of iterations.
    clusters : LongTensor [N]
        Pseudo labels.
    images : ImageSet
        N pictures, of which only the cameras are read.

    Yields
    ------
    dict of str to Watch
        By part. ``drawn singly`` is no part: it prepares the pictures of one batch as
        if there were no plan of the epoch.
    """
    meta = torch.device("meta")
    with mock.patch("torch.autocast", lambda *_, **__: nullcontext()):
        size = {"height": config.height, "width": config.width}
        with meta:
            model = build_model(config.backbone, "none", **size)
            pixels = torch.zeros(len(images), *size.values(), 3, dtype=torch.uint8)
        hardware = Hardware(meta, "off", 1)
        learner = Learner(config, hardware, model, pixels, images)
        for group in learner.optimizer.param_groups:
            group["foreach"] = True  # all weights at once; the fused one is for GPUs
        proxies = make_proxies(clusters, images.camids, config)
        memory = ProxyMemory(torch.zeros(len(proxies), model.dim, device=meta))
        there = proxies.to(meta)
        vars(there)["most_per_cluster"] = proxies.most_per_cluster  # once an epoch
        generator = learner.begin("train", 0, config.optim.lr)
        batches = proxy_batches(
            proxies.label,
            config.iterations,
            generator,
            proxies=config.batch.proxies,
            images=config.batch.images,
        )
        proxy = proxies.label[batches].to(meta)
        steps = learner.pictures(batches, generator)
        for batch, own in zip(batches, proxy, strict=True):
            names = ("pictures", "network", "losses", "update", "memory")
            found = {name: Watch() for name in (*names, "backward", "drawn singly")}
            with found["pictures"]:
                pictures = next(steps)
            with found["network"]:
                anchors = learner.embed(pictures)
            with found["losses"]:
                parts = method_losses(config, anchors, own, memory, there)
            with found["update"]:  # both backward passes, and the optimizer
                learner.step(parts)
            with found["memory"]:
                memory.update(anchors.detach(), own, config.batch.images)
            again = learner.embed(pictures)
            learner.optimizer.zero_grad(set_to_none=True)
            with found["backward"]:  # of the network alone
                again.backward(torch.zeros_like(again))
            with found["drawn singly"]:
                augment(pixels[batch], generator)
                proxies.label[batch].to(meta)
            yield found
