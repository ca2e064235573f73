"""The fields of the model, and of which of its weights are trained."""

import os

from alignprop.settings.fields.field import LORA, TRAINING, Field, needs
from alignprop.settings.fields.rules import COUNT, NAMES, QUANTIZED, SIZES
from rewards.rules import boolean, choice, number, optional, text

_FILES = (".safetensors", ".ckpt")
SINGLE_FILE = needs("a single file as pretrained.model", lambda c: c.pretrained.model.endswith(_FILES))
PIPELINE = needs("a pipeline as pretrained.model", lambda c: not c.pretrained.model.endswith(_FILES))
EIGHT_BITS = needs("pretrained.quantize = 'int8' or 'fp8'", lambda c: c.pretrained.quantize in ("int8", "fp8"))
HUB_NAME = needs("a hub name as pretrained.model", lambda c: not os.path.exists(c.pretrained.model))

FIELDS = (
    Field(
        "pretrained.model", "stable-diffusion-v1-5/stable-diffusion-v1-5", text(),
        "The model: a hub name, a folder in diffusers' format, or a single .safetensors or .ckpt file. docs/models.md "
        "lists the families.",
    ),
    Field(
        "pretrained.revision", None, optional(text()),
        "The branch, tag or commit of the model's repository on the hub. None takes the newest commit.", (HUB_NAME,),
    ),
    Field(
        "pretrained.variant", None, optional(text()),
        "The set of weights that is loaded if a folder or repository has several, such as 'fp16'. None loads the plain "
        "files. If a local folder lacks the plain files of some part, None loads the variant that is there.",
        (PIPELINE,),
    ),
    Field(
        "pretrained.config", None, optional(text()),
        "The hub name or folder of the pipeline that supplies the configuration and the tokenizer of a single file. "
        "None takes the file for a Stable Diffusion 1.x or 2.x model. --plan cannot use None.", (SINGLE_FILE,),
    ),
    Field(
        "pretrained.vae", None, optional(text()),
        "The hub name or folder of a VAE that replaces the model's own, such as an SDXL VAE that was made for fp16. "
        "None keeps the model's own VAE.",
    ),
    Field(
        "pretrained.denoiser", None, optional(text()),
        "The denoiser that replaces the model's own: a .gguf or .safetensors file with its weights alone, a folder, or "
        "a hub name, also of a file ('user/name/file.gguf'). Weights in the formats of GGUF and of bitsandbytes stay "
        "packed; weights in fp8 are loaded in the run's precision. None keeps the model's own denoiser.", (PIPELINE,),
    ),
    Field(
        "pretrained.quantize", "", QUANTIZED,
        "The format in which the frozen weights of the denoiser are kept, so that it needs less memory: 'int8' and "
        "'fp8' take 8 bits for each weight, 'int4' and 'nf4' take about 4. The weights are put into the format when "
        "they are loaded, and unpacked layer by layer in each network call. The LoRA stays float32, and an export "
        "merges it into the unquantised weights. 'nf4' needs the package bitsandbytes. docs/memory.md compares the "
        "formats. If the field is empty, the weights stay as they are. It needs use_lora = True.",
    ),
    Field(
        "pretrained.quantize_products", False, boolean(),
        "If True, the linear layers whose weights are packed in 8 bits multiply in 8 bits too, which the matrix units "
        "of many GPUs do twice as fast. Inputs are rounded in the rollout, and gradients in the sweep, so both get "
        "errors (docs/memory.md has their size). 'int8' needs a GPU of compute capability 7.5, 'fp8' one of 8.9. A CPU "
        "is slower with it.", (EIGHT_BITS,),
    ),
    Field(
        "pretrained.quantize_text_encoders", "", QUANTIZED,
        "The same for the text encoders, of which T5 is the largest part of many models.",
    ),
    Field(
        "pretrained.without", "", text(empty=True),
        "The part of the model that is left out. Only Stable Diffusion 3 has such a part, 't5'. Without it the model "
        "needs 9 GB less, but a part of a long prompt is lost. If the field is empty, nothing is left out.",
        (PIPELINE,),
    ),
    Field(
        "pretrained.loras", "", text(empty=True),
        "LoRAs that stay on beneath the trained one, such as LCM-LoRA: files, folders or hub names, separated by "
        "commas, each with a strength if it is not 1, for example 'style.safetensors@0.6'. They are merged into the "
        "weights of the model, and training does not change them.",
    ),
    Field(
        "resolution", None, optional(SIZES),
        "The size of the pictures in pixels: the side of a square, or WIDTHxHEIGHT, for example '768x512'. Stable "
        "Diffusion needs multiples of 16. None takes the size that the model was trained for. Several sizes are "
        "separated by commas, for example '768x512,512x768'. Then each training step draws one of them, and an "
        "evaluation draws each of its prompts in all of them.",
    ),
    Field(
        "use_lora", True, boolean(),
        "If True, a LoRA is trained. If False, every weight of the denoiser is trained, in float32.", (TRAINING,),
    ),
    Field(
        "train_text_encoder", False, boolean(),
        "If True, a LoRA is trained for the text encoders as well, if the pipeline's LoRA files have a place for them. "
        "Prompts are then encoded for every micro-batch instead of only once. It needs use_lora = True and algorithm = "
        "'align_prop'.", (TRAINING,),
    ),
    Field("lora_rank", 4, COUNT, "The rank of the LoRA's weight change in each layer.", (TRAINING, LORA)),
    Field(
        "lora_alpha", None, optional(number(above=0)),
        "Scales the LoRA: its weight change is lora_alpha / lora_rank · B @ A. None takes lora_rank as lora_alpha.",
        (TRAINING, LORA),
    ),
    Field(
        "lora_initialization", "kaiming", choice("kaiming", "gaussian"),
        "The distribution of the initial A of the LoRA. 'kaiming' is uniform between ±1/√(inputs of the layer), which "
        "is PEFT's default. 'gaussian' is normal with a standard deviation of 1/lora_rank, as in diffusers' training "
        "scripts and in TRL. It is several times larger, so the first steps go further at the same learning rate. B "
        "starts at 0 in both. Weights that init_lora has start from its values.",
        (TRAINING, LORA),
    ),
    Field(
        "lora_target_modules", None, optional(NAMES),
        "The layers of the denoiser that get a LoRA, by the endings of their names. None takes the attention layers "
        "that are usual for the model's family. The LoRA of a text encoder is always in its attention layers.",
        (TRAINING, LORA),
    ),
    Field(
        "init_lora", "", text(empty=True),
        "The LoRA from which a new run starts: a file, a folder, a checkpoint, a run folder (its newest checkpoint is "
        "taken), or a hub name such as 'user/name' or 'user/name/file.safetensors'. Its rank must not be larger than "
        "lora_rank. If the field is empty, training starts from a LoRA that changes nothing.", (TRAINING, LORA),
    ),
)  # fmt: skip
