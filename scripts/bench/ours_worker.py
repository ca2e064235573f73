"""Runs our AlignPropTrainer as a worker for step_time.py."""

from alignprop.trainer import AlignPropTrainer
from config.align_prop import get_config
from scripts.bench.worker import blueness, facts_of, noise_source, serve, start_lora


def build(settings: dict):
    problem, c = settings["problem"], get_config("quickstart")
    fields = {
        "pretrained.model": problem["pipeline"],
        "log_dir": problem["log_dir"],
        "lora_rank": problem["lora_rank"],
        "num_inference_steps": problem["num_steps"],
        "guidance_scale": problem["guidance_scale"],
        "eta": problem["eta"],
        "estimator": "truncated",
        "trunc_backprop_timestep": settings["first_step"],  # steps from this one on carry gradient
        "eval_reward_fn": "",
        "prompt_fn": problem["prompt_file"],
        "eval_prompt_fn": problem["prompt_file"],
        "per_gpu_capacity": problem["batch_size"],
        "train.total_batch_size": problem["batch_size"],
        "train.total_samples_per_epoch": problem["batch_size"],
        "train.learning_rate": problem["learning_rate"],
        "train.adam_weight_decay": problem["weight_decay"],
        "train.max_grad_norm": problem["max_grad_norm"],
    }
    c.update_from_flattened_dict({**fields, **settings["overrides"]})
    trainer = AlignPropTrainer(c, lambda images, prompts, metadata: blueness(images))
    model = trainer.run.model
    start_lora(model.denoiser, problem["lora_rank"])
    noise = noise_source(model.denoiser)
    model.init_latents = lambda generators: noise(len(generators))
    return lambda: trainer.step()["reward"], facts_of(model.denoiser)


if __name__ == "__main__":
    serve(build)
