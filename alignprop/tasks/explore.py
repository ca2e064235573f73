"""The task "explore": a page that compares base, checkpoints and their mixture on prompts that you type.

    alignprop explore --config tiny_explore --config.resume_from=logs/my_run

The page is served by gradio to this machine alone.
"""

import logging
import os
from dataclasses import dataclass, field
from threading import Lock

import torch

from alignprop.engine.seeding import generators
from alignprop.lora.adapters import set_adapter
from alignprop.lora.factors import LoraWeights
from alignprop.lora.soups import mix
from alignprop.models.base import encode
from alignprop.run import Run
from alignprop.settings.errors import ConfigError
from alignprop.tasks import build_mixture

LOOPBACK = "127.0.0.1"


@dataclass
class Explorer:
    """Draws one prompt with one noise under the base model, under one or two LoRAs, and under their mixture.

    Attributes:
        run: its reward and its `eval_reward_fn` score the pictures.
        first, second: the LoRAs of `resume_from` and `resume_from_2`; None is the base model.
        drawing: held while a picture is being drawn, by a thread of the page's.
    """

    run: Run
    first: LoraWeights | None
    second: LoraWeights | None
    drawing: Lock = field(default_factory=Lock)

    def variants(self, share: float) -> dict[str, LoraWeights | None]:
        """What is shown beside one another: {title: LoRA}. `share` is that of the first LoRA in the mixture."""
        shown: dict[str, LoraWeights | None] = {"base model": None}
        if self.second:
            shown["resume_from_2"] = self.second
        if self.first:
            shown["resume_from"] = self.first
            shown["mixture"] = mix(self.first, self.second, share, self.run.config.soup_mode)
        return shown

    @torch.no_grad()
    def draw(self, prompt: str, lora: LoraWeights | None, guidance: float, seed: int):
        """One picture, float [3, H, W] in [0, 1] on the CPU, and its score under each reward.

        Args:
            guidance: the strength of classifier-free guidance; 1 is none.
            seed: of the noise; the same for all variants.
        """
        with self.drawing:
            return self._draw(prompt, lora, guidance, seed)

    def _draw(self, prompt: str, lora: LoraWeights | None, guidance: float, seed: int):
        run = self.run
        run.residency.leave()  # what is loaded into the host's weights comes along next time
        set_adapter(run.model, lora)
        cond = encode(run.model, [prompt], run.residency)
        with run.residency("denoise"):
            latents = run.sampling(guidance)(generators(range(1), seed, "evaluation"), cond, None)
        with run.residency("decode"):
            images = run.model.decode(latents)
        scores, _ = run.judges.judge([images], [prompt], [{}], run.residency)
        return images[0].cpu(), {name: column.item() for name, column in scores.items()}


def explore(config, reward_function=None, model=None) -> None:
    """Serves the page until Ctrl-C.

    Raises:
        ConfigError, rewards.RewardError: one line for a mistake in the configuration, or where gradio is missing.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise ConfigError(
            'task = "explore" needs gradio: pip install "alignprop[explore]", or pip install gradio'
        ) from None
    run, first, second = build_mixture(config, reward_function, model)
    explorer = Explorer(run, first, second)
    page = make_page(explorer)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # gradio asks itself whether it is there, and logs that
    _, address, _ = page.launch(
        server_name=LOOPBACK, share=False, show_error=True, quiet=True, prevent_thread_lock=True
    )
    explorer.run.say(f"open {address} in a browser; Ctrl-C ends it")
    page.block_thread()
    explorer.drawing.acquire()  # a process that ends in the middle of a picture is aborted by torch


def make_page(explorer: Explorer):
    """The gradio page, not yet served."""
    import gradio as gr

    c = explorer.run.config
    mixes = explorer.first is not None

    def show(prompt: str, guidance: float, seed: float, share: float = 1.0):
        if not prompt.strip():
            raise gr.Error("Type a prompt first.")
        pictures, rows = [], []
        for title, lora in explorer.variants(share).items():
            image, scores = explorer.draw(prompt, lora, guidance, int(seed))
            pictures.append(((image.permute(1, 2, 0) * 255).round().byte().numpy(), title))
            rows.append((title, scores))
        return pictures, score_table(rows)

    with gr.Blocks(title="alignprop: explore") as page:
        gr.Markdown(f"# alignprop\n{c.pretrained.model}" + (f", {explorer.run.checkpoint}" if mixes else ""))
        prompt = gr.Textbox(explorer.run.eval_prompts.prompts[0], label="prompt", elem_id="prompt")
        with gr.Row():
            guidance = gr.Slider(1, 15, c.guidance_scale, step=0.5, label="guidance_scale", elem_id="guidance")
            seed = gr.Number(c.seed, precision=0, minimum=0, label="seed", elem_id="seed")
            inputs = [prompt, guidance, seed]
            if mixes:
                what = "share of resume_from in the mixture with " + (
                    "resume_from_2" if explorer.second else "the base"
                )
                inputs.append(gr.Slider(0, 1, 0.5, step=0.05, label=what, elem_id="share"))
        button = gr.Button("Draw", variant="primary", elem_id="draw")
        gallery = gr.Gallery(label="the same prompt and noise", columns=4, height=380, elem_id="pictures")
        scores = gr.Markdown(elem_id="scores")
        events = [button.click, prompt.submit, guidance.release, seed.change]
        if mixes:
            events.append(inputs[-1].release)
        gr.on(events, show, inputs, [gallery, scores], concurrency_limit=1)
    return page


def score_table(rows: list[tuple[str, dict[str, float]]]) -> str:
    """The scores as a table in Markdown: a line for each reward, a column for each variant (title, scores)."""
    titles, names = [title for title, _ in rows], list(rows[0][1])
    lines = [["", *titles], ["---"] * (1 + len(titles))]
    lines += [[name, *(f"{scores[name]:.3f}" for _, scores in rows)] for name in names]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
