"""The combinations of values that cannot run, each refused with one line before anything is loaded."""

from ml_collections import ConfigDict

from alignprop.settings.errors import ConfigError
from alignprop.settings.sizes import picture_sizes

POLYNOMIAL_END = 1e-7  # diffusers' own


def check_combinations(c: ConfigDict) -> None:
    """Checks the values that the user has set, before any is derived.

    Raises:
        ConfigError: they cannot run together.
    """
    _check_weights(c)
    _check_sampling(c)
    if c.task == "train":
        _check_training(c)
    if c.task == "train" and c.algorithm == "ddpo":
        _check_ddpo(c)
    if c.task == "evaluate_soup":
        _check_soup(c)


def _check_weights(c: ConfigDict) -> None:
    if c.pretrained.quantize and not c.use_lora:
        raise ConfigError(
            f"pretrained.quantize = {c.pretrained.quantize!r} needs use_lora = True: only frozen weights can be packed"
        )
    if c.pretrained.quantize and c.task == "train" and c.compile:
        raise ConfigError(
            f"compile = True needs pretrained.quantize = '', which is {c.pretrained.quantize!r}: torch.compile would "
            "keep the unpacked weights for the backward pass"
        )
    if c.train_text_encoder and not c.use_lora:
        raise ConfigError("train_text_encoder = True needs use_lora = True: a text encoder is trained by a LoRA only")
    if c.train_text_encoder and c.algorithm == "ddpo":
        raise ConfigError("train_text_encoder = True needs algorithm = 'align_prop': DDPO trains the denoiser alone")


def _check_sampling(c: ConfigDict) -> None:
    count = max(len(picture_sizes(c.resolution)), 1)
    if c.task in ("guide", "explore") and count > 1:
        raise ConfigError(f"resolution = {c.resolution!r} must be one size for task = {c.task!r}")
    check_multiple("num_eval_images", c.num_eval_images, count, f"the {count} sizes of resolution = {c.resolution!r}")
    if c.guide.window[0] >= c.guide.window[1]:
        raise ConfigError(f"guide.window = {tuple(c.guide.window)} must be (from, to) with from < to")
    if c.guidance_interval[0] >= c.guidance_interval[1]:
        raise ConfigError(f"guidance_interval = {tuple(c.guidance_interval)} must be (from, to) with from < to")


def _check_training(c: ConfigDict) -> None:
    if c.kl_coeff and not c.use_lora:
        raise ConfigError(f"kl_coeff = {c.kl_coeff} needs use_lora = True: without its adapter the model is the base")
    if c.train.lr_schedule == "polynomial" and c.train.learning_rate <= POLYNOMIAL_END:
        raise ConfigError(
            f"train.learning_rate = {c.train.learning_rate} must be greater than {POLYNOMIAL_END}, where "
            "train.lr_schedule = 'polynomial' ends"
        )
    if c.train.prefix_cache > 1 and c.compile:
        raise ConfigError(f"train.prefix_cache = {c.train.prefix_cache} needs compile = False, or 1")
    if c.loss != "maximise" and c.loss_target is None:
        raise ConfigError(f"loss = {c.loss!r} needs loss_target, in units of the reward")


def _check_ddpo(c: ConfigDict) -> None:
    if not c.eta and (c.train.sampler or c.sampler) == "ddim":
        raise ConfigError(
            "eta = 0 must be greater than 0 if algorithm = 'ddpo', which needs random steps; its presets have 1.0"
        )
    if c.train.total_samples_per_epoch == 1:
        raise ConfigError(
            "train.total_samples_per_epoch = 1 must be at least 2 if algorithm = 'ddpo', which compares a sample "
            "with others"
        )


def _check_soup(c: ConfigDict) -> None:
    if not c.resume_from:
        raise ConfigError("resume_from is empty; evaluate_soup needs the checkpoint that mixing_coef_1 multiplies")
    if not c.allow_extrapolation and not all(0 <= x <= 1 for x in c.mixing_coef_1):
        raise ConfigError(
            f"mixing_coef_1 = {tuple(c.mixing_coef_1)}: each coefficient must be from 0 to 1, unless "
            "allow_extrapolation = True"
        )


def check_memory(c: ConfigDict) -> None:
    """Checks the fields of `memory` after those that are None have got the policy's values.

    Raises:
        ConfigError: the policy cannot run with the other fields.
    """
    memory = c.memory
    if memory.residency in (None, "all"):
        return
    where = f"memory.residency = {memory.residency!r}"
    if memory.keep_steps:
        raise ConfigError(
            f"memory.keep_steps = {memory.keep_steps} must be 0 where {where}: kept graphs would "
            "hold the weights that leave the device"
        )
    if not c.use_lora and (c.task == "train" or memory.residency == "stream"):
        raise ConfigError(f"{where} needs use_lora = True: only frozen weights can leave the device")
    if memory.residency == "stream" and c.compile:
        raise ConfigError(f"{where} needs compile = False")


def check_multiple(field: str, value: int, unit: int, unit_name: str) -> None:
    """Raises a ConfigError with the nearest multiples if the value of a field is no multiple of `unit`."""
    if value % unit:
        below, above = value // unit * unit, (value // unit + 1) * unit
        nearest = f"{below} or {above}" if below else above
        raise ConfigError(f"{field} = {value} is not a multiple of {unit_name}; nearest: {nearest}")


def check_truncation(c: ConfigDict, steps: int) -> None:
    """Checks the fields that count the steps of the chain; `steps` is the number of its network calls.

    Raises:
        ConfigError: a field names a step that the chain does not have.
    """
    first, minmax = c.trunc_backprop_timestep, c.truncated_backprop_minmax
    name = (
        "num_inference_steps" if c.train.num_inference_steps == c.num_inference_steps else "train.num_inference_steps"
    )
    if steps != c.train.num_inference_steps:
        name = f"the number of network calls of train.sampler = {c.train.sampler!r}"
    if first is not None and not 0 <= first < steps:
        raise ConfigError(f"trunc_backprop_timestep = {first} must be from 0 to {name} - 1 = {steps - 1}")
    if minmax is not None and (len(minmax) != 2 or not 0 <= minmax[0] < minmax[1] <= steps):
        raise ConfigError(
            f"truncated_backprop_minmax = {tuple(minmax)} must be (low, high) with 0 <= low < high <= {name} = {steps}"
        )
