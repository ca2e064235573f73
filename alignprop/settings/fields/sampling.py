"""Fields of sampling and of the estimator: which part of the chain carries gradient."""

from alignprop.settings.fields.field import ALIGN_PROP, GRADIENTS, GUIDANCE, TRAINING, Field, estimator
from alignprop.settings.fields.rules import COUNT, INTEGERS, choice, integer, number, optional, text

SAMPLING = (
    Field(
        "num_inference_steps", 50, integer(1),
        "Sampler steps of an evaluation, and of training unless train.num_inference_steps is set.",
    ),
    Field(
        "guidance_scale", 7.5, number(at_least=1),
        "The strength of classifier-free guidance. 1 is none and halves the cost of a network call. For FLUX.1-dev it "
        "is an input of the network.",
    ),
    Field(
        "true_cfg_scale", 1.0, number(at_least=1),
        "FLUX.1 only: classifier-free guidance on top of that. 1 is none.",
    ),
    Field(
        "eta", 0.0, number(at_least=0, at_most=1),
        "The noise of the DDIM sampler: 0 is deterministic, 1 is ancestral sampling.",
    ),
)  # fmt: skip

ESTIMATOR = (
    Field(
        "estimator", "randomized", text(),
        "Which steps carry gradient: 'full', 'truncated', 'randomized', 'per_step', 'draft_lv', 'refl', 'drtune', "
        "'sparse', 'bridge', 'lagrange' or 'leapalign'. docs/estimators.md compares them.", (TRAINING, ALIGN_PROP),
    ),
    Field(
        "trunc_backprop_timestep", None, optional(integer(0)),
        "The first sampler step with gradient. None: the last step of the chain.", estimator("truncated"),
    ),
    Field(
        "truncated_backprop_minmax", None, optional(INTEGERS),
        "The range from which that first step is drawn: (0, 50) gives K = 1 … 50 of 50 steps. None: the whole chain.",
        estimator("randomized", "per_step"),
    ),
    Field(
        "plan.num_active", None, optional(COUNT),
        "How many steps carry gradient. None: 3 for drtune, 4 for sparse, 5 for bridge, 2 in a leap of lagrange.",
        estimator("drtune", "sparse", "bridge", "lagrange"),
    ),
    Field(
        "plan.exit_window", None, optional(number(above=0, at_most=1)),
        "The share of the chain's steps, at its end, in which the chain is left. None: 0.25 for refl, 0.4 for drtune.",
        estimator("refl", "drtune"),
    ),
    Field(
        "plan.copies", None, optional(COUNT),
        "How many further noises the last step is called with. None: 2.", estimator("draft_lv"),
    ),
    Field(
        "plan.late_bias", None, optional(number(at_least=0)),
        "Step i is drawn with weight (i + 1)^late_bias. None: 1 for sparse, 4 for bridge.",
        estimator("sparse", "bridge"),
    ),
    Field(
        "plan.rescale", None, optional(number(at_least=0, at_most=1)),
        "How far the active steps stand for all steps; 1: entirely. None: 0.5 for sparse, 0 for bridge.",
        estimator("sparse", "bridge"),
    ),
    Field(
        "plan.coupling", None, optional(number(at_least=0, at_most=1)),
        "The share of ∂f/∂x that passes the split of the chain. None: 0.5 for bridge, 0.1 for lagrange, 0.3 for "
        "leapalign.", estimator("bridge", "lagrange", "leapalign"),
    ),
    Field(
        "plan.order", None, optional(COUNT), "The supports of a leap. None: 3.", estimator("lagrange"),
    ),
    Field(
        "plan.support_scale", None, optional(number(above=0, at_most=1)),
        "Multiplies the gradient of all supports but the first. None: 0.25.", estimator("lagrange"),
    ),
    Field(
        "guidance_grad", "both", choice("both", "cond"),
        "The branches of guidance that carry gradient: 'both', or the conditional one alone, which is an approximation "
        "and halves the sweep's cost.", (GRADIENTS, GUIDANCE),
    ),
    Field(
        "adjoint_clip", 0.0, number(at_least=0),
        "The largest growth of a sample's ∂R/∂x on its way down the chain, as a ratio. 0: no limit.",
        (TRAINING, ALIGN_PROP),
    ),
)  # fmt: skip

# The estimators that have each field of `plan`.
PLAN_FIELDS = {
    field.name.removeprefix("plan."): field.effects[-1].names for field in ESTIMATOR if field.name.startswith("plan.")
}
