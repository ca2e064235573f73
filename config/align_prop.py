"""Presets of reward back-propagation. A preset states only how it differs from `base`.

    accelerate launch main.py --config config/align_prop.py:hps --config.train.learning_rate=5e-4

Every field can be overridden on the command line like `learning_rate` above. A field that is None is derived after the
overrides. The file `config.json` in the run folder shows the resolved values.
"""

from functools import partial
from pathlib import Path

from ml_collections import ConfigDict

from alignprop.settings.defaults import default_config
from alignprop.settings.errors import one_of

TINY = Path(__file__).resolve().parent.parent / "alignprop" / "assets" / "tiny"


def base() -> ConfigDict:
    """AlignProp's published hyper-parameters (arXiv 2310.03739, appendix), on Stable Diffusion 1.5.

    They are the defaults of the fields in alignprop/settings/fields/. docs/config.md lists them.
    """
    return default_config()


def aesthetic() -> ConfigDict:
    """LAION aesthetic score of animals, with 10 as the target. The paper reports 5.73 → 8.94 in 7 epochs on 4 A100."""
    c = base()
    c.num_epochs = 7
    c.num_checkpoint_limit = 14
    c.loss = "target"
    c.loss_target = 10.0
    return c


def aesthetic_k1() -> ConfigDict:
    """`aesthetic` with gradient through the last sampler step alone, which is step 49 of 0 … 49."""
    c = aesthetic()
    c.estimator = "truncated"
    return c


def hps() -> ConfigDict:
    """Human Preference Score v2 on the prompts of its benchmark. The paper reports 0.274 → 0.330 on 4 A100."""
    c = base()
    c.num_epochs = 200
    c.save_freq = 4
    c.eval_freq = 4
    c.reward_fn = "hps"
    c.hps.version = "v2.0"  # the paper's version; v2.1 has another scale
    c.prompt_fn = "hps_v2_all"
    c.eval_prompt_fn = "eval_hps_v2_all"
    return c


def hps_k1() -> ConfigDict:
    """`hps` with gradient through the last sampler step alone, which is step 49 of 0 … 49."""
    c = hps()
    c.estimator = "truncated"
    return c


def lcm() -> ConfigDict:
    """`hps` on LCM-LoRA's chain of 4 network calls without guidance, with gradient through all of them."""
    c = hps()
    c.pretrained.loras = "latent-consistency/lcm-lora-sdv1-5"
    c.sampler = "LCM"
    c.num_inference_steps = 4
    c.guidance_scale = 1.0
    c.estimator = "full"
    return c


def hps_with(estimator: str) -> ConfigDict:
    """`hps` with another estimator. The preset has the name of the estimator, such as "draft_lv" or "refl"."""
    c = hps()
    c.estimator = estimator
    return c


def evaluate() -> ConfigDict:
    """Makes and scores pictures of a checkpoint (`--config.resume_from=…`) or, without it, of the base model."""
    c = hps()
    c.task = "evaluate"
    c.num_eval_images = 200
    c.num_eval_prompts = None
    return c


def evaluate_soup() -> ConfigDict:
    """Scores the LoRA c·resume_from + (1-c)·resume_from_2 for each c of mixing_coef_1, with all named rewards."""
    c = evaluate()
    c.task = "evaluate_soup"
    return c


def guide() -> ConfigDict:
    """Compares reward guidance while sampling with the plain model and, with `resume_from`, the fine-tuned one."""
    c = evaluate()
    c.task = "guide"
    c.num_eval_images = 32
    return c


def explore() -> ConfigDict:
    """Serves a page for the browser that shows base model, checkpoints and their mixture on prompts that you type."""
    c = evaluate()
    c.task = "explore"
    return c


def use_tiny(c: ConfigDict) -> ConfigDict:
    """Changes any preset to the bundled 64×64 model, its rewards and its prompts, on a CPU."""
    c.pretrained.model = str(TINY / "pipeline")
    c.mixed_precision = "no"
    c.num_inference_steps = 20
    c.guidance_scale = 3.0
    c.aesthetic.clip = c.clip.model = str(TINY / "clip")
    c.aesthetic.head_file = str(TINY / "aesthetic.safetensors")
    c.prompt_fn, c.eval_prompt_fn = "tiny_train", "tiny_heldout"
    c.eval_reward_fn = "aesthetic,clip,rewards.tiny_judge:rating,rewards.tiny_judge:obedience"
    return c


def quickstart() -> ConfigDict:
    """Trains the bundled model for a higher aesthetic score, in minutes on two CPU cores."""
    c = use_tiny(base())
    c.reward_fn = "aesthetic:1,clip:40"  # CLIP makes the pictures follow their prompts
    c.num_epochs = 3
    c.per_gpu_capacity = 8
    c.num_eval_images = 48
    c.num_eval_prompts = 24
    c.max_vis_images = 12
    c.train.total_batch_size = 8
    c.train.total_samples_per_epoch = 64
    c.train.learning_rate = 4e-3
    c.train.loss_coeff = 1.0
    c.train.max_grad_norm = 1.0
    c.train.adam_weight_decay = 1e-4
    return c


def quickstart_fast() -> ConfigDict:
    """`quickstart` in seconds, by 8 large steps through a chain of 3 steps of UniPC.

    The first steps go far, because the LoRA starts with larger weights than by default. The learning rate falls to 0.
    With a constant one, such steps break the pictures of some seeds.
    """
    c = quickstart()
    c.estimator = "full"
    c.memory_policy = "roomy"
    c.num_epochs = 1
    c.train.sampler = "UniPCMultistep"
    c.train.num_inference_steps = 3
    c.lora_initialization = "gaussian"
    c.train.total_samples_per_epoch = 64
    c.train.learning_rate = 2e-2
    c.train.lr_schedule = "linear"
    return c


def tiny_evaluate() -> ConfigDict:
    """`evaluate` on the bundled model."""
    c = use_tiny(evaluate())
    c.reward_fn = "aesthetic"
    return c


def tiny_guide() -> ConfigDict:
    """`guide` on the bundled model."""
    c = use_tiny(guide())
    c.reward_fn = "aesthetic:1,clip:40"
    return c


def tiny_soup() -> ConfigDict:
    """`evaluate_soup` on the bundled model."""
    c = use_tiny(evaluate_soup())
    c.reward_fn = "aesthetic"
    return c


def tiny_explore() -> ConfigDict:
    """`explore` on the bundled model."""
    c = use_tiny(explore())
    c.reward_fn = "aesthetic"
    return c


PRESETS = {
    preset.__name__: preset
    for preset in (
        aesthetic, aesthetic_k1, hps, hps_k1, lcm, evaluate, evaluate_soup, guide, explore,
        quickstart, quickstart_fast, tiny_evaluate, tiny_soup, tiny_guide, tiny_explore,
    )
} | {
    estimator: partial(hps_with, estimator)
    for estimator in ("draft_lv", "refl", "drtune", "sparse", "bridge", "lagrange", "leapalign")
}  # fmt: skip


def get_config(preset: str = "quickstart") -> ConfigDict:
    """Returns the preset's configuration. `--config config/align_prop.py:<preset>` calls this function."""
    config = PRESETS[one_of("preset", preset, PRESETS)]()
    config.preset = preset
    return config
