"""The fields of sampling, and of the estimator, which decides which part of the chain carries gradient."""

from alignprop.settings.fields.field import ALIGN_PROP, GRADIENTS, GUIDANCE, TRAINING, Field, estimator, needs
from alignprop.settings.fields.rules import COUNT, INTEGERS, shares
from rewards.rules import choice, integer, number, optional, text

GUIDED_AT_ALL = needs(
    "guidance_scale > 1 or true_cfg_scale > 1", lambda c: c.guidance_scale != 1 or c.true_cfg_scale != 1
)

SAMPLING = (
    Field(
        "num_inference_steps", 50, integer(1),
        "The number of sampler steps for each picture. Training uses train.num_inference_steps instead if that is set.",
    ),
    Field(
        "sampler", "ddim", text(),
        "The sampler: 'ddim', which for a flow-matching model is Euler's method; 'pipeline', the scheduler that the "
        "model came with; or the name of a scheduler of diffusers, for example 'DPMSolverMultistep'. "
        "docs/samplers.md lists those that were tried.",
    ),
    Field(
        "sampler_options", "", text(empty=True),
        "Options of the sampler, in the words of diffusers, separated by commas, for example "
        "'use_karras_sigmas=True, solver_order=3'. They replace those of the model's files.",
    ),
    Field(
        "guidance_scale", 7.5, number(at_least=1),
        "The strength of classifier-free guidance. 1 switches guidance off, which halves the cost of a network call. "
        "FLUX.1-dev takes the value as an input of its network.",
    ),
    Field(
        "true_cfg_scale", 1.0, number(at_least=1),
        "The strength of classifier-free guidance by an empty prompt, on top of guidance_scale. 1 switches it off, and "
        "is the only value for models other than FLUX.1. Other values double the cost of a network call.",
    ),
    Field(
        "negative_prompt", "", text(empty=True),
        "The prompt of the unconditional branch of guidance, in training and in every evaluation. Guidance moves the "
        "pictures away from it.", (GUIDED_AT_ALL,),
    ),
    Field(
        "guidance_interval", (0.0, 1.0), shares(2),
        "The part of the chain with guidance, as (from, to) in shares of its steps. The other steps call the "
        "conditional branch alone, at half the cost (Kynkäänniemi et al. 2024, arXiv 2404.07724). At least one step of "
        "training and of evaluation must be in it.", (GUIDANCE,),
    ),
    Field(
        "eta", 0.0, number(at_least=0, at_most=1),
        "How much noise each step of 'ddim' or 'TCD' adds. 0 is a deterministic chain. 1 is "
        "ancestral sampling with 'ddim', and entirely fresh noise with 'TCD'. "
        "Other samplers need 0. DDPO needs a sampler with noise, such as 'ddim' with a value above 0.",
    ),
)  # fmt: skip

ESTIMATOR = (
    Field(
        "estimator", "randomized", text(),
        "The method that decides which sampler steps carry gradient: 'full', 'truncated', 'randomized', 'per_step', "
        "'draft_lv', 'refl', 'drtune', 'sparse', 'bridge', 'lagrange' or 'leapalign'. docs/estimators.md compares "
        "them.", (TRAINING, ALIGN_PROP),
    ),
    Field(
        "trunc_backprop_timestep", None, optional(integer(0)),
        "The first sampler step with gradient, counted from 0. A step is a network call. All later steps have gradient "
        "too. None takes the last step of the chain.", estimator("truncated"),
    ),
    Field(
        "truncated_backprop_minmax", None, optional(INTEGERS),
        "The range (low, high) of the draws. 'randomized' draws the first step with gradient from low to high - 1, so "
        "that (0, 50) gives the last K = 1 … 50 of 50 steps. 'per_step' draws a number from low to high for each step, "
        "and the step has gradient if this number is at most the step's index. None takes the whole chain.",
        estimator("randomized", "per_step"),
    ),
    Field(
        "plan.num_active", None, optional(COUNT),
        "The number of steps with gradient. With lagrange it is the number in each of the two leaps. None means 3 for "
        "drtune, 4 for sparse, 5 for bridge and 2 for lagrange.",
        estimator("drtune", "sparse", "bridge", "lagrange"),
    ),
    Field(
        "plan.exit_window", None, optional(number(above=0, at_most=1)),
        "The share of the chain, at its end, from which the exit step is drawn. The reward sees the clean latents that "
        "the exit step predicts. None means 0.25 for refl and 0.4 for drtune.",
        estimator("refl", "drtune"),
    ),
    Field(
        "plan.copies", None, optional(COUNT),
        "The number of further noise draws with which the last step is called. The gradient is averaged over all "
        "calls. None means 2.", estimator("draft_lv"),
    ),
    Field(
        "plan.late_bias", None, optional(number(at_least=0)),
        "How strongly late steps are preferred: step i is drawn with the weight (i + 1)^late_bias. With bridge, i "
        "counts from 0 on each side of the split. None means 1 for sparse and 4 for bridge.",
        estimator("sparse", "bridge"),
    ),
    Field(
        "plan.rescale", None, optional(number(at_least=0, at_most=1)),
        "How far the gradients of the active steps are enlarged to make up for the other steps. 0 does not enlarge "
        "them, and 1 makes up for all other steps. None means 0.5 for sparse and 0 for bridge.",
        estimator("sparse", "bridge"),
    ),
    Field(
        "plan.coupling", None, optional(number(at_least=0, at_most=1)),
        "The share of ∂f/∂x, the network's derivative by its input, that passes the split of the chain. None means 0.5 "
        "for bridge, 0.1 for lagrange and 0.3 for leapalign.", estimator("bridge", "lagrange", "leapalign"),
    ),
    Field(
        "plan.order", None, optional(COUNT),
        "The number of supports in a leap: the steps between which the network's output is interpolated. None means 3.",
        estimator("lagrange"),
    ),
    Field(
        "plan.support_scale", None, optional(number(above=0, at_most=1)),
        "Multiplies the gradient of each support of a leap except the first. None means 0.25.", estimator("lagrange"),
    ),
    Field(
        "guidance_grad", "both", choice("both", "cond"),
        "The branches of classifier-free guidance that carry gradient. 'both' is exact. 'cond' is the conditional "
        "branch alone, which is an approximation and halves the cost of the sweep.", (GRADIENTS, GUIDANCE),
    ),
    Field(
        "adjoint_clip", 0.0, number(at_least=0),
        "The largest norm that a sample's gradient ∂R/∂x may reach on its way down the chain, as a multiple of its "
        "norm at the end of the chain. 0 sets no limit.",
        (TRAINING, ALIGN_PROP),
    ),
)  # fmt: skip

# Maps each field of `plan` to the estimators that use it.
PLAN_FIELDS = {
    field.name.removeprefix("plan."): field.effects[-1].names for field in ESTIMATOR if field.name.startswith("plan.")
}
