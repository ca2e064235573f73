"""The fields of training: batches, steps and the optimizer."""

from alignprop.settings.fields.field import ALIGN_PROP, EVALUATION, TRAINING, Field, needs
from alignprop.settings.fields.rules import COUNT, COUNT_OR_AUTO
from rewards.rules import choice, integer, number, optional, text, whole_number_to

ADAM = needs(
    "train.optimizer = 'adamw', 'adamw8bit' or 'prodigy'",
    lambda c: c.train.optimizer in ("adamw", "adamw8bit", "prodigy"),
)
NOT_FULL = needs("an estimator other than 'full'", lambda c: c.estimator != "full")
CACHED = needs("train.prefix_cache > 1", lambda c: c.train.prefix_cache > 1)
RESTARTS = needs("train.lr_schedule = 'cosine_with_restarts'", lambda c: c.train.lr_schedule == "cosine_with_restarts")
POLYNOMIAL = needs("train.lr_schedule = 'polynomial'", lambda c: c.train.lr_schedule == "polynomial")

FIELDS = (
    Field(
        "num_epochs", 100, COUNT, "The number of epochs. Each has train.total_samples_per_epoch samples.", (TRAINING,),
    ),
    Field(
        "per_gpu_capacity", 4, COUNT_OR_AUTO,
        "The largest number of samples in one micro-batch on one GPU. Training uses the largest number up to it that "
        "divides a GPU's share of an optimizer step. 'auto' takes the most that fit the GPU's memory, up to 16, or at "
        "most 4 without a GPU or without training. The value changes results only by rounding.", (EVALUATION,),
    ),
    Field(
        "train.total_batch_size", 128, COUNT,
        "The number of samples in an optimizer step, over all processes. It must be a multiple of the number of "
        "processes.", (TRAINING,),
    ),
    Field(
        "train.total_samples_per_epoch", 256, COUNT,
        "The number of samples in an epoch, over all processes. It must be a multiple of train.total_batch_size.",
        (TRAINING,),
    ),
    Field(
        "train.num_inference_steps", None, optional(integer(1)),
        "The number of sampler steps in training. 10 to 25 steps are cheaper. None takes num_inference_steps.",
        (TRAINING,),
    ),
    Field(
        "train.sampler", None, optional(text()), "The sampler in training. None takes `sampler`.", (TRAINING,),
    ),
    Field(
        "train.sampler_options", None, optional(text(empty=True)),
        "The options of the sampler in training. None takes sampler_options if the sampler is the same, else none.",
        (TRAINING,),
    ),
    Field(
        "train.prefix_cache", 1, COUNT,
        "Computes only every n-th of the network calls before the first one with gradient in full, after 3 full ones. "
        "In the others the blocks of the denoiser predict their outputs (TaylorSeer). The gradient is exact at the "
        "latents that are visited, but these are those of a slightly different chain. The first call with gradient is "
        "that of all samples of an optimizer step together, so the cache helps most with 'truncated'. 1 computes all "
        "calls in full.", (TRAINING, ALIGN_PROP, NOT_FULL),
    ),
    Field(
        "train.prefix_cache_order", 1, whole_number_to(0, 2),
        "The order of the Taylor series of train.prefix_cache. 0 repeats the outputs of the last full call. Each order "
        "keeps one more tensor of every block.", (TRAINING, ALIGN_PROP, CACHED),
    ),
    Field(
        "train.optimizer", "adamw", choice("adamw", "adamw8bit", "prodigy", "adafactor", "sgd"),
        "The optimizer. 'adamw8bit' and 'adafactor' need less memory than 'adamw' if all weights are trained. "
        "'prodigy' finds its step size itself; set train.learning_rate=1 with it. 'adamw8bit' needs the package "
        "bitsandbytes, 'prodigy' needs prodigyopt, and the others are torch's own.", (TRAINING,),
    ),
    Field(
        "train.learning_rate", 1e-3, number(above=0),
        "The learning rate, or the largest one if train.lr_schedule or train.lr_warmup_steps changes it. The usual "
        "value for the optimizer 'prodigy' is 1.0, because it multiplies a step size that the optimizer finds.",
        (TRAINING,),
    ),
    Field(
        "train.lr_schedule", "constant", choice("constant", "linear", "cosine", "cosine_with_restarts", "polynomial"),
        "How the learning rate changes between the warm-up and the end of the run, by the formulas of diffusers. "
        "'linear' and 'cosine' fall to 0, 'polynomial' to 1e-7. The rate of an optimizer update depends only on the "
        "number of updates before it, skipped ones included, and on the number of updates in the whole run. A run that "
        "is resumed with another num_epochs continues on the schedule of the new length. The rows of metrics.jsonl "
        "have the rate as `lr`.", (TRAINING,),
    ),
    Field(
        "train.lr_warmup_steps", 0, integer(0),
        "The number of optimizer updates in which the learning rate rises from 0 in equal steps. The first of them has "
        "the learning rate 0, as in diffusers. It must be less than the number of updates of the run. 0 is no warm-up.",
        (TRAINING,),
    ),
    Field(
        "train.lr_num_cycles", 2, COUNT,
        "The number of times that the learning rate falls from its largest value to 0. 1 is the same as 'cosine'.",
        (TRAINING, RESTARTS),
    ),
    Field(
        "train.lr_power", 2.0, number(above=0),
        "The power p of the learning rate, which is proportional to rᵖ if a share r of the run is left. 1 is nearly "
        "the same as 'linear'.", (TRAINING, POLYNOMIAL),
    ),
    Field(
        "train.adam_beta1", 0.9, number(at_least=0, below=1),
        "The decay of the running mean of the gradient, per optimizer step.", (TRAINING, ADAM),
    ),
    Field(
        "train.adam_beta2", 0.999, number(at_least=0, below=1),
        "The decay of the running mean of the squared gradient, per optimizer step.", (TRAINING, ADAM),
    ),
    Field(
        "train.adam_weight_decay", 0.1, number(at_least=0),
        "The weight decay per optimizer step, multiplied by the learning rate. All optimizers use it.", (TRAINING,),
    ),
    Field(
        "train.adam_epsilon", 1e-8, number(above=0),
        "A small number that is added to the root of the mean squared gradient, to avoid a division by zero.",
        (TRAINING, ADAM),
    ),
    Field(
        "train.max_grad_norm", 5.0, number(above=0), "The norm to which the gradient of an optimizer step is clipped.",
        (TRAINING,),
    ),
    Field(
        "train.loss_coeff", 0.01, number(above=0), "Multiplies the loss of a sample, and so does grad_scale.",
        (TRAINING, ALIGN_PROP),
    ),
    Field(
        "train.ema_decay", 0.0, number(at_least=0, below=1),
        "The decay per optimizer step of a moving average of the trained weights. Evaluations and saved weights then "
        "use the average. 0 keeps no average.", (TRAINING,),
    ),
    Field(
        "train.max_skipped_steps", 10, COUNT,
        "An optimizer step whose loss or gradient is not finite is skipped. The run ends with an error after this many "
        "skipped steps in a row, or if a shorter run skips all its steps.", (TRAINING,),
    ),
)  # fmt: skip
