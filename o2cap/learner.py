"""What learns: a network with its optimizer, and the step that changes its weights."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.amp import GradScaler
from tqdm import tqdm

from o2cap import distributed
from o2cap.backbone import ReIDModel
from o2cap.config import Config
from o2cap.data.images import ImageSet
from o2cap.data.transforms import change, draw_changes
from o2cap.device import Hardware
from o2cap.errors import TrainingError
from o2cap.features import autocast, upload
from o2cap.run import Metrics

# The graphs' own stream: nothing is added up in it, so nothing waits.
warnings.filterwarnings("ignore", "The AccumulateGrad node's stream does not match")


class Learner:
    """What learns: a network with its optimizer, and the pictures it learns from.

    The warm start and the training share its step.

    Parameters
    ----------
    config, hardware
        The settings, and what to compute on.
    model : ReIDModel
        The network; moved to the device.
    pixels : uint8 Tensor [N, H, W, 3]
        Training pictures, decoded; moved to the GPU if they fit there.
    images : ImageSet
        The same pictures' files and cameras. It has no identities.
    """

    def __init__(
        self,
        config: Config,
        hardware: Hardware,
        model: ReIDModel,
        pixels: Tensor,
        images: ImageSet,
    ) -> None:
        device = hardware.device
        if device.type == "cuda" and pixels.numel() < torch.cuda.mem_get_info()[0] / 4:
            pixels = pixels.to(device)
        self.config, self.hardware, self.images = config, hardware, images
        self.pixels = pixels
        self.model = model.to(device).to(memory_format=torch.channels_last)
        # the model, or what several processes train it through
        self.network: nn.Module = distributed.parallel(self.model, device)
        self.graph: tuple[nn.Module, torch.Size] | None = None
        self.restart()

    def restart(self) -> None:
        """Take a new optimizer, its weight decay coupled (an L2 penalty)."""
        device, settings = self.hardware.device.type, self.config.optim
        trained = [p for p in self.model.parameters() if p.requires_grad]
        how: Any = {"weight_decay": settings.weight_decay, "fused": device == "cuda"}
        self.optimizer: torch.optim.Optimizer
        if settings.method == "adam":
            self.optimizer = torch.optim.Adam(trained, **how)
        else:
            self.optimizer = torch.optim.SGD(trained, momentum=0.9, **how)
        self.scaler = GradScaler(device, enabled=self.hardware.precision == "fp16")

    def begin(self, stage: str, epoch: int, lr: float) -> Generator:
        """Begin an epoch, and return what decides its batches and changes.

        Every epoch is seeded anew, so that a resumed run draws what an uninterrupted
        one would have drawn, with no generator's state to carry over. Processes draw
        the same batches and changes, and each its own dropout.
        """
        self.stage, self.epoch = stage, epoch
        self.losses: list[dict[str, Tensor]] = []
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.network.train()
        seed = seed_of(self.config.seed, stage, epoch)
        torch.manual_seed(seed + distributed.rank())
        return Generator().manual_seed(seed)

    def pictures(
        self, batches: Tensor, generator: Generator, jitter: float = 0.0
    ) -> Iterator[Tensor]:
        """Yield each batch's pictures, changed at random: this process's share of them.

        What an epoch needs of numbers is drawn and taken to the device at once; no step
        sends any.

        Parameters
        ----------
        batches : LongTensor [n, B]
            Numbers of the pictures of each batch, on the CPU.
        generator : Generator
            Decides the changes.
        jitter : float
            Strength of the colour jitter.
        """
        self.batches, device = batches, self.hardware.device
        how, (n, size) = self.config.augment, batches.shape
        shape = (n, size, *self.pixels.shape[1:3])
        own = (slice(None), distributed.share(size))
        changes = draw_changes(shape, generator, **asdict(how)).select(own).to(device)
        index = batches[own].to(self.pixels.device)
        hidden = distributed.rank() > 0 or None  # None: on a terminal only
        what = f"{self.stage} {self.epoch}"
        for i in tqdm(range(n), what, leave=False, disable=hidden):
            pixels = upload(self.pixels[index[i]], device)
            yield change(pixels, changes.select(i), pad=how.pad, jitter=jitter)

    def embed(self, pictures: Tensor) -> Tensor:
        """Return the features of a whole batch, with gradient.

        Parameters
        ----------
        pictures : FloatTensor [share of B, 3, H, W]
            This process's share.

        Returns
        -------
        FloatTensor [B, D]
        """
        device, network = self.hardware.device, self.network
        if device.type == "cuda" and self.config.cuda_graphs and network is self.model:
            # All batches of an epoch have one shape, but not all epochs have the same.
            if self.graph is None or self.graph[1] != pictures.shape:
                self.graph = None  # its memory is free for the next one
                self.graph = self.captured(pictures), pictures.shape
            network = self.graph[0]
        with autocast(device, self.hardware.precision):
            features = network(pictures)
        return distributed.gather(features, self.batches.shape[1])

    def captured(self, pictures: Tensor) -> nn.Module:
        """Return the network as CUDA graphs, for batches of this shape.

        Its forward and its backward pass become one launch each, in place of some 800:
        with small batches a GPU waits for launches, not for arithmetic. Losses, memory
        and optimizer stay outside: their shapes change with the number of proxies, so
        each epoch would have to be captured anew, and the GPU is busy for nearly the
        whole step as it is ("GPU busy" in `benchmarks.gpu`). `torch.compile` is no
        setting here: it wants a C compiler, and what it saves is still to be measured
        (the same benchmark does).
        """
        kept = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        with autocast(self.hardware.device, self.hardware.precision, cache=False):
            # (In a module of its own, since the call exchanges the forward method.)
            alone = nn.Sequential(self.model)
            graphed: Any = torch.cuda.make_graphed_callables(alone, (pictures,))
        for buffer, value in kept:  # the rehearsals moved the running statistics
            buffer.copy_(value)
        return graphed

    def step(self, found: dict[str, Tensor]) -> None:
        """Change the weights to lower the sum of these losses."""
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(torch.stack(list(found.values())).sum()).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        # Looked at once per epoch: asking a GPU for each loss would wait for it.
        self.losses.append({name: loss.detach() for name, loss in found.items()})

    def end(self) -> Metrics:
        """End an epoch: return the mean losses, and refuse one that broke the network.

        A loss tells of the weights before its step only; so the weights that the last
        step left are looked at too. This is the one place that looks.

        Raises
        ------
        TrainingError
            Names the epoch, the iteration and pictures of the batch.
        """
        distributed.copy_buffers(self.network)
        found = torch.stack([torch.stack([*x.values()]) for x in self.losses]).cpu()
        broken = ~found.isfinite().all(dim=1)
        numbers = [x for x in self.model.state_dict().values() if x.is_floating_point()]
        if broken.any() or not torch.stack([x.isfinite().all() for x in numbers]).all():
            at = int(broken.nonzero()[0]) if broken.any() else len(found) - 1
            some = ", ".join(str(self.images.paths[i]) for i in self.batches[at, :4])
            group = "optim" if self.stage == "train" else "warm-start"
            raise TrainingError(
                f"Losses or weights are not finite after epoch {self.epoch} of the "
                f"{self.stage}, from iteration {at} on (pictures {some}, ...); nothing "
                f"of it is kept. Lower --{group}.lr, or try --precision off."
            )
        mean = dict(zip(self.losses[0], found.mean(dim=0).tolist(), strict=True))
        named = {f"loss_{name}": value for name, value in mean.items()}
        return {"loss": sum(mean.values())} | named

    def state(self) -> dict[str, Any]:
        """Return all that a resumed run needs."""
        names = ("model", "optimizer", "scaler")
        return {name: getattr(self, name).state_dict() for name in names}

    def load(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state` returned, perhaps on another device."""
        self.model.load_state_dict(state["model"])
        fused = self.optimizer.param_groups[0]["fused"]
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            group["fused"] = fused  # how this device computes, not the one before
        if state["scaler"]:  # empty if the device before needed none
            self.scaler.load_state_dict(state["scaler"])


def seed_of(seed: int, stage: str, epoch: int) -> int:
    """Return the seed of one epoch's random numbers."""
    words = [seed, int.from_bytes(stage.encode(), "big") % 2**32, epoch]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint32)[0])
