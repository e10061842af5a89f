"""Several processes, one training: torchrun starts them, torch.distributed joins them.

K processes compute what one would. All draw the same plan of an epoch; each takes its
share of every batch through its copy of the network; the features of all are gathered,
with their gradient; and each computes the loss of the whole batch and moves its copy of
the memory in the order of the batch, so that the copies stay equal. Extraction and
neighbour search are shared out by rows. The first process alone clusters, evaluates and
touches the run directory. Every process reads the pictures, which must lie where all
of them see them.

Without torchrun there is one process, and each function here is what it is for one.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from o2cap.errors import InputError, TrainingError

logger = logging.getLogger("o2cap")

P = ParamSpec("P")
T = TypeVar("T")

_at_work = contextvars.ContextVar("at work for all", default=False)


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Join the processes that torchrun (or any launcher like it) started.

    GPUs talk by NCCL, CPUs by gloo.

    Raises
    ------
    TrainingError
        When another process stops before the end.
    """
    if dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    # A process that dies is noticed at once. The limit is for one that is cut off, and
    # must leave the first the time to cluster while the others wait.
    dist.init_process_group(timeout=timedelta(minutes=30))
    try:
        yield
    except RuntimeError as error:
        from_gloo = "gloo" in str(error) and not isinstance(error, TrainingError)
        if not from_gloo and not isinstance(error, dist.DistError):
            raise
        sentence = (
            f"Process {rank()} of {size()} lost the connection to another one, which "
            "has stopped; the same command goes on from the last checkpoint."
        )
        if rank() > 0:  # the first, which speaks for all, may be what was lost
            logger.error("o2cap: %s", sentence)
        raise TrainingError(sentence) from error
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """Return this process's number, 0 being the first."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def share(n: int) -> slice:
    """Return this process's rows of n: consecutive, ⌈n/K⌉ each but for the last."""
    most = -(-n // size())
    return slice(min(rank() * most, n), min((rank() + 1) * most, n))


def check_batch(pictures: int, options: str) -> None:
    """Refuse a batch of which the processes would get unequal shares.

    Raises
    ------
    InputError
        Names `options`, which decide the number of pictures.
    """
    if pictures % size():
        raise InputError(
            f"A batch of {pictures} pictures ({options}) does not divide among "
            f"{size()} processes; change those options, or --nproc-per-node."
        )


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, n: int) -> Tensor:
        ctx.own = share(n)
        sent = rows.new_zeros(-(-n // size()), *rows.shape[1:])
        sent[: len(rows)] = rows
        found = rows.new_empty(size() * len(sent), *rows.shape[1:])
        dist.all_gather_into_tensor(found, sent)
        return found[:n]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return size() * gradient[ctx.own], None


def gather(rows: Tensor, n: int) -> Tensor:
    """Put the shares of all processes together: [n, ...], the same on each.

    The gradient goes back to the process that a row came from, times K. All compute
    the same loss, so every process already has the whole gradient of its own rows and
    nothing need be sent; and DistributedDataParallel takes the mean of the processes'
    gradients where their sum is wanted, which the factor K makes good.

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
    on_gpu = device.type == "cuda"
    if on_gpu:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return DistributedDataParallel(model, device_ids=[device] if on_gpu else None)


def copy_buffers(module: nn.Module) -> None:
    """Give all processes the first's buffers: running statistics, memory entries.

    Sums on a GPU are not the same to the last bit on every one.
    """
    if size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def on_first(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Let the first process do `work`; all return what it found, or raise its error."""
    if size() == 1 or _at_work.get():  # a part of such work
        return work(*args, **kwargs)
    found: list[Any] = [None, None]
    if rank() == 0:
        before = _at_work.set(True)
        try:
            found[0] = work(*args, **kwargs)
        except (InputError, TrainingError) as error:
            found[1] = error
        finally:
            _at_work.reset(before)
    dist.broadcast_object_list(found, 0)
    if found[1] is not None:
        raise found[1]
    return found[0]


def first_only(method: Callable[P, T]) -> Callable[P, T]:
    """Make a function one that the first process does for all; see `on_first`."""

    @functools.wraps(method)
    def called(*args: P.args, **kwargs: P.kwargs) -> T:
        return on_first(method, *args, **kwargs)

    return called


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Go on only if all processes came through the block; else all raise the error.

    For work that each does for itself and that may fail on one alone. The processes
    must not communicate within the block.
    """
    error = None
    try:
        yield
    except (InputError, TrainingError) as caught:
        error = caught
    errors = [error]
    if size() > 1:
        errors = [None] * size()
        dist.all_gather_object(errors, error)
    for found in errors:
        if found is not None:
            raise found
