"""The trained weights of a run, a LoRA or the whole denoiser, with their optimizer, moving average and state."""

from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers.training_utils import EMAModel
from ml_collections import ConfigDict
from safetensors import SafetensorError
from safetensors.torch import load_file

from alignprop.engine.optimizers import learning_rates, load_optimizer, make_optimizer
from alignprop.engine.sharding import DTensor, gather, shard, spread, whole_copy
from alignprop.lora.adapters import add_adapter, get_adapter, start_from, trained_parameters, update_adapter
from alignprop.lora.factors import LoraWeights
from alignprop.lora.files import check_finite, make_readable, read_lora, save_lora
from alignprop.models.base import Model
from alignprop.models.packed import is_packed
from alignprop.settings.errors import ConfigError
from alignprop.settings.options import updates_of_epoch


class TrainedWeights:
    """The trained parameters of a model, always float32.

    Args:
        model: the model to train. Its denoiser gets a LoRA, or is trained whole; its text encoders get a LoRA too if
            `train_text_encoder` is set.
        config: the resolved configuration.
        accelerator: supplies the loss scaler, and sums and clips the gradient over all processes.
        start: the LoRA that training starts from. None: a LoRA that changes nothing.

    Attributes:
        parameters: the trained tensors.
        optimizer: the optimizer of the trained tensors.
        ema: the moving average of the trained tensors, or None if none is kept.
        updates: the number of updates done. Skipped updates count, so that the learning rate follows from the number
            of steps alone, and reaches the end of its schedule with the run.
        learning_rate: the learning rate of the last update.
        skipped: the number of updates that were skipped because a loss or the gradient was not finite.
        skipped_in_a_row: the number of updates that were skipped since the last one that was not.
    """

    def __init__(self, model: Model, config: ConfigDict, accelerator: Accelerator, start: LoraWeights | None = None):
        self.model, self.config, self.accelerator = model, config, accelerator
        c, denoiser = config, model.denoiser
        if c.use_lora:
            add_adapter(
                model, c.lora_rank, c.lora_alpha, c.lora_target_modules, c.seed, c.train_text_encoder,
                c.lora_initialization,
            )  # fmt: skip
            if start:
                start_from(model, start)
        else:
            denoiser.float().requires_grad_(True)
        self.parameters = list(trained_parameters(model).values())
        self.optimizer = make_optimizer(self.parameters, c.train)
        if accelerator.distributed_type == DistributedType.FSDP:
            self.optimizer = shard(accelerator, denoiser, self.optimizer)
            self.parameters = list(trained_parameters(model).values())
        else:
            self.optimizer = accelerator.prepare(self.optimizer)
        self.ema = EMAModel(self.parameters, decay=c.train.ema_decay) if c.train.ema_decay else None
        self.skipped = self.skipped_in_a_row = 0
        updates = max(c.num_epochs * updates_of_epoch(c), 1)
        self.most_skipped = min(c.train.max_skipped_steps, updates)  # a short run must not skip all its updates
        self.learning_rate_after = learning_rates(c.train, updates)
        self.updates, self.learning_rate = 0, self.learning_rate_after(0)
        # A LoRA is small, so its gradients are summed in float64 and rounded once. The result is then the same however
        # the samples are divided among processes.
        self.sum_dtype = torch.float64 if c.use_lora and denoiser.device.type != "mps" else torch.float32
        self.zero_grad()

    def zero_grad(self) -> None:
        """Drops the gradients. The next ones are summed in `sum_dtype`."""
        for parameter in self.parameters:
            parameter.grad = None
            parameter.grad_dtype = self.sum_dtype

    def sum_over_processes(self) -> None:
        sums = [self._summed(parameter.grad) for parameter in self.parameters]
        for parameter, gradient in zip(self.parameters, sums, strict=True):
            parameter.grad, parameter.grad_dtype = None, parameter.dtype
            parameter.grad = None if gradient is None else gradient.to(parameter.dtype)

    def _summed(self, gradient: torch.Tensor | None) -> torch.Tensor | None:
        if gradient is None:
            return None
        if isinstance(gradient, DTensor):  # FSDP has averaged it over the processes
            return gradient * self.accelerator.num_processes
        return self.accelerator.reduce(gradient, "sum")

    def update(self, losses: torch.Tensor) -> float:
        """Clips and applies the gradient summed over all samples, unless it or one of the losses is not finite.

        Args:
            losses: the losses of all samples, which every process has.

        Returns:
            The norm of the gradient before clipping.

        Raises:
            ConfigError: `max_skipped_steps` updates in a row, or all updates of a shorter run, were not finite.
        """
        train, scaler = self.config.train, self.accelerator.scaler
        self.sum_over_processes()
        grad_norm = float(gather(self.accelerator.clip_grad_norm_(self.parameters, train.max_grad_norm)))
        self._set_learning_rate()
        finite_loss = bool(losses.isfinite().all())
        finite = finite_loss and grad_norm < float("inf")
        # The loss scaler skips a non-finite gradient by itself, and must see it in order to lower its scale.
        if finite or (finite_loss and scaler):
            self.optimizer.step()
        elif scaler:
            scaler.update()
        self.zero_grad()
        if finite and self.ema:
            self.ema.step(self.parameters)
        self.updates += 1
        self.skipped += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= self.most_skipped:
            raise ConfigError(
                f"{self.skipped_in_a_row} optimizer steps in a row had a non-finite loss or gradient; the run stops, "
                "its checkpoints are unchanged; try mixed_precision='bf16', a smaller train.learning_rate or "
                "adjoint_clip=10"
            )
        return grad_norm

    def _set_learning_rate(self) -> None:
        self.learning_rate = self.learning_rate_after(self.updates)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate

    @contextmanager
    def averaged(self):
        """Replaces the weights by their moving average, if one is kept, within a `with` block."""
        if self.ema:
            self.ema.store(self.parameters)
            self.ema.copy_to(self.parameters)
        try:
            yield
        finally:
            if self.ema:
                self.ema.restore(self.parameters)

    def write(self, folder: Path, state: dict) -> None:
        """Writes the weights in diffusers' format. If a moving average is kept, that is what is written.

        Args:
            folder: where to write.
            state: what `state()` returned.
        """
        if self.config.use_lora:
            with self.averaged():
                save_lora(self.model, get_adapter(self.model), folder)
        else:
            usable = state["ema"]["shadow_params"] if self.ema else state["weights"].values()
            weights = dict(zip(state["weights"], usable, strict=True))
            whole_copy(self.model.denoiser, weights).save_pretrained(folder / "denoiser")
            make_readable(folder / "denoiser")

    def state(self) -> dict:
        """Returns everything that the next update depends on, as nested dicts of tensors and plain values.

        It does not depend on the number of processes. Only the main process gets the tensors; the other processes get
        None in their place. All processes have to call it.
        """
        scaler = self.accelerator.scaler
        state = {
            "weights": {name: p.detach() for name, p in trained_parameters(self.model).items()},
            "optimizer_name": self.config.train.optimizer,
            "optimizer": self.optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler else None,
            "ema": self.ema.state_dict() if self.ema else None,
            "skipped": [self.skipped, self.skipped_in_a_row],
        }
        return gather(state, keep=self.accelerator.is_main_process)

    def load(self, state: dict, checkpoint: Path) -> None:
        """Restores what `state()` returned.

        Args:
            state: the state, with the `global_step` of the run.
            checkpoint: the checkpoint folder that the state was read from.

        Raises:
            ConfigError: the state is that of other weights or of another optimizer.
        """
        if self.config.use_lora and "weights" in state and any("lora" in name for name in state["weights"]):
            update_adapter(self.model, read_lora(checkpoint))  # this refuses another rank or other layers
        own = trained_parameters(self.model)
        if {name: p.shape for name, p in own.items()} != {name: w.shape for name, w in state["weights"].items()}:
            raise ConfigError(
                f"resume_from = {str(checkpoint)!r} trained other weights; use_lora or pretrained.model differ"
            )
        check_finite(state["weights"], f"resume_from = {str(checkpoint)!r}")
        if state["optimizer_name"] != self.config.train.optimizer:
            raise ConfigError(
                f"resume_from = {str(checkpoint)!r} was trained with train.optimizer = {state['optimizer_name']!r}, "
                f"this run has {self.config.train.optimizer!r}"
            )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(spread(state["weights"][name], parameter))
        load_optimizer(self.optimizer, state["optimizer"], self.parameters)
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.ema:
            self.ema = EMAModel(self.parameters, decay=self.config.train.ema_decay)
            if state["ema"]:
                pairs = zip(state["ema"]["shadow_params"], self.parameters, strict=True)
                shadow = [spread(average, p).to(p.device) for average, p in pairs]
                self.ema.load_state_dict({**state["ema"], "decay": self.config.train.ema_decay})
                self.ema.shadow_params = shadow
        self.skipped, self.skipped_in_a_row = state["skipped"]
        self.updates = state["global_step"] * updates_of_epoch(self.config) // self.config.train.steps_per_epoch


def load_denoiser(denoiser, folder: Path) -> None:
    """Loads the weights of a denoiser that was trained whole, as diffusers' `save_pretrained` wrote them.

    Raises:
        ConfigError: the weights do not fit this denoiser, or are not finite, or the denoiser's weights are packed.
    """
    if is_packed(denoiser):
        raise ConfigError(
            f"{str(folder)!r} has full weights, which need pretrained.quantize = '' and a memory.residency other than "
            "'stream'"
        )
    tensors = {}
    denoiser.float()  # it was trained in float32
    try:
        for path in sorted(folder.glob("*.safetensors")):
            tensors |= load_file(path)
        check_finite(tensors, repr(str(folder)))
        denoiser.load_state_dict(tensors)
    except (RuntimeError, SafetensorError) as error:
        raise ConfigError(f"{str(folder)!r} does not fit this model: {str(error).splitlines()[-1].strip()}") from error
