"""Measures each estimator's gradient on the bundled model and the quickstart's reward, and prints a Markdown table.

    python scripts/gradient_table.py [--batches=12] [--steps=20]

The columns are measured on `batches` batches of 8 samples each, with the same prompts and noise for every estimator:

- to definition: relative difference to plain autograd through the estimator's definition (tests/helpers/definitions.py)
- cosine: between the mean gradient and full back-propagation's; in brackets, the average for single batches
- norm: the norm of a batch's gradient divided by that of full back-propagation, on average
- variance: E|g - ḡ|² / |ḡ|² for the gradient g of a batch; in brackets, the part that comes from the estimator's own
  draw, at the same prompts and noise
"""

import argparse
import inspect
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("DIFFUSERS_VERBOSITY", "critical")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from tqdm.auto import tqdm

from alignprop.engine.seeding import generator, generators
from alignprop.method.estimators import ESTIMATORS, build_estimator
from alignprop.models.base import select
from alignprop.prompts import draw_prompts
from alignprop.trainer import AlignPropTrainer
from config.align_prop import get_config
from tests.helpers.definitions import DEFINITIONS, Chain

SIZE = 8


def make_trainer(steps: int, folder: str) -> AlignPropTrainer:
    """Returns the quickstart's trainer, with an adapter that already changes the pictures.

    Half of a fresh adapter has no gradient.
    """
    c = get_config("quickstart")
    c.train.num_inference_steps, c.log_dir, c.eval_reward_fn = steps, folder, ""
    c.eval_diversity = c.eval_base_distance = False
    trainer = AlignPropTrainer(c)
    with torch.no_grad():
        for j, parameter in enumerate(trainer.weights.parameters):
            if not parameter.any():
                parameter.normal_(0, 0.02, generator=generator("adapter", j))
    return trainer


def sweep_gradient(trainer, key, plan) -> torch.Tensor:
    """Returns ∂(mean loss)/∂θ of a batch, computed by the trainer itself; float64."""
    trainer.weights.zero_grad()
    trainer.add_gradients(key, torch.arange(SIZE), plan)
    return torch.cat([p.grad.flatten() for p in trainer.weights.parameters])


def defined_gradient(trainer, key, name: str, plan, samples) -> torch.Tensor:
    """Returns the same gradient through the estimator's definition: the share of some samples in the batch's mean."""
    run, parameters = trainer.run, trainer.weights.parameters
    sampler, options, total = run.rollout.sampler, options_of(name, trainer), 0
    prompts, metadata = draw_prompts(trainer.prompts, *key, samples)
    cond = run.model.encode_prompts(prompts)
    for b, g in enumerate(generators(samples, *key, "noise")):
        own, start = select(cond, [b]), run.model.init_latents([g])
        noises = torch.randn((plan.copies, *start.shape[1:]), generator=g)
        f = lambda x, i, own=own: run.rollout.f(x, sampler.timesteps[i], own)  # noqa: E731
        finals = DEFINITIONS[name](Chain(f, sampler, start, plan.select([int(samples[b])]), noises, **options))
        n = len(finals)
        scores = run.reward(run.model.decode(torch.cat(finals)), [prompts[b]] * n, [metadata[b]] * n)
        total = total + scores.mean() / SIZE
    return torch.cat([g.double().flatten() for g in torch.autograd.grad(-total, parameters)])


def options_of(name: str, trainer) -> dict:
    steps = trainer.run.rollout.sampler.num_steps
    given = {"first": steps - 1, "minmax": (0, steps)}
    parameters = inspect.signature(ESTIMATORS[name]).parameters.values()
    return {p.name: given.get(p.name, p.default) for p in parameters if p.kind is p.KEYWORD_ONLY}


def measure(trainer, batches: int) -> dict[str, dict]:
    full = [sweep_gradient(trainer, (0, d), plan_of(trainer, "full", d)) for d in tqdm(range(batches), "full")]
    exact, rows = torch.stack(full), {}
    for name in ESTIMATORS:
        found = exact
        if name != "full":
            keys = tqdm(range(batches), name, leave=False)
            found = torch.stack([sweep_gradient(trainer, (0, d), plan_of(trainer, name, d)) for d in keys])
        own = torch.zeros(())
        if name not in ("full", "truncated"):
            again = [sweep_gradient(trainer, (0, 0), plan_of(trainer, name, d)) for d in range(batches)]
            own = spread(torch.stack(again), found.mean(0))
        plan, some = plan_of(trainer, name, 0), torch.arange(2)
        definition = defined_gradient(trainer, (0, 0), name, plan, some)
        rows[name] = {
            "to_definition": relative(sweep_gradient_of(trainer, plan, some), definition),
            "cosine": torch.cosine_similarity(found.mean(0), exact.mean(0), dim=0).item(),
            "cosine_single": torch.cosine_similarity(found, exact).mean().item(),
            "norm": (found.norm(dim=1) / exact.norm(dim=1)).mean().item(),
            "variance": spread(found, found.mean(0)).item(),
            "variance_of_draw": own.item(),
        }
    return rows


def sweep_gradient_of(trainer, plan, samples) -> torch.Tensor:
    trainer.weights.zero_grad()
    trainer.add_gradients((0, 0), samples, plan.select(samples))
    return torch.cat([p.grad.flatten() for p in trainer.weights.parameters])


def plan_of(trainer, name: str, draw: int):
    options = {k: v for k, v in options_of(name, trainer).items() if k in ("first", "minmax")}
    return build_estimator(name, **options)(trainer.run.rollout.sampler, SIZE, generator("plan", draw))


def spread(gradients: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    deviations = gradients - gradients.mean(0)
    return deviations.square().sum() / (len(gradients) - 1) / mean.square().sum()


def relative(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return ((ours - expected).norm() / expected.norm()).item()


def table(rows: dict[str, dict]) -> str:
    lines = ["| estimator | to definition | cosine | norm | variance |", "|---|---|---|---|---|"]
    for name, r in rows.items():
        lines.append(
            f"| {name} | {r['to_definition']:.1e} | {r['cosine']:.2f} ({r['cosine_single']:.2f}) | {r['norm']:.2f} | "
            f"{r['variance']:.2f} ({r['variance_of_draw']:.2f}) |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=12, help="batches of 8 samples, 2 or more; default 12")
    parser.add_argument("--steps", type=int, default=20, help="sampler steps, 2 or more; default 20")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    if min(options.batches, options.steps) < 2:
        parser.error("--batches and --steps must be 2 or more")
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(make_trainer(options.steps, folder), options.batches)
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
