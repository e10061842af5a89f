"""SIGKILL at random moments; what goes on afterwards ends as if nothing had happened.

    python tests/faults/kills.py [--kills 50] [--seed S] [WHAT ...]

WHAT is killed: training (a short smoke run), unpack (data_scripts), render (the
embedded data), book (a chapter of `make book`), reproduce (a batch of two jobs). Each
is killed, with all the processes that it has started, several times in a chain, goes on
until it is done, and is compared bit for bit with one left alone: metrics but for the
seconds, pseudo labels, weights; files; cells; records. The last line is a summary of
counts.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import mmap
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "data_scripts"))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # no threads yet: children are forked

import nbformat
import unpacking
from test_batch import kill_tree
from test_trainer import outcome

from o2cap import __main__ as program
from o2cap import features, files, trainer
from o2cap.config import SyntheticConfig, WarmStartConfig, preset
from o2cap.data import loading, synthetic

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("its work", "reading", "warm start", "extraction", "clustering", "training")
STAGES += ("evaluation", "writing", "between")


class Watch:
    """The stage that a child is in, readable after its death."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 2)

    def reset(self) -> None:
        self.memory[:] = bytes(2)

    @property
    def stage(self) -> str:
        return STAGES[self.memory[0]]

    @property
    def entered(self) -> int:
        """How many stages were entered so far, up to 255."""
        return self.memory[1]

    @contextlib.contextmanager
    def during(self, stage: str) -> Iterator[None]:
        before = self.memory[0]
        outer = STAGES[before] not in ("its work", "between", "warm start")
        if outer and stage != "writing":  # extraction within evaluation is evaluation
            yield
            return
        self.memory[0] = STAGES.index(stage)
        self.memory[1] = min(self.memory[1] + 1, 255)
        try:
            yield
        finally:
            self.memory[0] = before or STAGES.index("between")

    def over(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def watched(*args: Any, **kwargs: Any) -> Any:
            with self.during(stage):
                return function(*args, **kwargs)

        return watched

    def over_writing(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @contextlib.contextmanager
        def watched(path: Path) -> Iterator[Path]:
            with self.during("writing"), function(path) as temporary:
                yield temporary

        return watched

    def install(self) -> None:
        """Watch the functions that make up a run, wherever they are imported."""
        watched = {
            loading.decode: self.over("reading", loading.decode),
            trainer.warm_start: self.over("warm start", trainer.warm_start),
            features.extract: self.over("extraction", features.extract),
            trainer.find_clusters: self.over("clustering", trainer.find_clusters),
            trainer.train_epoch: self.over("training", trainer.train_epoch),
            files.replacing: self.over_writing(files.replacing),
        }
        for name, module in list(sys.modules.items()):
            if name.startswith("o2cap"):
                for key, value in list(vars(module).items()):
                    if callable(value) and value.__hash__ and value in watched:
                        setattr(module, key, watched[value])
        call = trainer.Evaluator.record
        trainer.Evaluator.record = self.over("evaluation", call)  # type: ignore[method-assign]


@dataclass
class Target:
    """Something to kill.

    Parameters
    ----------
    work : callable
        Given a folder, does it all, or goes on with what it finds there.
    compare : callable
        Given a folder, returns what two equal ends have in common.
    kills : int
        How often to kill it.
    aims : tuple of str
        Stages to aim at in turn; the empty one is any moment.
    """

    work: Callable[[Path], object]
    compare: Callable[[Path], object]
    kills: int
    aims: tuple[str, ...] = ("",)
    longest: int = 6  # kills of one chain, after which it may come to its end


@dataclass
class Tally:
    kills: int = 0
    chains: int = 0
    equal: int = 0
    where: Counter[str] = field(default_factory=Counter)


class Broken(Exception):
    """Work that should have gone on did not."""


def live(target: Target, folder: Path, watch: Watch, log: Path) -> int:
    """Fork a child that works, in a process group of its own; return its id."""
    watch.reset()
    child = os.fork()
    if child:
        return child
    try:
        os.setsid()
        with log.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        target.work(folder)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def ended(child: int) -> int | None:
    """Return the exit code of a child (negative: its signal), None if it lives."""
    found, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def kill_in_chain(
    target: Target, folder: Path, watch: Watch, chance: random.Random, length: float
) -> Iterator[str | None]:
    """Kill work in `folder` again and again; yield where, and None at its end."""
    log = folder.with_suffix(".log")
    for turn in range(10**6):
        aim = chance.choice(target.aims)
        number = chance.randrange(12)
        child = live(target, folder, watch, log)
        begun = time.monotonic()
        moment = begun + chance.uniform(0, length)
        if turn >= target.longest:
            moment, aim = float("inf"), ""
        code = None
        while code is None:
            if aim and watch.stage == aim and watch.entered >= number:
                time.sleep(chance.uniform(0, 0.05 if aim != "writing" else 0.002))
                break
            if not aim and time.monotonic() >= moment:
                break
            if time.monotonic() > begun + min(40 * length, 600) + 60:
                kill_tree(child)
                os.waitpid(child, 0)
                raise Broken(f"{folder} hangs:\n{log.read_text()}")
            time.sleep(0.0003 if aim else 0.002)
            code = ended(child)
        if code is None:
            kill_tree(child)
            _, status = os.waitpid(child, 0)
            code = os.waitstatus_to_exitcode(status)
        if code == -signal.SIGKILL:
            yield watch.stage
        elif code == 0:
            yield None
            return
        else:
            raise Broken(f"{folder} ended with {code}:\n{log.read_text()}")


def campaign(name: str, target: Target, place: Path, chance: random.Random) -> Tally:
    """Kill a target as often as asked; every chain must end as the one left alone."""
    tally, watch = Tally(), Watch()
    if name == "training":
        watch.install()
    begun = time.monotonic()
    reference = place / f"{name} whole"
    child = live(target, reference, watch, place / "whole.log")
    _, status = os.waitpid(child, 0)
    if status:
        raise Broken((place / "whole.log").read_text())
    length = time.monotonic() - begun
    expected = target.compare(reference)
    while tally.kills < target.kills:
        folder = place / f"{name} {tally.chains}"
        for where in kill_in_chain(target, folder, watch, chance, length):
            if where is not None:
                tally.kills += 1
                tally.where[where] += 1
        tally.chains += 1
        if target.compare(folder) != expected:
            raise Broken(f"{folder} is not {reference}")
        tally.equal += 1
        shutil.rmtree(folder)
        print(f"{name}: {tally.kills} of {target.kills} kills", file=sys.stderr)
    return tally


# ---------------------------------------------------------------------- what is killed


def training(place: Path, kills: int) -> Target:
    short = replace(
        preset("smoke", epochs=3, iterations=6, device="cpu", threads=1),
        warm_start=WarmStartConfig(epochs=2, iterations=4, images=16),
        evaluate_every=1,
        synthetic=SyntheticConfig(identities=12, test_identities=6, cameras=3),
    )

    def work(folder: Path) -> None:
        trainer.train(replace(short, output=folder))

    def compare(folder: Path) -> object:
        assert not list(folder.rglob(".*.part")), "a temporary file is left"
        return outcome(folder)

    return Target(work, compare, kills, ("", "", *STAGES[1:8]))


def unpack(place: Path, kills: int) -> Target:
    source = place / "Market ü.zip"
    with zipfile.ZipFile(source, "w") as archive:
        for i in range(3000):
            part = ("bounding_box_train", "query", "bounding_box_test")[i % 3]
            name = f"Market/{part}/{i % 700 + 1:04d}_c{i % 6 + 1}s1_{i:06d}_00.jpg"
            archive.writestr(name, i.to_bytes(4) * 100)
    benchmark = unpacking.Benchmark("market1501", "ask its owners")

    def work(folder: Path) -> None:
        unpacking.unpack(benchmark, source, folder, strict=False)

    def compare(folder: Path) -> object:
        left = [path.name for path in place.glob(".*.partial")]
        return left, {p.name: p.read_bytes() for p in folder.rglob("*.jpg")}

    return Target(work, compare, kills)


def render(place: Path, kills: int) -> Target:
    people = SyntheticConfig(identities=30, test_identities=10, cameras=3)

    def work(folder: Path) -> None:
        synthetic.render_dataset(people, 32, 16, cache=folder)

    def compare(folder: Path) -> object:
        rendered = synthetic.render_dataset(people, 32, 16, cache=folder)
        return {
            (split, path.name): path.read_bytes()
            for split, part in rendered.splits().items()
            for path in part.paths
        }

    return Target(work, compare, kills)


def book(place: Path, kills: int) -> Target:
    spec = importlib.util.spec_from_file_location("build", ROOT / "book" / "build.py")
    assert spec is not None and spec.loader is not None
    build: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    cell = nbformat.v4.new_code_cell
    values = {"profile": "cpu", "dataset": "synthetic", "root": "", "seed": 0}
    plain = "\n".join(f"{k} = {v!r}" for k, v in values.items()) + '\noutput = "o"'
    given = cell(plain, metadata={"tags": ["parameters"]})
    # Twice in one folder it would fail: the folder must have been emptied.
    said = cell(
        "import time\nfrom pathlib import Path\n"
        "Path(output, 'x').touch(exist_ok=False)\n"
        "time.sleep(0.5)\nprint(profile, seed)"
    )
    notebook = nbformat.v4.new_notebook(cells=[given, said])
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.metadata["kernelspec"] = kernel
    path = place / "chapter.ipynb"
    nbformat.write(notebook, path)

    def work(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        build.execute(path, folder, {"profile": "smoke"})

    def compare(folder: Path) -> object:
        executed = nbformat.read(folder / "chapter.ipynb", as_version=4)
        stamp = json.loads((folder / "chapter.json").read_text())
        return [c.outputs for c in executed.cells[-1:]], stamp["profile"]

    return Target(work, compare, kills, longest=2)


GRID = """
methods:
  both: {method: both}
  online: {method: online}
targets:
  tiny:
    what: Two jobs of a second.
    blocks:
      - preset: smoke
        settings:
          {epochs: 2, iterations: 3, warm_start.epochs: 1, warm_start.iterations: 3,
           synthetic.identities: 8, synthetic.test_identities: 4, clustering.k1: 8}
        methods: [online, both]
        seeds: [0]
"""


def reproduce(place: Path, kills: int) -> Target:
    grid = place / "grid.yaml"
    grid.write_text(GRID)
    words = ["reproduce", "tiny", "--grid", str(grid), "--cores", "1", "--output"]

    def work(folder: Path) -> None:
        if code := program.main([*words, str(folder)]):
            raise SystemExit(code)

    def compare(folder: Path) -> object:
        record = json.loads((folder / "records/tiny.json").read_text())
        assert not record["failures"] and len(record["rows"]) == 2
        names = ("method", "fingerprint", "before", "history", "clusters", "metrics")
        return [{name: row[name] for name in names} for row in record["rows"]]

    return Target(work, compare, kills, longest=3)


TARGETS: dict[str, tuple[Callable[[Path, int], Target], float]] = {
    "training": (training, 1.0),
    "unpack": (unpack, 0.2),
    "render": (render, 0.1),
    "book": (book, 0.06),
    "reproduce": (reproduce, 0.1),
}


def main() -> int:
    """Run the campaign; exit code 1 when something did not end as it should."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="of training; fewer else")
    parser.add_argument("--seed", type=int, default=random.randrange(2**31))
    parser.add_argument("what", nargs="*", metavar="WHAT")
    args = parser.parse_args()
    if unknown := set(args.what) - TARGETS.keys():
        parser.error(f"nothing is called {', '.join(unknown)}: {', '.join(TARGETS)}")
    chance = random.Random(args.seed)
    kills = chains = equal = 0
    broken = []
    for name in args.what or TARGETS:
        make, share = TARGETS[name]
        begun = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="o2cap ü ") as place:
            target = make(Path(place), max(round(args.kills * share), 1))
            try:
                tally = campaign(name, target, Path(place), chance)
            except Broken as error:
                print(f"{name}: {error}")
                broken.append(name)
                continue
        where = ", ".join(f"{k} {v}" for k, v in tally.where.most_common())
        print(
            f"{name}: {tally.kills} kills in {tally.chains} chains, "
            f"{tally.equal} ended as if left alone; killed in: {where} "
            f"({time.monotonic() - begun:.0f} s)",
            flush=True,
        )
        kills, chains = kills + tally.kills, chains + tally.chains
        equal += tally.equal
    print(
        f"kills: {kills} kills, seed {args.seed}, {equal} of {chains} chains ended as "
        f"if left alone, {len(broken)} broken {' '.join(broken)}".rstrip()
    )
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
