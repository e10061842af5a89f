"""What a run computes on: device, precision, threads."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch.backends import cudnn

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
            When the device asked for is not here.
        """
        name = config.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            device = torch.device(name)
            if config.deterministic:  # cuBLAS reads it once, at its first product
                os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"--device {config.device} cannot be used here ({reason}); try cpu."
            ) from error
        precision = config.precision
        if precision == "auto" and device.type == "cuda":
            precision = "bf16" if torch.cuda.is_bf16_supported(False) else "fp16"
        elif precision == "auto":
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
        threads = torch.get_num_threads()
        strict = torch.are_deterministic_algorithms_enabled()
        matmul = torch.get_float32_matmul_precision()
        tf32, fast = self.precision != "off", not config.deterministic
        gpu = [self.device] if self.device.type == "cuda" else []
        try:
            torch.set_num_threads(self.threads)
            torch.use_deterministic_algorithms(config.deterministic)
            if gpu and tf32:
                torch.set_float32_matmul_precision("high")
            chosen = torch.cuda.device(self.device) if gpu else contextlib.nullcontext()
            # Without devices `fork_rng` would initialise all GPUs, for the CPU too.
            switches = cudnn.flags(enabled=True, benchmark=fast, allow_tf32=tf32)
            with chosen, torch.random.fork_rng(gpu), switches:
                yield
        finally:
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(strict)
            torch.set_float32_matmul_precision(matmul)
