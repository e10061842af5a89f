"""Rewrite the configuration hashes of the committed records for version 0.2.0.

``python reproduce/rehash.py``. A record names the settings of each row by their hash,
and 0.2.0 has other names for some. The script takes a row's settings from the grid,
writes them as 0.1.0 did, and refuses the record unless their hash is the row's: then
nothing but the names has changed, and the new settings are off. It has run; a second
time it changes nothing. The rows of ``tuning.json`` come from older commits, which they
name, and keep their hashes: nothing looks them up.
"""

import hashlib
import json
import re

from o2cap.config import Config, preset
from o2cap_book.batch import GRID, RECORDS, read_grid

KEY = ("dataset", "method", "seed", "data_seed", "study", "value")
NEW = {
    "clustering": "distance k1_intra k1_inter k2_intra k2_inter standardise "
    "drop_single_camera",
    "loss": "camera_entropy spare_online_positives",
    "optim": "method",
}
NO_INFLUENCE = ("preset", "output", "device", "workers", "threads", "evaluate_every")
NO_INFLUENCE += ("cuda_graphs", "timeout")  # not there in 0.1.0


def old_hash(config: Config) -> str:
    """Return the hash that version 0.1.0 gave to the same settings."""
    plain = {k: v for k, v in config.to_dict().items() if k not in NO_INFLUENCE}
    usual = Config().to_dict()
    for group, names in NEW.items():
        for name in names.split():
            if plain[group].pop(name) != usual[group][name]:
                raise SystemExit(f"{group}.{name} is no setting of version 0.1.0")
    plain["model"] = {"pooling": plain.pop("pooling"), "last_stride": 1}
    plain["clustering"]["search"] = "torch"
    text = json.dumps(plain, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def ward(method: str, seed: int) -> Config:
    """Return the settings of a row of ward.json, whose command stands in it."""
    return preset(
        "own",
        **{"method": method, "seed": seed, "backbone": "mobilenet_v2"},
        **{"weights": "mobilenet_v2_imagenet.safetensors", "height": 128, "width": 64},
        **{"epochs": 20, "iterations": 50},
    )


def rehash(target: str) -> None:
    """Rewrite one record."""
    path = RECORDS / f"{target}.json"
    text = path.read_text("utf-8")
    rows = json.loads(text)["rows"]
    if target == "ward":
        configs = [ward(row["method"], row["seed"]) for row in rows]
    else:
        jobs = {tuple(job.key.values()): job.config for job in read_grid(GRID, target)}
        configs = [jobs[tuple(row[name] for name in KEY)] for row in rows]
    new: dict[str, str] = {}
    for row, config in zip(rows, configs, strict=True):
        if row["config_hash"] not in (old_hash(config), config.hash()):
            told = [row[name] for name in KEY]
            raise SystemExit(f"{path.name}, {told}: other settings than the grid's")
        new[row["config_hash"]] = config.hash()
    text, n = re.subn(
        r'(?<="config_hash": ")\w{8}(?=")', lambda found: new[found[0]], text
    )
    path.write_text(text, "utf-8")
    changed = sum(row["config_hash"] != new[row["config_hash"]] for row in rows)
    print(
        f"{path.name}: {n} rows, all of the grid's settings; {changed} hashes changed"
    )


if __name__ == "__main__":
    for target in ("ablation", "vehicles", "studies", "check", "ward"):
        rehash(target)
