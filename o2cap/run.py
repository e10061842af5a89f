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
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import yaml
from filelock import FileLock, Timeout
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor
from torch.amp import GradScaler

from o2cap import distributed
from o2cap.backbone import ReIDModel, build_model, read_state_dict
from o2cap.config import NO_INFLUENCE, Config, load
from o2cap.data.images import ReIDDataset
from o2cap.device import Hardware
from o2cap.distributed import first_only
from o2cap.errors import InputError
from o2cap.files import read_json, replacing, usable

logger = logging.getLogger("o2cap")

Metrics = dict[str, Any]


class RunDirectory:
    """Everything about a run that a reader, a plot or a resumed run needs.

    ``config.yaml``; ``environment.json`` (versions, device, commit, data counts and
    fingerprint); ``metrics.jsonl`` (a line per epoch) and ``warm_start.jsonl``;
    ``pseudo_labels/epoch_NNN.npz``; ``unreadable.txt``, the pictures left out, if there
    are any; ``checkpoint.pt`` (after every epoch, all that a resumed run needs);
    ``start.safetensors``, the weights before the first epoch; ``model.safetensors`` and
    ``summary.json`` at the end; TensorBoard events, which grow. The other files are
    written whole or not at all.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.path = config.directory()
        self.history: list[Metrics] = []
        self.warm_history: list[Metrics] = []
        self.board: Path | None = None

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
        if run.finished():  # and so nothing is written, perhaps nothing can be
            yield run
            return
        lock, patience = FileLock(run.path / ".lock"), 0
        while not run._locked(lock, patience):
            if patience == 0:
                logger.info(
                    "another process is training in %s; waiting for it", run.path
                )
            patience = 20
        try:
            run._check(resume)  # it may have written there
            yield run
        finally:
            run._unlock(lock)

    @first_only
    def _check(self, resume: bool) -> None:
        known = self.path / "config.yaml"
        with usable(self.path):
            is_file, is_run = self.path.is_file(), known.is_file()
            inside = list(self.path.iterdir()) if self.path.is_dir() else []
        if is_file:
            raise InputError(f"--output {self.path} is a file; name a directory.")
        if not is_run:
            # (What a killed run leaves before its settings is hidden.)
            if any(not path.name.startswith(".") for path in inside):
                raise InputError(
                    f"--output {self.path} holds files but no run (no config.yaml); "
                    "choose another directory."
                )
            return
        if not resume:
            raise InputError(f"--output {self.path} holds a run; choose another one.")
        differing = [
            f"{name} is {there} there and {here} here"
            for name, there, here in _differences(load(known), self.config)
        ]
        if differing:
            raise InputError(
                f"--output {self.path} belongs to a run with other settings: "
                f"{'; '.join(differing)}. Choose another --output, or repeat those."
            )

    @first_only
    def _locked(self, lock: FileLock, patience: float) -> bool:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=patience)
        except Timeout:
            return False
        except OSError as error:
            raise InputError(
                f"{self.path} cannot be written ({error.strerror or error})."
            ) from error
        return True

    def _unlock(self, lock: FileLock) -> None:
        if lock.is_locked:  # by the first process only
            with contextlib.suppress(OSError):
                (self.path / ".lock").unlink()
            lock.release()
            with contextlib.suppress(OSError):
                self.path.rmdir()  # when nothing came of the run

    @first_only
    def finished(self) -> bool:
        """Say whether the run has come to its end."""
        return (self.path / "summary.json").is_file()

    @first_only
    def begin(
        self,
        dataset: ReIDDataset,
        hardware: Hardware,
        pseudo_labels: Tensor | None,
        kept: ReIDDataset,
    ) -> None:
        """Write what is known before the first step.

        Parameters
        ----------
        kept : ReIDDataset
            The pictures of `dataset` that can be read.

        Raises
        ------
        InputError
            When a run to be resumed began with others.
        """
        left_out = _left_out(dataset, kept)
        unreadable = {
            "count": len(left_out),
            "kept": kept.fingerprint() if left_out else None,  # all
        }
        if not (self.path / "config.yaml").is_file():
            text = yaml.safe_dump(self.config.to_dict(), sort_keys=False)
            self._write("config.yaml", text)
        if not (self.path / "environment.json").is_file():
            facts = describe_environment(self.config, dataset, hardware)
            facts["pseudo_labels"] = _fingerprint(pseudo_labels)
            facts["unreadable"] = unreadable
            if left_out:
                self._write("unreadable.txt", "".join(f"{p}\n" for p in left_out))
            self._write("environment.json", json.dumps(facts, indent=2))
            return
        facts = json.loads((self.path / "environment.json").read_text("utf-8"))
        if facts.get("unreadable", unreadable) != unreadable:  # old runs do not say
            path = self.path / "unreadable.txt"
            text = path.read_text("utf-8", "surrogateescape") if path.is_file() else ""
            differing = set(text.splitlines()).symmetric_difference(map(str, left_out))
            first = f", the first being {min(differing)}" if differing else ""
            raise InputError(
                f"--output {self.path} belongs to a run from which --skip-unreadable "
                f"left other pictures out{first}; put the files back as they were, or "
                "choose another --output."
            )

    @first_only
    def check_input(
        self, dataset: ReIDDataset | None, pseudo_labels: Tensor | None
    ) -> None:
        """Refuse to go on with other pictures or labels than the run began with.

        Raises
        ------
        InputError
            When they differ from those that ``environment.json`` tells of.
        """
        path = self.path / "environment.json"
        if not path.is_file():
            return
        pictures, labels = read_json(path, "fingerprint", "pseudo_labels")
        if dataset is not None and dataset.fingerprint() != pictures:
            raise InputError(
                f"--output {self.path} belongs to a run on other pictures (the data "
                f"set's fingerprint was {pictures}); choose another."
            )
        if _fingerprint(pseudo_labels) != labels:
            raise InputError(
                f"--output {self.path} belongs to a run with other pseudo labels, "
                "given or found; choose another."
            )

    @first_only
    def restore(self) -> dict[str, Any] | None:
        """Return the last checkpoint, if there is one, and forget what came after.

        Its tensors are on the CPU.

        Raises
        ------
        InputError
            When the file is damaged, or its weights are not finite.
        """
        path = self.path / "checkpoint.pt"
        with usable(self.path):
            for left in self.path.rglob(".*.part"):  # of a run killed while writing
                left.unlink()
        state = None
        if path.is_file():
            try:
                with zipfile.ZipFile(path) as archive:  # torch checks no sums
                    if archive.testzip() is not None:
                        raise ValueError("checksum")
                state = torch.load(path, map_location="cpu", weights_only=True)
                stage, last = state["stage"], int(state["epoch"])
                finite = all(x.isfinite().all() for x in state["model"].values())
            except Exception as error:
                raise InputError(
                    f"{path} is damaged or no checkpoint of this program "
                    f"({type(error).__name__}); delete it to train from the start."
                ) from error
            if not finite:
                raise InputError(
                    f"{path} holds weights that are not finite, so training cannot go "
                    f"on from it; delete {self.path} and train again, with a lower "
                    "--optim.lr or --precision off."
                )
            done = last if stage == "train" else -1
            self.history = self._lines("metrics.jsonl", done)
            self.warm_history = self._lines(
                "warm_start.jsonl", last if stage == "warm start" else 10**9
            )
        return state

    def take_up(
        self,
        state: dict[str, Any],
        model: ReIDModel,
        optimizer: torch.optim.Adam,
        scaler: GradScaler,
    ) -> None:
        """Load a checkpoint's model, optimizer and loss scale.

        Raises
        ------
        InputError
            When it is of another model.
        """
        try:
            model.load_state_dict(state["model"])
            # A checkpoint says how the other device computed; a GPU needs fused=True.
            groups = [
                {**theirs, "fused": mine["fused"]}
                for theirs, mine in zip(
                    state["optimizer"]["param_groups"],
                    optimizer.param_groups,
                    strict=True,
                )
            ]
            optimizer.load_state_dict({**state["optimizer"], "param_groups": groups})
            if state["scaler"]:  # empty if the device before needed none
                scaler.load_state_dict(state["scaler"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"{self.path / 'checkpoint.pt'} does not fit the settings beside it; "
                "it is of another model. Delete it to train from the start."
            ) from error

    def _lines(self, name: str, last: int) -> list[Metrics]:
        path = self.path / name
        if not path.is_file():
            return []
        try:
            lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
            return [line for line in lines if line["epoch"] <= last]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is damaged ({error}).") from error

    @first_only
    def record(self, record: Metrics, clusters: Tensor) -> None:
        """Keep an epoch's record and its pseudo labels."""
        self.history.append(record)
        name = f"pseudo_labels/epoch_{record['epoch']:03d}.npz"
        with replacing(self.path / name) as path, path.open("wb") as file:
            np.savez_compressed(file, clusters=clusters.numpy())
        self._write_lines("metrics.jsonl", self.history)
        self._draw(record)

    def _draw(self, record: Metrics) -> None:
        """Add an epoch to the TensorBoard events.

        Not by a SummaryWriter, whose thread ends in a traceback where the disk is full.
        """
        epoch, now, content = record["epoch"], time.time(), io.BytesIO()
        writer = RecordWriter(content)
        if self.board is None:
            name = f"events.out.tfevents.{time.time_ns()}.{platform.node()}"
            self.board = self.path / name
            # What another file holds of this epoch and later ones is forgotten.
            again = SessionLog(status=SessionLog.START)
            for event in (
                Event(wall_time=now, file_version="brain.Event:2"),
                Event(wall_time=now, step=epoch, session_log=again),
            ):
                writer.write(event.SerializeToString())
        values = [
            Summary.Value(tag=key, simple_value=value)
            for key, value in record.items()
            if isinstance(value, int | float) and key != "epoch"
        ]
        event = Event(wall_time=now, step=epoch, summary=Summary(value=values))
        writer.write(event.SerializeToString())
        with usable(self.board), self.board.open("ab") as file:
            file.write(content.getvalue())

    @first_only
    def record_warm_start(self, record: Metrics) -> None:
        """Keep the record of an epoch of the warm start."""
        self.warm_history.append(record)
        self._write_lines("warm_start.jsonl", self.warm_history)

    @first_only
    def save(
        self,
        state: dict[str, Any],
        model: ReIDModel,
        optimizer: torch.optim.Adam,
        scaler: GradScaler,
    ) -> None:
        """Write the checkpoint: the last thing an epoch does."""
        whole = {
            **state,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
        }
        # By way of memory: torch does not say why it cannot write (a full disk).
        content = io.BytesIO()
        torch.save(whole, content)
        with replacing(self.path / "checkpoint.pt") as path:
            path.write_bytes(content.getbuffer())

    @first_only
    def keep_weights(self, model: ReIDModel, name: str) -> None:
        """Write the weights alone, in safetensors."""
        tensors = {k: v.contiguous().cpu() for k, v in model.state_dict().items()}
        with replacing(self.path / name) as path:
            path.write_bytes(safetensors.torch.save(tensors))

    @first_only
    def finish(self, model: ReIDModel, before: Metrics) -> None:
        """Write the trained weights and the final metrics."""
        self.keep_weights(model, "model.safetensors")
        summary = {
            **self.history[-1],
            "before": before,
            "epochs": len(self.history),
            "config_hash": self.config.hash(),
        }
        self._write("summary.json", json.dumps(summary, indent=2))

    def result(self, model: ReIDModel) -> RunResult:
        """Return the finished run."""
        return RunResult(self.path, self.config, model.eval(), *self._outcome())

    @first_only
    def _outcome(self) -> tuple[Metrics, list[Metrics]]:
        (before,) = read_json(self.path / "summary.json", "before")
        return before, self._lines("metrics.jsonl", 10**9)

    def _write_lines(self, name: str, records: list[Metrics]) -> None:
        self._write(name, "".join(json.dumps(record) + "\n" for record in records))

    def _write(self, name: str, text: str) -> None:
        with replacing(self.path / name) as path:
            # A file name that is no valid UTF-8 goes out as the bytes it is.
            path.write_text(text, encoding="utf-8", errors="surrogateescape")


def _left_out(dataset: ReIDDataset, kept: ReIDDataset) -> list[Path]:
    left_out = []
    for split, images in dataset.splits().items():
        if len(kept.splits()[split]) < len(images):
            there = set(kept.splits()[split].paths)
            left_out += [path for path in images.paths if path not in there]
    return left_out


def _fingerprint(labels: Tensor | None) -> str | None:
    if labels is None:
        return None
    return hashlib.sha256(labels.cpu().numpy().tobytes()).hexdigest()[:16]


def _differences(there: Config, here: Config) -> Iterator[tuple[str, Any, Any]]:
    def flat(plain: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in plain.items():
            if isinstance(value, dict):
                found |= flat(value, f"{prefix}{name}.")
            elif prefix or name not in NO_INFLUENCE:
                found[f"{prefix}{name}"] = value
        return found

    old, new = flat(there.to_dict()), flat(here.to_dict())
    return ((name, old[name], new[name]) for name in new if old[name] != new[name])


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Parameters
    ----------
    directory : Path
        The run directory; see :class:`RunDirectory`.
    config : Config
        The settings.
    model : ReIDModel
        The trained model, in evaluation mode.
    before : dict
        Retrieval metrics before the first epoch, after the warm start if there was
        one; empty when there is nothing to evaluate with.
    history : list of dict
        One record per epoch, as in ``metrics.jsonl``.
    """

    directory: Path
    config: Config
    model: ReIDModel
    before: Metrics
    history: list[Metrics]

    @property
    def final(self) -> Metrics:
        """The record of the last epoch: what is reported, never the best epoch."""
        return self.history[-1]


def describe_environment(
    config: Config, dataset: ReIDDataset, hardware: Hardware
) -> Metrics:
    """Return versions, device, seed, commit, and the data's counts and fingerprint."""
    packages = ("o2cap", "torch", "torchvision", "numpy", "scipy", "numba", "faiss-cpu")
    device = str(hardware.device)
    if hardware.device.type == "cuda":
        device += f" ({torch.cuda.get_device_name(hardware.device)})"
    commit = None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        commit = subprocess.run(
            # marked where the working tree holds more than what is committed
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": " ".join(sys.argv),
        "python": platform.python_version(),
        # with the instructions that torch uses: others round sums differently
        "platform": f"{platform.platform()}, {torch.backends.cpu.get_cpu_capability()}",
        "versions": {name: version(name) for name in packages},
        "commit": commit,
        "device": device,
        "precision": hardware.precision,
        "threads": hardware.threads,
        "processes": distributed.size(),
        "seed": config.seed,
        "config_hash": config.hash(),
        "dataset": dataset.name,
        "counts": dataset.counts(),
        "fingerprint": dataset.fingerprint(),
    }


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
    path = directory / weights
    with usable(directory):
        is_run, is_finished = (directory / "config.yaml").is_file(), path.is_file()
    if not is_run:
        raise InputError(f"{directory} is no run directory (it has no config.yaml).")
    config = load(directory / "config.yaml")
    if not is_finished:
        raise InputError(
            f"The run in {directory} is not finished (it has no {weights}); "
            "the same o2cap train command resumes it."
        )
    model = build_model(
        config.backbone,
        "none",
        height=config.height,
        width=config.width,
        pooling=config.model.pooling,
        last_stride=config.model.last_stride,
    )
    try:
        model.load_state_dict(read_state_dict(path))
    except RuntimeError as error:
        raise InputError(
            f"{path} does not fit the backbone {config.backbone} of config.yaml; "
            "both must come from one run."
        ) from error
    return config, model.to(memory_format=torch.channels_last).eval()
