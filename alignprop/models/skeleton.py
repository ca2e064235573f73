"""Builds models from facts (models/configs.py): without weights for planning, or with random weights for measuring."""

from contextlib import contextmanager
from types import SimpleNamespace

import diffusers
import torch
import transformers
from diffusers.configuration_utils import FrozenDict

from alignprop.models import FAMILIES
from alignprop.models.base import ENCODERS, Model
from alignprop.settings.errors import ConfigError


def skeleton(facts: dict, dtype: torch.dtype, without=(), **options) -> Model:
    """Builds a model of any family on the meta device, where it has all its shapes and needs no memory.

    It cannot encode prompts.

    Args:
        facts: the result of `find_config`.
        dtype: the dtype of all weights.
        without: names of the components to leave out (`optional` in latent.py).
        options: further arguments of the family's class, such as `resolution`.

    Raises:
        ConfigError: the facts name a class that diffusers or transformers does not have, or do not fit this class.
    """
    return random_model(facts, dtype, "meta", without, **options)


def random_model(facts: dict, dtype: torch.dtype, device, without=(), **options) -> Model:
    """Builds the model as `skeleton` does, but on any device.

    On a real device the initialisers of diffusers and transformers draw its weights.
    """
    cls = FAMILIES[facts["family"]].model_class
    named = {"vae": facts["vae"], **dict(zip(ENCODERS, facts["text_encoders"], strict=False))}
    left_out = cls.modules_of(without)
    parts = {n: build_module(part, dtype, device) for n, part in named.items() if n not in left_out}
    denoiser = build_module(facts["denoiser"], dtype, device)
    parts["unet" if isinstance(denoiser, diffusers.UNet2DConditionModel) else "transformer"] = denoiser
    scheduler = _build(facts["scheduler"], diffusers, diffusers.SchedulerMixin)
    # This object has the parts of the model's diffusers pipeline, except the tokenizers.
    pipeline = SimpleNamespace(**parts, scheduler=scheduler, config=FrozenDict(facts.get("pipeline", {})))
    return cls(pipeline, **options)


def build_module(facts: dict, dtype: torch.dtype, device) -> torch.nn.Module:
    """Builds one module from the name of its class and its configuration."""
    with torch.device(device), _default_dtype(dtype):
        if hasattr(diffusers, facts["_class_name"]):
            module = _build(facts, diffusers, diffusers.ModelMixin)
        else:
            module = _build(facts, transformers, transformers.PreTrainedModel)
    # Some tables are float32 whatever the default dtype is. The `to` of the module's class would warn about that.
    return torch.nn.Module.to(module, dtype)


def _build(facts: dict, library, kind: type):
    name = facts["_class_name"]
    cls = getattr(library, name, None)
    if not (isinstance(cls, type) and issubclass(cls, kind)):
        raise ConfigError(f"{library.__name__} has no {kind.__name__} of the name {name!r}")
    options = {key: value for key, value in facts.items() if key != "_class_name"}
    try:
        if library is transformers:
            return cls(cls.config_class(**options))
        return cls.from_config(options)
    except Exception as error:  # a configuration that does not fit fails in many ways
        reason = next(iter(str(error).splitlines()), "")
        raise ConfigError(f"no {name} can be built from its configuration: {type(error).__name__}: {reason}") from error


@contextmanager
def _default_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
