"""Creates, replaces and checks the LoRA adapter of one network, a denoiser or a text encoder.

An adapter that does not fit the network is refused: one that loads silently without an effect costs its user days.
"""

import re
from dataclasses import dataclass

import torch

from alignprop.engine.seeding import generator
from alignprop.settings.errors import ConfigError

ADAPTER = "default"  # The adapter has this name in the network.

# The distributions of the initial A, and what PEFT calls them. B is 0 at first in both.
INITIALIZATIONS = {"kaiming": True, "gaussian": "gaussian"}


@dataclass(frozen=True)
class LoraWeights:
    """The weights of an adapter outside of a network: ΔW = scale · B @ A for every adapted module.

    Attributes:
        tensors: "<module>.lora_A.weight" [rank, in, ...] and "<module>.lora_B.weight" [out, rank, ...], float32.
        scale: alpha / rank.
    """

    tensors: dict[str, torch.Tensor]
    scale: float

    @property
    def modules(self) -> list[str]:
        return sorted(name.removesuffix(".lora_A.weight") for name in self.tensors if "lora_A" in name)

    def rank(self, module: str) -> int:
        return self.tensors[f"{module}.lora_A.weight"].shape[0]

    def delta(self, module: str) -> torch.Tensor:
        """Returns ΔW, in the shape of the module's weight."""
        a, b = self.tensors[f"{module}.lora_A.weight"], self.tensors[f"{module}.lora_B.weight"]
        return self.scale * (b.flatten(1) @ a.flatten(1)).view(len(b), *a.shape[1:])


def add_lora(
    network, rank: int, alpha: float, target_modules, seed: int, encoder: str = "", initialization: str = "kaiming"
) -> None:
    """Adds a trainable float32 adapter with ΔW = 0 to a frozen network.

    Args:
        network: a denoiser or a text encoder.
        rank: the rank of each ΔW.
        alpha: ΔW = alpha / rank · B @ A.
        target_modules: the endings of the names of the layers to adapt.
        seed: the seed of the initial A.
        encoder: the name of the network if it is a text encoder.
        initialization: the distribution of the initial A, a key of INITIALIZATIONS.

    Raises:
        ConfigError: no layer's name has one of the endings.
    """
    from peft import LoraConfig

    names = [name for name, _ in network.named_modules()]
    missing = [t for t in target_modules if not any(n == t or n.endswith(f".{t}") for n in names)]
    if missing:
        field, what = ("train_text_encoder", encoder) if encoder else ("lora_target_modules", "denoiser")
        raise ConfigError(f"{field}: the {what} has no layer whose name ends in {missing}")
    with torch.random.fork_rng(devices=[]):
        key = (seed, "lora", encoder) if encoder else (seed, "lora")
        torch.manual_seed(generator(*key).initial_seed())
        config = LoraConfig(
            r=rank, lora_alpha=alpha, target_modules=list(target_modules),
            init_lora_weights=INITIALIZATIONS[initialization],
        )  # fmt: skip
        network.add_adapter(config, adapter_name=ADAPTER)
    for parameter in trainable_parameters(network).values():
        parameter.data = parameter.data.float()


def trainable_parameters(network) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in network.named_parameters() if p.requires_grad}


def get_lora(network) -> LoraWeights:
    """Returns the network's adapter, on the CPU."""
    from peft import get_peft_model_state_dict

    config = network.peft_config[ADAPTER]
    tensors = get_peft_model_state_dict(network, adapter_name=ADAPTER)
    return LoraWeights({k: v.detach().cpu().clone() for k, v in tensors.items()}, config.lora_alpha / config.r)


def set_lora(network, weights: LoraWeights | None) -> None:
    """Replaces the network's adapter, if any, by `weights`, which are frozen. None leaves the network without one.

    Raises:
        ConfigError: some of the adapter's tensors have no place in the network, or have another shape.
    """
    from peft import LoraConfig, set_peft_model_state_dict

    if has_lora(network):
        # The method has one name in diffusers and another in transformers.
        delete = network.delete_adapters if hasattr(network, "delete_adapters") else network.delete_adapter
        delete(ADAPTER)
    if weights is None:
        return
    check_modules(network, weights)
    rank = {f"^{re.escape(m)}$": weights.rank(m) for m in weights.modules}
    alpha = {pattern: weights.scale * r for pattern, r in rank.items()}
    largest = max(rank.values())
    config = LoraConfig(
        r=largest,
        lora_alpha=weights.scale * largest,
        target_modules=weights.modules,
        rank_pattern=rank,
        alpha_pattern=alpha,
    )
    network.add_adapter(config, adapter_name=ADAPTER)
    for parameter in trainable_parameters(network).values():
        parameter.data = parameter.data.float()
    set_peft_model_state_dict(network, weights.tensors, adapter_name=ADAPTER)
    for parameter in trainable_parameters(network).values():
        parameter.requires_grad_(False)


def has_lora(network) -> bool:
    return bool(getattr(network, "peft_config", None))


def update_lora(network, weights: LoraWeights) -> None:
    """Copies `weights` into the trainable adapter that the network already has.

    Raises:
        ConfigError: the two differ in their modules, rank or scale.
    """
    from peft import set_peft_model_state_dict

    own = get_lora(network)
    if own.tensors.keys() != weights.tensors.keys():
        matched = len(own.tensors.keys() & weights.tensors.keys())
        raise ConfigError(
            f"resume_from: {matched} of the checkpoint's {len(weights.tensors)} LoRA keys match the {len(own.tensors)} "
            f"of this run, {len(weights.tensors) - matched} do not; lora_target_modules or pretrained.model differ"
        )
    module = own.modules[0]
    for name, mine, theirs in (
        ("lora_rank", own.rank(module), weights.rank(module)),
        ("lora_alpha / lora_rank", own.scale, weights.scale),
    ):
        if mine != theirs:
            raise ConfigError(f"resume_from: the checkpoint has {name} = {theirs}, this run has {mine}")
    set_peft_model_state_dict(network, weights.tensors, adapter_name=ADAPTER)


def start_lora(network, weights: LoraWeights) -> None:
    """Sets the ΔW of the trainable adapter that the network already has to that of `weights`.

    Layers that `weights` do not have stay unchanged. If the adapter's rank is larger, its further ranks add nothing
    to ΔW at first.

    Raises:
        ConfigError: `weights` have layers that the adapter does not have, or a larger rank.
    """
    from peft import set_peft_model_state_dict

    own = get_lora(network)
    if others := sorted({*weights.modules} - {*own.modules}):
        endings = sorted({re.sub(r"^.*?(\w+(\.\d+)?)$", r"\1", module) for module in weights.modules})
        raise ConfigError(
            f"init_lora: {len(others)} of its {len(weights.modules)} layers have no LoRA in this run, for example "
            f"{others[0]!r}; lora_target_modules={','.join(endings)} gives them one"
        )
    largest, rank = max(map(weights.rank, weights.modules)), own.rank(own.modules[0])
    if largest > rank:
        raise ConfigError(f"init_lora has rank {largest}, and lora_rank = {rank} must be at least that")
    tensors = dict(own.tensors)
    for module in weights.modules:
        a, b, filled = f"{module}.lora_A.weight", f"{module}.lora_B.weight", weights.rank(module)
        tensors[a] = torch.cat([weights.tensors[a], tensors[a][filled:]])
        scaled = weights.tensors[b] if weights.scale == own.scale else weights.scale / own.scale * weights.tensors[b]
        tensors[b] = torch.cat([scaled, torch.zeros_like(tensors[b][:, filled:])], dim=1)
    set_peft_model_state_dict(network, tensors, adapter_name=ADAPTER)


def check_modules(network, weights: LoraWeights, what: str = "model") -> None:
    """Checks that the network has a layer of the right shape for every factor.

    Args:
        network: a denoiser or a text encoder.
        weights: the adapter.
        what: what error messages call the network.

    Raises:
        ConfigError: a factor has no layer in the network, or has another shape.
    """
    shapes = {name: _weight_shape(layer) for name, layer in network.named_modules()}
    absent = [m for m in weights.modules if len(shapes.get(m, ())) < 2]
    if absent:
        keys, unmatched = 2 * len(weights.modules), 2 * len(absent)
        raise ConfigError(
            f"LoRA: {keys - unmatched} of its {keys} keys match a layer of this {what}, {unmatched} do not, for "
            f"example those of {absent[0]!r} — is it from another base model?"
        )
    for module in weights.modules:
        outputs, inputs, *kernel = shape = shapes[module]
        a, b = weights.tensors[f"{module}.lora_A.weight"], weights.tensors[f"{module}.lora_B.weight"]
        if a.shape[1:] != (inputs, *kernel) or b.shape != (outputs, a.shape[0], *(1 for _ in kernel)):
            raise ConfigError(
                f"LoRA: {module!r} is {'×'.join(map(str, shape))} in this {what}; the file's factors are "
                f"{list(b.shape)} and {list(a.shape)} — is it from another base model?"
            )


def _weight_shape(layer) -> tuple[int, ...]:
    """Returns the shape of a layer's weight, without unpacking a packed one; () if the layer has no weight."""
    shape = getattr(layer, "weight_shape", None)
    return tuple(shape or getattr(getattr(layer, "weight", None), "shape", ()))
