"""Names of other programs for what a field is here: of AlignProp, TRL, ddpo-pytorch and diffusers' training scripts."""

import re

# What a person who types the name is told. A name of ours is what it is called here.
ELSEWHERE = {
    "accelerator_kwargs": "flags of `accelerate launch` do that",
    "aesthetic_target": "loss_target",
    "async_reward_computation": "the reward is called with a micro-batch at a time",
    "debug": "log_with",
    "exp_name": "run_name",
    "grad_checkpoint": "memory_policy",
    "gradient_checkpointing": "memory_policy",
    "height": "resolution",
    "log_image_freq": "eval_freq",
    "logdir": "log_dir",
    "lr": "train.learning_rate",
    "max_train_steps": "num_epochs",
    "max_workers": "the reward is called with a micro-batch at a time",
    "negative_prompt": "guidance is against the empty prompt",
    "negative_prompts": "guidance is against the empty prompt",
    "num_steps": "num_inference_steps",
    "only_eval": "task",
    "output_dir": "log_dir",
    "per_prompt_stat_tracking": "ddpo.per_prompt_buffer",
    "per_prompt_stat_tracking_buffer_size": "ddpo.per_prompt_buffer",
    "per_prompt_stat_tracking_min_count": "ddpo.per_prompt_min_count",
    "pretrained_model_name_or_path": "pretrained.model",
    "project_kwargs": "log_dir, run_name and num_checkpoint_limit do that",
    "push_to_hub": "hub.repo",
    "rank": "lora_rank",
    "report_to": "log_with",
    "same_evaluation": "evaluations always have the same prompts and noise",
    "sample_batch_size": "per_gpu_capacity",
    "sample_eta": "eta",
    "sample_guidance_scale": "guidance_scale",
    "sample_num_batches_per_epoch": "train.total_samples_per_epoch",
    "sample_num_steps": "num_inference_steps",
    "sd_guidance_scale": "guidance_scale",
    "soup_inference": "task",
    "steps": "num_inference_steps",
    "tracker_kwargs": "the tracker's environment variables do that, such as WANDB_ENTITY",
    "tracker_project_name": "the project is always 'alignprop'",
    "train_adam_beta1": "train.adam_beta1",
    "train_adam_beta2": "train.adam_beta2",
    "train_adam_epsilon": "train.adam_epsilon",
    "train_adam_weight_decay": "train.adam_weight_decay",
    "train_adv_clip_max": "ddpo.adv_clip_max",
    "train_batch_size": "per_gpu_capacity",
    "train_cfg": "guidance_scale",
    "train_clip_range": "ddpo.clip_range",
    "train_gradient_accumulation_steps": "train.total_batch_size",
    "train_learning_rate": "train.learning_rate",
    "train_max_grad_norm": "train.max_grad_norm",
    "train_num_inner_epochs": "ddpo.inner_epochs",
    "train_timestep_fraction": "ddpo.timestep_fraction",
    "train_use_8bit_adam": "train.optimizer",
    "truncated_backprop": "estimator",
    "truncated_backprop_rand": "estimator",
    "truncated_backprop_timestep": "trunc_backprop_timestep",
    "truncated_rand_backprop_minmax": "truncated_backprop_minmax",
    "use_8bit_adam": "train.optimizer",
    "vis_freq": "eval_freq",
    "visualize_eval": "evaluations are always written to the run's folder",
    "visualize_train": "evaluations are always written to the run's folder",
    "width": "resolution",
}


def answer_for(name: str) -> str:
    """What a person is told who types a name of another program, such as "train.batch_size"; "" for any other."""
    for known in (name, name.replace(".", "_"), name.rpartition(".")[2]):
        if known in ELSEWHERE:
            answer = ELSEWHERE[known]
            return f"here it is {answer}" if re.fullmatch(r"[\w.]+", answer) else answer
    return ""
