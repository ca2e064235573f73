"""Stage ``evaluate``: judges pictures of the saved pipeline. Writes ``evaluation.json`` and a grid of samples."""

import json
import math

import torch
from tqdm import tqdm

from rewards import tiny_judge
from scripts.tiny import aesthetic, clip, geometry, judge, scenes, vae, world

STEPS, GUIDANCE = 20, 3.0
SETS = {"train": (False, 1), "heldout": (True, 3)}  # (held out or not, pictures per prompt)


def load_pipeline(folder):
    from diffusers import StableDiffusionPipeline
    from diffusers.models.attention_processor import AttnProcessor

    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32, safety_checker=None)
    pipeline.unet.set_attn_processor(AttnProcessor())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(pipeline, prompts, seed=0, steps=STEPS, guidance=GUIDANCE, batch_size=36):
    """Returns one picture per prompt, float [N, 3, 64, 64] in [0, 1]. Picture i depends on (seed, i) alone."""
    images = []
    for start in tqdm(range(0, len(prompts), batch_size), desc="pictures"):
        part = prompts[start : start + batch_size]
        generators = [torch.Generator().manual_seed(10_000 * seed + start + i) for i in range(len(part))]
        images.append(pipeline(
            part, num_inference_steps=steps, guidance_scale=guidance, generator=generators, output_type="pt"
        ).images.float())  # fmt: skip
    return torch.cat(images)


def evaluate(work, out, limit=None):
    """Judges pictures of every prompt (or of ``limit`` in each set). Writes ``evaluation.json`` and ``samples.png``."""
    network = tiny_judge.load(out / "judge")
    images, contents, styles = scenes.load(work, "test")
    drawn = judge.accuracy(network, world.to_float(images), contents)
    style_error = (judge.measured_styles(network, world.to_float(images)) - styles).abs().mean(0)
    decibel, reconstructed = vae.psnr(_pipeline_vae(out), images[:600])
    figures = {
        "judge_on_drawings": {**drawn, "style_mean_error": dict(zip(world.STYLES, style_error.tolist(), strict=True))},
        "vae": {"psnr_db": decibel, "judge_on_reconstructions": judge.accuracy(network, reconstructed, contents[:600])},
        "clip": clip.report(work, out),
        "aesthetic_r2": aesthetic.r_squared(work, out),
        "sampling": {"steps": STEPS, "guidance_scale": GUIDANCE},
    }
    pipeline, grid = load_pipeline(out / "pipeline"), []
    for name, (held_out, repeats) in SETS.items():
        wanted = world.all_contents()
        wanted = wanted[world.held_out(wanted) == held_out].repeat(repeats, 1)[:limit]
        prompts = [world.caption(row) for row in wanted]
        pictures = generate(pipeline, prompts, seed=int(held_out))
        amounts = judge.measured_styles(network, pictures)
        figures[name] = {
            "pictures": len(pictures), **judge.accuracy(network, pictures, wanted),
            "rating_mean": world.rating(amounts).mean().item(),
            "styles_mean": dict(zip(world.STYLES, amounts.mean(0).tolist(), strict=True)),
        }  # fmt: skip
        chosen = torch.linspace(0, len(set(prompts)) - 1, 24).long().tolist()
        grid += [(pictures[i], prompts[i]) for i in chosen]
    for shape, measure in (("circle", geometry.radial_deviation), ("square", geometry.corner_error)):
        figures[f"single_{shape}s"] = single_shapes(pipeline, network, shape, measure, limit)
    (out / "evaluation.json").write_text(json.dumps(_rounded(figures), indent=2) + "\n")
    save_grid(grid, out / "samples.png")
    return figures


def single_shapes(pipeline, network, shape, measure, limit=None):
    """Measures how well single shapes are drawn. Pictures with gloss or a shadow are skipped: these hide outlines."""
    wanted = world.all_contents(1)
    wanted = wanted[wanted[:, 2] == world.SHAPES.index(shape)].repeat(2, 1)[:limit]
    pictures = generate(pipeline, [world.caption(row) for row in wanted], seed=9, batch_size=49)
    amounts = judge.measured_styles(network, pictures)
    plain = (amounts[:, world.STYLES.index("gloss")] < 0.3) & (amounts[:, world.STYLES.index("shadow")] < 0.3)
    return geometry.summary(pictures[plain], measure)


def _pipeline_vae(out):
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(out / "pipeline" / "vae", dtype=torch.float32).eval()


def _rounded(value):
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def save_grid(pictures, path, columns=8, scale=2):
    """Writes [(picture [3, H, W] in [0, 1], prompt), ...] as one image, with each prompt under its picture."""
    from PIL import Image, ImageDraw, ImageFont

    side, label = world.SIZE * scale, 34
    sheet = Image.new("RGB", (columns * (side + 8), math.ceil(len(pictures) / columns) * (side + label)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for i, (picture, prompt) in enumerate(pictures):
        left, top = i % columns * (side + 8), i // columns * (side + label)
        pixels = (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        sheet.paste(Image.fromarray(pixels).resize((side, side), Image.BICUBIC), (left, top))
        what, where = prompt.removesuffix(" background").split(" on ")
        pen.text((left + 2, top + side + 2), f"{what}\non {where}", fill="black", font=font)
    sheet.save(path)
