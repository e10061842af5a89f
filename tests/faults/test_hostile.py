"""A few cases of each family of ``hostile.py``; the campaign runs thousands."""

import hostile
import pytest


@pytest.mark.parametrize("family", hostile.FAMILIES)
def test_hostile_input(family: str) -> None:
    cases = 2 if family == "runs" else 8
    with hostile.quiet():
        tally = hostile.run_family(family, cases, chance=0)
    assert tally["cases"] >= cases // 2
    assert tally["refused"] > 0
