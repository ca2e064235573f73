"""The task "explore": a page that compares the base model, checkpoints and their mixture on prompts that you type.

    alignprop explore --config tiny_explore --config.resume_from=logs/my_run

gradio serves the page, and only this machine can open it.
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
    """Draws pictures of a prompt from the same noise with the base model, one or two LoRAs, and their mixture.

    Attributes:
        run: the run. Its reward and its `eval_reward_fn` score the pictures.
        first, second: the LoRAs of `resume_from` and `resume_from_2`; None is the base model.
        drawing: a lock that a thread of the page holds while it draws a picture.
    """

    run: Run
    first: LoraWeights | None
    second: LoraWeights | None
    drawing: Lock = field(default_factory=Lock)

    def variants(self, share: float) -> dict[str, LoraWeights | None]:
        """Returns what is shown side by side, as {title: LoRA}.

        Args:
            share: the share of the first LoRA in the mixture.
        """
        shown: dict[str, LoraWeights | None] = {"base model": None}
        if self.second:
            shown["resume_from_2"] = self.second
        if self.first:
            shown["resume_from"] = self.first
            shown["mixture"] = mix(self.first, self.second, share, self.run.config.soup_mode)
        return shown

    @torch.no_grad()
    def draw(self, prompt: str, lora: LoraWeights | None, guidance: float, seed: int):
        """Returns one picture, float [3, H, W] in [0, 1] on the CPU, and its score under each reward.

        Args:
            prompt: the prompt.
            lora: the LoRA to draw with. None: the base model.
            guidance: the strength of classifier-free guidance. 1: no guidance.
            seed: the seed of the noise. With the same seed, all variants get the same noise.
        """
        with self.drawing:
            return self._draw(prompt, lora, guidance, seed)

    def _draw(self, prompt: str, lora: LoraWeights | None, guidance: float, seed: int):
        run = self.run
        run.residency.leave()  # loading changes the weights on the host; the next phase copies them to the device
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
        ConfigError, rewards.RewardError: the configuration has a mistake, or gradio is missing; one line says so.
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
    logging.getLogger("httpx").setLevel(logging.WARNING)  # gradio sends requests to itself at its start, and logs them
    _, address, _ = page.launch(
        server_name=LOOPBACK, share=False, show_error=True, quiet=True, prevent_thread_lock=True
    )
    explorer.run.say(f"open {address} in a browser; Ctrl-C ends it")
    page.block_thread()
    explorer.drawing.acquire()  # torch aborts a process that ends while it draws a picture


def make_page(explorer: Explorer):
    """Returns the gradio page, which is not served yet."""
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
    """Returns the scores as a Markdown table, with a line for each reward and a column for each variant.

    Args:
        rows: (title, scores) of each variant.
    """
    titles, names = [title for title, _ in rows], list(rows[0][1])
    lines = [["", *titles], ["---"] * (1 + len(titles))]
    lines += [[name, *(f"{scores[name]:.3f}" for _, scores in rows)] for name in names]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
