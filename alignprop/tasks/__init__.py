"""The tasks that do not train: evaluation of a checkpoint or of mixtures of two, and reward guidance."""

import itertools
import re
from contextlib import suppress
from pathlib import Path

from alignprop.build import build_run
from alignprop.engine.background import Background
from alignprop.engine.processes import on_main
from alignprop.engine.speed import Timed
from alignprop.evaluation.evaluate import Sample
from alignprop.evaluation.pictures import plot_bars, plot_soup, save_comparison, save_image
from alignprop.evaluation.results import Evaluation, statistics, write_report
from alignprop.lora.adapters import adapted_networks, set_adapter
from alignprop.lora.factors import LoraWeights
from alignprop.lora.files import read_lora
from alignprop.lora.scaling import scale_lora
from alignprop.lora.soups import mix
from alignprop.memory.checkpointing import apply_policy
from alignprop.method.reward_guidance import RewardGuidance
from alignprop.run import Run
from alignprop.runs.checkpoint import find_checkpoint
from alignprop.runs.manifest import check_base
from alignprop.settings.errors import ConfigError
from alignprop.settings.json_files import write_json
from alignprop.settings.resolve import save_config
from alignprop.weights import load_denoiser

BASE_MODEL = "stablediffusion"


def evaluate(config, reward_function=None, model=None) -> Path:
    """Samples and scores pictures of `resume_from`, or of the base model if that is empty.

    Returns:
        The folder with scores.csv, summary.json, grid.png and images/.

    Raises:
        ConfigError, rewards.RewardError: the configuration has a mistake. The message is one line.
    """
    run = build_run(config, reward_function, model)
    _load_checkpoint(run)
    name = f"{_slug(config.eval_prompt_fn)}_{run.checkpoint.name if run.checkpoint else 'base'}"
    folder = _new_folder(run, name)
    background = Background()
    _evaluate_into(folder, run, background)
    background.wait()
    run.accelerator.end_training()
    return folder


def evaluate_soup(config, reward_function=None, model=None) -> Path:
    """Scores pictures of c·`resume_from` + (1-c)·`resume_from_2` for every c of `mixing_coef_1`.

    Returns:
        The folder with soup.json, soup.png (each reward against c) and one sub-folder for each coefficient.

    Raises:
        ConfigError, rewards.RewardError: the configuration has a mistake. The message is one line.
    """
    run, first, second = build_mixture(config, reward_function, model)
    c = run.config
    folder = _new_folder(run, f"soup_{c.soup_mode}")
    results: list[dict] = []
    background = Background()
    for coefficient in dict.fromkeys(map(float, c.mixing_coef_1)):
        set_adapter(run.model, mix(first, second, coefficient, c.soup_mode))
        part = folder / f"c_{coefficient:.10g}"
        evaluation = _evaluate_into(part, run, background, f"c = {coefficient:g}: ")
        measured = {name: statistics(scores) for name, scores in evaluation.columns.items()}
        results.append({"mixing_coef_1": coefficient, **measured})
    background.wait()
    if run.is_main:
        write_json(folder / "soup.json", results)
        names = [name for name in results[0] if name != "mixing_coef_1"]
        curves = {name: [(r[name]["mean"], r[name]["stderr"]) for r in results] for name in names}
        plot_soup([r["mixing_coef_1"] for r in results], curves, folder / "soup.png")
    run.accelerator.end_training()
    return folder


def build_mixture(config, reward_function=None, model=None) -> tuple[Run, LoraWeights | None, LoraWeights | None]:
    """Returns a run, and the LoRAs of `resume_from` and `resume_from_2`; None is the base model.

    Raises:
        ConfigError, rewards.RewardError: the configuration has a mistake. The message is one line.
    """
    second_path = None
    if config.resume_from_2 != BASE_MODEL:
        second_path = find_checkpoint(config.resume_from_2, config.log_dir, "resume_from_2")
    run = build_run(config, reward_function, model)
    first = read_lora(run.checkpoint, run.model) if run.checkpoint else None
    second = read_lora(second_path, run.model) if second_path else None
    if second_path:
        check_base(second_path, run.base, "resume_from_2")
    return run, first, second


def guide(config, reward_function=None, model=None) -> Path:
    """Compares sampling with reward guidance to plain sampling, also of the fine-tuned model if `resume_from` is given.

    Returns:
        The folder with guide.json (all measures and the seconds per picture of each variant), comparison.png (a row of
        pictures for each variant), guide.png (a bar chart) and one sub-folder for each variant.

    Raises:
        ConfigError, rewards.RewardError: the configuration has a mistake. The message is one line.
    """
    run = build_run(config, reward_function, model, needs_gradient=True)
    c = run.config
    guided = RewardGuidance(run.rollout, run.reward, phases=run.residency, **c.guide.to_dict())
    name = run.checkpoint.name if run.checkpoint else "base"
    folder = _new_folder(run, f"guide_{_slug(c.eval_prompt_fn)}_{name}")
    background, results, pictures = Background(), {}, {}

    def plain(streams, cond, prompts, metadata):
        return run.rollout(streams, cond, None)

    for tuned in (False, True) if run.checkpoint else (False,):
        if tuned:
            _load_checkpoint(run)
        apply_policy(run.model, run.choice.memory)
        for name, sample in (("plain", plain), ("guided", guided)):
            name = f"fine-tuned {name}" if tuned else name
            clock = Timed(sample, run.accelerator.device)
            evaluation = _evaluate_into(folder / _slug(name), run, background, f"{name}: ", clock)
            measured = {column: statistics(scores) for column, scores in evaluation.columns.items()}
            results[name] = {**measured, **evaluation.measures, "seconds_per_picture": clock.seconds_per_picture}
            pictures[name] = evaluation.images
    background.wait()
    if run.is_main:
        write_json(folder / "guide.json", results)
        save_comparison(pictures, evaluation.labels(), folder / "comparison.png")
        plot_bars({name: {m: r[m] for m in measured} for name, r in results.items()}, folder / "guide.png")
    run.accelerator.end_training()
    return folder


def _new_folder(run: Run, name: str) -> Path:
    """Makes <run folder>/eval/<name>, or the first of <name>_2, <name>_3, … that does not exist yet."""

    def make() -> Path:
        for n in itertools.count(1):
            folder = run.folder / "eval" / (name if n == 1 else f"{name}_{n}")
            with suppress(FileExistsError):
                folder.mkdir(parents=True)
                save_config(run.config, folder / "config.json")
                return folder

    return on_main(make)


def _slug(text: str) -> str:
    return re.sub(r"[^\w.-]+", "_", Path(text).stem, flags=re.ASCII)[:60]


def _load_checkpoint(run: Run) -> None:
    """Loads `resume_from`, if it is given, into the model. A LoRA is scaled by `lora_scale`.

    Raises:
        ConfigError: the checkpoint does not fit the model, or is to be scaled but has whole weights instead of a LoRA.
    """
    c, model = run.config, run.model
    run.residency.leave()  # loading changes the weights on the host; the next phase copies them to the device
    if run.checkpoint and (run.checkpoint / "denoiser").is_dir():
        if c.lora_scale != 1 or c.lora_schedule != "constant":
            raise ConfigError(
                f"lora_scale = {c.lora_scale}, lora_schedule = {c.lora_schedule!r} must be 1 and 'constant': "
                f"{str(run.checkpoint)!r} has full weights and no LoRA, so there is nothing to scale"
            )
        load_denoiser(model.denoiser, run.checkpoint / "denoiser")
    elif run.checkpoint:
        set_adapter(model, read_lora(run.checkpoint, model))
        # With a linear `lora_schedule`, the rollout sets the denoiser's scale again before each network call.
        for network in adapted_networks(model):
            scale_lora(network, c.lora_scale)


def _evaluate_into(
    folder: Path, run: Run, background: Background, prefix: str = "", sample: Sample | None = None
) -> Evaluation:
    """Evaluates. Pictures, the report and a line for the user are written while the device goes on with its work."""

    def save(j, image):
        background.submit(save_image, image, folder / "images" / f"{j:06d}.png")

    evaluation = run.evaluator(on_image=save, sample=sample)
    if run.is_main:
        background.submit(write_report, evaluation, folder)
        background.submit(_say_rewards, run, evaluation, folder, prefix)
    return evaluation


def _say_rewards(run: Run, evaluation: Evaluation, folder: Path, prefix: str) -> None:
    columns = {name: statistics(scores) for name, scores in evaluation.columns.items()}
    parts = [f"{name} {s['mean']:.4f} ± {s['stderr']:.4f}" for name, s in columns.items()]
    parts += [f"{name} {value:.4f}" for name, value in evaluation.measures.items()]
    run.say(f"{prefix}{', '.join(parts)}  ({folder})")
