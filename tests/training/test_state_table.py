"""The table in `docs/training-state.md` is what happens."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.document import between
from benchmarks.training_state import COMMAND, OPTIMIZERS, SOURCES, TABLE, measure_all, table
from hf_warmstart.growth.state import STATE_POLICIES

DOCUMENT = Path(__file__).parents[2] / "docs" / "training-state.md"


@pytest.mark.filterwarnings("ignore:The optimizer file has no names")  # Muon's runs freeze all vectors
def test_every_source_optimizer_and_policy_does_what_the_table_says():
    cells, _ = measure_all()
    found = [cell for of_optimizer in cells.values() for cell in of_optimizer.values()]
    assert len(found) == len(SOURCES) * len(OPTIMIZERS) * len(STATE_POLICIES)
    assert {cell.verdict for cell in found} == {"exact", "defined", "refused"}
    assert all(bool(cell.reason) == (cell.verdict == "refused") for cell in found)
    assert between(DOCUMENT.read_text(), TABLE) == table(cells), f"The table is stale: {COMMAND}"
