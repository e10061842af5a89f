"""Count lines of code, room by room, beside their budgets: ``python tests/lines.py``.

A line counts that holds code: no blank one, no comment, no docstring. The budgets are
part of the design: what grows beyond one by more than a tenth must take something out.
"""

import ast
import io
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUDGETS = {
    "o2cap/__main__.py": 50,
    "o2cap/backbone.py": 150,
    "o2cap/cli.py": 230,
    "o2cap/clustering.py": 220,
    "o2cap/config.py": 185,
    "o2cap/data/__init__.py": 50,
    "o2cap/data/finding.py": 50,
    "o2cap/data/images.py": 140,
    "o2cap/data/loading.py": 120,
    "o2cap/data/readers.py": 320,
    "o2cap/data/samplers.py": 40,
    "o2cap/data/synthetic.py": 950,
    "o2cap/data/transforms.py": 105,
    "o2cap/device.py": 65,
    "o2cap/distributed.py": 105,
    "o2cap/errors.py": 10,
    "o2cap/evaluation.py": 195,
    "o2cap/features.py": 85,
    "o2cap/files.py": 65,
    "o2cap/inference.py": 265,
    "o2cap/learner.py": 130,
    "o2cap/losses.py": 140,
    "o2cap/neighbours.py": 100,
    "o2cap/proxies.py": 65,
    "o2cap/reranking.py": 50,
    "o2cap/run.py": 265,
    "o2cap/trainer.py": 310,
    "o2cap/verification.py": 45,
    "o2cap/weights/__init__.py": 60,
}
RENDERER = "o2cap/data/synthetic.py"
# o2cap without the renderer. Its goal is 3,300: what is over is still to be taken out.
TOTALS = {"o2cap": 3630, "o2cap_book": 1450}


def code_lines(path: Path) -> int:
    """Return the number of lines of a Python file that hold code."""
    source = path.read_text(encoding="utf-8")
    prose: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            prose.update(range(node.lineno, (node.end_lineno or 0) + 1))
    held: set[int] = set()
    empty = ("COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENDMARKER")
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if tokenize.tok_name[token.type] not in empty:
            held.update(range(token.start[0], token.end[0] + 1))
    return len(held - prose)


def rooms() -> dict[str, int]:
    """Return the lines of code of every file of both packages."""
    files = [p for package in TOTALS for p in sorted((ROOT / package).rglob("*.py"))]
    return {str(p.relative_to(ROOT)): code_lines(p) for p in files}


def totals(found: dict[str, int]) -> dict[str, int]:
    """Return the lines of code of each package, the renderer left out."""
    return {
        package: sum(
            n
            for name, n in found.items()
            if name.startswith(f"{package}/") and name != RENDERER
        )
        for package in TOTALS
    }


if __name__ == "__main__":
    found = rooms()
    print(f"{'lines':>6} {'budget':>6}")
    for name, count in found.items():
        print(f"{count:6} {BUDGETS.get(name, ''):>6}  {name}")
    for package, count in totals(found).items():
        print(f"{count:6} {TOTALS[package]:>6}  {package}, without the renderer")
