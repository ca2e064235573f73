"""Writes the model card of a run from its folder, for people who find its weights on the hub.

The text is in card_template.md, a template for huggingface_hub's ModelCard. This file fills in the facts.
"""

import json
import math
import os
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from alignprop.evaluation.stop_when import MEASURES
from alignprop.models import FAMILIES, OLDEST
from alignprop.models.configs import find_config
from alignprop.publish.run_folder import RunFolder
from alignprop.settings.errors import ConfigError
from alignprop.settings.fields.rules import is_repo_name
from alignprop.settings.fields.sampling import PLAN_FIELDS
from alignprop.settings.sizes import picture_sizes

TEMPLATE = Path(__file__).with_name("card_template.md")
# The name and the arXiv number of each algorithm.
METHODS = {
    "align_prop": ("AlignProp, reward backpropagation", "2310.03739"),
    "ddpo": ("DDPO, a policy gradient", "2305.13301"),
}
# The fields that describe an estimator, if they are not fields of `plan`.
_ESTIMATOR_FIELDS = {
    "truncated": ("trunc_backprop_timestep",),
    "randomized": ("truncated_backprop_minmax",),
    "per_step": ("truncated_backprop_minmax",),
}


def picture_name(number: int) -> str:
    """Returns the path of a gallery picture in the repository."""
    return f"images/{number}.png"


def model_card(run: RunFolder, repo: str, prompts: list[str]) -> str:
    """Returns the text of README.md.

    Args:
        run: the run folder.
        repo: the repository, "user/name".
        prompts: the prompts of the gallery's pictures, which are at `picture_name(0)` and so on.
    """
    c, base = run.config, _base_model(run.config)
    method, paper = METHODS[c["algorithm"]]
    tags = ["text-to-image", *(["lora"] if run.has_lora else []), c["algorithm"].replace("_", ""), "reward"]
    widget = [{"text": prompt, "output": {"url": picture_name(n)}} for n, prompt in enumerate(prompts)]
    data = ModelCardData(
        base_model=base if is_repo_name(base) else None,  # The hub accepts only names of its own.
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=tags,
        widget=widget or None,
    )
    card = ModelCard.from_template(
        data, template_path=str(TEMPLATE), title=repo.split("/")[1], has_lora=run.has_lora, base=_link(base),
        reward=_reward(run), method=method, paper=paper, has_gallery=bool(prompts), usage=usage(run, repo, prompts),
        results=_results(run), pictures=_pictures(run), settings=_settings(run), command=c.get("command"),
        num_eval_images=c["num_eval_images"], eval_prompts=_public(c["eval_prompt_fn"]),
    )  # fmt: skip
    return card.content


def usage(run: RunFolder, repo: str, prompts: list[str]) -> str:
    """Returns Python code that makes a picture with the weights in `repo`."""
    c, base = run.config, _base_model(run.config)
    pipeline_class, load = "AutoPipelineForText2Image", "from_pretrained"
    if base.endswith((".safetensors", ".ckpt")):
        pipeline_class, load = FAMILIES[OLDEST].pipeline, "from_single_file"
    revision = f', revision="{c["pretrained.revision"]}"' if c.get("pretrained.revision") else ""
    options = ", ".join(f"{name}={value}" for name, value in _call_options(c).items())
    image = f"image = pipeline({json.dumps((prompts or ['a cat'])[0], ensure_ascii=False)}, {options}).images[0]"
    if run.has_lora:
        return "\n".join([
            f"from diffusers import {pipeline_class}\n",
            f'pipeline = {pipeline_class}.{load}("{base}"{revision})',
            f'pipeline.load_lora_weights("{repo}")',
            image,
        ])  # fmt: skip
    denoiser_class = json.loads((run.checkpoint / "denoiser" / "config.json").read_text())["_class_name"]
    name = "unet" if "UNet" in denoiser_class else "transformer"
    return "\n".join([
        f"from diffusers import {pipeline_class}, {denoiser_class}\n",
        f'{name} = {denoiser_class}.from_pretrained("{repo}", subfolder="denoiser")',
        f'pipeline = {pipeline_class}.{load}("{base}"{revision}, {name}={name})',
        image,
    ])  # fmt: skip


def _call_options(c: dict) -> dict[str, object]:
    """Returns the arguments with which the pipeline makes pictures as the run does, in the largest of its sizes."""
    try:
        family = find_config(c["pretrained.model"], c.get("pretrained.revision"))["family"]
    except ConfigError:  # The model is a single file, or is on another machine.
        family = OLDEST
    options = {
        "num_inference_steps": c["num_inference_steps"],
        "guidance_scale": c["guidance_scale"] + FAMILIES[family].guidance_offset,
    }
    if c.get("true_cfg_scale", 1) != 1:
        options |= {"true_cfg_scale": c["true_cfg_scale"], "negative_prompt": "''"}
    if c.get("negative_prompt"):
        options["negative_prompt"] = json.dumps(c["negative_prompt"], ensure_ascii=False)
    if c.get("resolution"):
        options |= dict(zip(("height", "width"), picture_sizes(c["resolution"])[0], strict=True))
    return options


def _results(run: RunFolder) -> dict:
    """Returns the results of the evaluations as the heads and the rows of a table; {} if there was no evaluation."""
    if not run.evaluations:
        return {}
    first, last = run.evaluations[0], run.evaluations[-1]
    own = [row for row in run.evaluations if row["step"] == run.step]
    rows = {row["step"]: row for row in (first, *own, last)}
    values = {step: row["rewards"] | {m: row[m] for m in MEASURES if m in row} for step, row in rows.items()}
    names = list(dict.fromkeys(name for measures in values.values() for name in measures))
    heads = [f"step {step}" + (" (this repository)" if step == run.step else "") for step in rows]
    cells = [[f"`{name}`", *(_number(measures.get(name)) for measures in values.values())] for name in names]
    return {"heads": ["", *heads], "rows": cells, "last_step": last["step"]}


def _pictures(run: RunFolder) -> dict:
    """Returns which pictures the run has, and the optimizer step of its weights."""
    return {
        "before_after": (run.folder / "before_after.png").exists(),
        "grid": run.grid.name if run.has_own_grid else "",
        "curves": (run.folder / "curves.png").exists(),
        "step": run.step,
    }


def _sampling(c: dict) -> str:
    name, options = c.get("train.sampler", "ddim"), c.get("train.sampler_options")
    sampler = "" if name == "ddim" else f" of {name}" + (f" ({options})" if options else "")
    interval = tuple(c.get("guidance_interval", (0, 1)))
    where = "" if interval == (0, 1) else f" from {interval[0]:g} to {interval[1]:g} of the chain"
    guidance = f"guidance {c['guidance_scale']:g}{where}"
    return f"{c['train.num_inference_steps']} steps{sampler}, {guidance}, eta {c['eta']:g}"


def _settings(run: RunFolder) -> dict[str, str]:
    c, is_ddpo = run.config, run.config["algorithm"] == "ddpo"
    reached = max((row["step"] for row in run.rows if row["kind"] == "train"), default=run.step)
    planned = c["num_epochs"] * c["train.steps_per_epoch"]
    steps = f"{run.step}" if run.step == reached else f"{run.step} of the {reached} that were made"
    estimator = c["estimator"]
    fields = _ESTIMATOR_FIELDS.get(estimator) or [f"plan.{f}" for f, names in PLAN_FIELDS.items() if estimator in names]
    options = [f"{field.removeprefix('plan.')} = {c[field]}" for field in fields if c.get(field) is not None]
    trained = f"LoRA of rank {c['lora_rank']}, alpha {c['lora_alpha']:g}" if run.has_lora else "every weight"
    trained += ", also of the text encoder" if c.get("train_text_encoder") else ""
    versions = {name: value for name, value in c.items() if name.startswith("versions.")}
    settings = {
        "base model": _link(_base_model(c)),
        "frozen LoRAs, to be loaded as well": c.get("pretrained.loras") or "",
        "estimator": "" if is_ddpo else ", ".join([f"`{estimator}`", *options]),
        "reward": _reward(run),
        "loss": "" if is_ddpo else " ".join(str(c[f]) for f in ("loss", "loss_target") if c.get(f) is not None),
        "prompts": f"`{_public(c['prompt_fn'])}`",
        "optimizer steps" if not is_ddpo else "epochs": steps if reached >= planned else f"{steps}; {planned} planned",
        "samples per step" if not is_ddpo else "samples per epoch": str(
            c["train.total_samples_per_epoch" if is_ddpo else "train.total_batch_size"]
        ),
        "optimizer": f"{c['train.optimizer']}, {_learning_rate(c)}",
        "trained": trained,
        "sampling": _sampling(c),
        "picture sizes": str(c.get("resolution") or ""),
        "precision": c["mixed_precision"].replace("no", "fp32"),
        "seed": str(c["seed"]),
        "versions": ", ".join(f"{name.removeprefix('versions.')} {value}" for name, value in versions.items()),
    }
    return {name: value for name, value in settings.items() if value}


def _learning_rate(c: dict) -> str:
    schedule, warmup = c.get("train.lr_schedule", "constant"), c.get("train.lr_warmup_steps", 0)
    text = f"learning rate {c['train.learning_rate']:g}" + ("" if schedule == "constant" else f" ({schedule})")
    return text + (f", {warmup} updates of warm-up" if warmup else "")


def _reward(run: RunFolder) -> str:
    """Returns the reward of the configuration; if the trainer was given another one, the names in the metrics rows."""
    spec = run.config["reward_fn"]
    names = next((list(row["rewards"]) for row in reversed(run.rows) if row["kind"] == "train"), [])
    return f"`{spec if all(name in spec for name in names) else ','.join(names)}`"


def _base_model(c: dict) -> str:
    return _public(c["pretrained.model"])


def _public(name: str) -> str:
    """Returns a name unchanged, and only the last part of a path, because the rest means nothing to others."""
    is_path = os.path.exists(name) or not is_repo_name(name)
    return Path(name).name if is_path else name


def _link(base: str) -> str:
    return f"[{base}](https://huggingface.co/{base})" if is_repo_name(base) else f"`{base}` (not on the hub)"


def _number(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.4g}"
