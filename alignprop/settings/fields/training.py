"""Fields of training: batches, steps and the optimizer."""

from alignprop.settings.fields.field import ALIGN_PROP, EVALUATION, TRAINING, Field, needs
from alignprop.settings.fields.rules import COUNT, COUNT_OR_AUTO, choice, integer, number, optional

ADAMW = needs("train.optimizer = 'adamw'", lambda c: c.train.optimizer == "adamw")

FIELDS = (
    Field("num_epochs", 100, COUNT, "Passes of total_samples_per_epoch samples.", (TRAINING,)),
    Field(
        "per_gpu_capacity", 4, COUNT_OR_AUTO,
        "The most samples in one micro-batch on one GPU. The largest number up to it that divides a GPU's share of a "
        "step is taken. 'auto': the most that fit. It changes results by rounding only.", (EVALUATION,),
    ),
    Field("train.total_batch_size", 128, COUNT, "Samples of an optimizer step, over all processes.", (TRAINING,)),
    Field("train.total_samples_per_epoch", 256, COUNT, "Samples of an epoch, over all processes.", (TRAINING,)),
    Field(
        "train.num_inference_steps", None, optional(integer(1)),
        "Sampler steps of training; 10 to 25 are cheaper. None: num_inference_steps.", (TRAINING,),
    ),
    Field(
        "train.optimizer", "adamw", choice("adamw", "adafactor", "sgd"),
        "The optimizer, of torch. Adafactor needs less memory in full fine-tuning.", (TRAINING,),
    ),
    Field("train.learning_rate", 1e-3, number(above=0), "The learning rate; it is constant.", (TRAINING,)),
    Field(
        "train.adam_beta1", 0.9, number(at_least=0, below=1),
        "The decay, per step, of the gradient's running mean.", (TRAINING, ADAMW),
    ),
    Field(
        "train.adam_beta2", 0.999, number(at_least=0, below=1),
        "The decay, per step, of the squared gradient's running mean.", (TRAINING, ADAMW),
    ),
    Field(
        "train.adam_weight_decay", 0.1, number(at_least=0),
        "The weight decay of every optimizer, per step and times the learning rate.", (TRAINING,),
    ),
    Field(
        "train.adam_epsilon", 1e-8, number(above=0),
        "Added to the root of the squared gradient's mean, against a division by zero.", (TRAINING, ADAMW),
    ),
    Field(
        "train.max_grad_norm", 5.0, number(above=0), "Gradients of an optimizer step are clipped to this norm.",
        (TRAINING,),
    ),
    Field("train.loss_coeff", 0.01, number(above=0), "Multiplies the loss.", (TRAINING, ALIGN_PROP)),
    Field(
        "train.ema_decay", 0.0, number(at_least=0, below=1),
        "The decay, per step, of a moving average of the trained weights, which evaluations and saved files then use. "
        "0: none.", (TRAINING,),
    ),
    Field(
        "train.max_skipped_steps", 10, COUNT,
        "So many optimizer steps in a row that are skipped, because they are not finite, end the run.", (TRAINING,),
    ),
)  # fmt: skip
