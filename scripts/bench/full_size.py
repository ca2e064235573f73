"""Builds trainers of full-size models with random weights. scripts/bench/gpu.py measures them."""

from dataclasses import dataclass

from scripts.bench import cost  # isort: skip (it comes first, because it sets environment variables)
import torch
from ml_collections import ConfigDict

from alignprop.memory.forecast import Forecast, forecast
from alignprop.memory.planner import skeletons
from alignprop.models.configs import find_config, find_tower_config
from alignprop.models.skeleton import build_module, random_model
from alignprop.settings.options import memory_policy
from alignprop.settings.resolve import resolve
from alignprop.trainer import AlignPropTrainer
from config.align_prop import TINY
from rewards.aesthetic import AestheticReward
from rewards.base import Reward
from rewards.combine import WeightedReward
from rewards.heads import AestheticHead
from rewards.preprocess import ClipPreprocess
from rewards.towers import ClipTower

MODELS = {
    **{name: hub for name, (hub, _) in cost.MODELS.items()},
    "flux": "black-forest-labs/FLUX.1-dev",
    "tiny": str(TINY / "pipeline"),
}
PLAIN, VARIANTS = "", ("channels_last", "compile", "channels_last+compile")


@dataclass(frozen=True)
class Case:
    """A training step to be measured.

    Attributes:
        model: A key of MODELS.
        policy: A key of POLICIES.
        chunk: The samples of the micro-batch. The network and the decoder take all of them at once.
        active: The number of sampler steps with gradient, which are the last ones.
        steps: The number of sampler steps.
        variant: PLAIN, or one of VARIANTS.
        quantize: The format of the frozen weights of the denoiser, as in the field pretrained.quantize.
        products: Whether its layers multiply in 8 bits, as in the field pretrained.quantize_products.
    """

    model: str
    policy: str
    chunk: int
    active: int
    steps: int = 50
    variant: str = PLAIN
    quantize: str = ""
    products: bool = False

    def configuration(self) -> ConfigDict:
        """Returns the unresolved configuration, with one micro-batch per optimizer step."""
        c = cost.configuration(MODELS[self.model], self.chunk, self.active)
        c.num_inference_steps, c.trunc_backprop_timestep = self.steps, self.steps - self.active
        c.memory_policy, c.memory.sweep_chunk, c.memory.decode_chunk = self.policy, 0, 0
        c.channels_last, c.compile = (option in self.variant.split("+") for option in ("channels_last", "compile"))
        c.pretrained.quantize, c.pretrained.quantize_products = self.quantize, self.products
        c.train.max_skipped_steps = 10**6  # random weights may overflow; such a step takes as long
        if self.model == "tiny":
            c.mixed_precision, c.aesthetic.dtype, c.aesthetic.clip = "no", "float32", str(TINY / "clip")
        return c


class RandomAesthetic(AestheticReward):
    """The aesthetic score that the configuration describes, with random weights on `device`."""

    def __init__(self, config: ConfigDict, device):
        Reward.__init__(self)
        clip = build_module(find_tower_config(config.aesthetic.clip, "aesthetic.clip")["model"], torch.float32, device)
        del clip.text_model, clip.text_projection
        size = clip.config.vision_config.image_size
        self.tower = ClipTower(clip, ClipPreprocess(size), dtype=config.aesthetic.dtype).to(device)
        self.head = AestheticHead(clip.config.projection_dim).to(device)


def build_trainer(case: Case, device: str, log_dir: str) -> AlignPropTrainer:
    """Returns a trainer with random weights, drawn on `device`. All prompts count as encoded already, to zeros."""
    config = case.configuration()
    config.log_dir = log_dir
    half = {"no": torch.float32, "bf16": torch.bfloat16}[config.mixed_precision]
    model = random_model(find_config(config.pretrained.model), half, device)
    model.knows, model.encode_prompts = lambda prompts: True, lambda prompts: model.blank_conditioning(len(prompts))
    reward = WeightedReward("aesthetic", {"aesthetic": RandomAesthetic(config, device)}, {"aesthetic": 1.0})
    return AlignPropTrainer(config, reward, model=model)


def expected(case: Case, done: dict) -> Forecast:
    """Returns the planner's forecast of the case.

    Args:
        done: What the planner has simulated of the same model so far.
    """
    config = resolve(case.configuration(), 1)
    return forecast(skeletons(config), config, case.policy, memory_policy(config), case.chunk, done)
