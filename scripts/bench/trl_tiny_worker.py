"""Runs TRL's AlignPropTrainer on the bundled model, in TRL's environment, as a worker for time_to_reward.py."""

import random
import statistics
from pathlib import Path

from accelerate import PartialState
from trl import AlignPropConfig, AlignPropTrainer, DefaultDDPOStableDiffusionPipeline

from rewards import build_reward
from scripts.bench.worker import facts_of, serve


def build(settings: dict):
    problem = settings["problem"]
    score = build_reward(problem["reward"], problem["reward_options"])
    prompts = Path(problem["prompt_file"]).read_text().splitlines()
    draw = random.Random(settings["seed"])
    rewards = []

    def reward(images, prompts, metadata):
        scores = score(images, list(prompts), metadata)
        rewards.extend(scores.tolist())
        return scores, {}

    PartialState()  # TRL's pipeline logs through accelerate, which refuses to log without it
    pipeline = DefaultDDPOStableDiffusionPipeline(problem["pipeline"], use_lora=True)
    fields = {
        "seed": settings["seed"],
        "mixed_precision": "no",
        "sample_num_steps": problem["num_steps"],
        "sample_guidance_scale": problem["guidance_scale"],
        "sample_eta": problem["eta"],
        "train_batch_size": problem["batch_size"],
    }
    config = AlignPropConfig(**{**fields, **settings["overrides"]})
    if config.truncated_backprop_rand:  # the whole chain, because TRL's own range is for TRL's own number of steps
        config.truncated_rand_backprop_minmax = (0, config.sample_num_steps)
    trainer = AlignPropTrainer(config, reward, lambda: (draw.choice(prompts), {}), pipeline)
    pipeline.set_progress_bar_config(disable=True)

    def step() -> float:
        rewards.clear()
        trainer.step(epoch=0, global_step=0)  # in epoch 0 it saves nothing
        return statistics.mean(rewards)

    def save(folder: str) -> None:
        pipeline.save_checkpoint([pipeline.unet], [], folder)

    return step, facts_of(pipeline.unet), save


if __name__ == "__main__":
    serve(build)
