"""The project's files agree with one another."""

import ast
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lines as counter
import nbformat
import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import o2cap

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
NOTEBOOKS = sorted((ROOT / "book").glob("*.ipynb"))
TARGETS = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def requirements() -> dict[str, Requirement]:
    """All of pyproject's, of every extra, by normalised name."""
    lines = list(PROJECT["dependencies"])
    for extra in EXTRAS.values():
        lines += extra
    found: dict[str, Requirement] = {}
    for line in lines:
        one = Requirement(line)
        name = one.name.lower().replace("_", "-")
        assert found.get(name, one) == one, f"{name} has two different specifiers"
        found[name] = one
    return found


def tracked() -> list[Path]:
    """Text files that are, or are about to be, committed; all files without git."""
    git = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True)
        files = [ROOT / name for name in done.stdout.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        made = re.compile(r"\.(?!ci|github)|_build|__pycache__|.*\.egg-info|runs|data$")
        files = []
        for top in ROOT.iterdir():
            if not made.match(top.name):
                files += [top, *top.rglob("*")]
        files = [p for p in files if "__pycache__" not in p.parts]
    binary = {".png", ".jpg", ".gif", ".npz"}
    return [p for p in files if p.is_file() and p.suffix not in binary]


def test_lock_satisfies_every_requirement_with_hashes() -> None:
    text = (ROOT / "requirements.lock").read_text()
    blocks = re.split(r"\n(?=[a-zA-Z0-9])", text)
    pins: dict[str, list[tuple[str, str]]] = {}
    for block in blocks:
        head = block.split(" \\")[0]
        name, pinned, marker = re.fullmatch(
            r"([\w.-]+)(?:\[[^]]*\])?==([^ ;]+)(?: ; (.*))?", head
        ).groups()
        assert "--hash=sha256:" in block, f"{name} has no hash"
        pins.setdefault(name, []).append((pinned, marker or ""))
    for name, wanted in requirements().items():
        assert name in pins, f"{name} is not in the lock: run 'make lock'"
        for pinned, _ in pins[name]:
            assert wanted.specifier.contains(pinned), (
                f"{wanted}, but {pinned} is locked"
            )


def test_lock_names_no_registry() -> None:
    text = (ROOT / "requirements.lock").read_text()
    assert "://" not in text
    assert not re.search(r"^--?(index|extra-index|find-links|i|f)", text, re.MULTILINE)


def test_conda_environment_is_in_step() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, last = environment["dependencies"]
    assert f"python{PROJECT['requires-python']}" in conda
    lines = [line for line in last["pip"] if not line.startswith("--")]
    listed = {r.name.lower(): r for r in map(Requirement, lines)}
    wanted = {r.name.lower(): r for r in requirements().values()}
    assert listed == wanted
    assert len(lines) == len(listed), "a name is listed twice"


def test_python_range_is_the_same_everywhere() -> None:
    supported = SpecifierSet(PROJECT["requires-python"])
    assert default_environment()["python_full_version"] in supported
    matrix = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())
    versions = matrix["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert versions == [
        v for v in ("3.10", "3.11", "3.12", "3.13", "3.14") if v in supported
    ]


def test_every_dependency_has_its_reason() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    for name, requirement in requirements().items():
        lines = re.findall(rf'^  "{re.escape(requirement.name)}[^a-z-].*$', text, re.M)
        assert lines, name
        assert all(re.search(r'",? *# \w+', line) for line in lines), lines


def test_citation_names_this_version_and_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"] == version("o2cap")
    assert o2cap.__version__ == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    paper = citation["preferred-citation"]
    assert paper["identifiers"][0]["value"] == "arXiv:2201.05820"
    assert f"## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_workflows_are_valid_and_use_existing_commands() -> None:
    workflows = sorted((ROOT / ".github/workflows").glob("*.yml"))
    assert workflows
    for file in workflows:
        workflow = yaml.safe_load(file.read_text())
        # YAML 1.1 reads the key `on` as true.
        assert {"name", True, "permissions", "jobs"} <= set(workflow), file.name
        for job in workflow["jobs"].values():
            assert job["runs-on"]
            for step in job["steps"]:
                assert ("uses" in step) != ("run" in step), step
                for target in re.findall(r"\bmake ([a-z]+)", step.get("run", "")):
                    assert target in TARGETS


def test_continuous_integration_runs_make_test() -> None:
    script = ROOT / ".ci/run"
    assert script.stat().st_mode & 0o111, ".ci/run is not executable"
    assert re.search(r"^(exec )?make test$", script.read_text(), re.MULTILINE)
    subprocess.run(["bash", "-n", str(script)], check=True)
    subprocess.run(["bash", "-n", str(ROOT / ".ci/setup")], check=True)


@pytest.fixture
def setup(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a copy of the set-up on a pretended machine, with a Python without venv."""
    place = tmp_path / "checkout"
    (place / ".ci").mkdir(parents=True)
    shutil.copy(ROOT / ".ci/setup", place / ".ci")
    for name in ("requirements.lock", "pyproject.toml"):
        (place / name).touch()

    def run(system: str, mac: str = "") -> subprocess.CompletedProcess[str]:
        programs = {
            "uname": f'[ "$1" = -s ] && echo "{system.split()[0]}" || echo "{system}"',
            "sw_vers": f"echo {mac}",
            "python3.11": '[ "$1" = -c ]',
        }
        for name, line in programs.items():
            (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
            (tmp_path / name).chmod(0o755)
        return subprocess.run(
            ["bash", place / ".ci/setup"],
            env={"PATH": f"{tmp_path}:/bin:/usr/bin"},
            capture_output=True,
            text=True,
        )

    return run


@pytest.mark.parametrize(
    ("system", "mac", "good"),
    [
        ("Linux x86_64", "", True),
        ("Linux aarch64", "", True),
        ("Darwin arm64", "14.0", True),
        ("Darwin arm64", "26.1.1", True),
        ("Darwin arm64", "13.6.9", False),
        ("Darwin x86_64", "15.2", False),
        ("MINGW64_NT-10.0 x86_64", "", False),
    ],
)
def test_set_up_refuses_what_the_pins_cannot_serve(
    system: str, mac: str, good: bool, setup: Callable[..., Any]
) -> None:
    done = setup(system, mac)
    assert done.returncode == 1
    said = "cannot make environments" if good else "macOS 14 or later on Apple silicon"
    assert said in done.stderr and done.stderr.count("\n") == 1


def test_set_up_deletes_only_what_it_has_made(
    setup: Callable[..., Any], tmp_path: Path
) -> None:
    venv = tmp_path / "checkout/.venv"
    kept = venv / "kept"
    venv.mkdir()
    kept.touch()
    done = setup("Linux x86_64")
    assert done.returncode == 1 and "made by something else" in done.stderr
    (venv / "bin").mkdir()
    shutil.copy(tmp_path / "python3.11", venv / "bin/python")
    setup("Linux x86_64")  # a Python that works: added to, in vain
    assert kept.exists() and (venv / ".o2cap-incomplete").exists()
    assert "going on" in setup("Linux x86_64").stdout
    (venv / "bin/python").write_text("broken")
    assert "made by something else" in setup("Linux x86_64").stderr
    assert kept.exists()
    (venv / ".o2cap-incomplete").write_text("999999999\n")  # made by the set-up itself
    assert "making it anew" in setup("Linux x86_64").stdout
    assert not kept.exists()
    venv.mkdir()
    (venv / ".o2cap-setup").write_text("/elsewhere\n")
    kept.touch()
    setup("Linux x86_64")
    assert not kept.exists()


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_documents_name_existing_targets(name: str) -> None:
    text = (ROOT / name).read_text()
    pieces = re.findall(r"```bash\n(.*?)```|`([^`\n]+)`", text, re.DOTALL)
    code = "\n".join(block or inline for block, inline in pieces)
    used = set(re.findall(r"\bmake ([a-z]+)", code))
    assert used, "names no command"
    assert used <= TARGETS


def test_links_between_documents_lead_somewhere() -> None:
    for page in ROOT.glob("*.md"):
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_make_help_lists_every_target() -> None:
    shown = subprocess.run(
        ["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert set(re.findall(r"^  make ([a-z]+) +[a-z]", shown, re.MULTILINE)) == TARGETS


def test_table_of_contents_lists_every_page() -> None:
    toc = (ROOT / "_toc.yml").read_text()
    listed = set(re.findall(r"(?:file|root): (\S+)", toc))
    pages = {f"book/{p.stem}" for p in (*NOTEBOOKS, *(ROOT / "book").glob("*.md"))}
    assert pages <= listed
    made = {"book/status", "book/exercises"}  # written by book/build.py
    for name in listed - made:
        assert any((ROOT / f"{name}{s}").exists() for s in (".md", ".ipynb")), name


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_committed_clean(path: Path) -> None:
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) >= (4, 5), "cells have no ids"
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [], f"cell {cell.id} has outputs"
            assert cell.execution_count is None, f"cell {cell.id} has a count"
    assert notebook.metadata.kernelspec.name == "python3"


def test_repository_address_has_one_home() -> None:
    home = PROJECT["urls"]["Repository"].removeprefix("https://github.com/")
    other = []
    for file in tracked():
        text = file.read_text(errors="replace")
        # Links to Colab carry it as /github/<owner>/<name>.
        for found in re.findall(r"github(?:\.com)?/([\w-]+/o2cap[\w-]*)", text):
            if found != home:
                other.append(f"{file.name}: {found}")
    assert not other


def test_no_path_of_one_machine() -> None:
    local = re.compile(
        r"(?<![\w.~/$}-])/(?:home|Users|root|work|mnt|media)/\w|[A-Z]:\\\\?Users"
    )
    found = []
    for file in tracked():
        for line in file.read_text(errors="replace").splitlines():
            if local.search(line):
                found.append(f"{file.relative_to(ROOT)}: {line.strip()[:80]}")
    assert not found


def test_the_ledger_names_tests_that_exist() -> None:
    page = (ROOT / "book/ledger.md").read_text(encoding="utf-8")
    items = re.split(r"^(\d+)\. ", page, flags=re.MULTILINE)[1:]
    assert [int(number) for number in items[::2]] == list(range(1, 12))
    for item in items[1::2]:
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", item)
        assert named, item
        for file, test in named:
            text = (ROOT / "tests" / file).read_text(encoding="utf-8")
            assert re.search(rf"^def {test}\(", text, re.MULTILINE), (file, test)


def test_records_hold_what_readers_of_them_rely_on() -> None:
    records = sorted((ROOT / "reproduce/records").glob("*.json"))
    assert records
    for path in records:
        plain = json.loads(path.read_text(encoding="utf-8"))
        if "target" not in plain and path.stem != "tuning":
            continue  # a benchmark's
        for row in plain["rows"]:
            assert {"dataset", "method", "seed", "metrics"} <= set(row)
            assert "versions" in row or "versions" in plain
            assert 0 <= row["metrics"]["mAP"] <= 1


def imports(place: ast.AST) -> set[str]:
    """Return the packages that a module, or a function of it, imports."""
    found: set[str] = set()
    for node in ast.walk(place):
        if isinstance(node, ast.Import):
            found |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


def modules(package: str) -> dict[Path, ast.Module]:
    paths = sorted((ROOT / package).rglob("*.py"))
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def test_the_packages_import_only_what_they_declare() -> None:
    known = importlib.metadata.packages_distributions()
    needed = PROJECT["dependencies"] + EXTRAS["timm"] + EXTRAS["onnx"]
    declared = {Requirement(line).name.lower() for line in needed}
    for path, module in (modules("o2cap") | modules("o2cap_book")).items():
        for top in imports(module) - {"o2cap", "o2cap_book"}:
            if top not in sys.stdlib_module_names:
                made_by = {d.lower() for d in known[top]}
                assert made_by & declared, f"{path.name} imports {top}"


def test_the_method_needs_nothing_of_the_book() -> None:
    """No arrow back, but in commands; no library that only draws."""
    commands = ("report", "reproduce", "search", "cluster", "sheet")
    for path, module in modules("o2cap").items():
        if path.name == "cli.py":
            module.body = [
                part
                for part in module.body
                if getattr(part, "name", None) not in commands
            ]
        assert not imports(module) & {"o2cap_book", "matplotlib", "umap"}, path


def test_every_room_keeps_its_budget() -> None:
    """Within a tenth; `python tests/lines.py` prints them all."""
    found = counter.rooms()
    for name, budget in counter.BUDGETS.items():
        assert found[name] <= 1.1 * budget, name
    unknown = {n for n in found if n not in counter.BUDGETS and found[n] > 20}
    assert all(name.startswith("o2cap_book/") for name in unknown)
    for package, count in counter.totals(found).items():
        assert count <= 1.1 * counter.TOTALS[package]
