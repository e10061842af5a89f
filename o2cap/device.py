"""What a run computes on: device, precision, threads."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from o2cap import distributed
from o2cap.config import Config
from o2cap.errors import InputError


@dataclass(frozen=True)
class Hardware:
    """What a run computes on: chosen once, printed, recorded.

    Parameters
    ----------
    device : torch.device
        CPU or an accelerator.
    precision : "bf16", "fp16" or "off"
        Mixed precision of the network.
    threads : int
        Threads of the arithmetic on the CPU.
    """

    device: torch.device
    precision: Literal["bf16", "fp16", "off"]
    threads: int

    @classmethod
    def choose(cls, config: Config) -> Hardware:
        """Turn the ``auto`` settings into what this machine has.

        Raises
        ------
        InputError
            When the device asked for is not here, or is at work already and cannot
            be made deterministic any more.
        """
        name = config.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cuda" and distributed.size() > 1:
            name = f"cuda:{os.environ['LOCAL_RANK']}"  # a GPU for each process
        try:
            device = torch.device(name)
            if config.deterministic and device.type == "cuda":
                _ask_for_deterministic_products()
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"--device {config.device} cannot be used here ({reason}); try cpu."
            ) from error
        if config.precision != "auto":
            precision: Literal["bf16", "fp16", "off"] = config.precision
        elif device.type == "cuda":
            precision = "bf16" if torch.cuda.is_bf16_supported(False) else "fp16"
        else:
            # Without such instructions a CPU emulates bf16, slower than float32.
            has = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
            precision = "bf16" if device.type == "cpu" and has() else "off"
        # With every core taken, threads that wait for each other collapse beside a
        # busy neighbour (measured on 2 cores: an epoch 60 s instead of 5 s).
        threads = config.threads or torch.get_num_threads()
        if not config.threads and "OMP_NUM_THREADS" not in os.environ:
            threads = max(1, min(threads // 2, 8))
        return cls(device, precision, threads)

    @property
    def extraction(self) -> Literal["fp16", "off"]:
        """Precision of features that are compared, not trained with.

        bf16 has 8 bits of mantissa, which is too coarse to rank near-duplicates (on
        video frames, rank-1 fell from 30.5 to 23.8 %); fp16 has 11, as TF32 has.
        """
        mixed = self.device.type == "cuda" and self.precision != "off"
        return "fp16" if mixed else "off"

    @contextlib.contextmanager
    def in_force(self, config: Config) -> Iterator[None]:
        """Set torch's global switches for a run, and put them back afterwards."""
        cudnn = torch.backends.cudnn
        threads, benchmark = torch.get_num_threads(), cudnn.benchmark
        strict = torch.are_deterministic_algorithms_enabled()
        tf32 = torch.get_float32_matmul_precision(), cudnn.allow_tf32
        # Without devices it would initialise all GPUs, for a run on the CPU too.
        on_gpu = [self.device] if self.device.type == "cuda" else []
        try:
            torch.set_num_threads(self.threads)
            torch.use_deterministic_algorithms(config.deterministic)
            cudnn.benchmark = not config.deterministic
            cudnn.allow_tf32 = self.precision != "off"
            if self.device.type == "cuda" and self.precision != "off":
                torch.set_float32_matmul_precision("high")
            with torch.random.fork_rng(on_gpu), self._as_current():
                yield
        finally:
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(strict)
            cudnn.benchmark = benchmark
            torch.set_float32_matmul_precision(tf32[0])
            cudnn.allow_tf32 = tf32[1]

    def _as_current(self) -> contextlib.AbstractContextManager[object]:
        if self.device.type == "cuda":
            return torch.cuda.device(self.device)
        return contextlib.nullcontext()

    def place(self, pixels: Tensor) -> Tensor:
        """Return decoded pictures where batches are taken from fastest.

        That is the GPU, when they fill no more than a quarter of what is free there.
        """
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            if pixels.numel() < free / 4:
                return pixels.to(self.device)
        return pixels

    def batch(self, pixels: Tensor, index: Tensor) -> Tensor:
        """Return the pictures `index` (on the CPU) on the device."""
        there = index.to(pixels.device, non_blocking=True)
        return pixels[there].to(self.device, non_blocking=True)


def _ask_for_deterministic_products() -> None:
    """Set what cuBLAS reads once, at its first product."""
    name = "CUBLAS_WORKSPACE_CONFIG"
    if name not in os.environ and torch.cuda.is_initialized():
        raise InputError(
            f"--deterministic True comes too late: the GPU is at work already. Set the "
            f"environment variable {name}=:4096:8 before Python starts, or restart the "
            "kernel."
        )
    os.environ.setdefault(name, ":4096:8")
