"""Checks the promises of each model family on tiny models with random weights, and prints one table.

    python scripts/bench/families.py                  all families, minutes on a CPU
    python scripts/bench/families.py sdxl flux        some families
    python scripts/bench/families.py --full_size      also the memory of a training step at full size, by the planner

The columns have the largest differences found:

- pictures: between ours, in [0, 1], and those of the family's own diffusers pipeline with the same seed, prompts and
  steps, without and with guidance
- gradient: relative, of a LoRA (also of text encoders, if they can have one), between the sweep and autograd through
  the scheduler's own steps
- LoRA there: of pictures, between a checkpoint loaded here and in the plain pipeline; "it changes" says how much the
  checkpoint changes the pictures
- resume: of the LoRA, between a run in one go and a run that stopped and continued
- soup: of pixel values (of 255), between the ends of a soup of two checkpoints and each checkpoint by itself

The last one, preset, names the preset for the family.
"""

import argparse
import os
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # so that the file runs as a script, from any folder

import diffusers  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from tqdm.auto import tqdm  # noqa: E402

from alignprop.engine.seeding import generators  # noqa: E402
from alignprop.lora.adapters import add_adapter, set_adapter, trained_parameters  # noqa: E402
from alignprop.lora.files import read_lora  # noqa: E402
from alignprop.method import estimators  # noqa: E402
from alignprop.method.rollout import Rollout  # noqa: E402
from alignprop.method.samplers import build_sampler  # noqa: E402
from alignprop.models import FAMILIES  # noqa: E402
from alignprop.models.loading import load_model  # noqa: E402
from alignprop.runs.checkpoint import checkpoints_of  # noqa: E402
from alignprop.tasks import evaluate, evaluate_soup  # noqa: E402
from alignprop.tasks.plan import compare_policies  # noqa: E402
from alignprop.trainer import AlignPropTrainer  # noqa: E402
from config import align_prop, models  # noqa: E402
from tests.helpers.tiny_families import SIDE  # noqa: E402
from tests.helpers.tiny_pipelines import make_family  # noqa: E402

PROMPTS = ["a red cat", "two blue circle on the square"]
STEPS = 3
GUIDED = 4.0
WITHOUT_SIZE = ("flux", "flux2", "z_image")  # their pipelines draw 1024² unless told otherwise
COLUMNS = ("pictures", "gradient", "LoRA there", "it changes", "resume", "soup", "preset")


def load(family: str, folder: Path, **options):
    return load_model(str(folder), **{"resolution": SIDE.get(family), **options})


def plain_pipeline(family: str, folder: Path, **options):
    pipeline = getattr(diffusers, FAMILIES[family].pipeline).from_pretrained(folder, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pipeline_pictures(family: str, pipeline, guidance_scale: float, **options) -> torch.Tensor:
    """Returns the pictures of the family's own pipeline, [2, 3, H, W] in [0, 1]."""
    if family in WITHOUT_SIZE:
        options = {"height": 16, "width": 16} | options
    guidance_scale += FAMILIES[family].guidance_offset
    return pipeline(
        prompt=list(PROMPTS), num_inference_steps=STEPS, guidance_scale=guidance_scale,
        generator=generators(range(2), "x"), output_type="pt", **options,
    ).images  # fmt: skip


def rollout_of(model, guidance_scale: float) -> Rollout:
    return Rollout(model, build_sampler(model.scheduler, STEPS, 0.0, **model.schedule(STEPS)), guidance_scale)


@torch.no_grad()
def our_pictures(model, guidance_scale: float) -> torch.Tensor:
    latents, _ = rollout_of(model, guidance_scale).sample(generators(range(2), "x"), model.encode_prompts(PROMPTS))
    return model.decode(latents)


def gradient_by_autograd(model, guidance_scale: float, weight: torch.Tensor) -> torch.Tensor:
    """Returns ∂(sum of weight · images)/∂LoRA through the scheduler's own steps, and text encoders that have a LoRA."""
    scheduler, schedule, cond = model.scheduler, model.schedule(STEPS), encode_with_graph(model, PROMPTS)
    scheduler.set_timesteps(None if "sigmas" in schedule else STEPS, **schedule)
    latents, branches = model.init_latents(generators(range(2), "x")), model.branches(cond, guidance_scale)
    for t in scheduler.timesteps:
        outputs = [model.predict(latents, t, branch) for branch in branches]
        mixed = outputs[0] if len(outputs) == 1 else outputs[0] + guidance_scale * (outputs[1] - outputs[0])
        latents = scheduler.step(mixed, t, latents).prev_sample
    (weight * model.decode(latents)).sum().backward()
    return take_gradients(model)


def gradients(family: str, folder: Path, guidance_scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the gradients (by the sweep, by autograd) of a LoRA that is not zero."""
    model, noise = load(family, folder), torch.Generator().manual_seed(0)
    add_adapter(model, 2, 2.0, None, seed=0, text_encoders=bool(model.lora_encoders))
    for parameter in trained_parameters(model).values():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=noise)
    weight = torch.randn(2, 3, 16, 16, generator=noise)
    expected = gradient_by_autograd(model, guidance_scale, weight)
    rollout, cond = rollout_of(model, guidance_scale), model.encode_prompts(PROMPTS)
    tracked = {name: tensor for name, tensor in cond.items() if model.lora_encoders and tensor.is_floating_point()}
    for tensor in tracked.values():
        tensor.requires_grad_()
    latents = rollout(generators(range(2), "x"), cond, estimators.full(rollout.sampler, 2))
    (weight * model.decode(latents)).sum().backward()
    model.backward_prompts(PROMPTS, {n: t.grad for n, t in tracked.items()} if tracked else {})
    return take_gradients(model), expected


def encode_with_graph(model, prompts: list[str]) -> dict[str, torch.Tensor]:
    """Does the work of `encode_prompts` with a graph for autograd."""
    cond = model.encode(prompts)
    if model.guides:
        empty = model.unconditional(model.encode([""] * len(prompts)), "")
        cond |= {f"negative_{name}": tensor for name, tensor in empty.items()}
    return cond


def take_gradients(model) -> torch.Tensor:
    """Returns the gradients of all trained parameters as one vector, with zeros for missing ones, and clears them."""
    found = []
    for parameter in trained_parameters(model).values():
        found.append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        parameter.grad = None
    return torch.cat([gradient.flatten() for gradient in found])


def lora_there(family: str, folder: Path, checkpoint: Path) -> tuple[float, float]:
    """Returns (difference of pictures with the checkpoint here and in the plain pipeline, how much it changes them)."""
    model, pipeline = load(family, folder), plain_pipeline(family, folder)
    before = pipeline_pictures(family, pipeline, GUIDED)
    set_adapter(model, read_lora(checkpoint))
    pipeline.load_lora_weights(checkpoint)
    after = pipeline_pictures(family, pipeline, GUIDED)
    return (our_pictures(model, GUIDED) - after).abs().max().item(), (after - before).abs().max().item()


def largest_difference(one: Path, other: Path) -> float:
    """Returns the largest difference between two LoRA files."""
    a, b = read_lora(one).tensors, read_lora(other).tensors
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def config_for(family: str, folder: Path, log_dir: Path, preset: str = "quickstart", **fields):
    """Returns the configuration of a run of two epochs of two steps on tiny pictures, towards red ones."""
    c = align_prop.get_config(preset)
    prompts = log_dir / "prompts.txt"
    prompts.parent.mkdir(parents=True, exist_ok=True)
    prompts.write_text("a cat\na dog\ntwo red circle\na blue bird\n")
    small = {
        "pretrained.model": str(folder), "resolution": SIDE.get(family), "guidance_scale": GUIDED,
        "reward_fn": "tests.helpers.toy_rewards:redness", "eval_reward_fn": "", "prompt_fn": str(prompts),
        "eval_prompt_fn": str(prompts), "log_dir": str(log_dir), "num_inference_steps": STEPS, "num_epochs": 2,
        "eval_freq": 0, "num_eval_images": 4, "num_eval_prompts": None, "eval_diversity": False, "max_vis_images": 2,
        "per_gpu_capacity": 2, "train.total_batch_size": 4, "train.total_samples_per_epoch": 8,
        "train.learning_rate": 0.05, **fields,
    }  # fmt: skip
    c.update_from_flattened_dict(small)
    return c


def train(config) -> Path:
    """Trains, and returns the last checkpoint."""
    trainer = AlignPropTrainer(config)
    trainer.train()
    return checkpoints_of(trainer.run.folder)[-1]


def soup_ends(family: str, folder: Path, log_dir: Path, checkpoints: list[Path]) -> int:
    """Returns the largest difference of pixel values between a soup's ends and each checkpoint by itself."""
    of = lambda preset, name, **fields: config_for(family, folder, log_dir, preset, run_name=name, **fields)  # noqa: E731
    first, second = map(str, checkpoints)
    soup = evaluate_soup(of("tiny_soup", "soup", resume_from=first, resume_from_2=second, mixing_coef_1=(1.0, 0.0)))
    alone = [evaluate(of("tiny_evaluate", f"alone_{i}", resume_from=c)) for i, c in enumerate((first, second))]
    pictures = lambda place: [  # noqa: E731
        np.asarray(Image.open(path)).astype(int) for path in sorted((place / "images").iterdir())
    ]
    found = [pictures(place) for place in (soup / "c_1", soup / "c_0", *alone)]
    assert any((a != b).any() for a, b in zip(found[0], found[1], strict=True)), "the two checkpoints are alike"
    pairs = [pair for mixed, own in zip(found[:2], found[2:], strict=True) for pair in zip(mixed, own, strict=True)]
    return max(int(abs(a - b).max()) for a, b in pairs)


def measure(family: str, folder: Path) -> dict[str, str]:
    """Returns a row of the table."""
    place = make_family(folder / "pipeline", family)
    model, pipeline = load(family, place), plain_pipeline(family, place)
    pictures = max(
        (our_pictures(model, scale) - pipeline_pictures(family, pipeline, scale)).abs().max().item()
        for scale in (1.0, GUIDED)
    )
    relative = []
    for scale in (1.0, GUIDED):
        ours, expected = gradients(family, place, scale)
        relative.append(((ours - expected).norm() / expected.norm()).item())
    fields = {"train_text_encoder": bool(model.lora_encoders)}
    run = lambda name, **more: train(  # noqa: E731
        config_for(family, place, folder / "logs", run_name=name, **fields, **more)
    )
    whole, other = run("whole"), run("other", seed=1)
    run("parts", num_epochs=1)
    parts = run("parts", resume_from="latest")
    there, change = lora_there(family, place, whole)
    soup = soup_ends(family, place, folder / "logs", [whole, other])
    preset = f"models.py:{family}" if family in models.PRESETS else "align_prop.py:hps"
    values = (pictures, max(relative), there, change, largest_difference(whole, parts), soup)
    return dict(zip(COLUMNS, [*(f"{value:.1e}" if value else "0" for value in values), preset], strict=True))


def full_size(family: str) -> dict[str, str]:
    """Returns the peak GiB of a training step of the preset, by the planner."""
    found = {}
    for policy in ("lean", "smallest"):
        c = models.get_config(family) if family in models.PRESETS else align_prop.get_config("hps")
        c.memory_policy, c.per_gpu_capacity = policy, 1
        c.mixed_precision = "bf16"
        (forecast,) = compare_policies(c)
        found[f"GiB, {policy}"] = f"{forecast.peak / 2**30:.1f}"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=list(FAMILIES), metavar="family", help="all by default")
    parser.add_argument("--full_size", action="store_true", help="plan the memory of the full-size model too")
    options = parser.parse_args()
    if unknown := [name for name in options.families if name not in FAMILIES]:
        parser.error(f"{unknown[0]!r} is none of {', '.join(FAMILIES)}")
    rows = {}
    for family in tqdm(options.families, "families"):
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
            rows[family] = measure(family, Path(folder))
            if options.full_size:
                rows[family] |= full_size(family)
    titles = list(next(iter(rows.values())))
    print("| family | " + " | ".join(titles) + " |\n|---|" + "---|" * len(titles))
    for family, row in rows.items():
        print(f"| {family} | " + " | ".join(row[title] for title in titles) + " |")


if __name__ == "__main__":
    os.environ["ACCELERATE_USE_CPU"] = "1"
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity(diffusers.logging.CRITICAL)
    diffusers.utils.logging.disable_progress_bar()
    main()
