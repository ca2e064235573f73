"""Runs TRL's AlignPropTrainer as a worker, in TRL's own virtual environment (step_time.py makes it)."""

import statistics

from accelerate import PartialState
from trl import AlignPropConfig, AlignPropTrainer, DefaultDDPOStableDiffusionPipeline

from scripts.bench.worker import blueness, facts_of, noise_source, serve, start_lora


def build(settings: dict):
    problem = settings["problem"]
    rewards = []

    def reward(images, prompts, metadata):
        scores = blueness(images)
        rewards.extend(scores.tolist())
        return scores, {}

    PartialState()  # TRL's pipeline logs through accelerate, which refuses to log without it
    pipeline = DefaultDDPOStableDiffusionPipeline(problem["pipeline"], use_lora=True)
    config = AlignPropConfig(
        mixed_precision="no",
        sample_num_steps=problem["num_steps"],
        sample_guidance_scale=problem["guidance_scale"],
        sample_eta=problem["eta"],
        train_batch_size=problem["batch_size"],
        train_learning_rate=problem["learning_rate"],
        train_adam_weight_decay=problem["weight_decay"],
        train_max_grad_norm=problem["max_grad_norm"],
        truncated_backprop_rand=False,
        truncated_backprop_timestep=settings["first_step"],  # steps from this one on carry gradient
    )
    trainer = AlignPropTrainer(config, reward, lambda: (problem["prompt"], {}), pipeline)
    pipeline.set_progress_bar_config(disable=True)
    start_lora(pipeline.unet, problem["lora_rank"])
    noise = noise_source(pipeline.unet)
    pipeline.sd_pipeline.prepare_latents = lambda batch_size, *_: noise(batch_size)

    def step() -> float:
        rewards.clear()
        trainer.step(epoch=0, global_step=0)  # in epoch 0 it saves nothing
        return statistics.mean(rewards)

    return step, facts_of(pipeline.unet)


if __name__ == "__main__":
    serve(build)
