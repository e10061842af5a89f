"""What the chapters of the book share: their settings, and runs trained only once."""

from __future__ import annotations

import logging
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import matplotlib as mpl
import matplotlib_inline.backend_inline

from o2cap.config import PRESETS, Config, Method, preset
from o2cap.data import load_configured
from o2cap.data.images import ReIDDataset
from o2cap.errors import InputError, unknown
from o2cap.run import RunResult
from o2cap.trainer import train
from o2cap_book.figures import STYLE

Profile = Literal["smoke", "cpu", "gpu"]


@dataclass(frozen=True)
class Chapter:
    """A chapter at work: its settings, and where it writes.

    Parameters
    ----------
    profile : "smoke", "cpu" or "gpu"
        Does it run?, minutes on a laptop, or full length.
    config : Config
        The settings of the profile and the data set, for the method ``both``.
    output : Path
        The chapter's own folder. Runs lie beside it, named after their settings, and
        are found there by other chapters.
    """

    profile: Profile
    config: Config
    output: Path

    def data(self) -> ReIDDataset:
        """Return the pictures."""
        return load_configured(self.config)

    def train(self, method: Method = "both", **changes: Any) -> RunResult:
        """Return a run of `method`, trained now unless it lies there finished.

        Parameters
        ----------
        method : str
            As in :class:`o2cap.config.Config`.
        changes
            Other fields of the settings, by name.
        """
        new = replace(self.config, method=method, **changes)
        return train(replace(new, output=self.output.parent / new.directory().name))


def begin(
    profile: str, dataset: str, root: str, seed: int, output: str | Path
) -> Chapter:
    """Turn a chapter's parameters into settings; figures become SVG, logs are shown.

    Parameters
    ----------
    profile : str
        ``smoke``, ``cpu`` or ``gpu``. With ``cpu``, rendered pictures are trained on
        for 10 epochs, in bf16 where the processor has it, and a real data set in small
        pictures, to see that it works.
    dataset, root : str
        As in :class:`o2cap.config.Config`; an empty root for rendered pictures.
    seed : int
        Of everything random, rendered pictures included.
    output : str or Path
        The folder that the chapter may write to; it is made.

    Raises
    ------
    InputError
        For a profile or data set that is none.
    """
    if profile not in get_args(Profile):
        raise InputError(unknown("The profile", profile, get_args(Profile)))
    if profile == "smoke":
        config = preset("smoke", dataset=dataset, epochs=2, iterations=5)
    elif dataset in PRESETS:
        config = preset(dataset)
        if profile == "cpu" and not root:
            # Half of what the records of people take, and bf16 where it is fast.
            config = replace(config, epochs=10, precision="auto")
    else:
        config = preset("own", dataset=dataset)
    if profile == "cpu" and root:  # a part of what a GPU would do
        config = replace(
            config,
            backbone="resnet18",
            height=128,
            width=64,
            epochs=10,
            iterations=50,
        )
    config = replace(config, root=Path(root) if root else None, seed=int(seed))
    Path(output).mkdir(parents=True, exist_ok=True)
    matplotlib_inline.backend_inline.set_matplotlib_formats("svg")
    mpl.rcParams.update(STYLE | {"text.parse_math": True})
    logging.basicConfig(format="%(message)s", stream=sys.stdout, force=True)
    logging.getLogger("o2cap").setLevel(logging.INFO)
    # UMAP asks for progress bars that nobody needs here.
    warnings.filterwarnings("ignore", message="IProgress not found")
    return Chapter(profile, config, Path(output))  # type: ignore[arg-type]
