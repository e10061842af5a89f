"""Let the package be imported where tyro and pydantic are not: import this first.

A GPU may stand in a machine with PyTorch and little else. pydantic checks settings,
and a benchmark's are right; tyro reads command lines, and a benchmark reads its own.
"""

import dataclasses
import json
import sys
from importlib.util import find_spec
from types import ModuleType
from unittest.mock import MagicMock

for missing in ("pydantic", "annotated_types", "tyro"):
    if find_spec(missing) is None:
        sys.modules[missing] = MagicMock()

if isinstance(sys.modules.get("pydantic"), MagicMock):

    def dataclass(config=None, **how):
        """Make a plain dataclass."""
        return dataclasses.dataclass(**how)

    plain = ModuleType("pydantic.dataclasses")
    plain.dataclass = dataclass
    sys.modules[plain.__name__] = plain

    def fill(settings, given):
        """Return settings with what is given, groups in groups."""
        for name, value in given.items():
            if isinstance(value, dict):
                value = fill(getattr(settings, name), value)
            if isinstance(value, list):
                value = tuple(value)
            settings = dataclasses.replace(settings, **{name: value})
        return settings

    class TypeAdapter:
        """Make settings of JSON, without looking at them."""

        def __init__(self, kind):
            self.kind = kind

        def validate_json(self, text):
            """Return them."""
            return fill(self.kind(), json.loads(text))

    sys.modules["pydantic"].TypeAdapter = TypeAdapter
