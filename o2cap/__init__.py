"""Camera-aware unsupervised re-identification: the package behind the O2CAP Book."""

import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from o2cap.files import cache_folder

# Waiting OpenMP threads that spin take the core from a busy neighbour (a second run,
# a notebook): measured 2x slower steps. Must be set before torch loads its runtime.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# numba keeps compiled kernels beside the code, or else in the user's home.
if not os.access(Path(__file__).parent, os.W_OK):
    os.environ.setdefault("NUMBA_CACHE_DIR", str(cache_folder() / "numba"))

try:
    __version__ = version("o2cap")
except PackageNotFoundError:  # a checkout that was not installed
    __version__ = "unknown"
