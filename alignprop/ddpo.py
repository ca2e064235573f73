"""DDPO: fine-tuning by policy gradient, for rewards that have no gradient (Black et al. 2023, arXiv 2305.13301).

DDPO is the baseline that reward back-propagation is compared with. `DDPOTrainer.step` is one epoch: it samples
pictures, computes their advantages, and makes the updates. Its mathematics are in method/policy_gradient.py.
"""

from collections import deque
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from tqdm.auto import tqdm

from alignprop.engine.seeding import generator, generators, seed_global
from alignprop.engine.sharding import is_fsdp
from alignprop.loop import TrainingLoop, now
from alignprop.method.policy_gradient import PromptStatistics, clipped_loss, log_probability
from alignprop.method.rollout import Rollout
from alignprop.models.base import Conditioning, encode, select
from alignprop.prompts import draw_prompts
from alignprop.settings.errors import ConfigError
from alignprop.settings.memory_policies import chunks


@dataclass
class Samples:
    """The trajectories of b samples. They are kept on the host, because an epoch has many.

    Attributes:
        rollout: the sampling chain that drew them.
        indices: the positions of the samples in the epoch, int [b].
        prompts: the prompts of the samples.
        latents: x[0] … x[N], N+1 tensors [b, ...].
        log_probabilities: for each step i that has noise, its log-probability when it was drawn; float32 [b].
    """

    rollout: Rollout
    indices: torch.Tensor
    prompts: list[str]
    latents: list[torch.Tensor]
    log_probabilities: dict[int, torch.Tensor]


class DDPOTrainer(TrainingLoop):
    """Trains a LoRA, or the whole denoiser, with any reward, by policy gradient.

    TrainingLoop (loop.py) explains the arguments of the constructor.
    """

    def check_run(self) -> None:
        if is_fsdp(self.run.accelerator):
            raise ConfigError("algorithm = 'ddpo' does not run under FSDP; use one of the other configurations")
        if not self.run.rollout.sampler.is_one_step:
            raise ConfigError(
                f"algorithm = 'ddpo' needs a sampler whose steps are independent draws; train.sampler = "
                f"{self.config.train.sampler!r} uses outputs of earlier steps again"
            )
        if not self.run.rollout.sampler.is_stochastic:
            raise ConfigError(
                f"algorithm = 'ddpo' needs random steps; train.sampler = {self.config.train.sampler!r} adds no noise"
            )
        for rollout in self.run.rollouts:
            if not self.noisy_steps(rollout):
                raise ConfigError(
                    f"ddpo.min_noise = {self.config.ddpo.min_noise} must be less than the noise of the sampler's "
                    f"noisiest step, {float(rollout.sampler.s.max()):.4g}"
                )

    @cached_property
    def statistics(self) -> PromptStatistics:
        """The newest rewards of each prompt."""
        return PromptStatistics(self.config.ddpo.per_prompt_buffer, self.config.ddpo.per_prompt_min_count)

    def noisy_steps(self, rollout: Rollout) -> list[int]:
        """Returns the sampler steps that updates may use: those with more noise than `ddpo.min_noise`."""
        return (rollout.sampler.s.diagonal() > self.config.ddpo.min_noise).nonzero().squeeze(1).tolist()

    def step(self) -> dict[str, Any]:
        """Samples `total_samples_per_epoch` pictures, makes the updates with them, and returns the metrics row."""
        c, run, started = self.config, self.run, now()
        key = (c.seed, self.global_step)
        seed_global(*key, "global", run.accelerator.process_index)
        size, total = c.train.total_batch_size, c.train.total_samples_per_epoch
        prompts, _ = draw_prompts(self.prompts, *key, torch.arange(total))
        blocks, scores = [], []
        for first in tqdm(range(0, total, size), "sampling", leave=False, disable=not run.is_main):
            sampled = [self.sample(key, first + indices) for indices in self.micro_batches()]
            blocks.append([samples for trajectories, _ in sampled for samples in trajectories])
            scores.append(run.accelerator.gather(torch.cat([s for _, s in sampled], dim=1).T.contiguous()))
            # Gathering puts the scores in the order of the processes. This restores the order of the epoch.
            scores[-1] = scores[-1][self._gathered_order()]
        rewards, *terms = torch.cat(scores).T
        limit = c.ddpo.adv_clip_max
        advantages = self.statistics.advantages(self.compared_as(prompts, key), rewards).clamp(-limit, limit)
        updates = []
        for inner in range(c.ddpo.inner_epochs):
            order = torch.randperm(len(blocks), generator=generator(*key, "updates", inner)).tolist()
            for block in tqdm(order, "updating", leave=False, disable=not run.is_main):
                updates.append(self.update(blocks[block], advantages, generator(*key, "steps", inner, block)))
        self.global_step += 1
        losses, grad_norms, ratios, clipped, divergences = (
            sum(means) / len(updates) for means in zip(*updates, strict=True)
        )
        return self.row(
            rewards, dict(zip(run.reward.terms, terms, strict=True)), started, loss=losses, grad_norm=grad_norms,
            ratio_mean=ratios, clip_fraction=clipped, approx_kl=divergences,
            samples=self.global_step * total, updates=self.global_step * len(updates),
        )  # fmt: skip

    def compared_as(self, prompts: list[str], key: tuple[int, int]) -> list[str]:
        """Returns the names under which rewards are compared: the prompts, with the size if there are several."""
        size = self.drawn_size(*key)
        return [f"{prompt} [{size}]" for prompt in prompts] if size else prompts

    @torch.no_grad()
    def sample(self, key: tuple[int, int | str], indices: torch.Tensor) -> tuple[list[Samples], torch.Tensor]:
        """Samples the trajectories of some samples of the epoch, and scores their pictures.

        Args:
            key: the key of the random numbers of this epoch.
            indices: the positions of the samples in the epoch, int [B].

        Returns:
            The trajectories, one entry for each group of samples that share a network call; and the scores,
            [1 + terms, B]: the reward, then each term of it.
        """
        run = self.run
        prompts, metadata = draw_prompts(self.prompts, *key, indices)
        cond = encode(run.model, prompts, run.residency)
        with run.residency("denoise"):
            groups = chunks(len(indices), run.choice.memory.sweep_chunk)
            trajectories = [self.draw(key, indices[rows], prompts[rows], select(cond, rows)) for rows in groups]
        final = torch.cat([samples.latents[-1] for samples in trajectories]).to(run.accelerator.device)
        scores = []
        with run.residency("decode"):
            for rows in chunks(len(final), run.choice.memory.decode_chunk):
                terms = run.reward.score_terms(run.model.decode(final[rows]), prompts[rows], metadata[rows])
                scores.append(torch.stack([run.reward.combine(terms), *terms.values()]))
        return trajectories, torch.cat(scores, dim=1)

    def draw(
        self, key: tuple[int, int | str], indices: torch.Tensor, prompts: list[str], cond: Conditioning
    ) -> Samples:
        """Samples the trajectories of one group, whose samples share each network call."""
        rollout, steps = self.rollout(key), []
        rollout.sample(generators(indices, *key, "noise"), cond, on_step=lambda *step: steps.append(step))
        latents = [steps[0][1], *(x_next for *_, x_next in steps)]
        logs = {i: log_probability(rollout.sampler, i, *step) for i, *step in steps if rollout.sampler.s[i, i]}
        return Samples(rollout, indices, prompts, [x.cpu() for x in latents], {i: log.cpu() for i, log in logs.items()})

    def update(self, block: list[Samples], advantages: torch.Tensor, draw: torch.Generator) -> list[float]:
        """Makes one optimizer update with `total_batch_size` samples.

        Args:
            block: the samples of this process.
            advantages: the advantages of the whole epoch, [n].
            draw: the random generator that chooses the sampler steps of this update.

        Returns:
            The mean loss, the gradient norm, the mean ratio, the share of clipped ratios, and half the mean squared
            change of the log-probability.
        """
        noisy = self.noisy_steps(block[0].rollout)
        count = max(1, round(self.config.ddpo.timestep_fraction * len(noisy)))
        drawn = torch.randperm(len(noisy), generator=draw)[:count].sort().values
        steps = [noisy[j] for j in drawn]
        with self.run.residency("sweep"):
            values = [self.add_gradients(samples, i, advantages, count) for samples in block for i in steps]
        losses, ratios, clipped, divergences = self.run.accelerator.gather(torch.cat(values, dim=1).T.contiguous()).T
        grad_norm = self.weights.update(losses)
        means = [t.double().mean().item() for t in (losses, ratios, clipped, divergences)]
        return [means[0], grad_norm, *means[1:]]

    def add_gradients(self, samples: Samples, i: int, advantages: torch.Tensor, count: int) -> torch.Tensor:
        """Adds the part of step i of b samples in ∂(mean loss of the update)/∂θ to the `.grad` of θ.

        Args:
            samples: the trajectories.
            i: the sampler step.
            advantages: the advantages of the whole epoch, [n].
            count: the number of sampler steps that the loss is averaged over.

        Returns:
            [4, b]: the loss, the ratio, whether the ratio is clipped, and half the squared change of the
            log-probability.
        """
        c, rollout, device = self.config, samples.rollout, self.run.accelerator.device
        x, x_next, before = (t.to(device) for t in (*samples.latents[i : i + 2], samples.log_probabilities[i]))
        cond = self.run.model.encode_prompts(samples.prompts)
        with torch.no_grad():  # with_graph still builds the one graph that is needed
            model_output, graph = rollout.f.with_graph(*rollout.inputs(i, x), cond, needs_input=False)
        model_output.requires_grad_()
        log_ratio = log_probability(rollout.sampler, i, x, model_output, x_next) - before
        losses = clipped_loss(log_ratio.exp(), advantages[samples.indices].to(log_ratio), c.ddpo.clip_range)
        scaler = self.run.accelerator.scaler
        total = losses.sum() / (c.train.total_batch_size * count)
        (vector,) = torch.autograd.grad(scaler.scale(total) if scaler else total, model_output)
        parameters = self.weights.parameters
        products = rollout.f.products_of(graph, vector, parameters).tensors
        for parameter, product in zip(parameters, products, strict=True):
            if product is not None:
                product = product.to(parameter.grad_dtype)
                parameter.grad = product if parameter.grad is None else parameter.grad + product
        ratio = log_ratio.detach().exp()
        clipped = (ratio - 1).abs() > c.ddpo.clip_range
        return torch.stack([losses.detach(), ratio, clipped.to(ratio), log_ratio.detach().square() / 2])

    def try_memory(self) -> None:
        size = self.run.choice.capacity
        trajectories, _ = self.sample((self.config.seed, "trial"), torch.arange(size))
        with self.run.residency("sweep"):
            self.add_gradients(trajectories[0], self.noisy_steps(self.run.rollout)[0], torch.zeros(size), 1)

    def extra_state(self) -> dict[str, Any]:
        return {"prompt_rewards": {prompt: list(rewards) for prompt, rewards in self.statistics.rewards.items()}}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        for prompt, rewards in state.get("prompt_rewards", {}).items():
            self.statistics.rewards[prompt] = deque(rewards, maxlen=self.statistics.size)

    def _gathered_order(self) -> torch.Tensor:
        """Returns, for each sample of a block, its position in a tensor that was gathered process by process."""
        c, n = self.config, self.run.accelerator.num_processes
        size = self.run.choice.capacity
        places = torch.arange(c.train.total_batch_size).view(n, -1, size)  # process, its micro-batch, sample
        return places.transpose(0, 1).flatten()
