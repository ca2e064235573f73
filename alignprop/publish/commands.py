"""The commands `alignprop export`, `push` and `film`, which export a LoRA, publish a run and film it."""

import argparse
from pathlib import Path

from alignprop.settings.errors import ConfigError
from alignprop.settings.fields import FIELDS

EXPORT = """A trained LoRA for other tools.

    alignprop export logs/my_run/checkpoints/best my_lora.safetensors --format kohya
    alignprop export logs/my_run my_model --format merged

- kohya: for ComfyUI, the Stable Diffusion web UI and its relatives, kohya's own scripts, and diffusers;
  alignprop/lora/kohya_names.py lists which tools read the files of which models
- diffusers: for pipelines' `load_lora_weights`, without the header that other tools do not know
- merged: a diffusers pipeline's folder, the base model with the LoRA in its weights

--scale makes the LoRA weaker or stronger, as lora_scale does in an evaluation. --mix_with exports a mixture of two
checkpoints, as evaluate_soup makes it with soup_mode="delta":

    alignprop export logs/run_1 soup.safetensors --format kohya --mix_with logs/run_2 --mixing_coef 0.25

With --verify what was written is read again, by diffusers too, and each layer's weight change compared with the
checkpoint's.
"""

PUSH = """Uploads a run to the Hugging Face hub: its best weights, a model card, curves and pictures.

    alignprop push logs/my_run --repo user/name --private

The token is that of HF_TOKEN or of `hf auth login`. The run may be finished or not; only its folder is needed.
"""

FILM = """Writes a film of a run: pictures of the same prompts and noise at every evaluation, from the base model on.

    alignprop film logs/my_run my_run.mp4

An MP4 needs the package's extra `video`. Files that end in .gif or .webp need nothing more.
"""


def export() -> None:
    """Runs `alignprop export` and scripts/export_lora.py with the command-line arguments of the process.

    Raises:
        ConfigError: `export_lora` fails.
    """
    parser = _parser(EXPORT)
    parser.add_argument("checkpoint", help="a checkpoint or run folder, or a LoRA file of any origin")
    parser.add_argument("out", help="the .safetensors file to write; with --format merged a folder")
    parser.add_argument("--format", required=True, help="kohya, diffusers or merged")
    parser.add_argument("--base", default="", help="pipeline folder or hub name; default the run's own model")
    parser.add_argument("--dtype", default="", help="float32, float16 or bfloat16; default float32; merged: the base's")
    parser.add_argument("--verify", action="store_true", help="read again what was written, and compare")
    parser.add_argument("--scale", type=float, default=1.0, help="strength of the LoRA in the export; default 1")
    parser.add_argument("--mix_with", default="", metavar="CHECKPOINT", help="export a mixture with this one")
    parser.add_argument("--mixing_coef", type=float, help="share of the first checkpoint in the mixture; default 0.5")
    parser.add_argument("--force", action="store_true", help="overwrite an existing export")
    options = parser.parse_args()
    from alignprop.publish.export import export_lora  # This takes seconds, which --help should not wait for.

    check = export_lora(
        options.checkpoint, options.out, options.format, base=options.base, dtype=options.dtype, force=options.force,
        verify=options.verify, scale=options.scale, mix_with=options.mix_with, mixing_coef=options.mixing_coef,
    )  # fmt: skip
    print(f"{options.out}: {check or 'written'}")


def push() -> None:
    """Runs `alignprop push` and scripts/push_to_hub.py with the command-line arguments of the process.

    Raises:
        ConfigError: --repo is not "user/name"; or `read_run`, `check_hub` or the upload fails.
    """
    parser = _parser(PUSH)
    parser.add_argument("run", type=Path, help="its folder")
    parser.add_argument("--repo", required=True, help="user/name; created if it does not exist")
    parser.add_argument("--private", action="store_true", help="create a private repository")
    options = parser.parse_args()
    rule = FIELDS["hub.repo"].rule
    if not options.repo or not rule.accepts(options.repo):
        raise ConfigError(f"--repo = {options.repo!r} must be {rule.wanted.removeprefix('empty or ')}")
    from alignprop.publish.hub import check_hub
    from alignprop.publish.hub import push as upload
    from alignprop.publish.run_folder import read_run  # This loads torch, which takes seconds.

    read_run(options.run)  # This finds mistakes in the folder without the network.
    check_hub(options.repo, options.private, "--repo")
    print(f"uploaded to {upload(options.run, options.repo, options.private, '--repo')}")


def film() -> None:
    """Runs `alignprop film` with the command-line arguments of the process.

    Raises:
        ConfigError: the folder is not that of a run, or `write_film` fails.
    """
    parser = _parser(FILM)
    parser.add_argument("run", type=Path, help="its folder; the run may be finished or not")
    parser.add_argument("out", type=Path, help="the file to write: .mp4, .gif or .webp")
    parser.add_argument("--pictures", type=int, default=8, help="at most so many pictures are shown; default 8")
    parser.add_argument("--seconds", type=float, default=0.6, help="for each evaluation; default 0.6")
    options = parser.parse_args()
    if options.pictures < 1:
        parser.error(f"--pictures = {options.pictures} must be at least 1")
    if not 0.05 <= options.seconds <= 60:
        parser.error(f"--seconds = {options.seconds} must be from 0.05 to 60")
    if not (options.run / "config.json").is_file():
        raise ConfigError(f"{str(options.run)!r} is not a run folder: it has no config.json")
    from alignprop.evaluation.report.film import write_film  # These load torch, which takes seconds.
    from alignprop.evaluation.report.source import read_run as read_evaluations
    from alignprop.runs.tracking import MetricsLog

    rows = MetricsLog(options.run / "metrics.jsonl").rows()
    count = write_film(read_evaluations(options.run, rows, []), options.out, options.pictures, options.seconds)
    print(f"{options.out}: {count} evaluations")


def _parser(text: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
