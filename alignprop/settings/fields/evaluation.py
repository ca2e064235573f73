"""The fields of prompts, of evaluations, of mixtures, and of what follows from an evaluation."""

from alignprop.settings.fields.field import AFTER_TRAINING, CHECKPOINT, EVALUATION, LORA, MIXTURE, SOUP, TRAINING, Field
from alignprop.settings.fields.rules import COUNT, NUMBERS
from rewards.rules import boolean, choice, integer, number, optional, text

FIELDS = (
    Field(
        "prompt_fn", "simple_animals", text(),
        "The prompts of training: the name of a prompt set, a text file with one prompt in each line, a .jsonl, "
        ".json, .csv or .tsv file with a column `prompt`, `prompts`, `text` or `caption`, or 'dataset:NAME:SPLIT', a "
        "dataset of the Hugging Face hub with such a column. The other columns are metadata for the reward. The column "
        "`weight` also says how often a prompt is drawn, `negative_prompt` replaces the field of that name, and "
        "`target` is the path of a picture that some rewards compare with.", (TRAINING,),
    ),
    Field("eval_prompt_fn", "eval_simple_animals", text(), "The prompts of evaluations, in the forms of prompt_fn."),
    Field(
        "eval_freq", 1, integer(0),
        "The number of epochs from one evaluation to the next. There is always one before the first epoch and one "
        "after the last. 0 makes only these two.", (TRAINING,),
    ),
    Field(
        "resume_from_2", "stablediffusion", text(),
        "The second checkpoint of a mixture, in any form that resume_from takes. 'stablediffusion' is the base model.",
        (MIXTURE,),
    ),
    Field(
        "mixing_coef_1", (0.0, 0.25, 0.5, 0.75, 1.0), NUMBERS,
        "The share of the first checkpoint, resume_from, in a mixture. Each of several values is evaluated. They must "
        "be from 0 to 1 unless allow_extrapolation = True.", (SOUP,),
    ),
    Field(
        "allow_extrapolation", False, boolean(),
        "If True, mixing_coef_1 may have shares below 0, which subtract the first checkpoint, and above 1, which "
        "subtract the second.", (SOUP,),
    ),
    Field(
        "soup_mode", "delta", choice("delta", "factors"),
        "What is mixed. 'delta' mixes the weight changes exactly. 'factors' mixes their factors A and B, as the "
        "paper's released code does.",
        (MIXTURE,),
    ),
    Field(
        "num_eval_images", 32, COUNT,
        "The number of pictures in an evaluation. If there are more pictures than prompts, prompts repeat with other "
        "noise. If resolution names several sizes, each size gets an equal part of the pictures, and the number of "
        "sizes must divide the number of pictures.",
        (EVALUATION,),
    ),
    Field(
        "num_eval_prompts", 16, optional(COUNT),
        "The number of different prompts in an evaluation. If each size has fewer pictures, fewer prompts are used. "
        "None takes all prompts of eval_prompt_fn.", (EVALUATION,),
    ),
    Field(
        "eval_diversity", True, boolean(),
        "If True, an evaluation measures how much the pictures of one prompt and size differ, as 1 - cosine in the "
        "embedding space of clip.model. This needs more pictures than prompts, in each size.", (EVALUATION,),
    ),
    Field(
        "eval_base_distance", True, boolean(),
        "If True, an evaluation measures the mean squared difference between the denoiser's output and the base "
        "model's, on the first 8 pictures, at 4 sampler steps of each.", (EVALUATION, LORA),
    ),
    Field(
        "stop_when", "", text(empty=True),
        "Conditions, separated by commas. Training ends after the first evaluation that meets one of them. A condition "
        "is, for example, 'clip<0.25', or 'clip<0.9x' for 0.9 times the value at step 0. It names a measure: a reward, "
        "'reward' for the trained one, 'diversity' or 'base_distance'. If the field is empty, no condition ends "
        "training.",
        (TRAINING,),
    ),
    Field(
        "best_by", "", text(empty=True),
        "The measure that decides which checkpoint is linked as checkpoints/best: the one with the highest value. It "
        "is one of those that stop_when can name. If the field is empty, the measure is the trained reward.",
        (TRAINING,),
    ),
    Field(
        "lora_scale", 1.0, number(),
        "Multiplies the weight change of the checkpoint's LoRA. 1 is the LoRA as it was trained, and 0 the base model.",
        (AFTER_TRAINING, CHECKPOINT),
    ),
    Field(
        "lora_schedule", "constant", choice("constant", "linear"),
        "How the denoiser's LoRA is scaled along the chain. 'constant' scales it by lora_scale at every sampler step. "
        "'linear' raises the scale from 0 at the first step to lora_scale at the last, which keeps the layout of the "
        "base model's pictures.", (AFTER_TRAINING, CHECKPOINT),
    ),
    Field(
        "max_vis_images", 16, COUNT,
        "The largest number of pictures in a sample grid, which are also sent to the trackers.", (EVALUATION,),
    ),
)  # fmt: skip
