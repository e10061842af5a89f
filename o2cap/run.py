"""The run directory: everything about a run that outlives the program."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import platform
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import yaml
from filelock import FileLock, Timeout
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from o2cap import __version__, distributed
from o2cap.backbone import ReIDModel, build_model
from o2cap.config import NO_INFLUENCE, Config, load
from o2cap.data.images import ReIDDataset
from o2cap.device import Hardware
from o2cap.distributed import first_only
from o2cap.errors import InputError
from o2cap.files import read_json, replacing

logger = logging.getLogger("o2cap")

Metrics = dict[str, Any]


class RunDirectory:
    """What a run writes while it trains, and finds again when it is resumed.

    ``config.yaml``; ``environment.json`` (versions, device, commit, data counts and
    fingerprint); ``metrics.jsonl`` (a line per epoch) and ``warm_start.jsonl``;
    ``pseudo_labels/epoch_NNN.npz``; ``unreadable.txt``, the pictures left out, if there
    are any; ``checkpoint.pt`` (after every epoch, all that a resumed run needs);
    ``start.safetensors``, the weights before the first epoch; ``model.safetensors`` and
    ``summary.json`` at the end; TensorBoard events, which grow. The other files are
    written whole or not at all.

    Epochs of the warm start are numbered from its length below 0 up to −1, those of
    the training from 0.

    Parameters
    ----------
    config : Config
        All settings; they name the directory.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.path = config.directory()
        self.history: list[Metrics] = []
        self.warm_history: list[Metrics] = []
        self.next_epoch = 0
        self.before: Metrics | None = None
        """Retrieval metrics before the first epoch; None until they are measured."""
        self._board: SummaryWriter | None = None
        self._lock = FileLock(self.path / ".lock")
        self._writer = ThreadPoolExecutor(1)
        self._written: Callable[[], None] = lambda: None
        """Wait for the checkpoint that is being written; raise what went wrong."""

    @classmethod
    @contextlib.contextmanager
    def claim(cls, config: Config, resume: bool) -> Iterator[RunDirectory]:
        """Give the directory of a run with these settings, new or to be resumed.

        Another program that trains in it is waited for, and kept out meanwhile; when
        a program dies, the system lets the next one in.

        Raises
        ------
        InputError
            When it holds a run with other settings, or something that is no run.
        """
        run = cls(config)
        run._check(resume)
        if not run.finished():  # else nothing is written, perhaps nothing can be
            run._acquire()
        try:
            run._check(resume)  # another program may have written there
            yield run
        finally:
            run._writer.shutdown()
            if run._board is not None:
                with contextlib.suppress(OSError):  # said before, when it was written
                    run._board.close()
            if run._lock.is_locked:  # by the first process only
                (run.path / ".lock").unlink()
                run._lock.release()
                with contextlib.suppress(OSError):
                    run.path.rmdir()  # when nothing came of the run

    @first_only
    def _check(self, resume: bool) -> None:
        known = self.path / "config.yaml"
        if not known.is_file():
            # (What a killed run leaves before its settings is hidden.)
            if any(self.path.glob("[!.]*")):
                raise InputError(f"--output {self.path} holds files but no run.")
            return
        if not resume:
            raise InputError(f"--output {self.path} holds a run; choose another one.")
        there = _decisive(load(known))
        for name, here in _decisive(self.config).items():
            if there[name] != here:
                raise InputError(
                    f"--output {self.path} holds a run with other settings ({name} "
                    f"is {there[name]} there and {here} here); choose another one."
                )

    @first_only
    def _acquire(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            logger.info("another process is training in %s; waiting for it", self.path)
            self._lock.acquire()

    @first_only
    def finished(self) -> bool:
        """Say whether the run has come to its end."""
        return (self.path / "summary.json").is_file()

    @first_only
    def check_input(self, **facts: Any) -> None:
        """Refuse to go on with other pictures or labels than the run began with.

        Parameters
        ----------
        facts
            Entries of ``environment.json`` as they are now; see :func:`input_facts`.

        Raises
        ------
        InputError
            When one differs from what the file says.
        """
        path = self.path / "environment.json"
        known = read_json(path) if path.is_file() else {}
        for name, now in facts.items():
            if (then := known.get(name, now)) != now:
                raise InputError(
                    f"--output {self.path} holds a run on other pictures or pseudo "
                    f"labels ({name}: {json.dumps(then)} then, {json.dumps(now)} now): "
                    "put them back as they were, or choose another --output."
                )

    @first_only
    def begin(self, hardware: Hardware, facts: Metrics, lost: set[Path]) -> None:
        """Write what is known before the first step.

        Parameters
        ----------
        hardware : Hardware
            See :func:`describe_environment`.
        facts : dict
            See :func:`input_facts`.
        lost : set of Path
            Pictures that cannot be read.
        """
        if (self.path / "environment.json").is_file():
            return
        text = yaml.safe_dump(self.config.to_dict(), sort_keys=False)
        self._write("config.yaml", text)
        if lost:
            self._write("unreadable.txt", "".join(f"{path}\n" for path in sorted(lost)))
        facts = describe_environment(self.config, hardware) | facts
        self._write("environment.json", json.dumps(facts, indent=2))

    def restore(self) -> dict[str, Any] | None:
        """Return the last checkpoint, if there is one; what came after is forgotten.

        Returns
        -------
        dict or None
            ``epoch`` (see the class), ``before``, ``history``, ``warm_history``, and
            the states of ``model``, ``optimizer`` and ``scaler``, tensors on the CPU.

        Raises
        ------
        InputError
            When the file is damaged.
        """
        state = self._read_checkpoint()
        if state is not None:
            self.next_epoch, self.before = state["epoch"] + 1, state["before"]
            self.history, self.warm_history = state["history"], state["warm_history"]
        return state

    @first_only
    def _read_checkpoint(self) -> dict[str, Any] | None:
        path = self.path / "checkpoint.pt"
        for left in self.path.rglob(".*.part"):  # of a run killed while writing
            left.unlink()
        if not path.is_file():
            return None
        try:
            with zipfile.ZipFile(path) as archive:  # torch itself checks no sums
                if archive.testzip() is not None:
                    raise ValueError("checksum")
            state = torch.load(path, map_location="cpu", weights_only=True)
            return {"warm_history": state["warm_history"], **state}
        except Exception as error:
            raise InputError(
                f"{path} is damaged or no checkpoint of this program "
                f"({type(error).__name__}); delete it to train from the start."
            ) from error

    @first_only
    def record(self, record: Metrics, clusters: Tensor) -> None:
        """Keep an epoch's record and its pseudo labels."""
        epoch = record["epoch"]
        self.history.append(record)
        name = f"pseudo_labels/epoch_{epoch:03d}.npz"
        with replacing(self.path / name) as path, path.open("wb") as file:
            np.savez_compressed(file, clusters=clusters.numpy())
        self._write_lines("metrics.jsonl", self.history)
        if self._board is None:
            # What another file holds of this epoch and later ones is forgotten.
            self._board = SummaryWriter(str(self.path), purge_step=epoch)
        for key, value in record.items():
            if isinstance(value, int | float) and key != "epoch":
                self._board.add_scalar(key, value, epoch)
        self._board.flush()

    @first_only
    def record_warm_start(self, record: Metrics) -> None:
        """Keep the record of an epoch of the warm start."""
        self.warm_history.append(record)
        self._write_lines("warm_start.jsonl", self.warm_history)

    @first_only
    def save(self, state: dict[str, Any], epoch: int) -> None:
        """Write the checkpoint, while the next epoch begins.

        Parameters
        ----------
        state : dict
            States of model, optimizer and loss scale; copied here.
        epoch : int
            The epoch that has ended.
        """
        told: Metrics = {"epoch": epoch, "before": self.before}
        told |= {"history": self.history, "warm_history": self.warm_history}
        # By way of memory: torch does not say why it cannot write (a full disk).
        content = io.BytesIO()
        torch.save(told | state, content)
        self._written()
        job = self._writer.submit(self._write, "checkpoint.pt", content.getbuffer())
        self._written = job.result

    @first_only
    def keep_weights(self, model: ReIDModel, name: str) -> None:
        """Write the weights alone, in safetensors, once the checkpoint is written."""
        self._written()
        tensors = {k: v.contiguous().cpu() for k, v in model.state_dict().items()}
        self._write(name, safetensors.torch.save(tensors))

    @first_only
    def finish(self) -> RunResult:
        """Write the final metrics, after all else, and return the run."""
        about = {"before": self.before, "epochs": len(self.history)}
        self._write("summary.json", json.dumps(self.history[-1] | about, indent=2))
        return read_run(self.path)

    def _write_lines(self, name: str, records: list[Metrics]) -> None:
        self._write(name, "".join(json.dumps(record) + "\n" for record in records))

    def _write(self, name: str, content: str | bytes | memoryview) -> None:
        if isinstance(content, str):
            # A file name that is no valid UTF-8 goes out as the bytes it is.
            content = content.encode("utf-8", "surrogateescape")
        with replacing(self.path / name) as path:
            path.write_bytes(content)


# ------------------------------------------------------------------------ reading a run


@dataclass(frozen=True)
class RunResult:
    """A finished run, as its directory tells it.

    Parameters
    ----------
    directory : Path
        The run directory; see :class:`RunDirectory`.
    config : Config
        The settings.
    environment : dict
        Versions, device, commit, counts and fingerprint of the data.
    before : dict
        Retrieval metrics before the first epoch, after the warm start if there was
        one; empty when there is nothing to evaluate with.
    history : list of dict
        One record per epoch.
    """

    directory: Path
    config: Config
    environment: Metrics
    before: Metrics
    history: list[Metrics]

    @property
    def final(self) -> Metrics:
        """The record of the last epoch, which is reported, never the best epoch."""
        return self.history[-1]

    @cached_property
    def model(self) -> ReIDModel:
        """The trained model, on the CPU, in evaluation mode."""
        return load_model(self.directory)[1]

    def clusters(self, epoch: int = -1) -> Tensor:
        """Return an epoch's pseudo labels, LongTensor [N], −1 for outliers.

        Parameters
        ----------
        epoch : int
            Counted from 0; −1 is the last.
        """
        number = range(len(self.history))[epoch]
        path = self.directory / f"pseudo_labels/epoch_{number:03d}.npz"
        with np.load(path, allow_pickle=False) as file:
            return torch.from_numpy(file["clusters"].astype(np.int64))


def read_run(directory: Path, *, finished: bool = True) -> RunResult:
    """Read a run.

    Parameters
    ----------
    finished : bool
        False to read also a run that goes on; it tells no `before` yet.

    Raises
    ------
    InputError
        When the directory holds none, or a file in it is damaged.
    """
    summary = directory / "summary.json"
    config = _finished(directory, summary.name if finished else "metrics.jsonl")
    before = read_json(summary, "before")[0] if summary.is_file() else {}
    environment = read_json(directory / "environment.json")
    history = read_json(directory / "metrics.jsonl")
    return RunResult(directory, config, environment, before, history)


def load_model(
    directory: Path, weights: str = "model.safetensors"
) -> tuple[Config, ReIDModel]:
    """Return the settings of a run and its model, on the CPU, in evaluation mode.

    Parameters
    ----------
    directory : Path
        The run directory.
    weights : str
        ``model.safetensors``, trained, or ``start.safetensors``, before training.

    Raises
    ------
    InputError
        When the directory holds no finished run, or its weights do not fit.
    """
    config = _finished(directory, weights)
    how: Any = {name: getattr(config, name) for name in ("height", "width", "pooling")}
    model = build_model(config.backbone, str(directory / weights), **how)
    return config, model.to(memory_format=torch.channels_last).eval()


def _finished(directory: Path, needed: str) -> Config:
    config = load(directory / "config.yaml")
    if not (directory / needed).is_file():
        raise InputError(f"The run in {directory} is not finished: it has no {needed}.")
    return config


def _decisive(config: Config) -> dict[str, Any]:
    """Return the settings that can change a result, groups with a dot."""
    import pandas as pd  # only where there is a run to compare with

    plain = {k: v for k, v in config.to_dict().items() if k not in NO_INFLUENCE}
    return pd.json_normalize(plain).to_dict("records")[0]


def input_facts(dataset: ReIDDataset, labels: Tensor | None) -> Metrics:
    """Return counts and fingerprints of pictures and given labels."""
    given = labels is not None and hashlib.sha256(labels.numpy().tobytes()).hexdigest()
    train = dataset.train
    one_of = {camid: i for i, camid in enumerate(train.camids.tolist())}
    return {
        "dataset": dataset.name,
        "counts": dataset.counts(),
        "fingerprint": dataset.fingerprint(),
        "cameras": [[camid, train.camera(i)] for camid, i in sorted(one_of.items())],
        "grey_range": train.grey_range and list(train.grey_range),
        "pseudo_labels": given[:16] if given else None,
    }


def describe_environment(config: Config, hardware: Hardware) -> Metrics:
    """Return versions, device, seed and commit."""
    packages = ["torch", "torchvision", "numpy", "scipy", "numba"]
    packages += ["timm"] * config.backbone.startswith("timm:")
    device = str(hardware.device)
    if hardware.device.type == "cuda":
        device += f" ({torch.cuda.get_device_name(hardware.device)})"
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": " ".join(sys.argv),
        "python": platform.python_version(),
        # with the instructions that torch uses: others round sums differently
        "platform": f"{platform.platform()}, {torch.backends.cpu.get_cpu_capability()}",
        "versions": {"o2cap": __version__} | {name: version(name) for name in packages},
        "commit": _commit(),
        "device": device,
        "precision": hardware.precision,
        "threads": hardware.threads,
        "processes": distributed.size(),
        "seed": config.seed,
        "config_hash": config.hash(),
    }


def _commit() -> str | None:
    """Return the commit of this very code, marked where the tree holds more than it.

    None where git does not track this file: a package installed inside another
    project's checkout has nothing to do with that project's commit.
    """
    git = ["git", "-C", str(Path(__file__).parent)]
    tracked = [*git, "ls-files", "--error-unmatch", Path(__file__).name]
    describe = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        subprocess.run(tracked, timeout=10, capture_output=True, check=True)
        return subprocess.check_output(describe, timeout=10, text=True).strip()
    except (OSError, subprocess.SubprocessError):
        return None
