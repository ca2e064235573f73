"""Trains the bundled tiny text-to-image model from scratch on a CPU: one command, about two and a half hours.

    OMP_NUM_THREADS=1 python scripts/pretrain_tiny.py

Stages, in order:

    scenes      draw the training and test pictures, write the prompt lists
    judge       the independent classifier that measures the result
    clip        CLIP; its text tower is final after this stage, its image tower is not
    vae         the autoencoder, and the scenes' latents
    unet        the denoiser, by far the longest
    unet_longer the denoiser again, from its own weights
    images      the rest of the CLIP's image tower
    decoder     the rest of the autoencoder's decoder
    decoder_longer  the decoder again, on latents as the denoiser makes them
    aesthetic   the aesthetic head on the CLIP's image embedding
    pipeline    put the parts together as a diffusers pipeline
    evaluate    judge generated pictures, write evaluation.json and samples.png

A finished stage is skipped, and an interrupted one continues from its last save, so the same command resumes. With a
second core, ``--stages judge,clip`` may run at the same time as ``--stages vae``, and
``--stages images,decoder,aesthetic`` at the same time as ``--stages unet``. alignprop/assets/tiny/README.md describes
the result.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that the file runs as a script, from any folder

from scripts.tiny import aesthetic, clip, decoder, evaluate, judge, scenes, unet, vae, world  # noqa: E402

TINY = ROOT / "alignprop" / "assets" / "tiny"
STAGES = (
    "scenes", "judge", "clip", "vae", "unet", "unet_longer", "images", "decoder", "decoder_longer", "aesthetic",
    "pipeline", "evaluate",
)  # fmt: skip


def run_stage(name: str, work: Path, out: Path, scale: float, unet_minutes: float) -> None:
    """Runs one stage. ``scale`` multiplies every number of steps and of drawn scenes."""
    scaled = lambda number: max(4, int(number * scale))  # noqa: E731
    if name == "scenes":
        scenes.make(work, scaled(48000), scaled(3000), scaled(16000))
        for filename, held_out in (("prompts_train.txt", False), ("prompts_heldout.txt", True)):
            (out / filename).write_text("\n".join(world.prompts(held_out)) + "\n")
    elif name == "judge":
        judge.train(work, out, scaled(1300))
    elif name == "clip":
        clip.train(work, out, scaled(2000))
    elif name == "vae":
        vae.train(work, scaled(3600))
        vae.encode_scenes(work)
    elif name == "unet":
        unet.train(work, out, scaled(8000), unet_minutes)
    elif name == "unet_longer":
        unet.train_longer(work, out, scaled(20000), unet_minutes)
    elif name == "images":
        clip.finish_images(work, out, scaled(2000))
    elif name == "decoder":
        vae.finish_decoder(work, scaled(3000))
    elif name == "decoder_longer":
        decoder.make_latents(work, out, scaled(2600), scaled(2400))
        decoder.train(work, scaled(7000))
    elif name == "aesthetic":
        aesthetic.train(work, out, scaled(1500))
    elif name == "pipeline":
        unet.save_pipeline(work, out, unet.load(work, "unet_longer"))
    elif name == "evaluate":
        print(json.dumps(evaluate.evaluate(work, out, limit=None if scale >= 1 else 2), indent=2))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=TINY, help="where the model is written")
    parser.add_argument("--work", type=Path, default=ROOT / "work" / "tiny", help="drawn scenes, states of training")
    parser.add_argument("--stages", default=",".join(STAGES), help="comma-separated; default: all, in order")
    parser.add_argument("--unet_minutes", type=float, default=65.0, help="upper bound of the longest stage")
    parser.add_argument("--steps_scale", type=float, default=1.0, help="multiplies all steps and data; tests use it")
    options = parser.parse_args(arguments)
    chosen = options.stages.split(",")
    if unknown := [stage for stage in chosen if stage not in STAGES]:
        parser.error(f"stages: {unknown[0]!r} is not one of {', '.join(STAGES)}")
    options.work.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # the tensors are small, so a second thread costs more than it gives
    for stage in chosen:
        done = options.work / f"{stage}.done"
        if done.exists():
            print(f"{stage}: done before ({done}), skipped")
            continue
        run_stage(stage, options.work, options.out, options.steps_scale, options.unet_minutes)
        done.touch()


if __name__ == "__main__":
    main()
