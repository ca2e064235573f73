"""A stand-in for the package bitsandbytes: an optimizer whose state has the layout of AdamW8bit's."""

import importlib.machinery
import sys
import types

import torch

QUANTISED = ("state1", "state2", "absmax1", "absmax2")
WRAPPED = "__bnb_optimizer_quant_state__"


class AdamW8bit(torch.optim.Optimizer):
    """The first arguments, and the saved state, are those of bitsandbytes 0.50. The arithmetic is only similar."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self._update(p, self.state[p], group)

    def _update(self, p, state, group):
        if not state:
            moments = {f"state{n}": torch.zeros_like(p, dtype=torch.uint8) for n in (1, 2)}
            state.update(moments, step=0, absmax1=torch.ones(1), absmax2=torch.ones(1))
        state["step"] += 1
        means = []
        for n, value in ((1, p.grad), (2, p.grad.square())):
            beta = group["betas"][n - 1]
            old = (state[f"state{n}"].float() - 128) / 127 * state[f"absmax{n}"]
            mean = beta * old + (1 - beta) * value
            state[f"absmax{n}"] = mean.abs().max().reshape(1).clamp(min=1e-30)
            state[f"state{n}"] = (mean / state[f"absmax{n}"] * 127 + 128).round().to(torch.uint8)
            means.append(mean / (1 - beta ** state["step"]))
        change = means[0] / (means[1].clamp(min=0).sqrt() + group["eps"]) + group["weight_decay"] * p
        p.sub_(group["lr"] * change)

    def state_dict(self):
        """The quantised tensors are in a dict of their own, and whole numbers are no tensors."""
        found = super().state_dict()
        found["state"] = {
            i: {"step": state["step"], WRAPPED: {name: state[name] for name in QUANTISED}}
            for i, state in found["state"].items()
        }
        return found

    def load_state_dict(self, state_dict):
        parameters = [p for group in self.param_groups for p in group["params"]]
        for own, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            own.update({k: v for k, v in saved.items() if k != "params"})
        for i, state in state_dict["state"].items():
            self.state[parameters[i]] = {"step": state["step"], **state[WRAPPED]}


def install(monkeypatch):
    """Makes `import bitsandbytes` find this stand-in."""
    package, optim = types.ModuleType("bitsandbytes"), types.ModuleType("bitsandbytes.optim")
    package.__spec__ = importlib.machinery.ModuleSpec("bitsandbytes", None, is_package=True)
    package.__path__, package.optim, optim.AdamW8bit = [], optim, AdamW8bit
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", optim)
