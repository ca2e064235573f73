"""Measures what the prefix cache saves, and what it changes: about half an hour on a CPU.

    python scripts/bench/prefix_cache.py --seeds 3 --steps 12 --json prefix_cache.json

Trains the bundled model with the reward of preset `quickstart`, 50 steps of DDIM and a gradient through the last step
(K = 1), once without the cache and once with each interval. For each it prints

- the seconds of an optimizer step, and their ratio to those without the cache. The runs of a seed make their steps in
  turn, so that a busy machine slows all of them alike;
- how far the final latents of the first step are from those without the cache, relative to their norm;
- the cosine between the LoRA's first gradient and the one without the cache, at the weights that a few steps without
  the cache have trained. The gradient is exact at the visited latents, so this is the bias through other latents;
- the held-out reward before training and after the same number of steps.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from time import perf_counter

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from tqdm import tqdm

from alignprop.engine.seeding import generators
from alignprop.prompts import draw_prompts
from alignprop.trainer import AlignPropTrainer
from config.align_prop import get_config
from scripts.bench.tables import markdown

CHAIN = {"estimator": "truncated", "num_inference_steps": 50, "num_epochs": 100, "log_with": ""}


def make_trainer(interval: int, seed: int, folder: str, fields: dict) -> AlignPropTrainer:
    config = get_config("quickstart")
    own = {"train.prefix_cache": interval, "seed": seed, "log_dir": folder, "run_name": f"{interval}_{seed}"}
    config.update_from_flattened_dict(CHAIN | fields | own)
    return AlignPropTrainer(config)


def first_gradient(trainer: AlignPropTrainer) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the final latents of the first micro-batch and the LoRA's gradient; leaves the weights as they are."""
    run, indices = trainer.run, trainer.micro_batches()[0]
    plan = trainer.estimator(run.rollout.sampler, len(indices), torch.Generator().manual_seed(0))
    key = (trainer.config.seed, "bias")
    prompts, metadata = draw_prompts(trainer.prompts, *key, indices)
    cond = run.model.encode_prompts(prompts)
    noise = generators(indices, *key, "noise")
    latents, _ = run.rollout.sample(noise, cond, plan, run.rollout.network_calls(plan))
    trainer.weights.zero_grad()
    trainer.gradient(run.rollout)(key, indices, prompts, metadata, plan)
    gradient = torch.cat([p.grad.flatten().float() for p in trainer.weights.parameters])
    trainer.weights.zero_grad()
    return latents, gradient


def bias(trainer: AlignPropTrainer, others: dict[int, AlignPropTrainer]) -> dict[int, dict[str, float]]:
    """Returns the differences that each interval makes at the weights of `trainer`, which has no cache."""
    found, (latents, gradient) = {}, first_gradient(trainer)
    for interval, other in others.items():
        for theirs, ours in zip(other.weights.parameters, trainer.weights.parameters, strict=True):
            theirs.data.copy_(ours.data)
        there, turned = first_gradient(other)
        cosine = torch.nn.functional.cosine_similarity(turned, gradient, dim=0).item()
        found[interval] = {"latents": ((there - latents).norm() / latents.norm()).item(), "cosine": cosine}
    return found


def race(intervals: list[int], seed: int, steps: int, folder: str, fields: dict) -> dict[int, dict]:
    """Trains with each interval from the same start; returns the seconds of the steps and the held-out rewards."""
    trainers = {interval: make_trainer(interval, seed, folder, fields) for interval in intervals}
    before = trainers[1].run.evaluator().row()["reward"]
    seconds = {interval: [] for interval in intervals}
    for step in tqdm(range(steps), f"seed {seed}"):
        for interval in intervals if step % 2 else reversed(intervals):
            started = perf_counter()
            trainers[interval].step()
            seconds[interval].append(perf_counter() - started)
    after = {interval: trainer.run.evaluator().row()["reward"] for interval, trainer in trainers.items()}
    differences = bias(trainers[1], {k: v for k, v in trainers.items() if k > 1})
    return {
        k: {"seconds": seconds[k][1:], "before": before, "after": after[k], **differences.get(k, {})} for k in intervals
    }


def table(results: dict[int, dict[int, dict]]) -> str:
    """Returns the table; `results` has the measurements by seed and by interval."""
    rows = []
    for interval in next(iter(results.values())):
        found = [measured[interval] for measured in results.values()]
        median = statistics.median(value for one in found for value in one["seconds"])
        ratios = [
            statistics.median(measured[interval]["seconds"]) / statistics.median(measured[1]["seconds"])
            for measured in results.values()
        ]
        gains = [one["after"] - one["before"] for one in found]
        spread = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else float("nan")
        changed = [
            f"{statistics.mean(one.get(name, same) for one in found):.4f}"
            for name, same in (("latents", 0.0), ("cosine", 1.0))
        ]
        rows.append([
            "off" if interval == 1 else str(interval), f"{median:.2f}", f"{statistics.mean(ratios):.2f}",
            *changed, f"{statistics.mean(gains):+.3f} ± {spread:.3f}",
        ])  # fmt: skip
    return markdown(["interval", "s/step", "of off", "latents", "cosine of gradients", "reward gained"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps of each run")
    parser.add_argument("--intervals", type=int, nargs="+", default=[2, 3, 5])
    parser.add_argument("--json", type=Path, help="write every measurement, and continue a file that has some")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=NUMBER", help="whole numbers for other fields")
    args = parser.parse_args()
    torch.set_num_threads(1)
    known = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    results = {int(s): {int(k): v for k, v in measured.items()} for s, measured in known.items()}
    fields = {name: int(value) for name, value in (word.split("=") for word in args.set)}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(args.seeds):
            if seed not in results:
                results[seed] = race([1, *args.intervals], seed, args.steps, folder, fields)
            if args.json:
                args.json.write_text(json.dumps(results))
    print(table(results))


if __name__ == "__main__":
    main()
