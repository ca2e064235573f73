"""f(x, t, c): the denoiser under classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598), and its gradient.

    f = u + g·(c - u),  so that  vᵀ∂f = (1 - g)·vᵀ∂u + g·vᵀ∂c

Here u is the unconditional output of the network, and c is the conditional one. Both come from one call with twice the
batch, or from two calls. The backward passes of two calls run one after the other, which holds half the activations.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch

from alignprop.lora.scaling import scale_lora
from alignprop.method.prefix_cache import PrefixCache
from alignprop.models.base import Conditioning, Model
from alignprop.settings.memory_policies import chunks


class Call(NamedTuple):
    """A network call: the outputs with their graph, one for each branch in the call, and each branch's factor in f."""

    outputs: list[torch.Tensor]
    factors: list[float]


@dataclass
class Graph:
    """A network call that waits for its backward pass.

    Attributes:
        latents: the latents that the network was called with.
        cond: the conditioning that the network was called with.
        calls: the network calls of the branches of f that carry gradient.
    """

    latents: torch.Tensor
    cond: Conditioning
    calls: list[Call]


class Products(NamedTuple):
    """The products of a vector v with the derivatives of f.

    Attributes:
        tensors: vᵀ ∂f/∂θ for each requested tensor θ; None for a tensor that f does not depend on.
        latents: vᵀ ∂f/∂x; None if the latents require no gradient.
    """

    tensors: list[torch.Tensor | None]
    latents: torch.Tensor | None


class GuidedDenoiser:
    """Computes f, its graph, and the products of a vector with the derivatives of f.

    Args:
        model: the model whose denoiser is called.
        guidance_scale: the user's guidance scale, from which the model computes g. 1 means no guidance.
        autocast: returns the context manager in which the network is called.
        batching: "joint" calls both branches at once, "split" one by one (settings/memory_policies.py).
        grad: "both" if both branches carry gradient. "cond" if only the conditional branch does, which is an
            approximation that treats the unconditional output as a constant.
        lora_scale_at: returns the scale of the denoiser's LoRA at a timestep. The scale is set before each network
            call. None leaves the LoRA's scale as it is.
        guided_at: says whether there is guidance at a timestep. Without it, f is the conditional output. None means
            that there is guidance at all timesteps.
        cache: the prefix cache, if there is one. The rollout switches it on and off.
    """

    def __init__(
        self, model: Model, guidance_scale: float, autocast=nullcontext, batching: str = "joint", grad: str = "both",
        lora_scale_at: Callable[[torch.Tensor], float] | None = None,
        guided_at: Callable[[torch.Tensor], bool] | None = None, cache: PrefixCache | None = None,
    ):  # fmt: skip
        self.model, self.autocast, self.batching, self.grad = model, autocast, batching, grad
        self.guidance_scale, self.scale = guidance_scale, model.mixing_scale(guidance_scale)
        self.lora_scale_at, self.guided_at, self.cache = lora_scale_at, guided_at, cache

    def __call__(self, latents: torch.Tensor, timestep: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        """Returns f in the shape and precision of `latents`; half precision loses the small steps of a long chain."""
        calls = self._calls(latents, timestep, *self._branches(cond, timestep))
        return self._combine([output for call in calls for output in call.outputs])

    def with_graph(self, latents, timestep, cond: Conditioning, needs_input: bool) -> tuple[torch.Tensor, Graph]:
        """Returns f without a graph, and its graph separately.

        The graph reaches the trainable parameters, the tensors of `cond` that require a gradient and, if `needs_input`,
        the latents.
        """
        latents = latents.detach().requires_grad_(needs_input)
        with torch.enable_grad():
            calls = list(self._calls(latents, timestep, *self._differentiable(cond, timestep)))
        outputs = [output.detach() for call in calls for output in call.outputs]
        branches, _ = self._branches(cond, timestep)
        constant = branches[: len(branches) - len(outputs)]
        outputs = [*(self._call(latents, timestep, [branch])[0] for branch in constant), *outputs]
        return self._combine(outputs), Graph(latents, cond, calls)

    def products_at(self, latents, timestep, cond: Conditioning, vector, tensors) -> Products:
        """Calls the network at `latents`, and returns the products of `vector` with the derivatives of f.

        Args:
            latents: [B, ...]; they require a gradient if ∂f/∂x is needed.
            timestep: the network's time input.
            cond: the conditioning that the network is called with.
            vector: v, [B, ...].
            tensors: the trainable parameters and tensors of `cond` that need a product. If the list is empty, the
                backward pass adds to `.grad` instead. Parameters that FSDP2 has spread need this.
        """
        return _products(
            self._calls(latents, timestep, *self._differentiable(cond, timestep)), latents, vector, tensors
        )

    def products_of(self, graph: Graph, vector, tensors) -> Products:
        """Returns the products of `vector` with the derivatives of f from the graph of an earlier call; uses it up."""
        return _products(graph.calls, graph.latents, vector, tensors)

    def scale_lora(self, timestep: torch.Tensor) -> None:
        """Sets the scale of the denoiser's LoRA to its value at `timestep`."""
        if self.lora_scale_at:
            scale_lora(self.model.denoiser, self.lora_scale_at(timestep))

    def _branches(self, cond: Conditioning, timestep) -> tuple[list[Conditioning], list[float]]:
        branches = self.model.branches(cond, self.guidance_scale)
        if len(branches) == 1 or (self.guided_at and not self.guided_at(timestep)):
            return branches[-1:], [1.0]
        return branches, [1 - self.scale, self.scale]

    def _differentiable(self, cond: Conditioning, timestep) -> tuple[list[Conditioning], list[float]]:
        branches, factors = self._branches(cond, timestep)
        return (branches, factors) if self.grad == "both" else (branches[-1:], factors[-1:])

    def _calls(self, latents, timestep, branches, factors) -> Iterator[Call]:
        """Yields the network calls one by one. Nothing here holds the first call when the second one is made."""
        for rows in chunks(len(branches), 0 if self.batching == "joint" else 1):
            cached = self.cache.of(rows.start, len(branches)) if self.cache else nullcontext()
            with cached:
                outputs = self._call(latents, timestep, branches[rows])
            yield Call(outputs, factors[rows])

    def _call(self, latents, timestep, branches) -> list[torch.Tensor]:
        self.scale_lora(timestep)
        joined = {name: torch.cat([branch[name] for branch in branches]) for name in branches[0]}
        with self.autocast():
            outputs = self.model.predict(torch.cat([latents] * len(branches)), timestep, joined)
        return list(outputs.to(latents.dtype).chunk(len(branches)))

    def _combine(self, outputs: list[torch.Tensor]) -> torch.Tensor:
        if len(outputs) == 1:
            return outputs[0]
        unconditional, conditional = outputs
        return unconditional + self.scale * (conditional - unconditional)


def _products(calls: Iterable[Call], latents, vector, tensors) -> Products:
    inputs = [*tensors, latents] if latents.requires_grad else tensors
    totals: list[torch.Tensor | None] = [None] * (len(tensors) + 1)
    with torch.enable_grad():
        for outputs, factors in calls:
            vectors = [factor * vector for factor in factors]
            if not tensors:
                # `torch.autograd.grad` bypasses the hooks with which FSDP2 averages and spreads gradients.
                torch.autograd.backward(outputs, vectors)
                continue
            for j, product in enumerate(torch.autograd.grad(outputs, inputs, vectors, allow_unused=True)):
                if product is not None:
                    totals[j] = product if totals[j] is None else totals[j] + product
    return Products(totals[:-1], totals[-1]) if tensors else Products([], latents.grad)
