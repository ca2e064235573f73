"""Presets of DDPO, the policy gradient (arXiv 2305.13301). A preset states only how it differs from `base`.

    accelerate launch main.py --config config/ddpo.py:compressibility

The fields are those of config/align_prop.py. An epoch is one step of the run. It samples
`train.total_samples_per_epoch` pictures and makes `ddpo.inner_epochs` × `train.total_samples_per_epoch` /
`train.total_batch_size` optimizer updates with them.
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
    """Trains for small JPEG files, which is a reward without a gradient."""
    c = base()
    c.reward_fn = "jpeg_compressibility"
    return c


def incompressibility() -> ConfigDict:
    """Trains for large JPEG files."""
    c = base()
    c.reward_fn = "jpeg_incompressibility"
    return c


def tiny() -> ConfigDict:
    """The bundled model and the quickstart's reward, on a CPU. A sample takes 0.09 processor seconds.

    Only the first of the 5 steps is trained on, because its gradient is the least noisy. The gradients of two sets of
    128 samples have a cosine of 0.55 at this step, and of 0.10 to 0.15 at the next three. Over all five steps the
    cosine is 0.03, because the large gradient of the last step dominates.
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
    c.ddpo.per_prompt_buffer = 0  # few of the 333 prompts are drawn twice
    return c


def tiny_compressibility() -> ConfigDict:
    """Trains the bundled model for small JPEG files."""
    c = tiny()
    c.reward_fn = "jpeg_compressibility"
    return c


def tiny_incompressibility() -> ConfigDict:
    """Trains the bundled model for large JPEG files."""
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
    """Returns the preset's configuration. `--config config/ddpo.py:<preset>` calls this function."""
    config = PRESETS[one_of("preset", preset, PRESETS)]()
    config.preset = preset
    return config
