"""Fields of the run: what is done, where the results lie, processes and precision."""

from alignprop.settings.fields.field import TRAINING, Field, needs
from alignprop.settings.fields.rules import (
    COUNT,
    FOLDER_NAME,
    REPO_NAME,
    boolean,
    choice,
    integer,
    number,
    optional,
    text,
)

HUB = needs("hub.repo", lambda c: bool(c.hub.repo))

FIELDS = (
    Field(
        "task", "train", choice("train", "evaluate", "evaluate_soup", "guide", "explore"),
        "What is done: training, measuring a checkpoint or the base model, measuring mixtures of two checkpoints, "
        "reward guidance while sampling, or a page that compares pictures.",
    ),
    Field(
        "algorithm", "align_prop", choice("align_prop", "ddpo"),
        "How training follows the reward: 'align_prop' back-propagates it; 'ddpo' is a policy gradient, for rewards "
        "without gradient (config/ddpo.py).", (TRAINING,),
    ),
    Field("run_name", "", FOLDER_NAME, "The folder under log_dir. Empty: the preset's name and the time."),
    Field("log_dir", "logs", text(), "The folder in which run folders are made."),
    Field(
        "log_with", "", text(empty=True),
        "Trackers besides metrics.jsonl: 'wandb', 'tensorboard', or both, separated by a comma.", (TRAINING,),
    ),
    Field(
        "seed", 0, integer(0),
        "The seed of everything random: noise, prompts, truncation and the first values of the LoRA.",
    ),
    Field(
        "resume_from", "", text(empty=True),
        "A checkpoint, a run folder (its newest checkpoint is taken) or 'latest'; where nothing is trained also a LoRA "
        "of any origin, as for init_lora. Empty: a new run, or the base model.",
    ),
    Field(
        "save_freq", 1, COUNT, "Epochs between checkpoints. The last epoch is always saved.", (TRAINING,),
    ),
    Field(
        "num_checkpoint_limit", 5, integer(0),
        "How many of the newest checkpoints are kept, besides the best one and one that resume_from names. "
        "0 keeps all.", (TRAINING,),
    ),
    Field(
        "timeout_minutes", 10.0, number(above=0, at_most=7 * 24 * 60),
        "The longest wait for another process, in minutes. A run that waited longer ends with an error.",
    ),
    Field(
        "mixed_precision", "fp16", choice("no", "fp16", "bf16"),
        "The precision of frozen weights and of network calls: 'no' is float32; 'fp16' comes with loss scaling.",
    ),
    Field(
        "allow_tf32", True, boolean(),
        "Matrix products of float32 tensors use TF32 on NVIDIA GPUs: faster, with a mantissa of 10 bits.",
    ),
    Field(
        "channels_last", None, optional(boolean()),
        "Convolutions work in NHWC order. None: on a CPU they do, which saves 2 to 4 % of the time there. "
        "`scripts/bench/gpu.py --variants channels_last` measures it on your GPU.",
    ),
    Field(
        "compile", False, boolean(),
        "torch.compile of the denoiser's repeated blocks: the first step takes a minute or more, later ones less.",
    ),
    Field(
        "hub.repo", "", REPO_NAME,
        "The repository 'user/name' on the Hugging Face hub that gets the best weights and a model card after "
        "training. The token is that of HF_TOKEN or of `hf auth login`. Empty: no upload.", (TRAINING,),
    ),
    Field(
        "hub.private", False, boolean(),
        "True: only its owners see the repository. False: everybody does, unless the organisation makes new "
        "repositories private.", (TRAINING, HUB),
    ),
)  # fmt: skip
