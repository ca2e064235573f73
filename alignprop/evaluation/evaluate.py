"""The evaluation of a model: fixed prompts, fixed noise, any number of rewards, and a report for people.

Picture j of a prompt set always has the same prompt and the same noise. The batch size and the number of processes
do not change them. An evaluation does not touch the randomness of training.
"""

from collections.abc import Callable
from itertools import zip_longest
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from alignprop.engine.seeding import generator, generators, seed_global
from alignprop.engine.sharding import is_sharded
from alignprop.evaluation.judges import Judges, diversity
from alignprop.evaluation.looks import looks
from alignprop.evaluation.results import Evaluation
from alignprop.lora.adapters import adapted_networks
from alignprop.method.base_distance import base_conditioning, chain_distance
from alignprop.method.rollout import Rollout
from alignprop.models.base import Conditioning, Phases, encode, select
from alignprop.prompts import PromptSet
from alignprop.settings.memory_policies import chunks
from alignprop.settings.sizes import size_name

Sample = Callable[[list[torch.Generator], Conditioning, list[str], list[dict]], torch.Tensor]

NUM_COMPARED = 8  # The base distance is measured on the first 8 pictures, whatever the batch size.


class _Picture(NamedTuple):
    """The data of picture j that all processes receive. A value that was not asked for is None."""

    j: int
    size: str
    scores: dict[str, float]
    looks: dict[str, float]
    image: torch.Tensor | None
    embedding: torch.Tensor | None
    distance: float | None


class Evaluator:
    """Samples pictures for a prompt set and scores them, sharded over the processes.

    Args:
        rollouts: sample the pictures, one for each size. Each prompt is drawn in all sizes, one after the other.
        judges: score the pictures.
        num_images: the number n of pictures. Prompts repeat if there are fewer, each time with different noise.
        num_prompts: the number of prompts to use; all prompts if there are fewer, or if it is None.
        batch_size: the number of pictures that one process samples at once.
        decode_chunk: the number of pictures that are decoded and scored at once; 0 means the whole batch.
        keep: the number of pictures to return.
        base_distance: whether to measure the base distance; it needs a model with an adapter.
        phases: brings the modules of a phase to the device (memory/residency.py).
    """

    def __init__(
        self, rollouts: list[Rollout], judges: Judges, prompts: PromptSet, accelerator: Accelerator, *, num_images: int,
        num_prompts: int | None, batch_size: int, decode_chunk: int, seed: int, keep: int, base_distance: bool,
        phases: Phases,
    ):  # fmt: skip
        self.rollouts, self.judges, self.prompts, self.base_distance = rollouts, judges, prompts, base_distance
        self.accelerator = accelerator
        self.num_images, self.batch_size, self.seed, self.keep = num_images, batch_size, seed, keep
        self.decode_chunk, self.phases = decode_chunk, phases
        # The prompts are shuffled, so that a few pictures of a sorted prompt file still show all kinds of prompts.
        order = torch.randperm(len(prompts), generator=generator(seed, "evaluation order")).tolist()[:num_prompts]
        self.order = [order[j // len(rollouts) % len(order)] for j in range(num_images)]

    @torch.no_grad()
    def __call__(
        self,
        on_image: Callable[[int, torch.Tensor], None] | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        sample: Sample | None = None,
    ) -> Evaluation | None:
        """Runs the evaluation; every process gets the same result.

        Args:
            on_image: called with (j, picture [3, H, W]) for each picture, on the process that made it.
            should_stop: called by all processes together before each batch. If it returns True, the evaluation ends
                and returns None.
            sample: (generators, cond, prompts, metadata) -> final latents; None means the rollout of each size.
        """
        size, accelerator = self.batch_size, self.accelerator
        seed_global(self.seed, "evaluation", accelerator.process_index)
        pictures, compares = [], self.base_distance and bool(adapted_networks(self.rollouts[0].model))
        batches = self._batches(size * accelerator.num_processes)
        for rollout, together in tqdm(batches, "evaluating", leave=False, disable=not accelerator.is_main_process):
            if should_stop():
                return None
            batch = together[accelerator.process_index * size :][:size]
            # All processes together gather the weights that FSDP2 has sharded. So a process without a picture left
            # samples a picture again and discards it.
            if not batch and not is_sharded(rollout.denoiser):
                continue
            compare = compares and together[0] < NUM_COMPARED
            for picture in self._batch(rollout, batch or together[:1], sample, compare)[: len(batch)]:
                if on_image:
                    on_image(picture.j, picture.image)
                pictures.append(picture if picture.j < self.keep else picture._replace(image=None))
        return self._evaluation(sorted(gather_object(pictures), key=lambda picture: picture.j))

    def _batches(self, at_once: int) -> list[tuple[Rollout, range]]:
        """Returns pairs of a chain and the numbers of the pictures that all processes together make with it at once.

        These pictures have one size. Picture j has the size j modulo the number of sizes.
        """
        count = len(self.rollouts)
        of_sizes = [(rollout, range(s, self.num_images, count)) for s, rollout in enumerate(self.rollouts)]
        return [(rollout, js[i : i + at_once]) for rollout, js in of_sizes for i in range(0, len(js), at_once)]

    def _evaluation(self, pictures: list[_Picture]) -> Evaluation:
        columns, seen = (_columns([getattr(p, kind) for p in pictures]) for kind in ("scores", "looks"))
        kept = [p.image for p in pictures if p.image is not None]
        places, source = [self.order[p.j] for p in pictures], self.prompts
        prompts, metadata = ([rows[i] for i in places] for rows in (source.prompts, source.metadata))
        embeddings = [p.embedding for p in pictures if p.embedding is not None]
        distances = [p.distance for p in pictures if p.distance is not None]
        sizes = [p.size for p in pictures] if len(self.rollouts) > 1 else []
        alike = list(zip(prompts, sizes, strict=True)) if sizes else prompts
        measures = {
            "diversity": diversity(torch.stack(embeddings), alike) if embeddings else None,
            "base_distance": sum(distances) / len(distances) if distances else None,
        }
        measures = {name: value for name, value in measures.items() if value is not None}
        # The copies do not keep the rest of their batch in memory.
        images = [image.clone() for image in kept] if sizes else torch.stack(kept)
        rewards = self.judges.reward.combine(columns)
        return Evaluation(prompts, images, rewards, columns, measures, metadata, seen, sizes)

    def _batch(self, rollout: Rollout, batch: range, sample: Sample | None, compare: bool) -> list[_Picture]:
        prompts = [self.prompts.prompts[self.order[j]] for j in batch]
        metadata = [self.prompts.metadata[self.order[j]] for j in batch]
        model, streams = rollout.model, generators(batch, self.seed, "evaluation")
        cond = encode(model, prompts, self.phases)
        base_cond = base_conditioning(model, prompts, cond, self.phases) if compare else None
        with self.phases("denoise"):
            latents = sample(streams, cond, prompts, metadata) if sample else rollout(streams, cond, None)
            distances = [None] * len(batch)
            if compare:
                distances = self._distances(rollout, batch, latents, cond, base_cond)
        with self.phases("decode"):
            images = [model.decode(latents[rows]) for rows in chunks(len(batch), self.decode_chunk)]
        scores, embeddings = self.judges.judge(images, prompts, metadata, self.phases)
        found = [looks(chunk) for chunk in images]
        seen = {name: torch.cat([part[name] for part in found]) for name in found[0]}
        rows, seen = (
            [{name: column[row].item() for name, column in columns.items()} for row in range(len(batch))]
            for columns in (scores, seen)
        )
        embeddings = [None] * len(batch) if embeddings is None else embeddings.cpu()
        sizes = [size_name(images[0].shape[-2:])] * len(batch)
        return [*map(_Picture, batch, sizes, rows, seen, torch.cat(images).cpu(), embeddings, distances)]

    def _distances(self, rollout: Rollout, batch: range, latents, cond, base_cond) -> list[float | None]:
        """Returns the base distance of each picture that is compared, and None for each other picture.

        If FSDP2 has sharded the weights, at least one distance is computed, because all processes gather together.
        """
        rows = slice(max(sum(j < NUM_COMPARED for j in batch), is_sharded(rollout.denoiser)))
        noise = generators(batch[rows], self.seed, "base distance")
        distances = torch.empty(0)
        if noise:
            cond, base_cond = select(cond, rows), select(base_cond, rows)
            distances = chain_distance(rollout, latents[rows], cond, noise, base_cond)
        return [d if j < NUM_COMPARED else None for j, d in zip_longest(batch, distances.tolist())]


def _columns(rows: list[dict[str, float]]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([row[name] for row in rows]).double() for name in rows[0]}
