"""Results of many runs: statistics over seeds, tables, figures.

A record is a JSON file that `o2cap reproduce` writes: what was run, where, and a row
for every finished job. Here it is a pandas frame with a line for each run. All numbers
of tables and figures come from such frames; a table is a frame, too, whose cells are
numbers or a :class:`Summary`.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from pandas import DataFrame, Series
from scipy import stats

from o2cap.config import preset
from o2cap.errors import InputError
from o2cap.files import replacing
from o2cap_book.figures import (
    BLUE,
    GREY,
    GREYS,
    METHODS,
    METRICS,
    STYLE,
    VERMILLION,
    Figure,
    curves,
    legend,
    look,
    panels,
    stack,
)

BEFORE = "before training"  # the warm start, or the pretrained weights
SEEDS = ["data_seed", "seed"]
RUN = ["dataset", "method", *SEEDS, "study", "value"]  # tells the lines apart

PUBLISHED = pd.read_csv(Path(__file__).with_name("published.csv"), comment="#")

# ------------------------------------------------------------------------------ reading


def read_record(path: Path) -> DataFrame:
    """Read a record as a frame with a line for each run.

    Returns
    -------
    DataFrame
        ``dataset``, ``method``, ``data_seed`` and ``seed`` of each run; ``study`` and
        ``value`` where one setting was varied, else ``""`` and NaN; each metric of
        ``METRICS`` after training, under its name and in its unit (percent for
        shares), and before it as ``before.mAP`` and so on; NaN for what was not
        measured. ``history`` holds the records of the epochs. All else in a row stands
        under its path, such as ``seconds.train``. What is said of the whole record
        (``target``, ``what``, ``failures``, ``device``, …) is in the frame's ``attrs``.

    Raises
    ------
    InputError
        When the file is missing or damaged, a row does not say of what run it is, or
        two rows are of the same run, which would count its seed twice.
    """
    about = _load(path)
    try:
        frame = pd.json_normalize(about.pop("rows"))
        frame = frame.rename(columns=lambda c: re.sub(r"^(metrics|clusters)\.", "", c))
        needed = [*RUN, *METRICS, *(f"before.{m}" for m in METRICS), "history"]
        frame = frame.reindex(columns=frame.columns.union(needed, sort=False))
        for name, metric in METRICS.items():
            for when in (name, f"before.{name}"):
                frame[when] = metric.factor * frame[when].astype(float)
        if frame[["dataset", "method", "seed"]].isna().any(axis=None):
            raise ValueError("a row lacks its dataset, method or seed")
    except (KeyError, TypeError, ValueError, NotImplementedError) as error:
        raise InputError(f"{path} is no record of results ({error!r}).") from error
    frame["data_seed"] = frame["data_seed"].fillna(frame["seed"]).astype(int)
    frame["study"] = frame["study"].astype(object).fillna("")
    again = frame.duplicated(RUN)
    if again.any():
        raise InputError(
            f"{path}, row {again.idxmax() + 1} is of the same run as one above it: "
            "remove one of them."
        )
    frame.attrs = {"target": path.stem, "failures": [], "device": None, "commit": None}
    frame.attrs |= about
    return frame


def read_results(folder: Path) -> list[DataFrame]:
    """Read the records in a folder that hold results of the methods.

    Those are the files that name a ``target``; left out is what serves only to check
    the code, or to choose the settings (targets ``check`` and ``tuning``).
    """
    named = {p: _load(p).get("target") for p in sorted(folder.glob("*.json"))}
    return [read_record(p) for p, t in named.items() if t not in OTHERS]


OTHERS = (None, "check", "tuning")


def _load(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} is missing or damaged ({error}).") from error


def every_difference(folder: Path) -> DataFrame:
    """Return `both` − `online` of all pairs of runs that the records of a folder hold.

    The runs of a pair differ in nothing but the losses: `both+ca` meets `online+ca`.
    Those of the tuning are among them, and those with true identities as clusters, some
    broken on purpose.

    Returns
    -------
    DataFrame
        ``source`` (in words), ``dataset``, ``seed``; ``difference`` in points of mAP;
        ``cameras`` per cluster of the `online` run at its end, NaN if not measured.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        record, rows = _load(path), []
        if path.stem == "tuning":
            for run in record["tried"]:
                given = {k.rpartition(".")[2]: v for k, v in run["changes"].items()}
                named = [f"{w} {given[k]:g}" for k, w in SHORT.items() if k in given]
                same = f"{run['start']} {sorted(given.items())}"
                kind = ["vehicles"] * (run["dataset"] == "synthetic-vehicles")
                source = ", ".join(["tuning", *kind, *named])
                rows.append(run | {"same": same, "source": source})
        elif path.stem == "association":
            for run in record["rows"]:
                if run["part"] == "fragments":
                    source = f"true people, {100 * run['cut']:.0f} % cut"
                    merged = f", {100 * run['merge']:.0f} % merged"
                    source += merged * (run["merge"] > 0)
                    metrics = {"mAP": run["mAP"]}
                    rows.append(run | {"metrics": metrics, "source": source})
        elif path.stem in ("ablation", "studies", "vehicles", "ward", "ward_beyond"):
            for run in record["rows"]:
                study = f", {run['study']} {run['value']}" if run.get("study") else ""
                source = SOURCES.get(path.stem, path.stem)
                rows.append(run | {"source": f"{source}{study}"})
        if rows:
            found.append(pd.json_normalize(rows))
    runs = pd.concat(found)
    runs["dataset"] = runs["dataset"].fillna("synthetic")
    runs = runs.reindex(columns=runs.columns.union(["same", "data_seed"]))
    loss, plus, more = runs.method.str.partition("+").T.to_numpy()
    runs["source"] += np.where(plus == "+", ", +" + more, "")
    on = ["source", "dataset", "seed", "data_seed", "same"]
    both, online = (runs[loss == m] for m in ("both", "online"))
    pairs = both.merge(online, on=on, suffixes=("", " online"))
    gain = 100 * (pairs["metrics.mAP"] - pairs["metrics.mAP online"])
    cameras = pairs["clusters.cameras_per_cluster online"]
    return pairs[on[:3]].assign(difference=gain, cameras=cameras)


SOURCES = {"ward": "WARD, two cuts", "ward_beyond": "WARD, one late cut"}
SHORT = {"momentum": "μ", "k1": "k1", "eps": "ε", "epochs": "epochs"}


def with_defaults(rows: DataFrame, study: str) -> DataFrame:
    """Return the lines of a study, those of the default value among them.

    The study itself runs the other values; at the default it is the ablation, of
    which the lines of the same data set, methods and seeds are taken.
    """
    own = rows[rows.study == study]
    which = ["dataset", "method", "seed"]
    usual = rows[rows.study == ""].merge(own[which].drop_duplicates())
    default = default_value(study)
    usual["study"] = study
    usual["value"] = usual.data_seed if default is None else default
    return pd.concat([own, usual]).drop_duplicates([*which, "value"])


def default_value(study: str) -> float | None:
    """Return the value that a study's setting has in the embedded preset.

    None for ``data_seed``, which is then the seed of the training.
    """
    config = preset("synthetic")
    parts = (config.synthetic, config.clustering, config.loss)
    return next((getattr(p, study) for p in parts if hasattr(p, study)), None)


def methods_in(rows: DataFrame) -> list[str]:
    """Return the methods of the lines, in the order of tables and figures.

    One with additions, such as ``both+std``, stands behind the one without.
    """
    order = [BEFORE, *METHODS]

    def place(method: str) -> tuple[int, str]:
        base = method.partition("+")[0]
        return order.index(base) if base in order else len(order), method

    return sorted(set(rows.method), key=place)


def by_seed(rows: DataFrame, metric: str = "mAP") -> DataFrame:
    """Return a metric of each run: a column for each method, a line for each seed.

    Parameters
    ----------
    rows : DataFrame
        Of one data set, and of one study or none.
    metric : str
        A name in ``METRICS``.

    Raises
    ------
    ValueError
        When two runs of a method have the same place.
    """
    wide = rows.pivot(index=SEEDS, columns="method", values=metric)
    return wide[methods_in(rows)].dropna(axis=1, how="all")


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
    above: int

    def student(self) -> tuple[float, float]:
        """Return Student's 95 % interval of the mean; NaN for fewer than two values.

        It allows for few values, where the bootstrap's interval is too short.
        """
        if self.n < 2:
            return np.nan, np.nan
        half = stats.t.ppf(0.975, self.n - 1) * self.sd / self.n**0.5
        return self.mean - half, self.mean + half

    def side(self) -> int:
        """Return 1 or −1 where Student's interval lies above or below zero, else 0."""
        low, high = self.student()
        return int(low > 0) - int(high < 0)

    def text(self, digits: int = 1) -> str:
        """Return the numbers as a cell of a table."""
        if self.n == 1:
            return f"{self.mean:.{digits}f} (1 seed)"
        return (
            f"{self.mean:.{digits}f} ± {self.sd:.{digits}f} "
            f"({self.low:.{digits}f} to {self.high:.{digits}f})"
        )


def bootstrap_interval(
    values: Iterable[float], resamples: int = 10_000
) -> tuple[float, float]:
    """Interval of the mean: percentiles of the means of resampled values.

    Few values give too short an interval, since a resample never leaves their range:
    with three it *is* the range, with five it holds the true mean in about 84 % of
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
    rng = np.random.default_rng(0)
    low, high = stats.bootstrap(
        (v,), np.mean, n_resamples=resamples, method="percentile", random_state=rng
    ).confidence_interval
    return float(low), float(high)


def summarise(values: Iterable[float]) -> Summary | None:
    """Return mean, standard deviation (n − 1) and bootstrap interval of the mean.

    NaN counts as not measured; None where nothing was.
    """
    v = Series(list(values), dtype=float).dropna()
    if v.empty:
        return None
    interval = bootstrap_interval(v)
    return Summary(len(v), v.mean(), v.std(), *interval, int((v > 0).sum()))


def paired_difference(a: Series, b: Series) -> Summary | None:
    """Summarise a − b over the seeds that both have; None where there is no such.

    The two of a seed saw the same pictures, so what makes a data set easy or hard
    drops out of the difference.

    Parameters
    ----------
    a, b : Series
        By seed, such as two columns of :func:`by_seed`.

    Book: :eq:`paired_difference`
    """
    return summarise(a - b)


def in_words(a: str, b: str, difference: Summary | None) -> str:
    """Say what a paired difference a − b in points of mAP allows to be said."""
    if difference is None:
        return f"{a} and {b} were not run on the same seeds."
    d = difference
    side = "above" if d.mean > 0 else "below"
    points = f"{a} is {abs(d.mean):.1f} points of mAP {side} {b}"
    if d.n == 1:
        return f"On the one seed that was run, {points}; one seed allows no conclusion."
    low, high = d.student()
    interval = f"{low:+.1f} to {high:+.1f} at 95 %"
    numbers = f"({interval}; {a} is the higher in {d.above} of {d.n} seeds)"
    if d.side():
        return f"{points} {numbers}."
    return f"On average {points}, which the seeds do not settle {numbers}."


# ------------------------------------------------------------------------------- tables

LABELS = {name: metric.label for name, metric in METRICS.items()}
PAIRS = (
    *(("offline", "baseline"), ("online", "baseline"), ("both", "baseline")),
    *(("online", "offline"), ("both", "offline"), ("both", "online")),
    *(("intra", "baseline"), ("offline", "intra"), ("both", "intra")),
    *(("both+ca", "both"), ("both+std", "both"), ("both+std", "both+ca")),
    ("supervised", "both"),
)
EPOCHS = ["mAP", "ari", "cameras_per_cluster"]  # over the epochs


def markdown(table: DataFrame) -> str:
    """Return a table in Markdown; a summary becomes mean ± s.d. (interval)."""
    digits = {metric.label: metric.digits for metric in METRICS.values()}

    def text(cell: Any, column: str) -> str:
        if isinstance(cell, Summary):
            return cell.text(digits.get(column, 1))
        if pd.isna(cell):
            return ""
        if isinstance(cell, float):
            unit = column.endswith(("(%)", "(points)", "(s)"))
            return f"{cell:.1f}" if unit else f"{cell:g}"
        return str(cell)

    lines: list[Iterable[str]] = [table.columns, ["---"] * len(table.columns)]
    for row in table.itertuples(index=False):
        lines.append(map(text, row, table.columns))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def csv(table: DataFrame) -> str:
    """Return a table as CSV, the parts of a summary in columns of their own."""
    parts = []
    for name, column in table.items():
        found = spread(column)
        parts.append(found.add_prefix(f"{name} ") if found["n"].any() else column)
    return pd.concat(parts, axis=1).to_csv(index=False, lineterminator="\n")


def spread(cells: Series) -> DataFrame:
    """Return the parts of summaries: n, mean, sd, low, high; NaN for None."""
    parts = [asdict(cell) if isinstance(cell, Summary) else {} for cell in cells]
    columns = ["n", "mean", "sd", "low", "high"]
    return DataFrame(parts, cells.index, columns).astype({"n": "Int64"})


def with_start(rows: DataFrame) -> DataFrame:
    """Add lines of a method `BEFORE`: the weights that ``both`` set out from."""
    start = rows[rows.method == "both"].copy()
    start["method"] = BEFORE
    start[list(METRICS)] = start[[f"before.{m}" for m in METRICS]]
    return pd.concat([start, rows])


def ablation_table(rows: DataFrame) -> DataFrame:
    """Every metric of every method: the paper's ablation, over seeds."""
    rows = with_start(rows)
    runs = rows.groupby("method")[list(METRICS)]
    table = runs.agg(summarise).dropna(axis=1, how="all")
    table.insert(0, "seeds", runs.count().max(axis=1))
    table = table.loc[methods_in(rows)]
    return table[table.seeds > 0].rename(columns=LABELS).reset_index()


def paired_table(rows: DataFrame) -> DataFrame:
    """Differences of mAP between methods, paired by seed.

    Beside the bootstrap's interval stands Student's; a difference is *settled* when
    that leaves out zero.
    """
    runs = by_seed(rows)
    lines = []
    for a, b in PAIRS:
        if {a, b} <= {*runs} and (d := paired_difference(runs[a], runs[b])):
            student = "{:+.1f} to {:+.1f}".format(*d.student()) if d.n > 1 else ""
            settled = {1: "above", -1: "below", 0: "no"}[d.side()]
            lines.append([f"{a} − {b}", d, student, f"{d.above} of {d.n}", settled])
    header = ["difference", "mAP (points)", "Student's 95 %"]
    return DataFrame(lines, columns=[*header, "seeds above 0", "settled"])


def gain_table(rows: DataFrame, study: str) -> DataFrame:
    """A study over methods: mAP of each, and the paired gain over the baseline.

    Parameters
    ----------
    rows : DataFrame
        Of the study, as from :func:`with_defaults`.
    study : str
        Such as ``strength``.
    """
    runs = rows.pivot(index=["value", *SEEDS], columns="method", values="mAP")
    runs = runs[methods_in(rows)]
    others = runs.drop(columns="baseline", errors="ignore")
    gains = others.sub(runs.get("baseline", np.nan), axis=0)
    columns = [runs.add_suffix(GAINS[0]), gains.add_suffix(GAINS[1])]
    table = pd.concat(columns, axis=1).groupby("value").agg(summarise)
    return table.rename_axis(study).reset_index()


GAINS = (", mAP (%)", " − baseline (points)")
AXES = {"strength": "camera gap (1: the book's)"}


def convergence_table(rows: DataFrame) -> DataFrame:
    """mAP, ARI and cameras per cluster after each epoch."""
    each = rows[["method", "history"]].explode("history").dropna()
    epochs = DataFrame(each["history"].tolist(), columns=["epoch", *EPOCHS])
    epochs[EPOCHS] = epochs[EPOCHS].astype(float)
    epochs["mAP"] *= METRICS["mAP"].factor
    table = epochs.groupby([each["method"].array, "epoch"])[EPOCHS].agg(summarise)
    table = table.rename_axis(["method", "epoch"]).dropna(how="all")
    return table.loc[methods_in(each)].rename(columns=LABELS).reset_index()


def cost_table(rows: DataFrame) -> DataFrame:
    """Seconds of each stage of a run, medians over seeds."""
    seconds = rows.filter(regex=r"^seconds\.").dropna(axis=1, how="all")
    runs = seconds.astype(float).groupby(rows["method"])
    table = runs.median().rename(columns=lambda c: f"{c.removeprefix('seconds.')} (s)")
    table.insert(0, "runs", runs.count().max(axis=1))
    table = table.loc[methods_in(rows)]
    return table[table.runs > 0].reset_index()


def published_table(rows: DataFrame) -> DataFrame:
    """Published numbers beside ours; what was not run stays empty."""
    which = ["dataset", "method"]
    ours = rows[(rows.study == "") & rows.dataset.isin(PUBLISHED["dataset"])]
    ours = ours.groupby(which)[["mAP", "rank1"]].agg(summarise).reset_index()
    names = [*PUBLISHED["dataset"].unique(), "CAP", *METHODS, *ours["method"]]
    table = PUBLISHED.merge(ours, "outer", which)
    table = table.sort_values(which, key=lambda column: column.map(names.index))
    ours_too = {"mAP": "ours, mAP (%)", "rank1": "ours, rank-1 (%)"}
    return table.rename(columns={"dataset": "data set"} | ours_too)


def failures_table(records: Iterable[DataFrame]) -> DataFrame:
    """Every job that failed; and per record how many did."""
    lines = []
    for record in records:
        target, failures = record.attrs["target"], record.attrs["failures"]
        counted = f"{len(failures)} of {len(record) + len(failures)} failed"
        lines.append([target, counted, None])
        for failure in failures:
            error = " ".join(str(failure.get("error", "")).split())[:200]
            lines.append([target, failure.get("job", "?"), error])
    return DataFrame(lines, columns=["record", "job", "error"])


# ------------------------------------------------------------------------------ figures


def intervals(ax: Axes, x: Any, cells: Series, **style: Any) -> None:
    """Draw means and their 95 % intervals."""
    found = spread(cells)
    error = np.array([found["mean"] - found.low, found.high - found["mean"]])
    style = {"capsize": 4, "elinewidth": 1.5} | style
    ax.errorbar(x, found["mean"], error.clip(0), **style)


@mpl.rc_context(STYLE)
def ablation_figure(rows: DataFrame) -> Figure:
    """Draw each method's mAP: a dot a run, a thin line through those of one seed.

    Beside the dots stand the mean and its 95 % interval.
    """
    runs = by_seed(with_start(rows))
    place = np.arange(len(runs.columns))
    fig, (ax,) = panels(1, columns=1, size=(7, 3.5))
    for _, run in runs.iterrows():
        there = run.notna()
        ax.plot(place[there], run[there], color=GREYS[2], lw=0.8, zorder=1)
    for x, (method, values) in enumerate(runs.items()):
        style = look(method.partition("+")[0])  # additions look like the method
        ax.plot([x] * len(values), values, ls="", alpha=0.7, **style)
    style = {"color": "black", "marker": "_", "ls": ""}
    intervals(ax, place + 0.25, runs.apply(summarise), **style)
    ax.set_xticks(place, [m.replace(" ", "\n") for m in runs])
    ax.tick_params("x", rotation=30 if len(place) > 6 else 0)
    ax.set(xlim=(-0.5, len(place) - 0.3), ylim=(0, None), ylabel="mAP (%)")
    return fig


@mpl.rc_context(STYLE)
def gain_figure(rows: DataFrame, study: str = "strength") -> Figure:
    """Draw mAP over a study's values, and beside it the paired gain over the baseline.

    Bars are 95 % intervals over seeds.
    """
    table, methods = gain_table(rows, study), methods_in(rows)
    values = table[study]
    step = 0.02 * (values.max() - values.min())  # side by side, not one upon another
    fig, axes = panels(2, columns=2, size=(3.5, 3.3))
    for ax, what in zip(axes, GAINS, strict=True):
        for i, method in enumerate(methods):
            if method + what in table:
                known = table.dropna(subset=[method + what])
                x = known[study] + (i - (len(methods) - 1) / 2) * step
                intervals(ax, x, known[method + what], lw=1, **look(method))
        ax.set(xlabel=AXES.get(study, study), xticks=values)
    axes[0].set(ylabel="mAP (%)", ylim=(0, None))
    axes[1].set_ylabel("gain over baseline (points)")
    axes[1].axhline(0, color=GREY, lw=1, ls="--")
    legend(fig, methods)
    return fig


@mpl.rc_context(STYLE)
def convergence_figure(rows: DataFrame) -> Figure:
    """Draw mAP, ARI and cameras per cluster over the epochs, 95 % bands over seeds."""
    table = convergence_table(rows).set_index(["method", "epoch"])
    mean, *ends = (
        DataFrame({label: spread(cells)[part] for label, cells in table.items()})
        for part in ("mean", "low", "high")
    )
    return curves(mean, size=(7 / 3, 3.1), ends=ends)


@mpl.rc_context(STYLE)
def cost_figure(rows: DataFrame) -> Figure:
    """Draw the seconds of each stage as stacked bars, one a method."""
    table = cost_table(rows).set_index("method")
    table = table.drop(columns=["runs", "cpu (s)", "total (s)"], errors="ignore")
    table = table.fillna(0).rename(columns=lambda stage: stage.removesuffix(" (s)"))
    fig, (ax,) = panels(1, columns=1, size=(7, 0.45 * len(table) + 1.4))
    stack(ax.barh, table)
    ax.invert_yaxis()
    ax.set_xlabel("seconds of a run, medians over seeds")
    fig.legend(loc="outside lower center", ncols=4)
    return fig


@mpl.rc_context(STYLE)
def forest_figure(differences: DataFrame) -> Figure:
    """Draw differences, a line for each ``source``, a dot for each seed.

    From three seeds on, a bar is Student's interval; blue is settled above zero, red
    below. The black stroke is the mean.
    """
    lines = [*differences.groupby("source", sort=False)["difference"]]
    fig, (ax,) = panels(1, columns=1, size=(6.8, 0.33 * len(lines) + 0.9))
    for y, (_, values) in enumerate(lines):
        d = summarise(values)
        assert d is not None
        side = d.side() if d.n > 2 else 0
        colour = {1: BLUE, -1: VERMILLION, 0: GREYS[0]}[side]
        if d.n > 2:
            ax.plot(d.student(), [y, y], color=colour, lw=5, alpha=0.45)
        ax.plot(values, [y] * len(values), "o", color=colour)
        ax.plot(d.mean, y, "|", color="black", ms=12, mew=2)
    ax.axvline(0, color=GREY, ls="--", lw=1)
    ax.set_yticks(range(len(lines)), [source for source, _ in lines])
    ax.set(ylim=(len(lines) - 0.5, -0.5), xlabel="both − online (points of mAP)")
    return fig


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
    index = ["# Tables and figures", "", "Made from:", ""]
    about = "- {target}: {what} (device {device}, {commit})"
    index += [about.format(**record.attrs) for record in records]
    written: dict[str, bytes] = {}
    for name, caption, table, figure in _tables(records):
        written[f"{name}.md"] = markdown(table).encode()
        written[f"{name}.csv"] = csv(table).encode()
        index += ["", f"## {caption}", ""]
        long = name.endswith("-convergence")  # a line an epoch
        index.append(f"[{name}.csv]({name}.csv)" if long else markdown(table).rstrip())
        if figure:
            index += ["", f"![{caption}]({name}.svg)"]
            written[f"{name}.svg"] = _svg(figure)
            written[f"{name}.png"] = figure.png()
    written = {"index.md": ("\n".join(index) + "\n").encode()} | written
    for name, content in written.items():
        with replacing(output / name) as path:
            path.write_bytes(content)
    return [output / name for name in written]


RESULTS: tuple[Any, ...] = (  # end of the name, caption, table, figure
    ("", "mean ± s.d. (95 % interval)", ablation_table, ablation_figure),
    ("-paired", "differences, paired by seed", paired_table, None),
    ("-convergence", "after each epoch", convergence_table, convergence_figure),
    ("-cost", "seconds of a run, medians", cost_table, cost_figure),
)


def _tables(records: list[DataFrame]) -> Iterator[tuple[Any, ...]]:
    """Yield name, caption, table and figure of all that the records allow."""
    for record in records:
        for dataset, rows in record[record.study == ""].groupby("dataset"):
            for end, what, tabulate, draw in RESULTS:
                table, name = tabulate(rows), f"{record.attrs['target']}-{dataset}{end}"
                if len(table):
                    yield name, f"{dataset}: {what}", table, draw and draw(rows)
    everything = pd.concat(records, ignore_index=True)
    for dataset, study in everything.groupby(["dataset", "study"]).groups:
        if study:
            same = everything[everything.dataset == dataset]
            found, name = with_defaults(same, study), f"{study}-{dataset}"
            table, figure = gain_table(found, study), gain_figure(found, study)
            yield name, f"{dataset}: {AXES.get(study, study)}", table, figure
    caption = "Published numbers, and this code's"
    yield "published", caption, published_table(everything), None
    yield "failures", "Jobs that failed", failures_table(records), None


def _svg(figure: Figure) -> bytes:
    svg = io.BytesIO()
    with mpl.rc_context({**STYLE, "svg.hashsalt": "o2cap"}):  # the same file each time
        figure.savefig(svg, format="svg", metadata={"Date": None})
    return svg.getvalue()
