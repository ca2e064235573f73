"""The fields of training: batches, steps and the optimizer."""

from alignprop.settings.fields.field import ALIGN_PROP, EVALUATION, TRAINING, Field, needs
from alignprop.settings.fields.rules import COUNT, COUNT_OR_AUTO, choice, integer, number, optional, text

ADAMW = needs("train.optimizer = 'adamw'", lambda c: c.train.optimizer == "adamw")

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
        "train.optimizer", "adamw", choice("adamw", "adafactor", "sgd"),
        "The optimizer, as torch implements it. 'adafactor' needs less memory than 'adamw' if all weights are trained.",
        (TRAINING,),
    ),
    Field("train.learning_rate", 1e-3, number(above=0), "The learning rate, which stays constant.", (TRAINING,)),
    Field(
        "train.adam_beta1", 0.9, number(at_least=0, below=1),
        "The decay of the running mean of the gradient, per optimizer step.", (TRAINING, ADAMW),
    ),
    Field(
        "train.adam_beta2", 0.999, number(at_least=0, below=1),
        "The decay of the running mean of the squared gradient, per optimizer step.", (TRAINING, ADAMW),
    ),
    Field(
        "train.adam_weight_decay", 0.1, number(at_least=0),
        "The weight decay per optimizer step, multiplied by the learning rate. All optimizers use it.", (TRAINING,),
    ),
    Field(
        "train.adam_epsilon", 1e-8, number(above=0),
        "A small number that is added to the root of the mean squared gradient, to avoid a division by zero.",
        (TRAINING, ADAMW),
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
