"""Says what training large models needs with packed and with streaming weights: about an hour on a CPU.

    python scripts/bench/large_models.py                            every model, prints a table
    python scripts/bench/large_models.py --models sd15,sdxl         some of them
    python scripts/bench/large_models.py --json large_models.json   also writes every figure, after each forecast

No weights and no GPU are needed, because the figures are those of `--plan`: the training code runs on tensors without
data. A training step has one sample, a LoRA and HPSv2.1 as its reward. The presets are those of config/models.py, and
`hps` in bfloat16 for Stable Diffusion 1.5. Their estimator draws a random number of sampler steps with gradient.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from tqdm import tqdm

from alignprop.memory.forecast import GIB, Forecast, forecast
from alignprop.memory.planner import skeletons
from alignprop.settings.options import memory_policy
from alignprop.settings.resolve import resolve
from config import align_prop, models
from scripts.bench.tables import markdown

BFLOAT16 = {"hps.dtype": "bfloat16"}  # in the presets the reward is in float32
INT4 = {
    **BFLOAT16,
    "pretrained.quantize": "int4",
    "pretrained.quantize_text_encoders": "int4",
    "quantize_rewards": "int4",
}
ON_HOST = {"memory.decode_activations": "host"}
# Each way to train: the memory policy, and the fields of the configuration that differ from the preset.
WAYS = {
    "as the preset says, `smallest`": ("smallest", {}),
    "int4, on the device": ("balanced", {**INT4, "memory.block_checkpointing": True}),
    "int4, `smallest`": ("smallest", INT4),
    "int4, `smallest`, decode's activations on the host": ("smallest", INT4 | ON_HOST),
    "bfloat16, `streaming`": ("streaming", BFLOAT16),
    "bfloat16, `streaming`, decode's activations on the host": ("streaming", BFLOAT16 | ON_HOST),
}
PRESETS = {
    "sd15": align_prop.hps,
    "sdxl": models.sdxl,
    "sd3": models.sd3,
    "flux2": models.flux2,
    "z_image": models.z_image,
    "flux": models.flux,
}


def plan(preset: str, way: str) -> Forecast:
    """Returns the forecast of a training step of the preset, with one sample in a micro-batch."""
    policy, changes = WAYS[way]
    c = PRESETS[preset]()
    c.mixed_precision, c.memory_policy, c.per_gpu_capacity = "bf16", policy, 1
    c.update_from_flattened_dict(changes)
    c = resolve(c, 1)
    return forecast(skeletons(c), c, policy, memory_policy(c), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(PRESETS), help=f"of {', '.join(PRESETS)}; default all")
    parser.add_argument("--json", type=Path, help="file for every figure, written after each forecast")
    options = parser.parse_args()
    names = options.models.split(",")
    if unknown := [name for name in names if name not in PRESETS]:
        parser.error(f"--models = {unknown[0]} is not one of {', '.join(PRESETS)}")
    torch.set_num_threads(1)
    rows = []
    for name, way in tqdm([(name, way) for name in names for way in WAYS], disable=None):
        found = plan(name, way)
        rows.append({
            "model": name, "way": way, "peak": found.peak, "phase": found.phase, "flops": found.flops,
            "operators": found.operators, "moved": found.moved + found.streamed,
        })  # fmt: skip
        if options.json:
            options.json.write_text(json.dumps(rows, indent=2) + "\n")
    print(table(rows))


def table(rows: list[dict]) -> str:
    """Returns a Markdown table with one line for each model and way."""
    header = ["model", "way", "peak GiB", "in phase", "TFLOP", "thousand operators", "GiB moved"]
    lines = [
        [
            row["model"], row["way"], f"{row['peak'] / GIB:.2f}", row["phase"], f"{row['flops'] / 1e12:.0f}",
            f"{row['operators'] / 1e3:.0f}", f"{row['moved'] / GIB:.1f}",
        ]
        for row in rows
    ]  # fmt: skip
    return markdown(header, lines)


if __name__ == "__main__":
    main()
