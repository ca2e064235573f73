"""Compares the seconds of training to a held-out reward with TRL 0.23.1's AlignPropTrainer: an hour or two on a CPU.

    python scripts/bench/time_to_reward.py                    three seeds, prints a table
    python scripts/bench/time_to_reward.py --json out.json    also writes every measurement
    python scripts/bench/time_to_reward.py --figure out.png   also draws the held-out reward against seconds

Both sides train a LoRA of rank 4 on the bundled model (alignprop/assets/tiny), in float32 on one thread. They train
towards the reward of preset `quickstart` (aesthetic + 40 × CLIP, the same code), on its training prompts, with guidance
3 and 8 pictures in an optimizer step. Each side has its own adapter initialisation, loss, optimizer and estimator. TRL
has its defaults, with its randomized truncation over the whole chain, unless a row says otherwise. Its sampler has
quickstart's 20 steps and is deterministic, like ours and like the evaluation. TRL runs with several learning rates, and
the fastest of these runs is compared, so that the learning rate is no handicap. In the last rows TRL also has those of
our settings that it knows. The remaining differences are the cost of a step, the draws, and our sampler and
learning-rate schedule.

Every few optimizer steps, a worker pauses and writes its adapter. Our evaluator scores the adapters of both sides on
quickstart's 48 held-out pictures, with fixed prompts and noise and 20 sampler steps. The clock counts only optimizer
steps, including the first. The worker with the least seconds on its clock is always the next, so that a busy machine
slows all workers alike. The time to a reward is interpolated linearly between two evaluations. So is the obedience at
that time: the share of pictures that have the count, colour, shape and background of their prompt, by an independent
judge.

The table has the medians over the seeds, and the least and the greatest value. Other processes on the machine disturb
processor seconds less.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # so that the file runs as a script, from any folder

from scripts.bench.curves import draw, summary, table  # noqa: E402
from scripts.bench.step_time import CACHE, TRL, trl_python  # noqa: E402
from scripts.bench.worker import QUIET, Worker, WorkerError  # noqa: E402

OBEDIENCE = "rewards.tiny_judge:obedience"
PROGRESS = "{}: step {steps}, {seconds:.1f} s, {cpu_seconds:.1f} CPU s, reward {reward:.3f}, obedience {obedience:.3f}"


@dataclass(frozen=True, eq=False)
class Side:
    """One way of training.

    Attributes:
        name: The name in the table.
        of: "ours"; "trl" (the fastest of these is what ours are compared with); or "trl, ours" (not compared with).
        every: The number of optimizer steps between evaluations.
        overrides: Further fields of TRL's AlignPropConfig.
        preset: The preset of our configuration.
    """

    name: str
    of: str
    every: int
    overrides: dict = field(default_factory=dict)
    preset: str = ""


FAST_IN_TRL = {  # with DDIM, because TRL has no other sampler
    "sample_num_steps": 3,
    "truncated_backprop_rand": False,
    "truncated_backprop_timestep": 0,
}
# The adapter of quickstart_fast starts with the distribution of TRL's, so the first steps have the same size at the
# same rate. TRL has no rate that falls, so it also runs with a smaller one.
FAST_RATES = (1.2e-2, 2e-2)
SIDES = (
    Side("TRL, defaults", "trl", 8),
    Side("TRL, learning rate 4e-3", "trl", 4, {"train_learning_rate": 4e-3}),
    Side("TRL, learning rate 1.2e-2", "trl", 1, {"train_learning_rate": 1.2e-2}),
    Side("TRL, learning rate 2e-2", "trl", 1, {"train_learning_rate": 2e-2}),
    Side("ours, quickstart", "ours", 8, preset="quickstart"),
    Side("ours, quickstart_fast", "ours", 1, preset="quickstart_fast"),
    *(
        Side(
            f"TRL, as quickstart_fast, learning rate {rate:g}",
            "trl, ours",
            1,
            {**FAST_IN_TRL, "train_learning_rate": rate},
        )
        for rate in FAST_RATES
    ),
)


# ---- set-up


def problem_of(config) -> dict:
    """Returns what TRL's worker has to know of our configuration, as plain values."""
    from alignprop.prompts import ASSETS

    return {
        "pipeline": config.pretrained.model,
        "prompt_file": str(ASSETS / "tiny" / "prompts_train.txt"),
        "reward": config.reward_fn,
        "reward_options": {name: config[name].to_dict() for name in ("aesthetic", "clip")},
        "num_steps": config.num_inference_steps,
        "guidance_scale": config.guidance_scale,
        "eta": config.eta,
        "batch_size": config.train.total_batch_size,
    }


class Referee:
    """Scores adapters with our evaluator, on the held-out pictures of a configuration of task "evaluate"."""

    def __init__(self, config):
        import torch

        from alignprop.build import build_run

        torch.set_num_threads(1)  # on a busy machine, two threads wait for each other
        self.run = build_run(config)

    def __call__(self, adapter: Path | None) -> dict[str, float]:
        """Returns the means of "reward", of its terms and of "obedience", with the LoRA in a folder or without one."""
        from alignprop.lora.factors import set_lora
        from alignprop.lora.files import read_lora

        set_lora(self.run.model.denoiser, read_lora(adapter) if adapter else None)
        row = self.run.evaluator().row()
        terms = dict(row["rewards"])
        return {"reward": row["reward"], "obedience": terms.pop(OBEDIENCE), **terms}


def start(side: Side, seed: int, problem: dict, log_dir: str, python: Path) -> Worker:
    if side.of == "ours":
        settings = {"seed": seed, "preset": side.preset, "log_dir": log_dir}
        return Worker(sys.executable, "scripts.bench.ours_tiny_worker", settings)
    settings = {"seed": seed, "overrides": side.overrides, "problem": problem}
    return Worker(python, "scripts.bench.trl_tiny_worker", settings)


# ---- measuring


def race(workers: dict[Side, Worker], judged: Callable, base: dict, target: float, max_steps: int) -> dict[str, list]:
    """Trains all sides until the held-out reward is `target`, or for `max_steps` steps.

    Args:
        judged: worker -> the referee's scores of its adapter.
        base: The referee's scores of the model without an adapter.

    Returns:
        The curve of each side: points of "steps", "seconds", "cpu_seconds" and the referee's scores.

    Raises:
        WorkerError: A side failed, or the sides are not alike.
    """
    check_alike({side.name: worker.facts for side, worker in workers.items()})
    curves = {side: [{"steps": 0, "seconds": 0.0, "cpu_seconds": 0.0, **base}] for side in workers}
    running = list(workers)
    while running:
        side = min(running, key=lambda one: curves[one][-1]["seconds"])
        curve, worker = curves[side], workers[side]
        count = min(side.every, max_steps - curve[-1]["steps"])
        answers = [worker.step() for _ in range(count)]
        clock = {name: curve[-1][name] + sum(a[name] for a in answers) for name in ("seconds", "cpu_seconds")}
        curve.append({"steps": curve[-1]["steps"] + count, **clock, **judged(worker)})
        print(PROGRESS.format(side.name, **curve[-1]), flush=True)
        if curve[-1]["reward"] >= target or curve[-1]["steps"] >= max_steps:
            running.remove(side)
    return {side.name: curve for side, curve in curves.items()}


def check_alike(facts: dict[str, dict]) -> None:
    """Checks that all sides train as many weights of the same model, with the same packages.

    Raises:
        WorkerError: They do not.
    """
    (first, expected), *others = facts.items()
    for name, found in others:
        for fact in ("parameters", "trained", "versions"):
            if found[fact] != expected[fact]:
                raise WorkerError(f"{fact} differ: {expected[fact]} in {first!r}, {found[fact]} in {name!r}")


def measure(sides, seeds: list[int], target: float, max_steps: int, python: Path) -> dict[str, list[list[dict]]]:
    """Returns, for each side, a curve for each seed.

    Raises:
        WorkerError: A side failed, or the base model already has the target.
    """
    from config.align_prop import get_config

    problem = problem_of(get_config("quickstart"))
    with tempfile.TemporaryDirectory() as folder:
        c = get_config("quickstart")
        c.update_from_flattened_dict({"task": "evaluate", "log_dir": folder, "eval_reward_fn": OBEDIENCE})
        referee = Referee(c)
        base = referee(None)
        print("without training: reward {reward:.3f}, obedience {obedience:.3f}".format(**base), flush=True)
        if base["reward"] >= target:
            raise WorkerError(f"--target = {target} must be above the base model's {base['reward']:.3f}")

        def judged(worker: Worker) -> dict:
            worker.save(folder)
            return referee(Path(folder))

        curves = {side.name: [] for side in sides}
        for seed in seeds:
            print(f"seed {seed}", flush=True)
            with ExitStack() as stack:
                workers = {s: stack.enter_context(start(s, seed, problem, folder, python)) for s in sides}
                for name, curve in race(workers, judged, base, target, max_steps).items():
                    curves[name].append(curve)
    return curves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of training; default 0 1 2")
    parser.add_argument("--target", type=float, default=36.5, help="held-out reward; default 36.5, without training 34")
    parser.add_argument("--max-steps", type=int, default=48, help="optimizer steps of a side at most; default 48")
    parser.add_argument("--json", type=Path, help="file for every measurement")
    parser.add_argument("--figure", type=Path, help="file for a picture of the curves, .png or .svg")
    options = parser.parse_args()
    python = trl_python(CACHE / "trl_venv")
    try:
        curves = measure(SIDES, options.seeds, options.target, options.max_steps, python)
    except WorkerError as error:
        sys.exit(f"error: {error}")
    results = summary(curves, [side.name for side in SIDES if side.of == "trl"], options.target)
    print(f"\nTo a held-out reward of {options.target}; {TRL}\n\n{table(results)}")
    if options.json:
        sides = {side.name: {**asdict(side), **results[side.name], "curves": curves[side.name]} for side in SIDES}
        options.json.write_text(json.dumps({"trl": TRL, "target": options.target, "sides": sides}, indent=2) + "\n")
    if options.figure:
        draw(curves, options.target, options.figure)


if __name__ == "__main__":
    os.environ.update(QUIET | {"ACCELERATE_USE_CPU": "1"})
    main()
