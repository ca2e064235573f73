"""Compares each reward with its reference, on random weights of tiny sizes, and prints a Markdown table.

    python scripts/reward_table.py [hps clip pickscore imagereward cyclereward siglip aesthetic aesthetic_v2_5 hpsv3 …]

The references are published code (the packages hpsv2, image-reward and cyclereward, which the first call installs aside
in `work/`), transformers' processors and models, and for the newer judges their maths in float64. They are in
`tests/helpers/`. The columns:

- pixels: the largest difference in 1/255, before normalising, of pictures that need no resize; in brackets the share of
  the other pictures' values that differ by more than a hundredth of that
- tokens: whether all ids are equal, also for odd prompts
- scores: the largest relative difference of pictures that need no resize; in brackets that of all pictures, relative to
  the scores' standard deviation
- gradient: the relative norm of the difference to autograd through the reference
"""

import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here comes from the hub
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.helpers.reward_cases import CASES
from tests.helpers.reward_references import Difference, compare


def main(names: list[str]) -> None:
    unknown = [name for name in names if name not in CASES]
    if unknown:
        sys.exit(f"no reward {unknown[0]!r}; allowed: {', '.join(CASES)}")
    rows = []
    for i, name in enumerate(names):
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            difference = compare(CASES[name](Path(folder)))
        print(f"{i + 1}/{len(names)} {name}: {time.monotonic() - start:.0f} s", file=sys.stderr)
        rows.append(row(name, difference))
    print("| reward | pixels (resized) | tokens | scores (resized) | gradient |\n|---|---|---|---|---|")
    print("\n".join(rows))


def row(name: str, d: Difference) -> str:
    tokens = {None: "–", True: "equal", False: "differ"}[d.tokens]
    pixels, scores = f"{number(d.pixels)} ({number(d.resized)})", f"{number(d.scores)} ({number(d.resized_scores)})"
    return f"| {name} | {pixels} | {tokens} | {scores} | {number(d.gradient)} |"


def number(value: float) -> str:
    return f"{value:.1e}" if value else "0"


if __name__ == "__main__":
    main(sys.argv[1:] or list(CASES))
