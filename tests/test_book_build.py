"""The chapters run, and the machinery that runs them tells when they do not."""

import importlib.util
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import papermill
import psutil
import pytest
import torch
from filelock import FileLock
from jupyter_client.manager import KernelManager
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import Engine, papermill_engines

from o2cap.losses import offline_loss
from o2cap.proxies import CameraProxies

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "book").glob("*.ipynb"))
PARAMETERS = 'profile = "cpu"\ndataset = ""\nroot = ""\nseed = 0\noutput = ""'


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"book/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def build() -> ModuleType:
    return load("build")


def write_notebook(path: Path, *code: str, parameters: str = PARAMETERS) -> Path:
    first = new_code_cell(parameters, metadata={"tags": ["parameters"]})
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    cells = [first, *map(new_code_cell, code)]
    notebook = new_notebook(cells=cells, metadata={"kernelspec": kernel})
    nbformat.write(notebook, path)
    return path


def alt_of_glued(name: str) -> bool:
    """Whether some page shows a glued figure, with alt text."""
    sources = [p.read_text() for p in (ROOT / "book").glob("*.md")]
    for path in NOTEBOOKS:
        cells = nbformat.read(path, as_version=4).cells
        sources += [c.source for c in cells if c.cell_type == "markdown"]
    figure = re.compile(
        rf"\{{glue:figure\}} *{re.escape(name)}\s*\n(?:.*\n)*?:alt: *\S", re.MULTILINE
    )
    return any(figure.search(text) for text in sources)


def test_there_are_chapters() -> None:
    assert NOTEBOOKS


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Path], Path]]:
    """Run a chapter in the smoke profile by papermill; return the executed copy.

    In one kernel, for importing and compiling take longer than most chapters do, and
    in one folder, where they share their runs. A chapter finds no name of another.
    """
    folder = tmp_path_factory.mktemp("executed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", f"{sys.prefix}/share/jupyter")
        patch.setenv("IPYTHONDIR", str(folder / ".ipython"))
        manager = KernelManager(kernel_name="python3")
        manager.start_kernel(cwd=ROOT / "book")

    class OneKernel(Engine):
        @classmethod
        def execute_managed_notebook(cls, nb_man: Any, *_: Any, **__: Any) -> None:
            client = PapermillNotebookClient(nb_man, km=manager)
            client.execute()
            client.kc.execute_interactive("%reset -f")
            client.kc.stop_channels()

    papermill_engines.register("one kernel", OneKernel)

    def execute(path: Path) -> Path:
        copy = folder / path.name
        given = {"profile": "smoke", "output": str(copy.with_suffix(""))}
        how = {"engine_name": "one kernel", "progress_bar": False}
        papermill.execute_notebook(path, copy, given, **how)
        return copy

    yield execute
    manager.shutdown_kernel(now=True)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_chapter_runs_in_the_smoke_profile(
    path: Path, run: Callable[[Path], Path]
) -> None:
    executed = nbformat.read(run(path), as_version=4)
    printed, pictures = 0, Counter[str]()
    for cell in executed.cells:
        for output in cell.get("outputs", []):
            assert output.output_type != "error", output.get("evalue")
            if output.output_type == "stream":
                printed += len(output.text)
            if any(kind.startswith("image/") for kind in output.get("data", {})):
                pictures[cell.id] += 1
                alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
                assert alt.strip(), f"the figure of cell {cell.id} has no alt text"
            if glued := output.get("metadata", {}).get("scrapbook"):
                kinds = " ".join(output.data)
                if "image/" in kinds:
                    assert alt_of_glued(glued["name"]), f"{glued['name']}: no alt"
    twice = [cell for cell, count in pictures.items() if count > 1]
    assert not twice, "two figures would share a caption"
    assert printed < 20_000, "the saved outputs are flooded, by a progress bar?"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_chapter_refuses_an_unknown_parameter(
    path: Path, build: ModuleType, tmp_path: Path
) -> None:
    with pytest.raises(build.BookError, match=r"no parameter sede; it has .*seed"):
        build.execute(path, tmp_path, {"profile": "smoke", "sede": "1"})
    assert not list(tmp_path.iterdir())


def test_missing_parameter_is_named(build: ModuleType, tmp_path: Path) -> None:
    path = write_notebook(tmp_path / "a.ipynb", parameters='profile = "cpu"\nseed = 0')
    with pytest.raises(build.BookError, match="must assign dataset, output, root"):
        build.check_parameters(path, {})


def test_copy_is_reused_only_while_nothing_changes(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import pathlib, sys\npath = pathlib.Path(output, 'run.txt')\n"
    code += "path.write_text(sys.prefix + profile)"
    path = write_notebook(tmp_path / "a.ipynb", code)
    executed = tmp_path / "executed"
    earlier = executed / "a" / "earlier-run"
    earlier.mkdir(parents=True)
    build.execute(path, executed, {"profile": "smoke"}, "package")
    assert not earlier.exists(), "an earlier run could have been resumed"
    # By the interpreter that runs the tests, whatever kernels the person has.
    assert (executed / "a" / "run.txt").read_text() == sys.prefix + "smoke"
    assert str(tmp_path) not in nbformat.read(executed / "a.ipynb", 4).cells[1].source
    stamp = executed / "a.json"
    finished = stamp.read_text()
    assert json.loads(finished)["memory"] > 0

    class RanAgainError(Exception):
        pass

    def popen(*args: object, **kwargs: object) -> None:
        raise RanAgainError

    monkeypatch.setattr(build.subprocess, "Popen", popen)
    build.execute(path, executed, {"profile": "smoke"}, "package")
    for profile, sources in [("cpu", "package"), ("smoke", "changed package")]:
        stamp.write_text(finished)
        with pytest.raises(RanAgainError):
            build.execute(path, executed, {"profile": profile}, sources)
    for left in ("", "[]", "{}", finished[:20]):  # by a machine that went down
        stamp.write_text(left)
        with pytest.raises(RanAgainError):
            build.execute(path, executed, {"profile": "smoke"}, "package")
    write_notebook(path, code + "\n")
    stamp.write_text(finished)
    with pytest.raises(RanAgainError):
        build.execute(path, executed, {"profile": "smoke"}, "package")
    assert not stamp.exists(), "an interrupted execution must not count as finished"


def test_a_stamp_is_written_whole_or_not_at_all(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_notebook(tmp_path / "a.ipynb")
    write, written = Path.write_text, []

    def killed(self: Path, text: str, *args: object, **kwargs: object) -> int:
        if text.startswith('{"digest"'):
            written.append(self)
            write(self, text[:9])
            raise KeyboardInterrupt
        return write(self, text, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        build.execute(path, tmp_path / "executed", {"profile": "smoke"})
    assert written and not (tmp_path / "executed/a.json").exists()


@pytest.fixture
def other_book(tmp_path: Path) -> Path:
    """A checkout of a book whose one chapter sleeps; return its script."""
    (tmp_path / "book").mkdir()
    (tmp_path / "_toc.yml").write_text("root: book/sleeping\n")
    code = "from pathlib import Path\nimport time\nPath(output, 'x').touch()\n"
    write_notebook(tmp_path / "book/sleeping.ipynb", code + "time.sleep(600)")
    return Path(shutil.copy(ROOT / "book/build.py", tmp_path / "book"))


@pytest.mark.parametrize(("how", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_build_that_is_ended_leaves_no_process(
    how: signal.Signals, code: int, other_book: Path
) -> None:
    # A shell starts background jobs, and so these tests there, deaf to SIGINT.
    hears = "import runpy, signal, sys; sys.argv.pop(0);"
    hears += "signal.signal(signal.SIGINT, signal.default_int_handler);"
    hears += "runpy.run_path(sys.argv[0], run_name='__main__')"
    process = subprocess.Popen(
        [sys.executable, "-c", hears, other_book], stderr=subprocess.PIPE, text=True
    )
    begun = other_book.parents[1] / "_build/executed/sleeping/x"
    while not begun.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    started = psutil.Process(process.pid).children(recursive=True)
    assert len(started) >= 2, "papermill and its kernel"
    process.send_signal(how)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in said
    assert not psutil.wait_procs(started, timeout=5)[1]


def test_two_builds_do_not_work_in_one_folder(other_book: Path) -> None:
    build = other_book.parents[1] / "_build"
    build.mkdir()
    with FileLock(build / ".lock"):
        done = subprocess.run(
            [sys.executable, other_book], capture_output=True, text=True
        )
    said = f"book: Another run is building the book in {build}; wait for it.\n"
    assert (done.returncode, done.stderr) == (1, said)


def test_a_disk_that_refuses_is_one_sentence(other_book: Path) -> None:
    build = other_book.parents[1] / "_build"
    build.write_text("a file")
    done = subprocess.run([sys.executable, other_book], capture_output=True, text=True)
    said = f"book: {build} cannot be used (File exists).\n"
    assert (done.returncode, done.stderr) == (1, said)


def test_failing_notebook_is_kept_and_named(build: ModuleType, tmp_path: Path) -> None:
    path = write_notebook(tmp_path / "bad.ipynb", "print('before')", "1 / 0")
    executed = tmp_path / "executed"
    with pytest.raises(build.BookError, match=r"executed/bad\.ipynb"):
        build.execute(path, executed, {"profile": "smoke"})
    assert not (executed / "bad.json").exists(), "taken for a finished copy"
    copy = nbformat.read(executed / "bad.ipynb", as_version=4)
    errors = [o for c in copy.cells for o in c.get("outputs", []) if "ename" in o]
    assert [error.ename for error in errors] == ["ZeroDivisionError"]


def test_two_chapters_run_at_a_time_and_wait_for_shared_runs(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = {"a": "1", "b": "chapter.train()", "c": "chapter.train()", "d": "2"}
    paths = {n: write_notebook(tmp_path / f"{n}.ipynb", c) for n, c in code.items()}
    both, log = threading.Barrier(2), []

    def execute(notebook: Path, *args: object) -> dict[str, str]:
        if notebook.stem in "ab":  # each waits until the other one has begun
            both.wait(timeout=60)
        if notebook.stem in "bd":
            log.append(notebook.stem)
            raise build.BookError(f"{notebook.stem} failed")
        log.append(notebook.stem)
        return {"name": notebook.stem}

    monkeypatch.setattr(build, "execute", execute)
    monkeypatch.setattr(build, "CORES", 2)
    with pytest.raises(build.BookError, match=r"^b failed\nd failed$"):
        build.execute_all(paths, tmp_path, {})
    assert sorted(log) == ["a", "b", "c", "d"]  # a failure stops no other
    assert log.index("b") < log.index("c")
    found = build.execute_all({"c": paths["c"]}, tmp_path, {})
    assert found == {"c": {"name": "c"}}


def test_a_page_has_its_place_in_the_drawing_its_times_and_named_folds(
    build: ModuleType, tmp_path: Path
) -> None:
    title = "# Offline\n\n:::{admonition} Before\n\nText.\n:::\n\n" + "word " * 900
    cells = [new_markdown_cell(title, id="title")]
    names = "parameters", "imports", "check-1", "exercise-2-check", "solution-1", "plot"
    for name in names:
        tags = {"parameters": ["parameters"], "plot": ["hide-input"]}.get(name, [])
        cells.append(new_code_cell("1", id=name, metadata={"tags": tags}))
    copy = tmp_path / "offline.ipynb"
    nbformat.write(new_notebook(cells=cells), copy)
    record = {"seconds": 3, "memory": 0.4, "machine": "Linux", "profile": "cpu"}
    found = nbformat.reads(build.with_head(copy, record), as_version=4).cells
    source = found[0].source
    assert source.count("aria-current") == 1
    assert '<a href="offline.html" aria-current="page">' in source
    assert source.index("# Offline") < source.index("<svg") < source.index(":::{adm")
    assert "About 10 minutes to read. To run: 3 s and 0.4 GiB" in source
    folds = [cell.metadata.mystnb.code_prompt_show for cell in found[1:]]
    wanted = ("parameters", "imports", "check", "check", "solution", "code")
    assert folds == [f"Show the {what}" for what in wanted]
    assert "hide-input" in found[1].metadata.tags
    copy = copy.rename(tmp_path / "maps.ipynb")
    assert "<svg" not in build.with_head(copy, record), "no step of the method"


def test_the_drawing_leads_to_chapters() -> None:
    drawing = (ROOT / "book/_static/pipeline.svg").read_text()
    named = re.findall(r'href="(\w+)\.html"', drawing)
    assert named and set(named) <= {path.stem for path in NOTEBOOKS}
    assert "\n\n" not in drawing, "Markdown would end it there"


def test_exercises_are_named_by_their_titles(build: ModuleType) -> None:
    page = build.exercises_page()
    links = re.findall(r"^- \[(.+)\]\(#(.+)\)$", page, re.MULTILINE)
    text = "\n".join(path.read_text() for path in NOTEBOOKS)
    assert len(links) == len(re.findall(r"\(\w+-exercise-\d\)=", text))
    assert not [title for title, _ in links if re.match(r"\d|\W", title)]


def test_status_says_where_and_sums_up(build: ModuleType) -> None:
    record = {"seconds": 3, "memory": 0.4, "machine": "M", "profile": "cpu"}
    record["date"] = "2030-01-01"
    page = build.status_page({"book/a": record, "book/b": record | {"memory": 2.0}})
    assert page.count("- profile cpu, on M, 2030-01-01") == 1
    assert "| [](/book/b) | 3 | 2.0 |\n| **sum, and peak** | **6** | **2.0** |" in page


@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node.js")
def test_the_half_circle_computes_the_offline_loss() -> None:
    page = (ROOT / "book/_static/half_circle.html").read_text()
    script = re.search(r"<script>(.*)</script>", page, re.DOTALL)[1]
    cases = [(55, 0.3, 2), (20, 0.1, 3), (100, 1, 0), (130, 0.05, 1)]
    script += f"for (const [angle, tau, n] of {json.dumps(cases)})"
    script += "console.log(offlineOnHalfCircle(angle, tau, n).loss);"
    done = subprocess.run(["node", "-e", script], capture_output=True, text=True)
    assert not done.stderr
    angles = [[a] for a in (50, 5, 100, 70, 125, 170)]

    def at(degrees: list[list[int]]) -> torch.Tensor:
        angle = torch.tensor(degrees, dtype=torch.float64).deg2rad()
        return torch.cat([angle.cos(), angle.sin()], dim=1)

    clusters, cameras = [0, 0, 0, 1, 1, 2], [0, 1, 2, 0, 1, 2]
    six = CameraProxies(torch.arange(6), *map(torch.tensor, (clusters, cameras)))
    right = [
        offline_loss(
            *(at([[angle]]), torch.tensor([0]), at(angles), six),
            temperature=tau,
            negatives=n,
        ).item()
        for angle, tau, n in cases
    ]
    assert [float(line) for line in done.stdout.split()] == pytest.approx(right)


def test_accessibility_of_no_pages_or_without_npm_is_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    access = load("accessibility")
    monkeypatch.setattr(access, "HTML", tmp_path)
    with pytest.raises(SystemExit, match="run make book first"):
        access.main()
    (tmp_path / "book").mkdir()
    (tmp_path / "book/page.html").touch()
    for name, code in (("npm", 1), ("chromium", 0)):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\nexit {code}\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin:/usr/bin")
    with pytest.raises(SystemExit, match="npm cannot fetch axe-core"):
        access.main()


def test_digest_sees_names_and_contents(build: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    seen = {build.digest(tmp_path)}
    (tmp_path / "a").write_text("2")
    seen.add(build.digest(tmp_path))
    (tmp_path / "a").rename(tmp_path / "b")
    seen.add(build.digest(tmp_path))
    assert len(seen) == 3
    assert build.digest("ab", "c") != build.digest("a", "bc")


def test_outside_requests_are_found(build: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(
        '<a href="https://a.example"></a><script async src="https://b.example/x.js">'
        '</script><link rel="canonical" href="https://c.example">'
        '<img src="//d.example/p.png"><img src="_images/own.png">'
    )
    assert build.outside_requests(tmp_path) == [
        "//d.example/p.png",
        "https://b.example/x.js",
    ]
