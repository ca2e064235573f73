"""Fields of the model and of what is trained of it."""

import os

from alignprop.settings.fields.field import LORA, TRAINING, Field, needs
from alignprop.settings.fields.rules import COUNT, NAMES, boolean, integer, number, optional, text

_FILES = (".safetensors", ".ckpt")
SINGLE_FILE = needs("a single file as pretrained.model", lambda c: c.pretrained.model.endswith(_FILES))
PIPELINE = needs("a pipeline as pretrained.model", lambda c: not c.pretrained.model.endswith(_FILES))
HUB_NAME = needs("a hub name as pretrained.model", lambda c: not os.path.exists(c.pretrained.model))

FIELDS = (
    Field(
        "pretrained.model", "stable-diffusion-v1-5/stable-diffusion-v1-5", text(),
        "The model: a hub name, a diffusers folder, or a .safetensors or .ckpt file.",
    ),
    Field(
        "pretrained.revision", None, optional(text()),
        "The branch, tag or commit of the hub's repository. None: the newest.", (HUB_NAME,),
    ),
    Field(
        "pretrained.variant", None, optional(text()),
        "Which of several sets of weights a folder or repository has, such as 'fp16'. None: the plain files; in a "
        "folder with none of some part, the variant that is there.", (PIPELINE,),
    ),
    Field(
        "pretrained.config", None, optional(text()),
        "For a single file: the pipeline folder that has its configuration.", (SINGLE_FILE,),
    ),
    Field(
        "pretrained.vae", None, optional(text()),
        "The hub name or folder of another VAE, such as one of SDXL that is made for fp16.",
    ),
    Field(
        "pretrained.without", "", text(empty=True),
        "What is left out of the model: 't5' of Stable Diffusion 3 saves 9 GB and loses some of long prompts.",
        (PIPELINE,),
    ),
    Field(
        "resolution", None, optional(integer(16)),
        "The side of the pictures in pixels. None: the size that the model was trained for.",
    ),
    Field(
        "use_lora", True, boolean(),
        "True trains a LoRA. False trains every weight of the denoiser, in float32.", (TRAINING,),
    ),
    Field(
        "train_text_encoder", False, boolean(),
        "True trains a LoRA of the text encoders too, of those that the pipeline's LoRA files have a place for. "
        "Prompts are then encoded for every micro-batch, and not only once.", (TRAINING,),
    ),
    Field("lora_rank", 4, COUNT, "The rank of each weight change.", (TRAINING, LORA)),
    Field(
        "lora_alpha", None, optional(number(above=0)),
        "The weight change is alpha / rank · B @ A. None: alpha is the rank.", (TRAINING, LORA),
    ),
    Field(
        "lora_target_modules", None, optional(NAMES),
        "The endings of the names of the layers that get a LoRA. None: the attention layers that are usual for the "
        "model's family. A text encoder always gets one in its attention layers.", (TRAINING, LORA),
    ),
    Field(
        "init_lora", "", text(empty=True),
        "The LoRA that a new run starts from: a file, a folder, a checkpoint, a run folder (its newest checkpoint is "
        "taken) or a hub name, as 'user/name' or 'user/name/file.safetensors'. Its rank may be smaller than lora_rank. "
        "Empty: a LoRA that changes nothing.", (TRAINING, LORA),
    ),
)  # fmt: skip
