"""Weight soups: mixes two checkpoints into one LoRA with a coefficient c (Wortsman et al. 2022, arXiv 2203.05482).

c = 1 is exactly the first checkpoint, and c = 0 exactly the second. The second may be the base model.
"""

import torch

from alignprop.lora.factors import LoraWeights
from alignprop.settings.errors import ConfigError


def mix(first: LoraWeights, second: LoraWeights | None, c: float, mode: str) -> LoraWeights | None:
    """Returns the mixture c·first + (1-c)·second.

    Args:
        first: the first adapter.
        second: the second adapter; None means the base model (ΔW = 0).
        c: the coefficient of the first adapter.
        mode: "delta" mixes the weight changes exactly: ΔW = c·ΔW1 + (1-c)·ΔW2 is linear in c. "factors" mixes A and
            B separately, as AlignProp's released code does. Then c scales both factors, so ΔW has terms in c².

    Returns:
        The mixed adapter; None if the mixture is the base model.

    Raises:
        ConfigError: mode is "factors", and the adapters differ in modules, rank or scale.
    """
    if c == 1:
        return first
    if c == 0:
        return second
    return {"delta": _mix_deltas, "factors": _mix_factors}[mode](first, second, c)


def _mix_deltas(first: LoraWeights, second: LoraWeights | None, c: float) -> LoraWeights:
    """Stacks the ranks: [c·s1·B1, (1-c)·s2·B2] @ [A1; A2] is exactly the mixed ΔW, and it is still a LoRA."""
    parts = [(c, first)] + ([(1 - c, second)] if second else [])
    tensors = {}
    for module in sorted({m for _, weights in parts for m in weights.modules}):
        having = [(share, w) for share, w in parts if f"{module}.lora_A.weight" in w.tensors]
        a, b = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
        tensors[a] = torch.cat([w.tensors[a] for _, w in having], dim=0)
        tensors[b] = torch.cat([share * w.scale * w.tensors[b] for share, w in having], dim=1)
    return LoraWeights(tensors, scale=1.0)


def _mix_factors(first: LoraWeights, second: LoraWeights | None, c: float) -> LoraWeights:
    if second is None:
        return LoraWeights({k: c * t for k, t in first.tensors.items()}, first.scale)
    shapes = [{k: t.shape for k, t in w.tensors.items()} for w in (first, second)]
    if shapes[0] != shapes[1] or first.scale != second.scale:
        raise ConfigError("soup_mode = 'factors' needs two LoRAs of the same layers, rank and alpha; use 'delta'")
    tensors = {k: c * t + (1 - c) * second.tensors[k] for k, t in first.tensors.items()}
    return LoraWeights(tensors, first.scale)
