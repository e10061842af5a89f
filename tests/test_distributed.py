"""Several processes compute what one does, and end together.

They run on the CPU and talk by gloo. Most are forked from a server that has imported
everything, which torchrun's own would do each for itself.
"""

from __future__ import annotations

import copy
import logging
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_trainer import lines, outcome, trained
from torch import nn
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from o2cap import distributed, losses, trainer
from o2cap.__main__ import main
from o2cap.backbone import build_model
from o2cap.config import BatchConfig, Config, OptimConfig
from o2cap.data import loading
from o2cap.data.images import ImageSet, ReIDDataset
from o2cap.errors import InputError
from o2cap.proxies import split_by_camera
from o2cap.trainer import train

K = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "data"
    tiny.write_pictures(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ReIDDataset:
    folder = tmp_path_factory.mktemp("tiny") / "data"
    return tiny.as_dataset(folder, tiny.write_pictures(folder))


def command(folder: Path, output: Path, **changes: Any) -> list[str]:
    """Return the words of a tiny training on the command line."""
    where = ["--dataset", "manifest", "--root", str(folder / "manifest.csv")]
    return ["train", *where, "--output", str(output), *tiny.options(**changes)]


# -------------------------------------------------------------------- several processes


def _as_rank(rank: int, size: int, port: int, said: Path, work: Any, args: Any) -> None:
    for name, value in {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }.items():
        os.environ[name] = str(value)
    with said.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    raise SystemExit(work(*args))


def forkserver() -> Any:
    context = multiprocessing.get_context("forkserver")
    # (Before Python 3.13 the server does not find this file and what it imports.)
    needed = ["pytest", "hypothesis.strategies", "torch.distributed.launcher.api"]
    context.set_forkserver_preload(["o2cap.cli", "o2cap.trainer", *needed])
    return context


def run(
    said: Path, work: Callable[..., int | None], *args: Any, size: int = K
) -> list[int | None]:
    """Let some processes do `work`; return their exit codes, None for one that hangs.

    What they say goes to the file `said`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes: list[BaseProcess] = []
    for rank in range(size):
        given_ = (rank, size, port, said, work, args)
        processes.append(forkserver().Process(target=_as_rank, args=given_))
        processes[-1].daemon = True
        processes[-1].start()
    for process in processes:
        process.join(300)
    return [process.exitcode for process in processes]


# -------------------------------------------------------------------------- the pieces


@given(st.integers(0, 40), st.integers(1, 9))
def test_shares_are_all_rows_in_order(n: int, processes: int) -> None:
    found: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "size", lambda: processes)
        for rank in range(processes):
            patch.setattr(distributed, "rank", lambda r=rank: r)
            own = list(range(n))[distributed.share(n)]
            assert n // processes <= len(own) <= -(-n // processes)
            found += own
    assert found == list(range(n))


def _pieces() -> None:
    with distributed.joined():
        rank = distributed.rank()
        for n in (6, 5, 1):  # equal shares, unequal ones, and one that is empty
            whole = torch.randn(n, 3, generator=torch.Generator().manual_seed(n))
            own = distributed.share(n)
            mine = whole[own].clone().requires_grad_()
            found = distributed.gather(mine, n)
            assert torch.equal(found, whole)
            weight = torch.arange(3.0 * n).view(n, 3)
            (found * weight).sum().backward()
            assert mine.grad is not None
            assert torch.equal(mine.grad, distributed.size() * weight[own])
            numbers = torch.arange(n)
            assert torch.equal(distributed.gather(numbers[own], n), numbers)

        assert distributed.on_first(lambda: f"from {rank}") == "from 0"
        module = nn.BatchNorm1d(2)
        module.running_mean += rank  # type: ignore[operator]
        distributed.copy_buffers(module)
        assert torch.equal(module.running_mean, torch.zeros(2))  # type: ignore

        def refuse(culprit: int) -> None:
            if rank == culprit:
                raise InputError(f"refused by {culprit}.")

        with pytest.raises(InputError, match="refused by 0"):
            distributed.on_first(refuse, 0)


@pytest.mark.parametrize("size", [2, 3])
def test_the_pieces(size: int, tmp_path: Path) -> None:
    said = tmp_path / "said"
    assert run(said, _pieces, size=size) == [0] * size, said.read_text()


def _decode(images: ImageSet, folder: Path, machines: list[int], scratch: Path) -> None:
    """Note, in a file for each process, which pictures it has read."""
    real, tempfile.tempdir = loading.read_picture, str(scratch)

    def read_picture(path: Path, *args: Any) -> Any:
        with (folder / os.environ["RANK"]).open("a") as file:
            file.write(f"{path.name}\n")
        return real(path, *args)

    loading.read_picture = read_picture
    with distributed.joined():
        rank = distributed.rank()
        os.environ["LOCAL_RANK"] = str(machines[:rank].count(machines[rank]))
        with pytest.raises(InputError, match=r"broken.* 1 more cannot be read"):
            loading.decode(images, 32, 16)
        assert list(scratch.iterdir()) == []
        distributed.everyones(None)  # all have looked
        for file in folder.glob(os.environ["RANK"]):
            file.unlink()
        pixels, kept = loading.decode(images, 32, 16, skip_unreadable=True)
        assert list(scratch.iterdir()) == []
        distributed.everyones(None)  # all have looked
        assert len(kept) == len(images) - 2
        expected = [real(path, 32, 16) for path in kept.paths]
        assert torch.equal(pixels, torch.from_numpy(np.stack(expected)))
        with pytest.raises(InputError, match="TMPDIR"):
            if distributed.rank() == 0:
                limit = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
                resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limit))
            loading.decode(images, 32, 16)


@pytest.mark.parametrize("machines", [[1, 1], [1, 1, 2], [2, 1, 1]])
def test_each_machine_reads_a_picture_once(
    machines: list[int], data: ReIDDataset, tmp_path: Path
) -> None:
    """By its first process; they share the pixels, and what is unreadable."""
    for name in ("read", "scratch"):
        (tmp_path / name).mkdir()
    images = data.train
    for place in (4, 50):
        copied = list(images.paths)
        copied[place] = tmp_path / f"broken{place}.png"
        images = replace(images, paths=copied)
    size, said = len(machines), tmp_path / "said"
    given_ = (images, tmp_path / "read", machines, tmp_path / "scratch")
    ended = run(said, _decode, *given_, size=size)
    assert ended == [0] * size, said.read_text()
    names = sorted(path.name for path in images.paths)
    readers = {str(machines.index(machine)) for machine in machines}
    assert {file.name for file in (tmp_path / "read").iterdir()} == readers
    for file in (tmp_path / "read").iterdir():
        assert sorted(file.read_text().split()) == names


def _wait() -> None:
    logging.basicConfig(level="INFO")
    distributed.PATIENCE = 0.2
    with distributed.joined():
        distributed.on_first(time.sleep, 1)
        distributed.PATIENCE = 60
        distributed.on_first(time.sleep, 0.3)


def test_a_long_wait_is_said_once(tmp_path: Path) -> None:
    said = tmp_path / "said"
    assert run(said, _wait) == [0, 0], said.read_text()
    assert said.read_text().count("sleep takes a while: the others wait") == 1
    assert "--timeout minutes" in said.read_text()


def _freeze_statistics() -> None:
    """Batch norm stays in evaluation mode: no picture depends on another."""

    def train_(self: nn.Module, mode: bool = True) -> nn.Module:
        return nn.Module.train(self, False)

    nn.modules.batchnorm._BatchNorm.train = train_  # type: ignore[method-assign]


def _gradient() -> None:
    _freeze_statistics()
    with distributed.joined():
        torch.manual_seed(0)
        model = build_model("tiny_resnet", "none", height=32, width=16).train()
        alone = copy.deepcopy(model)
        network = distributed.parallel(model, torch.device("cpu"))
        pictures = torch.randn(14, 3, 32, 16)
        features = network(pictures[distributed.share(14)])
        losses.instance_loss(distributed.gather(features, 14)).backward()
        losses.instance_loss(alone(pictures)).backward()
        for mine, whole in zip(model.parameters(), alone.parameters(), strict=True):
            if whole.grad is None:
                assert mine.grad is None
                continue
            scale = float(whole.grad.abs().max())
            torch.testing.assert_close(
                mine.grad, whole.grad, rtol=1e-4, atol=1e-5 * scale
            )


@pytest.mark.parametrize("size", [2, 3])
def test_the_gradient_is_that_of_the_whole_batch(size: int, tmp_path: Path) -> None:
    """With its factor: neither K times too large nor too small; shares may differ."""
    said = tmp_path / "said"
    assert run(said, _gradient, size=size) == [0] * size, said.read_text()


# ----------------------------------------------------------------- equal to one process


def _train(config: Config, data: ReIDDataset, notes: Path, frozen: bool) -> None:
    """Train, and note what memory, model and records this process ends up with."""
    if frozen:
        _freeze_statistics()
        # Adam makes whole steps of gradients so small that rounding decides them.
        torch.optim.Adam = torch.optim.SGD  # type: ignore[misc, assignment]
    real, memories = trainer.train_epoch, []

    def train_epoch(*args: Any, **kwargs: Any) -> Any:
        record = real(*args, **kwargs)
        memories.append(args[1].centroids.clone())
        return record

    trainer.train_epoch = train_epoch
    result = train(config, data)
    history = [{k: v for k, v in r.items() if k != "seconds"} for r in result.history]
    torch.save(
        {"memories": memories, "model": result.model.state_dict(), "history": history},
        notes / f"{os.environ.get('RANK', 'alone')}.pt",
    )


def noted(folder: Path, name: str) -> Any:
    return torch.load(folder / f"{name}.pt", weights_only=True)


@pytest.mark.parametrize(("method", "size"), [("baseline", 2), ("both", 3)])
def test_processes_train_as_one(
    method: Any, size: int, data: ReIDDataset, tmp_path: Path
) -> None:
    """Losses, memory, pseudo labels, metrics and weights, with frozen batch norm.

    A batch of 8 gives three processes unequal shares.
    """
    said = tmp_path / "said"
    steep = OptimConfig(lr=0.05, warmup=0.0, milestones=(0.5,))
    config = tiny.config(tmp_path / "two", method=method, optim=steep, precision="off")
    given_ = (config, data, tmp_path, True)
    assert run(said, _train, *given_, size=size) == [0] * size, said.read_text()
    config = replace(config, output=tmp_path / "one")
    alone = forkserver().Process(target=_train, args=(config, data, tmp_path, True))
    alone.start()
    alone.join()
    first, second, one = (
        noted(tmp_path, name) for name in ("0", str(size - 1), "alone")
    )

    assert first["history"] == second["history"]
    assert len(first["memories"]) == len(one["memories"]) == config.epochs
    for x, y, z in zip(*(n["memories"] for n in (first, second, one)), strict=True):
        assert torch.equal(x, y)
        torch.testing.assert_close(x, z, rtol=0, atol=1e-5)
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name])
        torch.testing.assert_close(value, one["model"][name], rtol=0, atol=1e-5)

    assert trained(tmp_path / "two")[1] == trained(tmp_path / "one")[1]  # pseudo labels
    for name in ("warm_start.jsonl", "metrics.jsonl"):
        for x, y in zip(
            lines(tmp_path / "two", name), lines(tmp_path / "one", name), strict=True
        ):
            x.pop("seconds", None)
            y.pop("seconds", None)
            assert x == pytest.approx(y, rel=1e-5)


def test_statistics_per_process_are_the_difference(
    data: ReIDDataset, tmp_path: Path
) -> None:
    """Batch norm as usual: another result than one process's, the same on both."""
    said = tmp_path / "said"
    config = tiny.config(tmp_path / "two", precision="off")
    assert run(said, _train, config, data, tmp_path, False) == [0, 0], said.read_text()
    one = train(replace(config, output=tmp_path / "one"), data)
    first, second = noted(tmp_path, "0"), noted(tmp_path, "1")
    assert first["history"] == second["history"]
    for name, value in first["model"].items():  # running statistics too
        assert torch.equal(value, second["model"][name])
    for x, y in zip(first["memories"], second["memories"], strict=True):
        assert torch.equal(x, y)
    began = [lines(tmp_path / name, "warm_start.jsonl")[0] for name in ("one", "two")]
    assert began[0]["loss"] != pytest.approx(began[1]["loss"], rel=1e-4)
    assert one.config.hash() == config.hash()


# ----------------------------------------------------------------------------- refusals


def test_fewer_pictures_than_processes_want_are_drawn_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: ReIDDataset
) -> None:
    """Each gets two at least, for its batch norms."""
    drawn: list[int] = []

    def embed(self: Any, pictures: torch.Tensor) -> torch.Tensor:
        index = self.batches[len(drawn)]
        drawn.append(len(index))
        return self.features[index]

    config = tiny.config(tmp_path, batch=BatchConfig(proxies=4, images=1))
    proxies = split_by_camera(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 0]))
    model = build_model("tiny_resnet", "none", height=32, width=16)
    hardware = trainer.Hardware.choose(config)
    pixels = torch.zeros(4, 32, 16, 3, dtype=torch.uint8)
    learner = trainer.Learner(config, hardware, model, pixels, data.train)
    learner.features = torch.eye(4, requires_grad=True)
    memory = trainer.ProxyMemory.from_features(learner.features.detach(), proxies)
    monkeypatch.setattr(trainer.Learner, "embed", embed)
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "size", lambda: 4)
        patch.setattr(distributed, "copy_buffers", lambda module: None)
        trainer.train_epoch(learner, memory, proxies, 0)
    assert drawn == [9] * 3  # 3 proxies: 3 pictures, three times


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_half_an_environment_of_torchrun_is_named(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "2")
    with pytest.raises(InputError, match="torchrun"), distributed.joined():
        pass


def test_what_the_first_process_refuses_ends_all_with_one_sentence(
    folder: Path, tmp_path: Path
) -> None:
    said, words = tmp_path / "said", command(folder, tmp_path / "run", epochs=1)
    assert main(words) == 0
    (tmp_path / "run/summary.json").unlink()
    (tmp_path / "run/checkpoint.pt").write_bytes(b"x" * 99)
    assert run(said, main, words) == [2, 2]
    (sentence,) = [x for x in said.read_text().splitlines() if x.startswith("o2cap: ")]
    assert "checkpoint.pt is damaged" in sentence
    assert "Traceback" not in said.read_text()


def test_options_are_refused_once(folder: Path, tmp_path: Path) -> None:
    said = tmp_path / "said"
    words = [*command(folder, tmp_path / "run"), "--epoch", "3"]
    assert run(said, main, words) == [2, 2]
    assert said.read_text().count("Unrecognized options: --epoch") == 1


# ----------------------------------------------------------------------------- torchrun


def _die(config: Config, data: ReIDDataset, victim: int) -> None:
    def on_epoch(record: Any) -> None:
        if distributed.rank() == victim:
            os.kill(os.getpid(), signal.SIGKILL)

    train(config, data, on_epoch=on_epoch)


def resume(config: Config, data: ReIDDataset) -> None:
    """Finish, in one process, what several left after its first epoch."""
    (before,) = lines(config.directory())
    seen: list[int] = []
    train(config, data, on_epoch=lambda record: seen.append(record["epoch"]))
    assert seen in ([1, 2], [0, 1, 2])  # was its checkpoint written already?
    after = lines(config.directory())[0]
    assert after["epoch"] == before["epoch"] == 0
    assert (config.directory() / "summary.json").is_file()


@pytest.mark.parametrize("victim", range(K))
def test_a_killed_process_is_missed_and_the_run_can_be_resumed(
    victim: int, data: ReIDDataset, tmp_path: Path
) -> None:
    said, config = tmp_path / "said", tiny.config(tmp_path / "run", epochs=3)
    ended = run(said, _die, config, data, victim)
    assert ended[victim] == -signal.SIGKILL and ended[1 - victim] == 1
    resume(config, data)


def test_torchrun_ends_the_job_of_a_killed_process(
    data: ReIDDataset, tmp_path: Path
) -> None:
    """Its agent, with processes from the fork server."""
    config = tiny.config(tmp_path / "run", epochs=3)
    forkserver()
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=K,
        run_id="test",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="forkserver",
        logs_specs=DefaultLogsSpecs(str(tmp_path / "logs"), redirects=Std.ALL),
    )
    with pytest.raises(ChildFailedError):
        elastic_launch(launch, _die)(config, data, 1)
    resume(config, data)


def test_torchrun_of_one_process_is_a_plain_run(folder: Path, tmp_path: Path) -> None:
    plain, torchrun = tmp_path / "plain", tmp_path / "torchrun"
    assert main(command(folder, plain)) == 0
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words = [*program, "--nproc-per-node", "1", "-m", "o2cap"]
    ended = subprocess.run(
        [*words, *command(folder, torchrun)], capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == f"{torchrun}\n"
    assert outcome(torchrun) == outcome(plain)
