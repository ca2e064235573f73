"""f(x, t, c): the denoiser under classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598), and its gradient.

    f = u + g·(c - u),  so that  vᵀ∂f = (1 - g)·vᵀ∂u + g·vᵀ∂c

with u and c the unconditional and the conditional output. Both come from one call of twice the batch, or from two calls
whose backward passes run one after the other, which holds half the activations.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from alignprop.models.base import Conditioning, Model
from alignprop.settings.memory_policies import chunks

# The outputs of a network call, one per branch, with their graph, and each one's factor in f.
Call = tuple[list[torch.Tensor], list[float]]


@dataclass
class Graph:
    """A network call that waits for its backward pass.

    Attributes:
        latents, cond: what it was called with.
        calls: what f was made of, as far as it carries gradient.
    """

    latents: torch.Tensor
    cond: Conditioning
    calls: list[Call]


class GuidedDenoiser:
    """f, its graph, and its products with a vector.

    Args:
        model: the model whose denoiser is called.
        guidance_scale: what the user asks for; the model says what g it is, 1 being no guidance.
        autocast: returns the context manager in which the network is called.
        batching: "joint" or "split" (settings/memory_policies.py).
        grad: "both" branches carry gradient, or only the conditional one, "cond": an approximation that takes the
            unconditional output for a constant.

    Attributes:
        before_call: called with the timestep before each network call, where it is set.
    """

    before_call: Callable[[torch.Tensor], None] | None = None

    def __init__(
        self, model: Model, guidance_scale: float, autocast=nullcontext, batching: str = "joint", grad: str = "both"
    ):
        self.model, self.autocast, self.batching, self.grad = model, autocast, batching, grad
        self.guidance_scale, self.scale = guidance_scale, model.mixing_scale(guidance_scale)

    def __call__(self, latents: torch.Tensor, timestep: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        """f, in the shape and precision of `latents`: half precision would lose small steps of a long chain."""
        calls = self._calls(latents, timestep, *self._branches(cond))
        return self._combine([output for outputs, _ in calls for output in outputs])

    def with_graph(self, latents, timestep, cond: Conditioning, needs_input: bool) -> tuple[torch.Tensor, Graph]:
        """f without a graph, and the graph beside it; it reaches `latents` where `needs_input`, and `cond`."""
        latents = latents.detach().requires_grad_(needs_input)
        with torch.enable_grad():
            calls = list(self._calls(latents, timestep, *self._differentiable(cond)))
        outputs = [output.detach() for outputs, _ in calls for output in outputs]
        branches, _ = self._branches(cond)
        constant = branches[: len(branches) - len(outputs)]
        outputs = [*(self._call(latents, timestep, [branch])[0] for branch in constant), *outputs]
        return self._combine(outputs), Graph(latents, cond, calls)

    def products(self, at: torch.Tensor | Graph, timestep, cond, vector, tensors) -> list[torch.Tensor | None]:
        """vectorᵀ ∂f/∂θ for each of `tensors`, and at last vectorᵀ ∂f/∂x, None where it was not asked for.

        Args:
            at: latents, requiring a gradient where ∂f/∂x is asked for, or the graph of a call that was made before.
            cond: what a new call is made with.
            tensors: trained ones, or some of those in `cond`; none where FSDP2 has spread them: it adds to their
                `.grad` by itself.
        """
        kept = at.calls if isinstance(at, Graph) else None
        latents = at.latents if isinstance(at, Graph) else at
        if kept is None:
            kept = self._calls(latents, timestep, *self._differentiable(cond))
        inputs = [*tensors, latents] if latents.requires_grad else tensors
        totals: list[torch.Tensor | None] = [None] * (len(tensors) + 1)
        with torch.enable_grad():
            for outputs, factors in kept:
                vectors = [factor * vector for factor in factors]
                if not tensors:
                    # `torch.autograd.grad` would bypass the hooks with which FSDP2 averages and spreads gradients.
                    torch.autograd.backward(outputs, vectors)
                    continue
                for j, product in enumerate(torch.autograd.grad(outputs, inputs, vectors, allow_unused=True)):
                    if product is not None:
                        totals[j] = product if totals[j] is None else totals[j] + product
        return totals if tensors else [latents.grad]

    def _branches(self, cond: Conditioning) -> tuple[list[Conditioning], list[float]]:
        branches = self.model.branches(cond, self.guidance_scale)
        return branches, [1 - self.scale, self.scale] if len(branches) == 2 else [1.0]

    def _differentiable(self, cond: Conditioning) -> tuple[list[Conditioning], list[float]]:
        branches, factors = self._branches(cond)
        return (branches, factors) if self.grad == "both" else (branches[-1:], factors[-1:])

    def _calls(self, latents, timestep, branches, factors) -> Iterator[Call]:
        """One by one: when the second call is made, nothing here holds the first."""
        for some in chunks(len(branches), 0 if self.batching == "joint" else 1):
            yield self._call(latents, timestep, branches[some]), factors[some]

    def _call(self, latents, timestep, branches) -> list[torch.Tensor]:
        if self.before_call:
            self.before_call(timestep)
        joined = {name: torch.cat([branch[name] for branch in branches]) for name in branches[0]}
        with self.autocast():
            outputs = self.model.predict(torch.cat([latents] * len(branches)), timestep, joined)
        return list(outputs.to(latents.dtype).chunk(len(branches)))

    def _combine(self, outputs: list[torch.Tensor]) -> torch.Tensor:
        if len(outputs) == 1:
            return outputs[0]
        unconditional, conditional = outputs
        return unconditional + self.scale * (conditional - unconditional)
