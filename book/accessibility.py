"""Check every page of the built book with axe: ``make accessibility``.

Each page is opened in Chromium, on a desktop's width and a phone's, in the
light and the dark theme, with axe-core (from npm) run in it. Findings are
printed by rule, with the first places; a serious or critical one fails.
"""

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from pathlib import Path

HTML = Path(__file__).resolve().parent.parent / "_build" / "html"
AXE = "axe-core@4.14.1"
AXE_SHA256 = "e6b0ce02b84d892e2e33e403485e7f3d6c29e2be6df65daf44d89ba564139745"
BROWSERS = (
    *("chromium", "chromium-browser", "google-chrome"),
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
)
VIEWS = {"desktop": (1280, "light"), "phone": (390, "dark")}
# Not of our making: names of the theme's search button and folds leave out
# what they show; docutils calls citations a list, and no list items.
THEME = {"label-content-name-mismatch", "aria-required-children"}
RUN = """
<script id="axe-settings">
try { localStorage.setItem("mode", "THEME");
      localStorage.setItem("theme", "THEME"); } catch (e) {}
document.documentElement.dataset.mode = "THEME";
document.documentElement.dataset.theme = "THEME";
</script>
<script src="AXE"></script>
<script>
addEventListener("load", () => setTimeout(async () => {
  const found = await axe.run(document, {resultTypes: ["violations"]});
  const short = found.violations.map(v => ({
    id: v.id, impact: v.impact, help: v.help,
    nodes: v.nodes.map(n => n.html.slice(0, 160))}));
  const wide = document.documentElement.scrollWidth > innerWidth + 1;
  if (wide) short.push({id: "page-scrolls-sideways", impact: "serious",
    help: "The page is wider than the window", nodes: [""]});
  const pre = document.createElement("pre");
  pre.id = "axe-report";
  pre.textContent = btoa(unescape(encodeURIComponent(JSON.stringify(short))));
  document.body.append(pre);
}, 1500));
</script>
"""


def fetch_axe(folder: Path) -> Path:
    """Return axe's script, fetched by npm and checked."""
    command = ["npm", "pack", AXE, "--silent"]
    if subprocess.run(command, cwd=folder, capture_output=True).returncode:
        sys.exit(
            f"accessibility: npm cannot fetch {AXE}; try 'npm pack {AXE}'"
        )
    archive = next(folder.glob("*.tgz"))
    if hashlib.sha256(archive.read_bytes()).hexdigest() != AXE_SHA256:
        sys.exit(f"{archive.name} is not the {AXE} that is known here")
    with tarfile.open(archive) as tar:
        script = tar.extractfile("package/axe.min.js")
        assert script is not None
        (folder / "axe.js").write_bytes(script.read())
    return folder / "axe.js"


def check(page: Path, axe: Path, browser: str, view: str) -> list[dict]:
    """Return axe's findings on one page."""
    width, theme = VIEWS[view]
    code = RUN.replace("AXE", axe.as_uri()).replace("THEME", theme)
    copy = page.with_name(f".axe-{page.name}")
    text = page.read_text(encoding="utf-8")
    copy.write_text(text.replace("</body>", code + "</body>"), "utf-8")
    with tempfile.TemporaryDirectory() as profile:
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu"]
        command += ["--disable-background-networking", "--no-first-run"]
        command += [f"--user-data-dir={profile}", f"--window-size={width},900"]
        command += ["--virtual-time-budget=20000", "--timeout=90000"]
        command += ["--allow-file-access-from-files", "--dump-dom"]
        done = subprocess.run(
            [*command, copy.as_uri()], capture_output=True, text=True
        )
    copy.unlink()
    report = re.search(r'<pre id="axe-report">([^<]*)<', done.stdout)
    if report is None:
        return [
            {"id": "no-report", "impact": "serious", "help": "", "nodes": [""]}
        ]
    return json.loads(base64.b64decode(report[1]))


def main() -> None:
    """Check all pages but those of source code."""
    pages = sorted((HTML / "book").glob("[!.]*.html"))
    if not pages:
        sys.exit("accessibility: there are no pages; run make book first")
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None or shutil.which("npm") is None:
        sys.exit("accessibility: Chromium or Chrome, and npm, are needed")
    total: Counter[tuple[str, str]] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        axe = fetch_axe(Path(folder))
        for page in pages:
            for view in VIEWS:
                for found in check(page, axe, browser, view):
                    key = (found["impact"] or "minor", found["id"])
                    total[key] += len(found["nodes"])
                    words = ", ".join([*key, found["help"]])
                    print(f"{page.stem}, {view}: {words}")
                    for node in found["nodes"][:3]:
                        print("    ", " ".join(node.split())[:150])
    print(f"\n{len(pages)} pages, {len(VIEWS)} views each")
    for (impact, rule), count in sorted(total.items()):
        print(f"{impact:<9} {rule:<32} {count}")
    ours = {i for i, rule in total if rule not in THEME}
    if ours & {"serious", "critical"}:
        sys.exit(1)


if __name__ == "__main__":
    main()
