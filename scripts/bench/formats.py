"""Measures what the formats of frozen weights do to gradients and to an alignment: about an hour on a CPU.

    python scripts/bench/formats.py --gradients              gradients only, a minute
    python scripts/bench/formats.py --json formats.json      also trains the bundled model on each format, three seeds

For each format the first table has, relative to float32 weights, the error of the output of one network call, and the
cosine and the ratio of norms of the gradient with respect to the input and to a LoRA. The networks are random ones with
the shapes of FLUX's and of SDXL's denoiser, and the bundled model's.

The second table has the reward of the pictures in training and of held-out pictures, with preset `quickstart_fast` and
the denoiser and the text encoder in each format, and the independent judge's measures at the end: the mean over the
seeds, with its standard error. The rewards and the judge are not quantised.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F

from alignprop.lora.factors import add_lora, trainable_parameters
from alignprop.models.formats import FORMATS
from alignprop.models.loading import load_model
from alignprop.models.packed import pack, packable
from alignprop.models.products import multiply_in_8_bits
from alignprop.trainer import AlignPropTrainer
from config.align_prop import TINY, get_config
from scripts.bench.tables import markdown
from tests.helpers.shaped import flux_shaped, gradients, normal, random_network, sdxl_shaped

SHOWN = (1, 2, 4, 6, 8)  # the optimizer steps whose reward is shown
JUDGE = "rewards.tiny_judge:"
ALSO_PRODUCTS = " products"  # after the name of a format: the layers multiply in it too
PRODUCTS = tuple(name + ALSO_PRODUCTS for name in ("int8", "fp8"))


def networks():
    """Yields (name, a function that makes the network anew, a function of it that returns output and gradients)."""
    for name, facts in (("FLUX-shaped", flux_shaped(16, 2)), ("SDXL-shaped", sdxl_shaped(128, 2))):
        _, x = random_network(facts)
        yield name, lambda facts=facts: with_lora(random_network(facts)[0]), lambda network, x=x: gradients(network, x)

    def bundled_gradients(model):
        x = normal(2, *model.latent_shape, seed=1).requires_grad_()
        y = model.predict(x, torch.tensor([400.0, 400.0]), model.branches(model.encode_prompts(PROMPTS), 1.0)[-1])
        trained = trainable_parameters(model.denoiser).values()
        found = torch.autograd.grad(y, [x, *trained], normal(*y.shape, seed=2))
        return y.detach(), torch.cat([g.flatten() for g in found])

    def bundled():
        model = load_model(str(TINY / "pipeline"))
        with_lora(model.denoiser)
        return model

    yield "bundled model", bundled, bundled_gradients


PROMPTS = ["one red circle on a blue background", "two green squares on a white background"]


def with_lora(network):
    """Adds a LoRA that is not zero, so that both of its factors have a gradient."""
    add_lora(network, 4, 4.0, ["to_q", "to_k", "to_v", "to_out.0"], seed=0)
    for i, (name, parameter) in enumerate(trainable_parameters(network).items()):
        if "lora_B" in name:
            parameter.data = normal(*parameter.shape, seed=i) / 20
    return network


def compare_gradients() -> list[dict]:
    rows = []
    for name, make, differentiate in networks():
        y, expected = differentiate(make())
        for kind in (*FORMATS, *PRODUCTS):
            network = make()
            layers = packable(getattr(network, "denoiser", network))
            pack(layers, FORMATS[kind.removesuffix(ALSO_PRODUCTS)])
            if kind in PRODUCTS:
                multiply_in_8_bits(layers)
            ours, found = differentiate(network)
            rows.append(
                {
                    "network": name,
                    "format": kind,
                    "output": ((ours - y).norm() / y.norm()).item(),
                    "cosine": F.cosine_similarity(found.double(), expected.double(), dim=0).item(),
                    "norm": (found.norm() / expected.norm()).item(),
                }
            )
    return rows


def align(kind: str, seed: int, folder: str) -> list[dict]:
    """Returns the rows of the optimizer steps and of the evaluations of a training run."""
    config = get_config("quickstart_fast")
    fmt = kind.removesuffix(ALSO_PRODUCTS)
    named = {f"pretrained.{name}": fmt for name in ("quantize", "quantize_text_encoders")}
    named["pretrained.quantize_products"] = kind in PRODUCTS
    own = {"seed": seed, "log_dir": folder, "run_name": f"{kind.replace(' ', '_') or 'plain'}_{seed}", "log_with": ""}
    config.update_from_flattened_dict({**named, **own})
    trainer = AlignPropTrainer(config)
    trainer.train()
    return [json.loads(line) for line in (trainer.run.folder / "metrics.jsonl").read_text().splitlines()]


def table_of(runs: dict[str, list[list[dict]]]) -> str:
    """Returns the table of the rewards in training, the held-out rewards, and the judge's measures at the end."""
    lines = []
    for kind, seeds in runs.items():
        steps = [{row["step"]: row["reward"] for row in rows if row["kind"] == "train"} for rows in seeds]
        ends = [[row for row in rows if row["kind"] == "eval"] for rows in seeds]
        found = [[of_seed[step] for of_seed in steps] for step in SHOWN]
        found += [[evaluations[end]["reward"] for evaluations in ends] for end in (0, -1)]
        found += [[e[-1]["rewards"][JUDGE + measure] for e in ends] for measure in ("rating", "obedience")]
        lines.append([kind or "float32", *map(mean, found)])
    named = [f"step {step}" for step in SHOWN]
    return markdown(["format", *named, "held-out before", "after", "rating", "obedience"], lines)


def mean(values: list[float]) -> str:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.2f} ± {error:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gradients", action="store_true", help="compare gradients only")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of training; default 0 1 2")
    parser.add_argument(
        "--formats", nargs="+", default=["", *FORMATS, *PRODUCTS], help="of training; default all and float32"
    )
    parser.add_argument("--json", type=Path, help="file for every measurement, written after each run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = compare_gradients()
    cells = [[r["network"], r["format"], *(f"{r[k]:.5f}" for k in ("output", "cosine", "norm"))] for r in rows]
    print(markdown(["network", "format", "error of the output", "cosine", "ratio of norms"], cells), flush=True)
    if options.gradients:
        return
    runs: dict[str, list[list[dict]]] = {kind: [] for kind in options.formats}
    with tempfile.TemporaryDirectory() as folder:
        for seed in options.seeds:
            for kind in options.formats:
                runs[kind].append(align(kind, seed, folder))
                if options.json:
                    options.json.write_text(json.dumps({"gradients": rows, "runs": runs}, indent=2) + "\n")
    print("\n" + table_of(runs))


if __name__ == "__main__":
    os.environ.setdefault("ACCELERATE_USE_CPU", "1")
    main()
