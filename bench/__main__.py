"""`make bench`: every figure in one run, printed and written to bench/results.json.

    python -m bench [gate] [ledger] [pipeline]

With names, only those are measured, and the other figures of the file stay as they were.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path

PARTS = ("gate", "ledger", "pipeline")
RESULTS = Path(__file__).with_name("results.json")


def main(names: list[str]) -> None:
    """Measure, print, write."""
    if unknown := set(names) - set(PARTS):
        sys.exit(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    figures: dict[str, float] = {}
    for part in names or PARTS:
        print(f"{part}: measuring", flush=True)
        figures |= import_module(f"bench.{part}").measure()
    width = max(map(len, figures))
    for name, figure in sorted(figures.items()):
        print(f"{name:{width}}  {figure:>12,.3f}")
    kept = json.loads(RESULTS.read_text()) if names and RESULTS.exists() else {}
    merged = kept | {name: round(figure, 4) for name, figure in figures.items()}
    RESULTS.write_text(json.dumps(merged, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
