"""Let the package be imported where tyro and pydantic are not: import this first.

A GPU may stand in a machine with PyTorch and little else. pydantic checks settings,
and a benchmark's are right; tyro reads command lines, and a benchmark reads its own.
"""

import dataclasses
import sys
from importlib.util import find_spec
from types import ModuleType
from unittest.mock import MagicMock

for missing in ("pydantic", "tyro"):
    if find_spec(missing) is None:
        sys.modules[missing] = MagicMock()

if isinstance(sys.modules.get("pydantic"), MagicMock):

    def dataclass(config=None, **how):
        """Make a plain dataclass."""
        return dataclasses.dataclass(**how)

    plain = ModuleType("pydantic.dataclasses")
    plain.dataclass = dataclass
    sys.modules[plain.__name__] = plain
