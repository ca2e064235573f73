"""A trained LoRA for other tools.

    python scripts/export_lora.py logs/my_run/checkpoints/best my_lora.safetensors --format kohya
    python scripts/export_lora.py logs/my_run my_model --format merged

- kohya: for ComfyUI, the Stable Diffusion web UI and its relatives, sd-scripts, and diffusers;
  alignprop/lora/kohya_names.py says which of them reads which model's
- diffusers: for pipelines' `load_lora_weights`, without the header that other tools do not know
- merged: a diffusers pipeline's folder, the base model with the LoRA in its weights

With --verify what was written is read again, by diffusers too, and each layer's weight change compared with the
checkpoint's.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("DIFFUSERS_VERBOSITY", "critical")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from alignprop.stopping import plain_endings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a checkpoint or run folder, or a LoRA file in diffusers' or kohya's format")
    parser.add_argument("out", help="the .safetensors file to write; with --format merged a folder")
    parser.add_argument("--format", required=True, help="kohya, diffusers or merged")
    parser.add_argument("--base", default="", help="pipeline folder or hub name; default the run's own model")
    parser.add_argument("--dtype", default="", help="float32, float16 or bfloat16; default float32; merged: the base's")
    parser.add_argument("--verify", action="store_true", help="read again what was written, and compare")
    parser.add_argument("--force", action="store_true", help="replace what is there")
    options = parser.parse_args()
    with plain_endings():
        from alignprop.publish.export import export_lora  # takes seconds, which --help need not

        check = export_lora(
            options.checkpoint,
            options.out,
            options.format,
            base=options.base,
            dtype=options.dtype,
            force=options.force,
            verify=options.verify,
        )
        print(f"{options.out}: {check or 'written'}")


if __name__ == "__main__":
    main()
