"""Presets of DDPO, the policy gradient (arXiv 2305.13301). A preset states only how it differs from `base`.

    accelerate launch main.py --config config/ddpo.py:compressibility

Fields are those of config/align_prop.py. An epoch samples `train.total_samples_per_epoch` pictures and makes
`ddpo.inner_epochs` × `train.total_samples_per_epoch` / `train.total_batch_size` optimizer updates with them; it is one
step of the run.
"""

from ml_collections import ConfigDict

from alignprop.settings.errors import one_of
from config import align_prop


def base() -> ConfigDict:
    """The hyper-parameters of the authors' PyTorch code, with a LoRA, on Stable Diffusion 1.5."""
    c = align_prop.base()
    c.algorithm = "ddpo"
    c.eta = 1.0
    c.guidance_scale = 5.0
    c.num_epochs = 100
    c.save_freq = 20
    c.eval_freq = 10
    c.train.learning_rate = 3e-4
    c.train.adam_weight_decay = 1e-4
    c.train.max_grad_norm = 1.0
    return c


def aesthetic() -> ConfigDict:
    """LAION aesthetic score of animals."""
    return base()


def compressibility() -> ConfigDict:
    """Small JPEG files: a reward without gradient."""
    c = base()
    c.reward_fn = "jpeg_compressibility"
    return c


def incompressibility() -> ConfigDict:
    """Large JPEG files."""
    c = base()
    c.reward_fn = "jpeg_incompressibility"
    return c


def tiny() -> ConfigDict:
    """The bundled model and the quickstart's reward, on a CPU; 0.09 processor seconds a sample.

    Trained on the first of 5 steps alone, whose gradient is the least noisy: those of two sets of 128 samples have a
    cosine of 0.55 there, of 0.10 to 0.15 at the next three, and of 0.03 over all five, which the last one outshouts.
    """
    c = align_prop.use_tiny(base())
    c.reward_fn = "aesthetic:1,clip:40"
    c.num_inference_steps = 20
    c.num_epochs = 25
    c.save_freq = c.eval_freq = 5
    c.per_gpu_capacity = 16
    c.num_eval_images, c.num_eval_prompts, c.max_vis_images = 48, 24, 12
    c.train.total_samples_per_epoch = 64
    c.train.total_batch_size = 32
    c.train.learning_rate = 4e-3
    c.train.num_inference_steps = 5
    c.ddpo.min_noise = 0.95
    c.ddpo.clip_range = 0.02
    c.ddpo.per_prompt_buffer = 0  # of 333 prompts few come twice
    return c


def tiny_compressibility() -> ConfigDict:
    """Small JPEG files of the bundled model's pictures."""
    c = tiny()
    c.reward_fn = "jpeg_compressibility"
    return c


def tiny_incompressibility() -> ConfigDict:
    """Large JPEG files of the bundled model's pictures."""
    c = tiny()
    c.reward_fn = "jpeg_incompressibility"
    return c


PRESETS = {
    preset.__name__: preset
    for preset in (
        aesthetic, compressibility, incompressibility, tiny, tiny_compressibility, tiny_incompressibility
    )
}  # fmt: skip


def get_config(preset: str = "tiny") -> ConfigDict:
    """What `--config config/ddpo.py:<preset>` calls."""
    config = PRESETS[one_of("preset", preset, PRESETS)]()
    config.preset = preset
    return config
