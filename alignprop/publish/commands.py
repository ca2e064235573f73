"""The tools of the command line: exporting a LoRA, publishing a run."""

import argparse
from pathlib import Path

from alignprop.settings.errors import ConfigError
from alignprop.settings.fields import FIELDS

EXPORT = """A trained LoRA for other tools.

    alignprop export logs/my_run/checkpoints/best my_lora.safetensors --format kohya
    alignprop export logs/my_run my_model --format merged

- kohya: for ComfyUI, the Stable Diffusion web UI and its relatives, kohya's own scripts, and diffusers;
  alignprop/lora/kohya_names.py says which of them reads which model's
- diffusers: for pipelines' `load_lora_weights`, without the header that other tools do not know
- merged: a diffusers pipeline's folder, the base model with the LoRA in its weights

With --verify what was written is read again, by diffusers too, and each layer's weight change compared with the
checkpoint's.
"""

PUSH = """Uploads a run to the Hugging Face hub: its best weights, a model card, curves and pictures.

    alignprop push logs/my_run --repo user/name --private

The token is that of HF_TOKEN or of `hf auth login`. The run may be finished or not; only its folder is needed.
"""


def export() -> None:
    """`alignprop export` and scripts/export_lora.py, with the arguments of the process.

    Raises:
        ConfigError: as `export_lora`.
    """
    parser = _parser(EXPORT)
    parser.add_argument("checkpoint", help="a checkpoint or run folder, or a LoRA file of any origin")
    parser.add_argument("out", help="the .safetensors file to write; with --format merged a folder")
    parser.add_argument("--format", required=True, help="kohya, diffusers or merged")
    parser.add_argument("--base", default="", help="pipeline folder or hub name; default the run's own model")
    parser.add_argument("--dtype", default="", help="float32, float16 or bfloat16; default float32; merged: the base's")
    parser.add_argument("--verify", action="store_true", help="read again what was written, and compare")
    parser.add_argument("--force", action="store_true", help="replace what is there")
    options = parser.parse_args()
    from alignprop.publish.export import export_lora  # takes seconds, which --help need not

    check = export_lora(
        options.checkpoint, options.out, options.format, base=options.base, dtype=options.dtype, force=options.force,
        verify=options.verify,
    )  # fmt: skip
    print(f"{options.out}: {check or 'written'}")


def push() -> None:
    """`alignprop push` and scripts/push_to_hub.py, with the arguments of the process.

    Raises:
        ConfigError: as `publish.hub.push`.
    """
    parser = _parser(PUSH)
    parser.add_argument("run", type=Path, help="its folder")
    parser.add_argument("--repo", required=True, help="user/name; made where it is not there yet")
    parser.add_argument("--private", action="store_true", help="nobody else sees it")
    options = parser.parse_args()
    rule = FIELDS["hub.repo"].rule
    if not options.repo or not rule.accepts(options.repo):
        raise ConfigError(f"--repo = {options.repo!r} must be {rule.wanted.removeprefix('empty or ')}")
    from alignprop.publish.hub import check_hub
    from alignprop.publish.hub import push as upload
    from alignprop.publish.run_folder import read_run  # with torch, which takes seconds

    read_run(options.run)  # mistakes here are found without the network
    check_hub(options.repo, options.private, "--repo")
    print(f"uploaded to {upload(options.run, options.repo, options.private, '--repo')}")


def _parser(text: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
