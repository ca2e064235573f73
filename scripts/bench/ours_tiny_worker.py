"""Runs our AlignPropTrainer on the bundled model, as a worker for time_to_reward.py."""

from alignprop.lora.factors import get_lora
from alignprop.lora.files import save_lora
from alignprop.trainer import AlignPropTrainer
from config.align_prop import get_config
from scripts.bench.worker import facts_of, serve


def build(settings: dict):
    c = get_config(settings["preset"])
    c.seed, c.log_dir = settings["seed"], settings["log_dir"]
    trainer = AlignPropTrainer(c)
    model = trainer.run.model

    def save(folder: str) -> None:
        save_lora(model, get_lora(model.denoiser), folder)

    return lambda: trainer.step()["reward"], facts_of(model.denoiser), save


if __name__ == "__main__":
    serve(build)
