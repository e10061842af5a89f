"""Results of many runs: statistics over seeds, tables, figures.

A record is a JSON file that `o2cap reproduce` writes: what was run, where, and a row
for every finished job. All numbers of a table come from such rows; a share (mAP,
rank-k) is a fraction in them and a percentage everywhere here.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from scipy.special import stdtrit

from o2cap.config import preset
from o2cap.errors import InputError
from o2cap.files import replacing
from o2cap_book.figures import GREY, MARKERS, PALETTE, STYLE, Figure

Row = Mapping[str, Any]
Seeds = tuple[int, int]  # of the data, of the training

METHODS = (
    *("baseline", "intra", "offline", "online", "both"),
    *("both+gem", "both+ibn", "both+ibn+gem", "supervised"),
)
BEFORE = "before training"  # the warm start, or the pretrained weights

# Name in a record: label, factor, digits.
METRICS: dict[str, tuple[str, float, int]] = {
    "mAP": ("mAP (%)", 100, 1),
    "rank1": ("rank-1 (%)", 100, 1),
    "rank5": ("rank-5 (%)", 100, 1),
    "rank10": ("rank-10 (%)", 100, 1),
    "mINP": ("mINP (%)", 100, 1),
    "ari": ("ARI (0 to 1)", 1, 2),
    "clusters": ("clusters", 1, 0),
    "outliers": ("outliers (pictures)", 1, 0),
    "cameras_per_cluster": ("cameras per cluster", 1, 2),
}

# mAP and rank-1 in percent, from the tables of results in the two public repositories,
# Terminator8758/CAP-master and Terminator8758/O2CAP. "supervised" is CAP's upper bound.
PUBLISHED: dict[str, dict[str, tuple[float, float]]] = {
    "market1501": {
        "CAP": (79.2, 91.4),
        "both": (82.7, 92.5),
        "both+ibn": (83.7, 93.1),
        "both+ibn+gem": (85.0, 93.3),
        "supervised": (85.1, 93.3),
    },
    "dukemtmcreid": {
        "CAP": (67.3, 81.1),
        "both": (71.2, 83.9),
        "both+ibn": (72.8, 85.2),
        "both+ibn+gem": (73.2, 85.3),
        "supervised": (76.0, 87.7),
    },
    "msmt17": {
        "CAP": (36.9, 67.4),
        "both": (42.4, 72.0),
        "both+ibn": (46.9, 75.5),
        "both+ibn+gem": (48.3, 77.3),
        "supervised": (53.7, 77.1),
    },
    "veri776": {"CAP": (40.6, 87.0)},
}

# What a study varies: label, and whether the axis is logarithmic.
STUDIES: dict[str, tuple[str, bool]] = {
    "strength": ("camera gap (1: the book's)", False),
    "cameras": ("cameras (number)", False),
    "k1": ("k1 (neighbours)", False),
    "eps": ("eps (Jaccard distance)", False),
    "temperature": ("temperature τ", True),
    "momentum": ("momentum μ", False),
    "negatives": ("negatives (proxies)", True),
}

# ------------------------------------------------------------------------------ reading


@dataclass(frozen=True)
class Record:
    """What one target of the batch gave."""

    target: str
    what: str
    rows: list[Row]
    failures: list[Row]
    facts: dict[str, Any]
    """Date, commit, versions, platform, device."""


def read_record(path: Path) -> Record:
    """Read a record and refuse what would make its statistics wrong.

    Raises
    ------
    InputError
        When the file is missing or damaged, a row lacks what it needs, or two rows
        are of the same run, which would count its seed twice.
    """
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        rows, what = plain.pop("rows"), plain.pop("what")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{path} is no record of results ({error!r}).") from error
    seen: dict[Any, int] = {}
    for number, row in enumerate(rows, 1):
        try:
            run = (*_of(row), _seeds(row)[0], row.get("study"), row.get("value"))
            metrics = row["metrics"].values()
        except (KeyError, AttributeError, TypeError) as error:
            raise InputError(f"{path}, row {number} is damaged ({error!r}).") from error
        if not all(v is None or isinstance(v, int | float) for v in metrics):
            raise InputError(f"{path}, row {number} has a metric that is no number.")
        if run in seen:
            raise InputError(
                f"{path}, rows {seen[run]} and {number} are of the same run: "
                "remove one of them."
            )
        seen[run] = number
    target, failures = plain.pop("target", path.stem), plain.pop("failures", [])
    return Record(target, what, rows, failures, plain)


def read_results(folder: Path) -> list[Record]:
    """Read the records in a folder that hold results of the methods.

    Those are the files that name a ``target``; left out is what serves only to check
    the code (target ``check``).
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            plain = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{path} is damaged ({error}).") from error
        if plain.get("target", "check") != "check" and "rows" in plain:
            found.append(read_record(path))
    return found


def _seeds(row: Row) -> Seeds:
    data = row.get("data_seed")
    return (row["seed"] if data is None else data), row["seed"]


def select(rows: Iterable[Row], **equal: Any) -> list[Row]:
    """Return the rows with these entries; one that a row lacks counts as None."""
    return [r for r in rows if all(r.get(k) == v for k, v in equal.items())]


def with_defaults(rows: Sequence[Row], study: str) -> list[Row]:
    """Return the rows of a study, those of the default value among them.

    The study itself runs the other values; at the default it is the ablation, of
    which the rows of the same methods, data set and seeds are taken.
    """
    own = select(rows, study=study)
    there = {(*_of(r), r["value"]) for r in own}
    wanted = {_of(r) for r in own}
    default = default_value(study)
    added = []
    for row in select(rows, study=None):
        value = _seeds(row)[0] if default is None else default
        if _of(row) in wanted and (*_of(row), value) not in there:
            added.append({**row, "study": study, "value": value})
    return own + added


def _of(row: Row) -> tuple[str, str, int]:
    return row["dataset"], row["method"], row["seed"]


def default_value(study: str) -> float | None:
    """Return the value that a study's setting has in the embedded preset.

    None for ``data_seed``, which is then the seed of the training.
    """
    config = preset("synthetic")
    parts = (config.synthetic, config.clustering, config.loss)
    return next((getattr(p, study) for p in parts if hasattr(p, study)), None)


def by_seed(
    rows: Iterable[Row], method: str, metric: str = "mAP"
) -> dict[Seeds, float]:
    """Return a metric of each run of a method, by its seeds, in the unit of METRICS.

    For `BEFORE`, of the weights that ``both`` set out from.
    """
    factor = METRICS[metric][1]
    found = {}
    for row in select(rows, method="both" if method == BEFORE else method):
        after = {**(row.get("clusters") or {}), **row["metrics"]}
        value = ((row.get("before") or {}) if method == BEFORE else after).get(metric)
        if value is not None and np.isfinite(value):
            found[_seeds(row)] = factor * value
    return found


# --------------------------------------------------------------------------- statistics


@dataclass(frozen=True)
class Summary:
    """Mean over n seeds, standard deviation, 95 % interval; NaN where n is too small.

    Of a paired difference, `above` counts the seeds with a positive one.
    """

    n: int
    mean: float
    sd: float
    low: float
    high: float
    above: int = 0

    def side(self) -> int:
        """Return 1 or −1 where the mean is surely above or below zero, else 0.

        Surely: the bootstrap's interval leaves out zero, and so does Student's, which
        allows for few values where the bootstrap's is too short.
        """
        if self.n < 2:
            return 0
        half = float(stdtrit(self.n - 1, 0.975)) * self.sd / self.n**0.5
        if min(self.low, self.mean - half) > 0:
            return 1
        return -1 if max(self.high, self.mean + half) < 0 else 0

    def text(self, digits: int = 1) -> str:
        """Return the numbers as a cell of a table."""
        if self.n == 1:
            return f"{self.mean:.{digits}f} (1 seed)"
        return (
            f"{self.mean:.{digits}f} ± {self.sd:.{digits}f} "
            f"({self.low:.{digits}f} to {self.high:.{digits}f})"
        )


def bootstrap_interval(
    values: Iterable[float], confidence: float = 0.95, resamples: int = 10_000
) -> tuple[float, float]:
    """Interval of the mean: percentiles of the means of resampled values.

    Few values give too short an interval, since a resample never leaves their range:
    with three it *is* the range, with five it holds the true mean in about 82 % of
    all cases, with ten in about 90 %, instead of 95 %. Drawn by a fixed seed.

    Returns
    -------
    low, high : float
        NaN for fewer than two values.

    Book: :eq:`bootstrap_interval`
    """
    v = np.fromiter(values, float)
    if len(v) < 2:
        return np.nan, np.nan
    drawn = np.random.default_rng(0).integers(len(v), size=(resamples, len(v)))
    tail = (1 - confidence) / 2
    low, high = np.quantile(v[drawn].mean(1), [tail, 1 - tail])
    return float(low), float(high)


def summarise(values: Iterable[float]) -> Summary:
    """Return mean, standard deviation (n − 1) and bootstrap interval of the mean."""
    v = np.fromiter(values, float)
    if not len(v):
        raise ValueError("there are no values to summarise")
    sd = float(v.std(ddof=1)) if len(v) > 1 else np.nan
    interval = bootstrap_interval(v)
    return Summary(len(v), float(v.mean()), sd, *interval, int((v > 0).sum()))


def paired_difference(
    a: Mapping[Seeds, float], b: Mapping[Seeds, float]
) -> Summary | None:
    """Summarise a − b over the seeds that both have; None where there is no such.

    The two of a seed saw the same pictures, so what makes a data set easy or hard
    drops out of the difference.

    Book: :eq:`paired_difference`
    """
    both = a.keys() & b.keys()
    return summarise(a[s] - b[s] for s in sorted(both)) if both else None


def in_words(a: str, b: str, difference: Summary | None, of: str = "mAP") -> str:
    """Say what a paired difference a − b in percentage points allows to be said."""
    if difference is None:
        return f"{a} and {b} were not run on the same seeds."
    d = difference
    if d.n == 1:
        return (
            f"On the one seed that was run, {a} is {abs(d.mean):.1f} points of {of} "
            f"{'above' if d.mean > 0 else 'below'} {b}; one seed allows no conclusion."
        )
    numbers = (
        f"({d.low:+.1f} to {d.high:+.1f} at 95 %; {a} is the higher in {d.above} of "
        f"{d.n} seeds)"
    )
    side = "above" if d.mean > 0 else "below"
    if d.side():
        return f"{a} is {abs(d.mean):.1f} points of {of} {side} {b} {numbers}."
    if d.low > 0 or d.high < 0:
        return (
            f"On average {a} is {abs(d.mean):.1f} points of {of} {side} {b}, which so "
            f"few seeds do not settle {numbers}."
        )
    return (
        f"Between {a} and {b} no difference is shown: {d.mean:+.1f} points of {of} "
        f"{numbers}."
    )


def variance_components(values: Mapping[Seeds, float]) -> tuple[float, float]:
    """Split the variance into that of the data seed and that of the training seed.

    One-way analysis of variance with the data seed as a random factor. The variance
    inside a data seed is the training's; what the means of the data seeds vary beyond
    what that explains is the data's, and 0 where it would be negative.

    Parameters
    ----------
    values : mapping
        By data seed and training seed; at least two data seeds, and one of them with
        two training seeds.

    Returns
    -------
    data, training : float
        Variances, in the square of the unit of the values.

    Raises
    ------
    ValueError
        For too few runs.

    Book: :eq:`variance_components`
    """
    groups: dict[int, list[float]] = {}
    for (data, _), value in values.items():
        groups.setdefault(data, []).append(value)
    n, k = len(values), len(groups)
    if k < 2 or n == k:
        raise ValueError("too few data seeds, or one training seed in each")
    size = np.array([len(g) for g in groups.values()])
    means = np.array([np.mean(g) for g in groups.values()])
    grand = np.mean(list(values.values()))
    inside = sum(((np.array(g) - np.mean(g)) ** 2).sum() for g in groups.values())
    training = float(inside / (n - k))
    between = float((size * (means - grand) ** 2).sum() / (k - 1))
    typical = (n - (size**2).sum() / n) / (k - 1)
    return max(0.0, (between - training) / typical), training


# ------------------------------------------------------------------------------- tables

Cell = str | int | float | Summary | None


@dataclass(frozen=True)
class Table:
    """A table: cells hold numbers, and an empty one what was not measured."""

    name: str
    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    def markdown(self, columns: Sequence[str] | None = None) -> str:
        """Return the table, or some columns of it, in Markdown.

        A summary becomes mean ± s.d. (interval).
        """
        chosen = [self.header.index(name) for name in columns or self.header]
        lines = [[self.header[i] for i in chosen], ["---"] * len(chosen)]
        lines += [[_text(row[i], self.header[i]) for i in chosen] for row in self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"

    def csv(self) -> str:
        """Return the table as CSV, the parts of a summary in columns of their own."""
        cells = list(zip(*self.rows, strict=True))
        parts = ("n", "mean", "sd", "low", "high")
        columns: list[tuple[str, list[Any]]] = []
        for name, column in zip(self.header, cells, strict=False):
            if any(isinstance(c, Summary) for c in column):
                for part in parts:
                    values = [getattr(c, part) if c else "" for c in column]
                    columns.append((f"{name} {part}", values))
            else:
                columns.append((name, ["" if c is None else c for c in column]))
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(name for name, _ in columns)
        writer.writerows(zip(*(values for _, values in columns), strict=True))
        return text.getvalue()


_DIGITS = {label: digits for label, _, digits in METRICS.values()}
_UNITS = ("(%)", "(points)", "(s)")  # shown with one digit


def _text(cell: Cell, column: str) -> str:
    if cell is None:
        return ""
    if isinstance(cell, Summary):
        return cell.text(_DIGITS.get(column, 1))
    if isinstance(cell, float):
        return f"{cell:.1f}" if column.endswith(_UNITS) else f"{cell:g}"
    return str(cell)


def methods_in(rows: Iterable[Row]) -> list[str]:
    """Return the methods of the rows, in the order of tables and figures."""
    there = {r["method"] for r in rows}
    return [m for m in METHODS if m in there] + sorted(there - set(METHODS))


def _values_of(rows: Iterable[Row]) -> list[float]:
    return sorted({r["value"] for r in rows})


def _cell(rows: Iterable[Row], method: str, metric: str) -> Summary | None:
    found = by_seed(rows, method, metric)
    return summarise(found.values()) if found else None


def ablation_table(rows: Sequence[Row], name: str = "ablation") -> Table:
    """Every metric of every method: the paper's ablation, over seeds."""
    metrics = [m for m in METRICS if any(by_seed(rows, k, m) for k in methods_in(rows))]
    lines: list[list[Cell]] = []
    for method in (BEFORE, *methods_in(rows)):
        cells = [_cell(rows, method, m) for m in metrics]
        if any(cells):
            n = max(c.n for c in cells if c)
            lines.append([method, n, *cells])
    header = ["method", "seeds", *(METRICS[m][0] for m in metrics)]
    return Table(name, f"{_names(rows)}: mean ± s.d. (95 % interval)", header, lines)


def paired_table(rows: Sequence[Row], name: str = "paired") -> Table:
    """Differences of mAP between methods, paired by seed."""
    present = methods_in(rows)
    pairs = [("offline", "baseline"), ("online", "baseline"), ("both", "baseline")]
    pairs += [("online", "offline"), ("both", "offline"), ("both", "online")]
    pairs += [("intra", "baseline"), ("offline", "intra"), ("both", "intra")]
    pairs += [("both+gem", "both")]
    pairs += [("both+ibn", "both"), ("both+ibn+gem", "both"), ("supervised", "both")]
    lines: list[list[Cell]] = []
    for a, b in pairs:
        if a in present and b in present:
            difference = paired_difference(by_seed(rows, a), by_seed(rows, b))
            if difference:
                counted = f"{difference.above} of {difference.n}"
                lines.append([f"{a} − {b}", difference, counted])
    header = ["difference", "mAP (points)", "seeds above 0"]
    return Table(name, f"{_names(rows)}: differences, paired by seed", header, lines)


def gain_table(rows: Sequence[Row], study: str) -> Table:
    """A study over methods: mAP of each, and the paired gain over the baseline.

    Parameters
    ----------
    rows : sequence of dict
        Of the study, as from `with_defaults`.
    study : str
        ``strength`` or ``cameras``.
    """
    methods = methods_in(rows)
    others = [m for m in methods if m != "baseline"]
    lines: list[list[Cell]] = []
    for value in _values_of(rows):
        here = select(rows, value=value)
        base = by_seed(here, "baseline")
        line: list[Cell] = [value, *(_cell(here, m, "mAP") for m in methods)]
        line += [paired_difference(by_seed(here, m), base) for m in others]
        lines.append(line)
    header = [study, *(f"{m}, mAP (%)" for m in methods)]
    header += [f"{m} − baseline (points)" for m in others]
    return Table(study, f"{_names(rows)}: {STUDIES[study][0]}", header, lines)


def sensitivity_table(studies: Mapping[str, Sequence[Row]]) -> Table:
    """Each value of each setting, and what it changes, paired by seed.

    Parameters
    ----------
    studies : mapping
        The rows of each study, as from `with_defaults`.
    """
    lines: list[list[Cell]] = []
    for study, rows in studies.items():
        for method, value in product(methods_in(rows), _values_of(rows)):
            here = select(rows, value=value)
            usual = by_seed(select(rows, value=default_value(study)), method)
            change = paired_difference(by_seed(here, method), usual)
            is_usual = value == default_value(study)
            cells = [_cell(here, method, m) for m in ("mAP", "ari")]
            lines.append([study, value, method, *cells, None if is_usual else change])
    header = ["setting", "value", "method", METRICS["mAP"][0], METRICS["ari"][0]]
    header.append("mAP − at the usual value (points)")
    return Table("sensitivity", "One setting at a time", header, lines)


def seeds_table(rows: Sequence[Row]) -> Table:
    """Effect of the data seed and of the training seed on mAP, as s.d. in points."""
    lines: list[list[Cell]] = []
    for method in methods_in(rows):
        found = by_seed(rows, method)
        try:
            data, training = variance_components(found)
        except ValueError:
            continue  # not enough runs of this method
        seeds = len({d for d, _ in found}), len({s for _, s in found})
        lines.append([method, *seeds, len(found), data**0.5, training**0.5])
    header = ["method", "data seeds", "training seeds", "runs"]
    header += ["s.d. by data (points)", "s.d. by training (points)"]
    caption = f"{_names(rows)}: what a seed changes in mAP"
    return Table("data_seed", caption, header, lines)


def convergence_table(rows: Sequence[Row], name: str = "convergence") -> Table:
    """mAP, ARI and cameras per cluster after each epoch."""
    lines: list[list[Cell]] = []
    for method in methods_in(rows):
        curves = {m: convergence(rows, method, m) for m in _CURVES}
        for epoch in sorted(set().union(*curves.values())):
            line = [curves[m].get(epoch) for m in _CURVES]
            lines.append([method, epoch, *line])
    header = ["method", "epoch", *(METRICS[m][0] for m in _CURVES)]
    return Table(name, f"{_names(rows)}: after each epoch", header, lines)


_CURVES = ("mAP", "ari", "cameras_per_cluster")


def convergence(rows: Iterable[Row], method: str, metric: str) -> dict[int, Summary]:
    """Summarise a metric over seeds, epoch by epoch (the first is number 0)."""
    found: dict[int, list[float]] = {}
    for row in select(rows, method=method):
        for record in row.get("history") or ():
            value = record.get(metric)
            if value is not None and np.isfinite(value):
                found.setdefault(record["epoch"], []).append(METRICS[metric][1] * value)
    return {epoch: summarise(found[epoch]) for epoch in sorted(found)}


def cost_table(rows: Sequence[Row], name: str = "cost") -> Table:
    """Seconds of each stage of a run, medians over seeds."""
    stages = list(dict.fromkeys(s for r in rows for s in r.get("seconds") or ()))
    lines: list[list[Cell]] = []
    for method in methods_in(rows):
        taken = [r["seconds"] for r in select(rows, method=method) if r.get("seconds")]
        line: list[Cell] = [method, len(taken)]
        for stage in stages:
            known = [t[stage] for t in taken if t.get(stage) is not None]
            line.append(float(np.median(known)) if known else None)
        if taken:
            lines.append(line)
    header = ["method", "runs", *(f"{s} (s)" for s in stages)]
    return Table(name, f"{_names(rows)}: seconds of a run, medians", header, lines)


def published_table(rows: Sequence[Row]) -> Table:
    """Published numbers beside ours; what was not run stays empty."""
    lines: list[list[Cell]] = []
    for dataset, published in PUBLISHED.items():
        own = select(rows, dataset=dataset, study=None)
        names = [m for m in METHODS if m in published or m in methods_in(own)]
        for method in ("CAP", *names):
            numbers: Sequence[Cell] = published.get(method, (None, None))
            ours = [_cell(own, method, m) for m in ("mAP", "rank1")]
            lines.append([dataset, method, *numbers, *ours])
    header = ["data set", "method", "published mAP (%)", "published rank-1 (%)"]
    header += ["ours, mAP (%)", "ours, rank-1 (%)"]
    return Table("published", "Published numbers, and this code's", header, lines)


def failures_table(records: Iterable[Record]) -> Table:
    """Every job that failed; and per record how many did."""
    lines: list[list[Cell]] = []
    for record in records:
        total = len(record.rows) + len(record.failures)
        counted = f"{len(record.failures)} of {total} failed"
        lines.append([record.target, counted, None])
        for failure in record.failures:
            error = " ".join(str(failure.get("error", "")).split())[:200]
            lines.append([record.target, failure.get("job", "?"), error])
    return Table("failures", "Jobs that failed", ["record", "job", "error"], lines)


def _names(rows: Iterable[Row]) -> str:
    return ", ".join(sorted({r["dataset"] for r in rows}))


# ------------------------------------------------------------------------------ figures


def _look(method: str) -> dict[str, Any]:
    """Colour and marker of a method, the same in every figure."""
    if method not in METHODS:
        return {"color": GREY, "marker": "x"}
    i = METHODS.index(method)
    return {"color": PALETTE[i % len(PALETTE)], "marker": MARKERS[i % len(MARKERS)]}


def _interval(ax: Axes, x: float, s: Summary, **look: Any) -> None:
    low, high = max(0, s.mean - s.low), max(0, s.high - s.mean)
    error = [[low], [high]] if s.n > 1 else None
    ax.errorbar(x, s.mean, error, capsize=4, **look)


@mpl.rc_context(STYLE)
def ablation_figure(rows: Sequence[Row], metric: str = "mAP") -> Figure:
    """Draw each method's runs as dots, a thin line through those of one seed.

    Beside the dots stand the mean and its 95 % interval.
    """
    named = [BEFORE, *methods_in(rows)]
    found = {m: by_seed(rows, m, metric) for m in named}
    found = {m: v for m, v in found.items() if v}
    fig = Figure(figsize=(7, 3.8), layout="constrained")
    ax = fig.subplots()
    for seed in sorted(set().union(*found.values())):
        line = [(x, v[seed]) for x, v in enumerate(found.values()) if seed in v]
        ax.plot(*zip(*line, strict=True), color="#C4C4C4", lw=0.8, zorder=1)
    for x, (method, values) in enumerate(found.items()):
        look = _look(method)
        ax.plot([x] * len(values), list(values.values()), ls="", alpha=0.7, **look)
        _interval(ax, x + 0.25, summarise(values.values()), color="black", marker="_")
    ax.set_xticks(range(len(found)), [m.replace(" ", "\n") for m in found])
    if len(found) > 6:
        ax.tick_params("x", rotation=30)
    ax.set_xlim(-0.5, len(found) - 0.3)
    ax.set_ylabel(METRICS[metric][0])
    ax.set_ylim(bottom=0)
    return fig


@mpl.rc_context(STYLE)
def gain_figure(rows: Sequence[Row], study: str = "strength") -> Figure:
    """Draw mAP over a study's values, and beside it the paired gain over the baseline.

    Bars are 95 % intervals over seeds.
    """
    methods = methods_in(rows)
    fig = Figure(figsize=(7, 3.6), layout="constrained")
    left, right = fig.subplots(1, 2)
    values = _values_of(rows)
    step = 0.02 * (values[-1] - values[0])  # side by side, not one upon another
    for i, method in enumerate(methods):
        shift = (i - (len(methods) - 1) / 2) * step
        for ax in (left, right):
            points = []
            for value in values:
                here = select(rows, value=value)
                own, base = by_seed(here, method), by_seed(here, "baseline")
                point = paired_difference(own, base if ax is right else {})
                if ax is left and own:
                    point = summarise(own.values())
                if point and (ax is left or method != "baseline"):
                    points.append((value + shift, point))
                    _interval(ax, value + shift, point, **_look(method))
            line = [(x, p.mean) for x, p in points]
            if line:
                color = _look(method)["color"]
                ax.plot(*zip(*line, strict=True), color=color, lw=1)
    for ax in (left, right):
        ax.set_xlabel(STUDIES[study][0])
        ax.set_xticks(values)
    left.set_ylabel("mAP (%)")
    left.set_ylim(bottom=0)
    right.set_ylabel("gain over baseline (points)")
    right.axhline(0, color=GREY, lw=1, ls="--")
    _legend(fig, methods)
    return fig


@mpl.rc_context(STYLE)
def convergence_figure(rows: Sequence[Row]) -> Figure:
    """Draw mAP, ARI and cameras per cluster over the epochs, 95 % bands over seeds."""
    methods = methods_in(rows)
    fig = Figure(figsize=(7, 3.4), layout="constrained")
    for ax, metric in zip(fig.subplots(1, len(_CURVES)), _CURVES, strict=True):
        for method in methods:
            curve = convergence(rows, method, metric)
            x = list(curve)
            look = _look(method)
            ax.plot(x, [s.mean for s in curve.values()], markersize=4, **look)
            low, high = ([getattr(s, k) for s in curve.values()] for k in _ENDS)
            ax.fill_between(x, low, high, color=look["color"], alpha=0.2, lw=0)
        ax.set_title(METRICS[metric][0])
        ax.set_xlabel("epoch")
        ax.set_ylim(bottom=0)
        ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    _legend(fig, methods)
    return fig


_ENDS = ("low", "high")


@mpl.rc_context(STYLE)
def sensitivity_figure(studies: Mapping[str, Sequence[Row]]) -> Figure:
    """Draw mAP over the values of each setting: dots for seeds, a line for the mean.

    A dotted line marks the value that is used everywhere else.
    """
    columns = min(3, len(studies))
    lines = -(-len(studies) // columns)
    fig = Figure(figsize=(7, 2.5 * lines + 0.2), layout="constrained")
    axes = fig.subplots(lines, columns, squeeze=False, sharey=True).flatten()
    for ax, (study, rows) in zip(axes, studies.items(), strict=False):
        for method in methods_in(rows):
            look = _look(method)
            means = []
            for value in _values_of(rows):
                found = by_seed(select(rows, value=value), method)
                ax.plot([value] * len(found), list(found.values()), ls="", **look)
                if found:
                    means.append((value, summarise(found.values()).mean))
            if means:
                ax.plot(*zip(*means, strict=True), color=look["color"], lw=1)
        label, logarithmic = STUDIES[study]
        if logarithmic:
            ax.set_xscale("log")
        values = _values_of(rows)
        ax.set_xticks(values, [f"{v:g}" for v in values], minor=False)
        ax.minorticks_off()
        ax.axvline(default_value(study), color=GREY, lw=1, ls=":")
        ax.set_xlabel(label)
    axes[0].set_ylim(0, 1.05 * axes[0].get_ylim()[1])  # of all, when all is drawn
    for ax in axes[::columns]:
        ax.set_ylabel("mAP (%)")
    for ax in axes[len(studies) :]:
        ax.remove()
    return fig


@mpl.rc_context(STYLE)
def cost_figure(rows: Sequence[Row]) -> Figure:
    """Draw the seconds of each stage as stacked bars, one a method."""
    table = cost_table(rows)
    stages = [n for n in table.header[2:] if n not in ("cpu (s)", "total (s)")]
    fig = Figure(figsize=(7, 0.45 * len(table.rows) + 1.7), layout="constrained")
    ax = fig.subplots()
    left = np.zeros(len(table.rows))
    for i, stage in enumerate(stages):
        column = list(table.header).index(stage)
        width = np.array([row[column] or 0 for row in table.rows], float)
        hatch = ("", "//", "..", "xx", "\\\\", "--")[i % 6]
        bars = ax.barh(
            range(len(width)),
            width,
            left=left,
            color=PALETTE[i % len(PALETTE)],
            edgecolor="white",
            hatch=hatch,
        )
        bars.set_label(stage.removesuffix(" (s)"))
        left += width
    ax.set_yticks(range(len(table.rows)), [str(row[0]) for row in table.rows])
    ax.invert_yaxis()
    ax.set_xlabel("seconds of a run, medians over seeds")
    fig.legend(loc="outside lower center", ncols=4)
    return fig


def _legend(fig: Figure, methods: Iterable[str]) -> None:
    marks = [mpl.lines.Line2D([], [], label=m, **_look(m)) for m in methods]
    fig.legend(handles=marks, loc="outside lower center", ncols=4)


# ------------------------------------------------------------------------------ writing


def write_tables(records_folder: Path, output: Path) -> list[Path]:
    """Write all tables (Markdown, CSV) and figures (SVG, PNG) that the records allow.

    ``index.md`` shows them all.

    Parameters
    ----------
    records_folder : Path
        Holds the records, as `o2cap reproduce` writes them.
    output : Path
        The folder to write to; it is made.

    Returns
    -------
    list of Path
        What was written, the index first.

    Raises
    ------
    InputError
        When the folder holds no record, or a damaged one.
    """
    records = read_results(records_folder)
    if not records:
        raise InputError(
            f"{records_folder} holds no record of results: run o2cap reproduce first."
        )
    tables: list[Table] = []
    figures: dict[str, Figure] = {}
    for record in records:
        for dataset in sorted({r["dataset"] for r in record.rows}):
            rows = select(record.rows, dataset=dataset, study=None)
            if rows:
                end = f"{record.target}-{dataset}"
                tables.append(ablation_table(rows, end))
                tables.append(paired_table(rows, f"{end}-paired"))
                figures[end] = ablation_figure(rows)
                if any(r.get("history") for r in rows):
                    tables.append(convergence_table(rows, f"{end}-convergence"))
                    figures[f"{end}-convergence"] = convergence_figure(rows)
                if any(r.get("seconds") for r in rows):
                    tables.append(cost_table(rows, f"{end}-cost"))
                    figures[f"{end}-cost"] = cost_figure(rows)
    everything = [r for record in records for r in record.rows]
    present = {r.get("study") for r in everything}
    studies = {s: with_defaults(everything, s) for s in STUDIES if s in present}
    for study in ("strength", "cameras"):
        if rows := studies.pop(study, []):
            tables.append(gain_table(rows, study))
            figures[study] = gain_figure(rows, study)
    if studies:
        tables.append(sensitivity_table(studies))
        figures["sensitivity"] = sensitivity_figure(studies)
    if "data_seed" in present:
        tables.append(seeds_table(with_defaults(everything, "data_seed")))
    tables += [published_table(everything), failures_table(records)]

    written: dict[str, bytes] = {}
    index = ["# Tables and figures", "", "Made from:", ""]
    for record in records:
        device, commit = (record.facts.get(k) for k in ("device", "commit"))
        index.append(f"- {record.target}: {record.what} (device {device}, {commit})")
    for table in tables:
        written[f"{table.name}.md"] = table.markdown().encode()
        written[f"{table.name}.csv"] = table.csv().encode()
        index += ["", f"## {table.caption}", ""]
        if table.name.endswith("-convergence"):  # a line an epoch: too long here
            index.append(f"[{table.name}.csv]({table.name}.csv)")
        else:
            index.append(table.markdown().rstrip())
        if figure := figures.pop(table.name, None):
            index += ["", f"![{table.caption}]({table.name}.svg)"]
            written |= _images(table.name, figure)
    for name, figure in figures.items():
        index += ["", f"![{name}]({name}.svg)"]
        written |= _images(name, figure)
    written = {"index.md": ("\n".join(index) + "\n").encode()} | written
    for name, content in written.items():
        with replacing(output / name) as path:
            path.write_bytes(content)
    return [output / name for name in written]


def _images(name: str, figure: Figure) -> dict[str, bytes]:
    svg = io.BytesIO()
    with mpl.rc_context({**STYLE, "svg.hashsalt": "o2cap"}):  # the same file each time
        figure.savefig(svg, format="svg", metadata={"Date": None})
    return {f"{name}.svg": svg.getvalue(), f"{name}.png": figure.png()}
