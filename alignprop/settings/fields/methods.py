"""Fields of the other methods: reward guidance without training, and the policy gradient."""

from alignprop.settings.fields.field import DDPO, GUIDE, Field, needs
from alignprop.settings.fields.rules import COUNT, choice, integer, number, shares

BUFFER = needs(
    "ddpo.per_prompt_buffer of at least as many", lambda c: c.ddpo.per_prompt_buffer >= c.ddpo.per_prompt_min_count
)

GUIDANCE = (
    Field(
        "guide.strength", 0.5, number(above=0),
        "The length of a move along the reward's gradient, as a share of the sampler's own step; on average over the "
        "window.", (GUIDE,),
    ),
    Field(
        "guide.through", "denoiser", choice("denoiser", "x0"),
        "Where the gradient goes: through the denoiser, or to x̂0 alone, which takes the network's output for a "
        "constant.", (GUIDE,),
    ),
    Field(
        "guide.schedule", "noise", choice("constant", "noise", "late"),
        "How the strength changes over the window. 'noise': it falls with the share of noise in the latents. 'late': "
        "it grows as that falls.", (GUIDE,),
    ),
    Field(
        "guide.window", (0.0, 1.0), shares(2),
        "From and to: the share of the chain's steps in which latents are moved.", (GUIDE,),
    ),
)  # fmt: skip

POLICY_GRADIENT = (
    Field("ddpo.inner_epochs", 1, COUNT, "Passes over the samples of an epoch.", (DDPO,)),
    Field(
        "ddpo.clip_range", 1e-4, number(above=0), "The importance ratio counts within 1 ± clip_range.", (DDPO,),
    ),
    Field(
        "ddpo.adv_clip_max", 5.0, number(above=0),
        "Advantages are clipped to ± this many standard deviations.", (DDPO,),
    ),
    Field(
        "ddpo.timestep_fraction", 1.0, number(above=0, at_most=1),
        "The share of the sampler steps that an update is made from, drawn anew for each update.", (DDPO,),
    ),
    Field(
        "ddpo.min_noise", 0.0, number(at_least=0),
        "Training uses the steps whose noise, as a standard deviation of latents, is greater than this. The noise of "
        "the last step, 0.03, hardly shows in a picture, and its gradient is far larger than that of all others.",
        (DDPO,),
    ),
    Field(
        "ddpo.per_prompt_buffer", 16, integer(0),
        "How many of the newest rewards of a prompt its mean and deviation are taken from. 0: from all of the epoch.",
        (DDPO,),
    ),
    Field(
        "ddpo.per_prompt_min_count", 16, COUNT,
        "A prompt with fewer rewards so far uses the mean and deviation of the epoch.", (DDPO, BUFFER),
    ),
)  # fmt: skip
