"""`make mutants` takes minutes; that it can begin is seen here."""

from __future__ import annotations

import pytest
from mutants import MUTANTS, place


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_the_text_of_every_mutant_is_in_the_package_once(mutant):
    assert place(mutant).suffix == ".py" and mutant.old != mutant.new
