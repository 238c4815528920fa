"""How long the library and its command line take to start, beside the interpreter's own start.

    python -m benchmarks.start_up --pairs 15

Each round starts the bare interpreter and every case in a fresh process, in an order that is drawn anew, so that what else the
machine does meets all of them alike; differences and ratios are within a round, and their medians are reported. Modules are
compiled by a round that does not count.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

BARE = "python -c pass"
CASES = {
    BARE: ["-c", "pass"],
    "import hf_warmstart": ["-c", "import hf_warmstart"],
    "hf-warmstart --help": ["-m", "hf_warmstart.cli", "--help"],
    "hf-warmstart grow --help": ["-m", "hf_warmstart.cli", "grow", "--help"],
}


def seconds(arguments: Sequence[str]) -> float:
    """Seconds from starting a fresh interpreter to its end."""
    begun = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


def measured(pairs: int, seed: int = 0) -> dict[str, list[float]]:
    """Seconds of every case in every round."""
    order, found = random.Random(seed), {name: [] for name in CASES}
    for name in CASES:
        seconds(CASES[name])
    for _ in range(pairs):
        for name in order.sample(list(CASES), len(CASES)):
            found[name].append(seconds(CASES[name]))
    return found


def rows(found: dict[str, list[float]]) -> list[dict[str, float | str]]:
    """Medians of each case: seconds, seconds beyond the bare interpreter, and times the bare interpreter."""
    bare = found[BARE]
    return [
        {
            "case": name,
            "seconds": statistics.median(times),
            "beyond": statistics.median(own - base for own, base in zip(times, bare, strict=True)),
            "ratio": statistics.median(own / base for own, base in zip(times, bare, strict=True)),
        }
        for name, times in found.items()
    ]


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15, metavar="N", help="rounds (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="write JSON to stdout")
    options = parser.parse_args()
    made = rows(measured(options.pairs))
    if options.json:
        print(json.dumps({"pairs": options.pairs, "cores": os.cpu_count(), "rows": made}))
        return
    print(f"{options.pairs} rounds, Python {sys.version.split()[0]}, medians\n")
    print("| case | seconds | beyond the bare interpreter | times the bare interpreter |\n|---|--:|--:|--:|")
    for row in made:
        print(f"| `{row['case']}` | {row['seconds']:.3f} | {row['beyond']:+.3f} | {row['ratio']:.2f} |")


if __name__ == "__main__":
    main()
