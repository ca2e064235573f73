"""How few network calls are enough, by the judge of the bundled model.

    python scripts/bench/samplers.py --seeds 3 --out samplers.json

For each sampler and number of steps, pictures of the held-out prompts are sampled by the product's own chain and
judged: the rating (1 to 10) and the share of pictures in which count, colours, shape and background are as the prompt
says. A number of steps is enough if neither measure is below that of 50 steps of DDIM by more than their standard
errors together. Prints a table and draws a grid of pictures beside the JSON file. A file with results is continued.
"""

import argparse
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from tqdm import tqdm

from alignprop.engine.seeding import generators
from alignprop.engine.speed import use_channels_last
from alignprop.evaluation.pictures import save_comparison
from alignprop.method.rollout import Rollout
from alignprop.method.samplers import chain_of
from alignprop.models.loading import load_model
from alignprop.prompts import load_prompts
from config.align_prop import get_config
from rewards.tiny_judge import obedience, rating
from scripts.bench.tables import markdown

REFERENCE = ("ddim", "", 50)
SAMPLERS = [
    ("ddim", ""),
    ("DPMSolverMultistep", ""),
    ("DPMSolverMultistep", "use_karras_sigmas=True"),
    ("UniPCMultistep", ""),
    ("EulerDiscrete", ""),
    ("EulerAncestralDiscrete", ""),
    ("HeunDiscrete", ""),
    ("DEISMultistep", ""),
    ("DPMSolverMultistep", "algorithm_type=sde-dpmsolver++"),
]
STEPS, GUIDANCE, BATCH = (4, 6, 8, 10, 12, 15, 20), 3.0, 36
MEASURES = (rating, obedience)


def measure(model, case, prompts: list[str], seed: int) -> dict:
    """Returns the number of calls, and of each picture the rating and whether all of it is as the prompt says."""
    name, options, steps = case
    sampler = chain_of(model, steps, name=name, options=options)
    rollout, pictures = Rollout(model, sampler, GUIDANCE), []
    for rows in torch.arange(len(prompts)).split(BATCH):
        cond = model.encode_prompts([prompts[i] for i in rows.tolist()])
        with torch.no_grad():
            pictures.append(model.decode(rollout(generators(rows, "samplers", seed), cond, None)))
    pictures = torch.cat(pictures)
    measured = {f.__name__: f(pictures, prompts, [{}] * len(prompts)).tolist() for f in MEASURES}
    return {"calls": sampler.num_steps, **measured, "pictures": pictures}


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Returns the mean and its standard error."""
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return mean, spread / math.sqrt(len(values))


def is_enough(found: dict, reference: dict) -> bool:
    """Says whether no measure is below the reference's by more than the two standard errors together."""
    pairs = [(mean_and_error(found[f.__name__]), mean_and_error(reference[f.__name__])) for f in MEASURES]
    return all(ours >= other - math.hypot(error, others) for (ours, error), (other, others) in pairs)


def table(results: dict[str, dict]) -> str:
    """Returns the table of all cases, with a mark where the pictures are as good as the reference's."""
    rows = []
    for case, found in results.items():
        cells = [f"{mean:.3f} ± {error:.3f}" for mean, error in (mean_and_error(found[f.__name__]) for f in MEASURES)]
        mark = "yes" if is_enough(found, results[_key(REFERENCE)]) else "no"
        rows.append([*case.split("|"), str(found["calls"]), *cells, mark])
    return markdown(["sampler", "options", "steps", "calls", "rating", "all right", "as good"], rows)


def _key(case) -> str:
    return "|".join(map(str, case))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="each seed has one picture of every held-out prompt")
    parser.add_argument("--prompts", type=int, help="take every n-th held-out prompt, so that there are about so many")
    parser.add_argument("--out", type=Path, default=Path("samplers.json"))
    args = parser.parse_args()
    config = get_config("quickstart")
    model = load_model(config.pretrained.model, dtype=torch.float32)
    use_channels_last(model)
    prompts = load_prompts(config.eval_prompt_fn, "eval_prompt_fn").prompts
    prompts = prompts[:: max(len(prompts) // args.prompts, 1) if args.prompts else 1]
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    cases = [REFERENCE, *((*sampler, steps) for steps in STEPS for sampler in SAMPLERS)]
    grids = {}
    for case in tqdm(cases, "samplers"):
        if _key(case) in results:
            continue
        parts = [measure(model, case, prompts, seed) for seed in range(args.seeds)]
        grids[_key(case)] = parts[0].pop("pictures")[:8]
        joined = {f.__name__: [value for part in parts for value in part[f.__name__]] for f in MEASURES}
        results[_key(case)] = {"calls": parts[0]["calls"], **joined}
        args.out.write_text(json.dumps(results))
    if grids:
        save_comparison(grids, [""] * 8, args.out.with_suffix(".png"))
    print(table(results))


if __name__ == "__main__":
    main()
