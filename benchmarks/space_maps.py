"""The figure of docs/space-maps.md: W and R of the width operators, of a stream of 4 coordinates that becomes 6.

python -m benchmarks.space_maps [FILE]
"""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hf_warmstart.growth.operators import WIDTH_OPERATORS, OperatorOptions

OPERATORS = ("exact_copy", "perturbed_copy", "uneven_copy", "reference_slice")
BEFORE, AFTER = 4, 6
TARGET = Path(__file__).parents[1] / "docs" / "space-maps.png"


def draw(path: Path) -> None:
    """Two rows of matrices, W above R, an operator in each column."""
    figure = Figure(figsize=(9.6, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subplots(2, len(OPERATORS))
    options = OperatorOptions(noise=0.2, uneven_ratio=0.5, shrink=0.4)
    for column, name in enumerate(OPERATORS):
        space = WIDTH_OPERATORS[name].build(BEFORE, AFTER, "rms_normed", options)
        for axis, letter, matrix in zip(rows[:, column], "WR", (space.dense_write(), space.dense_read()), strict=True):
            axis.imshow(matrix, cmap="Blues", vmin=0, vmax=1.4)
            for row in range(AFTER):
                for at in range(BEFORE):
                    value = float(matrix[row, at])
                    if value:
                        colour = "white" if value > 0.8 else "black"
                        axis.text(at, row, f"{value:.2g}", ha="center", va="center", fontsize=8, color=colour)
            axis.set(xticks=range(BEFORE), yticks=range(AFTER))
            axis.tick_params(length=0, labelsize=7)
            if not column:
                axis.set_ylabel(f"{letter}\nnew coordinate")
            if letter == "W":
                axis.set_title(name, fontsize=10)
            else:
                axis.set_xlabel("old coordinate")
    figure.savefig(path, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else TARGET)
