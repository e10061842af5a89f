"""Several processes, one training: torchrun starts them, torch.distributed joins them.

K processes compute what one would. All draw the same plan of an epoch; each takes its
share of every batch through its copy of the network; the features of all are gathered,
with their gradient; and each computes the loss of the whole batch and moves its copy of
the memory in the order of the batch, so that the copies stay equal. Extraction is
shared out by rows; pictures are read once a machine, by the first process on it. The
first process of all clusters, evaluates and touches the run directory.

Without torchrun there is one process, and each function here is what it is for one.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from o2cap.errors import InputError, TrainingError

P = ParamSpec("P")
T = TypeVar("T")

PATIENCE = 60.0  # seconds for which the others wait before it is said:
WAITING = "%s takes a while: the others wait for it, --timeout minutes at most"


@contextlib.contextmanager
def joined(minutes: float = 30) -> Iterator[None]:
    """Join the processes that torchrun (or any launcher like it) started.

    GPUs talk by NCCL, CPUs by gloo.

    Parameters
    ----------
    minutes : float
        How long a process waits for one that is cut off. The others wait as long while
        the first one clusters, so it must be longer than that takes.

    Raises
    ------
    InputError
        When the environment names some of what torchrun sets, but not all.
    RuntimeError
        From torch, when another process stops before the end; the same command goes on
        from the last checkpoint.
    """
    names = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    alone = not {"RANK", "WORLD_SIZE"} & os.environ.keys()
    if dist.is_initialized() or alone or os.environ.get("WORLD_SIZE") == "1":
        yield
        return
    if lacking := sorted(names - os.environ.keys()):
        raise InputError(
            f"The environment has RANK or WORLD_SIZE, but not {', '.join(lacking)}: "
            "start several processes by torchrun, or unset them all for one."
        )
    gpu = None
    if count := torch.cuda.device_count():
        gpu = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % count)
        torch.cuda.set_device(gpu)  # what "cuda" means from here on, to NCCL too
    dist.init_process_group(timeout=timedelta(minutes=minutes), device_id=gpu)
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """Return this process's number, 0 being the first."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def share(n: int) -> slice:
    """Return this process's rows of n: consecutive, as equal as n allows."""
    return slice(rank() * n // size(), (rank() + 1) * n // size())


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, n: int) -> Tensor:
        ctx.own = share(n)
        k, most = size(), -(-n // size())
        sent = rows.new_zeros(most, *rows.shape[1:])
        sent[: len(rows)] = rows
        found = rows.new_empty(k * most, *rows.shape[1:])
        dist.all_gather_into_tensor(found, sent)
        sizes = [(r + 1) * n // k - r * n // k for r in range(k)]
        return torch.cat([found[r * most :][:s] for r, s in enumerate(sizes)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return size() * gradient[ctx.own], None


def gather(rows: Tensor, n: int) -> Tensor:
    """Put the shares of all processes together: [n, ...], the same on each.

    The gradient goes back to the process that a row came from, times K. All compute
    the same loss, so every process already has the whole gradient of its own rows and
    nothing need be sent; and DistributedDataParallel takes the mean of the processes'
    gradients where their sum is wanted, which the factor K makes good. So only the
    network is wrapped, not the losses: they need the features of all.

    Parameters
    ----------
    rows : Tensor [len(share(n)), ...]
        This process's share.
    n : int
        Rows of all processes together.
    """
    return rows if size() == 1 else _Gather.apply(rows, n)


def parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """Return what a process's share of a batch goes through, in training.

    That is `model`, whose gradients become the mean over the processes. On GPUs its
    batch norms compute over the whole batch. On the CPU torch cannot do that: they
    normalise each share by itself, and the running statistics are the first's.
    """
    if size() == 1:
        return model
    if device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return DistributedDataParallel(model)


def copy_buffers(module: nn.Module) -> None:
    """Give all processes the first's buffers: running statistics, memory entries.

    Sums on a GPU are not the same to the last bit on every one.
    """
    if size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def everyones(found: T) -> list[T]:
    """Return what each process found, in their order; raise what is an error."""
    every = [found] * size()
    if size() > 1:
        dist.all_gather_object(every, found)
    for error in every:
        if isinstance(error, InputError):
            raise error
    return every


def first_here() -> int:
    """Return the number of the first process on this machine, as torchrun counts."""
    return rank() - int(os.environ.get("LOCAL_RANK", "0")) if size() > 1 else 0


def on_first(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Let the first process do `work`; all return what it found, or raise its error."""
    if size() == 1:
        return work(*args, **kwargs)
    found: list[Any] = [None]
    if rank() == 0:
        say = logging.getLogger("o2cap").info
        late = threading.Timer(PATIENCE, say, (WAITING, work.__name__))
        late.start()
        try:
            found = [work(*args, **kwargs)]
        except (InputError, TrainingError) as error:
            found = [error]
        finally:
            late.cancel()
    dist.broadcast_object_list(found, 0)
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def first_only(method: Callable[P, T]) -> Callable[P, T]:
    """Make a function one that the first process does for all; see `on_first`."""

    @functools.wraps(method)
    def called(*args: P.args, **kwargs: P.kwargs) -> T:
        return on_first(method, *args, **kwargs)

    return called
