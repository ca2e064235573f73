"""Every scheduler of diffusers that can be trained through: its pictures, and the gradient through its steps."""

import json
import shutil

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from alignprop.ddpo import DDPOTrainer
from alignprop.engine.seeding import generator, generators
from alignprop.method import estimators
from alignprop.method.plans import GradientPlan
from alignprop.method.samplers import build_sampler
from alignprop.method.schedulers import make_scheduler
from alignprop.method.tables import read_table
from alignprop.models.configs import find_config
from alignprop.settings.errors import ConfigError
from alignprop.settings.samplers import check_sampler
from alignprop.trainer import AlignPropTrainer
from tests.helpers.schedulers import (
    BATCH,
    DIFFUSION,
    ESTIMATORS,
    GUIDANCE,
    KINDS,
    PROMPTS,
    SMALL,
    STEPS,
    InFloat64,
    by_autograd,
    by_sweep,
    difference,
    differences,
    from_pipeline,
    gradients_of,
    guided,
    make_model,
    reward,
    scheduler_of,
)
from tests.helpers.training import train

FLOW = FlowMatchEulerDiscreteScheduler(shift=3.0)


@pytest.fixture(scope="module")
def models(pipelines):
    return {dtype: make_model(pipelines["epsilon"], dtype, SMALL) for dtype in (torch.float32, torch.float64)}


@pytest.fixture(scope="module")
def scheduler(models):
    return models[torch.float32].scheduler


# All pairs are in the table that `python -m tests.helpers.schedulers` prints; here each sampler has one estimator.
@pytest.mark.parametrize(("kind", "name", "options", "calls", "estimator"), [
    (*row, ESTIMATORS[place % len(ESTIMATORS)]) for place, row in enumerate(KINDS)
])  # fmt: skip
def test_the_gradient_is_that_of_plain_autograd(models, kind, name, options, calls, estimator):
    for dtype, near in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        found, latents, gradient = differences(models[dtype], kind, name, options, estimator, dtype)
        assert found == calls
        assert latents <= near
        assert gradient <= near


@pytest.fixture(scope="module")
def like_sd15(pipelines, tmp_path_factory):
    """The folder of a pipeline whose scheduler file leaves out what that of Stable Diffusion 1.5 does: the spacing."""
    folder = tmp_path_factory.mktemp("sd15") / "pipeline"
    shutil.copytree(pipelines["epsilon"], folder)
    facts = find_config("stable-diffusion-v1-5/stable-diffusion-v1-5")["scheduler"]
    own = {**facts, "clip_sample": False, "set_alpha_to_one": False}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(own))
    return folder


@pytest.mark.parametrize(("name", "options", "calls"), DIFFUSION)
def test_latents_are_those_of_the_pipeline(like_sd15, models, name, options, calls):
    assert from_pipeline(like_sd15, models[torch.float32], name, options) <= 1e-5


def test_what_the_files_leave_out_is_the_samplers_own_choice_but_for_the_noise():
    own = DDIMScheduler(beta_start=0.001, beta_schedule="scaled_linear")
    assert make_scheduler(own, "ddim", {}).config.timestep_spacing == "leading"
    assert make_scheduler(own, "UniPCMultistep", {}).config.timestep_spacing == "linspace"
    named = DDIMScheduler(timestep_spacing="leading")
    assert make_scheduler(named, "UniPCMultistep", {}).config.timestep_spacing == "leading"
    assert torch.equal(make_scheduler(named, "LCM", {}).alphas_cumprod, named.alphas_cumprod)  # LCM's own are others


def test_a_flow_keeps_its_levels_with_every_solver():
    for kind, name, options, _ in KINDS:
        if kind == "flow":
            sampler = build_sampler(FLOW, STEPS, 0.0, name, options)
            assert torch.equal(sampler.alpha + sampler.sigma, torch.ones(sampler.num_steps + 1).double())
            assert (sampler.sigma[:-1] - sampler.timesteps / 1000).abs().max() < 1e-3  # some round their timesteps
            assert sampler.start == 1 and torch.equal(sampler.scale, torch.ones(sampler.num_steps).double())


@pytest.mark.parametrize("name", ["FlowMatchHeunDiscrete", "DPMSolverMultistep", "UniPCMultistep"])
def test_a_shift_by_the_size_of_the_picture_reaches_every_solver(name):
    """mu is the logarithm of the shift."""
    dynamic = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    found = build_sampler(dynamic, STEPS, 0.0, name, mu=0.9)
    expected = build_sampler(FlowMatchEulerDiscreteScheduler(shift=2.718281828459045**0.9), STEPS, 0.0, name)
    torch.testing.assert_close(found.sigma, expected.sigma, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.b, expected.b, rtol=1e-4, atol=1e-5)
    unshifted = build_sampler(FlowMatchEulerDiscreteScheduler(), STEPS, 0.0, name)
    assert (found.sigma - unshifted.sigma).abs().max() > 0.05


@pytest.mark.parametrize(("name", "options", "message"), [
    ("EulerDisc", "", "sampler = 'EulerDisc' must be 'ddim', 'pipeline' or .*mean 'EulerDiscrete'"),
    ("Euler a", "", "sampler = 'Euler a' must be .*mean 'EulerAncestralDiscrete'"),
    ("DPM++", "", "sampler = 'DPM[+][+]' must be .*mean 'DPMSolverMultistep'"),
    ("magic", "", "sampler = 'magic' must be .*those that usually work: DDIM, DDPM, "),
    ("DPMSolverSinglestep", "solver_order=0", "sampler_options: solver_order = 0 must be a whole number from 1 to 3"),
    ("UniPCMultistep", "solver_order=0", "sampler_options: solver_order = 0 must be a whole number of at least 1"),
    ("DEISMultistep", "solver_order=4", "sampler_options: solver_order = 4 must be a whole number from 1 to 3"),
    ("DPMSolverMultistep", "timestep_spacing=magic", "sampler 'DPMSolverMultistep' and its options: diffusers"),
    ("DPMSolverMultistep", "thresholding=True", "sampler_options: thresholding cannot be used.* linear"),
    ("ddim", "clip_sample=True", "sampler_options: clip_sample cannot be used"),
    ("EulerDiscrete", "karras=True", "sampler_options: EulerDiscreteScheduler has no option karras; it has"),
    ("EulerDiscrete", "beta_start=0.1", "sampler_options: beta_start is a property of the model"),
    ("EulerDiscrete", "use_karras_sigmas=1", "use_karras_sigmas = 1 must be of the type of its default, False"),
    ("EulerDiscrete", "use_karras_sigmas", "sampler_options = 'use_karras_sigmas' must be NAME=VALUE"),
    ("DPMSolverMultistep", "solver_order=two", "solver_order = 'two' must be of the type of its default, 2"),
    ("DPMSolverMultistep", "solver_type=magic", "DPMSolverMultistepScheduler says: .*magic"),
    ("FlowMatchEulerDiscrete", "", "FlowMatchEulerDiscreteScheduler is not for a model of discrete-time diffusion"),
    ("EDMEuler", "", "EDMEulerScheduler is not for a model of discrete-time diffusion"),
    ("ScoreSdeVe", "", "ScoreSdeVeScheduler is not for a model of discrete-time diffusion"),
    ("VQDiffusion", "", "VQDiffusionScheduler says: .*num_vec_classes"),
    ("DDIMInverse", "", "the sampler 'DDIMInverse' does not go from noise to pictures"),
    ("CogVideoXDPM", "", "CogVideoXDPMScheduler makes no sampling chain here"),
    ("LCM", "original_inference_steps=3", "num_inference_steps = 5 with the sampler 'LCM' and its options: diffusers"),
])  # fmt: skip
def test_what_cannot_be_sampled_is_refused_in_a_line(scheduler, name, options, message):
    with pytest.raises(ConfigError, match=message) as error:
        build_sampler(scheduler, STEPS, 0.0, name, options)
    assert "\n" not in str(error.value)


def test_a_value_may_be_a_list(scheduler):
    plain, without = (
        build_sampler(scheduler, STEPS, 0.0, "UniPCMultistep", f"disable_corrector={steps}, solver_order=3")
        for steps in ("[]", "[0, 1]")
    )
    assert not torch.equal(plain.b, without.b)
    expected = make_scheduler(scheduler, "UniPCMultistep", {"disable_corrector": [0, 1], "solver_order": 3})
    expected.set_timesteps(STEPS)
    assert torch.equal(read_table(expected).b, without.b)


@pytest.mark.parametrize("exit_step", [2, 4])
def test_leaving_a_multistep_chain_early(models, exit_step):
    """The reward then sees x̂0 of the exit step, which earlier outputs reach through the latents alone."""
    model, dtype, name = models[torch.float64], torch.float64, "DPMSolverMultistep"
    sampler = build_sampler(model.scheduler, STEPS, 0.0, name)
    active = torch.zeros(STEPS, BATCH, dtype=torch.bool)
    active[0] = active[exit_step] = True
    exits = torch.tensor([exit_step, STEPS])  # the second sample stays to the end
    ours = by_sweep(model, sampler, GradientPlan.exact(active, exit_step=exits), dtype)
    solver, cond = make_scheduler(model.scheduler, name, {}), model.encode_prompts(PROMPTS)
    solver.set_timesteps(STEPS)
    latents = model.init_latents(generators(range(BATCH), "x")).double()
    for i, t in enumerate(solver.timesteps):
        output = guided(model, latents, t, cond, GUIDANCE)
        output = output if active[i, 0] else output.detach()
        if i == exit_step:
            left = float(sampler.p[i]) * latents[:1] + float(sampler.q[i]) * output[:1]
        with InFloat64():
            latents = solver.step(output, t, latents).prev_sample
    expected = torch.cat([left, latents[1:]])
    assert difference(ours[0], expected) <= 1e-10
    assert difference(ours[1], gradients_of(reward(expected), model)) <= 1e-10


def test_a_scheduler_that_is_not_linear_is_refused(scheduler):
    class Squares(DPMSolverMultistepScheduler):
        def step(self, model_output, timestep, sample, **options):
            return super().step(model_output + 0.1 * model_output**2, timestep, sample, **options)

    solver = Squares.from_config(scheduler.config)
    solver.set_timesteps(STEPS)
    with pytest.raises(ConfigError, match="the steps of Squares with these options are not linear"):
        read_table(solver)


def test_a_flow_refuses_a_scheduler_of_diffusion():
    with pytest.raises(ConfigError, match="EulerDiscreteScheduler is not for a model of flow matching"):
        build_sampler(FLOW, STEPS, 0.0, "EulerDiscrete")


def test_eta_is_refused_where_it_does_nothing(scheduler):
    message = r"^eta = 0.5 has no effect with train.sampler = 'EulerDiscrete'; it must be 0"
    with pytest.raises(ConfigError, match=message):
        check_sampler("EulerDiscrete", "", 0.5, "train.sampler")
    own = DPMSolverMultistepScheduler(beta_schedule="scaled_linear")
    with pytest.raises(ConfigError, match=r"^eta = 0.5 has no effect with sampler = 'pipeline'; it must be 0"):
        build_sampler(own, STEPS, 0.5, "pipeline")
    assert build_sampler(scheduler, STEPS, 0.5, "TCD").is_stochastic


def test_the_pipelines_own_scheduler_has_its_own_options():
    own = DPMSolverMultistepScheduler(use_karras_sigmas=True, beta_schedule="scaled_linear")
    ours, named = (build_sampler(own, STEPS, 0.0, name) for name in ("pipeline", "DPMSolverMultistepScheduler"))
    other = build_sampler(own, STEPS, 0.0, "pipeline", "use_karras_sigmas=False")
    assert torch.equal(ours.b, named.b) and not torch.equal(ours.b, other.b) and not ours.is_one_step


@pytest.mark.parametrize("interval", [(0.2, 0.6), (0.0, 0.4), (0.9, 1.0)])
def test_without_guidance_the_conditional_branch_is_called_alone(models, interval):
    model, seen = models[torch.float64], []
    predict, name = model.predict, "DPMSolverMultistep"
    sampler = build_sampler(model.scheduler, STEPS, 0.0, name)
    plan, dtype = estimators.full(sampler, BATCH), torch.float64
    model.predict = lambda x, t, branch: seen.append((torch.is_grad_enabled(), len(x))) or predict(x, t, branch)
    ours = by_sweep(model, sampler, plan, dtype, guidance_interval=interval)
    del model.predict
    guided = [interval[0] <= (i + 0.5) / STEPS < interval[1] for i in range(STEPS)]
    assert [size for with_grad, size in seen if not with_grad] == [BATCH * (1 + step) for step in guided]
    assert [size for with_grad, size in seen if with_grad] == [BATCH * (1 + step) for step in reversed(guided)]
    plain = make_scheduler(model.scheduler, name, {})
    plain.set_timesteps(STEPS)
    expected = by_autograd(model, plain, plan, 0.0, dtype, [GUIDANCE if step else 1 for step in guided])
    assert max(map(difference, ours, expected)) <= 1e-10


def test_an_interval_without_a_step_is_refused(scheduler):
    """It would switch guidance off."""
    sampler = build_sampler(scheduler, STEPS, 0.0)
    assert sampler.within((0.0, 1.0)) is None and sampler.inside((0.4, 0.6), "f").tolist() == [0, 0, 1, 0, 0]
    with pytest.raises(ConfigError, match=r"^guidance_interval = \(0.4, 0.45\) has none of the 5 sampler steps in it"):
        sampler.within((0.4, 0.45))


def test_leaps_are_refused_where_a_step_does_not_reach_a_later_one(scheduler):
    """The first steps of PNDM are Runge-Kutta's, some of which start from the same latents."""
    sampler = build_sampler(scheduler, STEPS, 0.0, "PNDM", "skip_prk_steps=False")
    for estimator in (estimators.leapalign, estimators.lagrange):
        with pytest.raises(ConfigError, match="zero for some steps of this model's sampler"):
            estimator(sampler, BATCH, generator("p"))
    for kind, name, options, _ in KINDS:
        if "skip_prk_steps=False" not in options:
            sampler = build_sampler(scheduler_of(kind, scheduler), STEPS, 0.0, name, options)
            assert estimators.leapalign(sampler, 64, generator("p")).weight.isfinite().all()


@pytest.mark.parametrize(("name", "options"), [("HeunDiscrete", ""), ("PNDM", "skip_prk_steps=True")])
def test_levels_that_repeat_are_refused_by_lagrange(scheduler, name, options):
    """Whatever it draws, so that no run ends at a later step."""
    sampler = build_sampler(scheduler, STEPS, 0.0, name, options)
    for draw in range(10):
        with pytest.raises(ConfigError, match="'lagrange' needs another noise level at each step"):
            estimators.lagrange(sampler, 1, generator("p", draw))


def test_an_estimator_that_does_not_fit_the_sampler_is_refused_before_a_run(toy_config):
    with pytest.raises(ConfigError, match="'lagrange' needs another noise level at each step"):
        AlignPropTrainer(toy_config(sampler="HeunDiscrete", estimator="lagrange"))


def test_what_waits_for_later_steps(scheduler):
    """A one-step method keeps nothing; SA-Solver uses outputs and noises again, and both are counted."""
    assert build_sampler(scheduler, STEPS, 0.7).most_waiting == 0
    assert build_sampler(scheduler, STEPS, 0.0, "HeunDiscrete").most_waiting == 1
    again = build_sampler(scheduler, STEPS, 0.0, "SASolver")
    counts = [int((table[i + 1 :, : i + 1] != 0).any(0).sum()) for i in range(STEPS) for table in (again.b, again.s)]
    assert again.most_waiting == max(map(sum, zip(counts[::2], counts[1::2], strict=True))) > max(counts)


# ---- runs


def test_training_and_evaluation_with_samplers_of_their_own(toy_config):
    fields = {"sampler": "DPMSolverMultistep", "sampler_options": "use_karras_sigmas=True", "num_epochs": 1}
    trainer = train(toy_config(train__sampler="HeunDiscrete", estimator="full", num_inference_steps=3, **fields))
    run = trainer.run
    assert run.rollout.sampler.num_steps == 5 and run.evaluator.rollouts[0].sampler.num_steps == 3
    assert not torch.equal(run.rollout.sampler.timesteps[:3], run.evaluator.rollouts[0].sampler.timesteps)
    row = json.loads((run.folder / "metrics.jsonl").read_text().splitlines()[1])
    assert row["kind"] == "train" and row["grad_norm"] > 0
    assert run.config.train.sampler_options == "" and run.config.sampler_options == fields["sampler_options"]


@pytest.mark.parametrize(("fields", "active"), [
    ({"estimator": "truncated"}, {1}),
    ({"estimator": "truncated", "trunc_backprop_timestep": 2}, {3}),
    ({"estimator": "randomized"}, {1, 2, 3, 4, 5}),
])  # fmt: skip
def test_step_fields_count_network_calls(toy_config, fields, active):
    """Heun's method makes five calls for three steps; by default the last one, or all of them, have gradient."""
    trainer = AlignPropTrainer(toy_config(sampler="HeunDiscrete", num_inference_steps=3, **fields))
    plan = trainer.estimator(trainer.run.rollout.sampler, 50, generator("p"))
    assert set(plan.active.sum(dim=0).tolist()) == active and len(plan.active) == 5


@pytest.mark.parametrize("fields", [{"trunc_backprop_timestep": 5}, {"truncated_backprop_minmax": (0, 6)}])
def test_a_step_that_the_chain_does_not_have(toy_config, fields):
    message = rf"^{next(iter(fields))} = .* the number of network calls of train.sampler = 'HeunDiscrete'"
    with pytest.raises(ConfigError, match=message):
        AlignPropTrainer(toy_config(sampler="HeunDiscrete", num_inference_steps=3, **fields))


def test_a_policy_gradient_needs_independent_steps(toy_config):
    fields = {"algorithm": "ddpo", "num_inference_steps": 3, "num_epochs": 1}
    with pytest.raises(ConfigError, match="algorithm = 'ddpo' needs a sampler whose steps are independent draws"):
        DDPOTrainer(
            toy_config(sampler="DPMSolverMultistep", sampler_options="algorithm_type=sde-dpmsolver++", **fields)
        )
    message = "^algorithm = 'ddpo' needs random steps; train.sampler = 'EulerDiscrete' adds no noise$"
    with pytest.raises(ConfigError, match=message):
        DDPOTrainer(toy_config(sampler="EulerDiscrete", **fields))
    trainer = DDPOTrainer(toy_config(sampler="EulerAncestralDiscrete", **fields))
    trainer.train()
    assert trainer.noisy_steps(trainer.run.rollout) == [0, 1]  # the last step goes to clean latents
