"""The fields of the run: its task, the place of its results, processes and precision."""

from alignprop.settings.fields.field import TRAINING, Field, needs
from alignprop.settings.fields.rules import COUNT, FOLDER_NAME, REPO_NAME
from rewards.rules import boolean, choice, integer, number, optional, text

HUB = needs("hub.repo", lambda c: bool(c.hub.repo))

FIELDS = (
    Field(
        "task", "train", choice("train", "evaluate", "evaluate_soup", "guide", "explore"),
        "What the program does. 'train' trains. 'evaluate' measures a checkpoint or the base model. 'evaluate_soup' "
        "measures mixtures of two checkpoints. 'guide' steers pictures by the reward while they are sampled. 'explore' "
        "serves a page that compares pictures.",
    ),
    Field(
        "algorithm", "align_prop", choice("align_prop", "ddpo"),
        "How training follows the reward. 'align_prop' back-propagates the reward. 'ddpo' is a policy gradient, for "
        "rewards without a gradient (config/ddpo.py).", (TRAINING,),
    ),
    Field(
        "run_name", "", FOLDER_NAME,
        "The name of the run's folder in log_dir. If it is empty, the folder is that of the run whose checkpoint "
        "resume_from names, or else a new one with the preset's name and the time.",
    ),
    Field("log_dir", "logs", text(), "The folder in which the run folders are created."),
    Field(
        "log_with", "", text(empty=True),
        "The trackers that get the metrics in addition to metrics.jsonl: 'wandb', 'tensorboard' or 'trackio', or "
        "several of them, separated by commas. If it is empty, there is no tracker.", (TRAINING,),
    ),
    Field(
        "seed", 0, integer(0),
        "The seed of everything random: noise, prompts, the estimator's draws and the initial values of the LoRA.",
    ),
    Field(
        "resume_from", "", text(empty=True),
        "The checkpoint from which training continues, or which another task uses: a checkpoint, a run folder (its "
        "newest checkpoint is taken), or 'latest', the newest checkpoint of run_name, or of log_dir if run_name is "
        "empty. Tasks that do not train take every LoRA that init_lora takes, too. If the field is empty, training "
        "starts a new run, and other tasks use the base model.",
    ),
    Field(
        "save_freq", 1, COUNT,
        "The number of epochs from one checkpoint to the next. The last epoch is always saved.", (TRAINING,),
    ),
    Field(
        "num_checkpoint_limit", 5, integer(0),
        "The number of newest checkpoints that are kept. The best checkpoint, and one that resume_from names, are kept "
        "in addition. 0 keeps all checkpoints.", (TRAINING,),
    ),
    Field(
        "timeout_minutes", 10.0, number(above=0, at_most=7 * 24 * 60),
        "The longest time, in minutes, that a process waits for another one. A run that waits longer ends with an "
        "error.",
    ),
    Field(
        "mixed_precision", "fp16", choice("no", "fp16", "bf16"),
        "The precision of frozen weights and of network calls. 'no' is float32. 'fp16' uses loss scaling and needs a "
        "GPU.",
    ),
    Field(
        "allow_tf32", True, boolean(),
        "If True, matrix products and convolutions of float32 tensors use TF32 on NVIDIA GPUs, which is faster and has "
        "a mantissa of 10 bits.",
    ),
    Field(
        "channels_last", None, optional(boolean()),
        "If True, convolutions work in NHWC order. None means True on a CPU, where it saves 2 to 4 % of the time, and "
        "False elsewhere. `scripts/bench/gpu.py --variants channels_last` measures the effect on your GPU.",
    ),
    Field(
        "compile", False, boolean(),
        "If True, training compiles the denoiser's repeated blocks with torch.compile. The first step then takes a "
        "minute or more, and later steps take less time.", (TRAINING,),
    ),
    Field(
        "hub.repo", "", REPO_NAME,
        "The repository 'user/name' on the Hugging Face hub to which the best weights and a model card, with the run's "
        "configuration, metrics and some pictures, are uploaded after training. The token is that of HF_TOKEN or of "
        "`hf auth login`. If it is empty, nothing is uploaded.", (TRAINING,),
    ),
    Field(
        "hub.private", False, boolean(),
        "If True, only the owners of the repository see it. If False, everybody sees it, unless the organisation makes "
        "new repositories private.", (TRAINING, HUB),
    ),
)  # fmt: skip
