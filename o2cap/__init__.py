"""Camera-aware unsupervised re-identification: the package behind the O2CAP Book."""

import os
from importlib.metadata import version

# Waiting OpenMP threads that spin take the core from a busy neighbour (a second run,
# a notebook): measured 2x slower steps. Must be set before torch loads its runtime.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = version("o2cap")
