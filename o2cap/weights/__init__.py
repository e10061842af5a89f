"""Weights from files of many origins: read without running code, put in place."""

from __future__ import annotations

import logging
import math
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from o2cap.errors import InputError

logger = logging.getLogger("o2cap")
HEADS = ("fc", "classifier", "head")  # what libraries call a classifier
# Label-free starts of the small network for rendered people and vehicles; card.json
# says how data_scripts/pretrain.py made them.
EMBEDDED = Path(__file__).parent


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a weights file, without running any code in it.

    Parameters
    ----------
    path : Path
        A ``.safetensors`` file, or a state dict that ``torch.save`` wrote (plain, or
        under the key ``state_dict``, ``model``, ``teacher`` or ``student``; a leading
        ``module.`` of DataParallel is removed), or the directory of a finished run.

    Raises
    ------
    InputError
        When the file is missing, damaged, more than a dictionary of tensors, or holds
        NaN or infinity.
    """
    state: Any
    try:
        if path.is_dir():
            path = path / "model.safetensors"
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            # the options that many a training saves beside its weights are mere data
            with torch.serialization.safe_globals([Namespace]):
                state = torch.load(path, map_location="cpu", weights_only=True)
        for key in ("state_dict", "model", "teacher", "student"):
            state = state.get(key, state)
        state = {name.removeprefix("module."): value for name, value in state.items()}
        for name, value in state.items():
            if not value.float().isfinite().all():
                raise ArithmeticError(f"NaN or infinity in {name}")
    except Exception as error:
        # The words of other errors may advise to trust the file.
        ours = isinstance(error, OSError | ArithmeticError)
        reason = error if ours else "damaged, or not of tensors alone"
        raise InputError(
            f"The weights file {path} cannot be used ({reason}); it must be "
            "safetensors, or a state dict as torch.save writes it."
        ) from error
    return state


def fill(network: Any, state: dict[str, Tensor]) -> None:
    """Load weights: all that the network has. The log says what else there is.

    Parameters
    ----------
    network : Module
        Of torchvision, of timm (which translates the layouts of other libraries), or
        a whole :class:`o2cap.backbone.ReIDModel`.
    state : dict
        Tensors by name, as their library saves them; a leading ``backbone.``,
        ``base.`` or ``encoder_q.``, as DINO, Re-ID code and MoCo have it, is removed.

    Raises
    ------
    ValueError
        When something lacks, or a part of the network is larger in the file.
    RuntimeError
        When something has another shape.
    """
    for prefix in ("backbone", "base", "encoder_q"):
        if not hasattr(network, prefix):
            state = {k.removeprefix(f"{prefix}."): v for k, v in state.items()}
    module = sys.modules[type(network).__module__]
    if hasattr(module, "checkpoint_filter_fn"):  # timm's
        n = state["pos_embed"].shape[1] - 1 if "pos_embed" in state else 0
        columns = math.isqrt(n // 2)
        if n and n == 2 * columns**2:  # TransReID's; timm would take it for a square
            from timm.layers import resample_abs_pos_embed

            old, new = [2 * columns, columns], network.patch_embed.grid_size
            state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], new, old)
        state = module.checkpoint_filter_fn(state, network)
    lacks, extra = network.load_state_dict(state, strict=False)
    parts = {name.split(".")[0] for name in network.state_dict()}.difference(HEADS)
    wrong = lacks + [name for name in extra if name.split(".")[0] in parts]
    if wrong:
        raise ValueError(f"{len(wrong)} entries do not fit, for instance {wrong[0]}")
    if extra:
        logger.info("left out of the weights: %s", ", ".join(sorted(extra)))
