"""Fields of prompts, of evaluations, of mixtures, and of what follows from an evaluation."""

from alignprop.settings.fields.field import AFTER_TRAINING, CHECKPOINT, EVALUATION, LORA, MIXTURE, SOUP, TRAINING, Field
from alignprop.settings.fields.rules import COUNT, NUMBERS, boolean, choice, integer, number, optional, text

FIELDS = (
    Field(
        "prompt_fn", "simple_animals", text(),
        "The prompts of training: a named prompt set, a text file with one prompt a line, or a .jsonl, .json, .csv or "
        ".tsv file with a column `prompt`, whose other columns are metadata for the reward.", (TRAINING,),
    ),
    Field("eval_prompt_fn", "eval_simple_animals", text(), "The prompts of evaluations, likewise."),
    Field(
        "eval_freq", 1, integer(0),
        "Epochs between evaluations. 0: only before the first epoch and after the last.", (TRAINING,),
    ),
    Field(
        "resume_from_2", "stablediffusion", text(),
        "The second checkpoint of a mixture. 'stablediffusion' is the base model.", (MIXTURE,),
    ),
    Field(
        "mixing_coef_1", (0.0, 0.25, 0.5, 0.75, 1.0), NUMBERS,
        "The share c of the first checkpoint in a mixture: one value or several, from 0 to 1.", (SOUP,),
    ),
    Field(
        "allow_extrapolation", False, boolean(),
        "Allows shares below 0 and above 1, which subtract a checkpoint.", (SOUP,),
    ),
    Field(
        "soup_mode", "delta", choice("delta", "factors"),
        "What is mixed: the weight changes, exactly, or their factors A and B, as the paper's released code does.",
        (MIXTURE,),
    ),
    Field(
        "num_eval_images", 32, COUNT,
        "Pictures of an evaluation. Where there are more pictures than prompts, prompts repeat with other noise.",
        (EVALUATION,),
    ),
    Field(
        "num_eval_prompts", 16, optional(COUNT),
        "How many different prompts an evaluation uses. None: all there are.", (EVALUATION,),
    ),
    Field(
        "eval_diversity", True, boolean(),
        "Measures how much pictures of one prompt differ: 1 - cosine in the space of clip.model.", (EVALUATION,),
    ),
    Field(
        "eval_base_distance", True, boolean(),
        "Measures the mean squared difference of the denoiser's output to the base model's, on the first 8 pictures at "
        "4 steps each.", (EVALUATION, LORA),
    ),
    Field(
        "stop_when", "", text(empty=True),
        "Conditions that end training after an evaluation, separated by commas: 'clip<0.25', or 'clip<0.9x' for 0.9 "
        "times its value at step 0. A measure is the name of a reward, 'reward', 'diversity' or 'base_distance'.",
        (TRAINING,),
    ),
    Field(
        "best_by", "", text(empty=True),
        "The measure whose highest value decides checkpoints/best. Empty: the trained reward.", (TRAINING,),
    ),
    Field(
        "lora_scale", 1.0, number(), "Multiplies the trained weight change.", (AFTER_TRAINING, CHECKPOINT),
    ),
    Field(
        "lora_schedule", "constant", choice("constant", "linear"),
        "How the weight change counts along the chain. 'linear': from 0 at the first sampler step to lora_scale at the "
        "last, which keeps the layout of the base model's pictures.", (AFTER_TRAINING, CHECKPOINT),
    ),
    Field("max_vis_images", 16, COUNT, "Pictures in a sample grid and sent to trackers.", (EVALUATION,)),
)  # fmt: skip
