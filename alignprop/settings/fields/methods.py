"""The fields of the other methods, which are reward guidance without training and the policy gradient."""

from alignprop.settings.fields.field import DDPO, GUIDE, Field, needs
from alignprop.settings.fields.rules import COUNT, shares
from rewards.rules import choice, integer, number

BUFFER = needs(
    "ddpo.per_prompt_buffer of at least as many", lambda c: c.ddpo.per_prompt_buffer >= c.ddpo.per_prompt_min_count
)

GUIDANCE = (
    Field(
        "guide.strength", 0.5, number(above=0),
        "The length of a move along the reward's gradient, as a share of the length of the sampler's own step. It is "
        "the mean over the steps of the window.", (GUIDE,),
    ),
    Field(
        "guide.through", "denoiser", choice("denoiser", "x0"),
        "How far the reward's gradient goes back. 'denoiser' takes it through the denoiser. 'x0' takes it only to the "
        "predicted clean latents x̂0 and treats the network's output as a constant.", (GUIDE,),
    ),
    Field(
        "guide.schedule", "noise", choice("constant", "noise", "late"),
        "How the strength changes over the window. 'constant' keeps it the same. 'noise' lets it fall with the share "
        "of noise in the latents. 'late' lets it grow as that share falls.", (GUIDE,),
    ),
    Field(
        "guide.window", (0.0, 1.0), shares(2),
        "The part of the chain in which latents are moved, as (from, to) in shares of the chain's steps. The first "
        "number must be smaller than the second.", (GUIDE,),
    ),
)  # fmt: skip

POLICY_GRADIENT = (
    Field("ddpo.inner_epochs", 1, COUNT, "The number of passes over the samples of an epoch.", (DDPO,)),
    Field(
        "ddpo.clip_range", 1e-4, number(above=0),
        "The loss clips a sample's importance ratio to the range 1 ± clip_range, as PPO does.", (DDPO,),
    ),
    Field(
        "ddpo.adv_clip_max", 5.0, number(above=0),
        "Advantages are clipped to plus or minus this number of standard deviations.", (DDPO,),
    ),
    Field(
        "ddpo.timestep_fraction", 1.0, number(above=0, at_most=1),
        "The share of the sampler steps that an update uses. The steps are drawn again for each update, from those "
        "that ddpo.min_noise allows.", (DDPO,),
    ),
    Field(
        "ddpo.min_noise", 0.0, number(at_least=0),
        "Training uses only the sampler steps whose noise has a standard deviation, in units of the latents, above "
        "this value. The noise of the last step, 0.03, is hardly visible in a picture, but the gradient of this step "
        "is far larger than that of all other steps.",
        (DDPO,),
    ),
    Field(
        "ddpo.per_prompt_buffer", 16, integer(0),
        "The number of a prompt's newest rewards that are kept. Their mean and standard deviation normalise the "
        "prompt's advantages. 0 takes the mean and standard deviation of all rewards of the epoch.",
        (DDPO,),
    ),
    Field(
        "ddpo.per_prompt_min_count", 16, COUNT,
        "A prompt with fewer kept rewards than this uses the mean and standard deviation of the epoch.",
        (DDPO, BUFFER),
    ),
)  # fmt: skip
