"""How equal each reward is to its reference, with random weights of tiny sizes: a Markdown table.

    python scripts/reward_table.py [hps clip pickscore imagereward siglip aesthetic]

The references are published code (the packages hpsv2 and image-reward, installed aside in `work/` the first time) and
transformers' processors and models; `tests/helpers/reward_references.py` has them. Columns, of pictures
that need no resize unless it says "resized":

- pixels: largest difference in 1/255, before normalising; in brackets, of resized pictures: PIL rounds to 8 bits
  after each of its two passes, the rewards keep float32
- tokens: whether all ids are equal, also of odd prompts
- scores: largest difference, relative; in brackets, of all pictures, relative to the scores' standard deviation
- gradient: norm of the difference to autograd through the reference, relative
"""

import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here is on the hub
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.helpers.reward_references import CASES, Difference, compare


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
    return (
        f"| {name} | {number(d.pixels)} ({d.resized:.2f}) | {tokens} | {number(d.scores)} ({number(d.resized_scores)}) "
        f"| {number(d.gradient)} |"
    )


def number(value: float) -> str:
    return f"{value:.1e}" if value else "0"


if __name__ == "__main__":
    main(sys.argv[1:] or list(CASES))
