"""Judges that ask a vision-language model for a number: a question of one's own, and UnifiedReward's."""

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Literal

import torch

from rewards.base import Reward, TowerConfig, did_you_mean
from rewards.endpoint import Endpoint, beginning
from rewards.errors import RewardError
from rewards.pictures import to_pictures
from rewards.registry import Precision
from rewards.skeleton import blank
from rewards.vlm import AnswerCache, load_vlm, plan_vlm

PLACES = ("prompt", "lowest", "highest")
PLACEHOLDER = re.compile(r"\{(\w+)\}")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?", re.ASCII)
THOUGHTS = re.compile(r"^.*</think>", re.DOTALL)  # of a model that reasons before it answers
FINAL_SCORE = re.compile(r"Final Score:\s*([1-5](?:\.\d+)?)(?!\.?\d)")

# UnifiedReward was trained with these texts, so every character counts.
CRITERIA = (
    "You are given a text caption and a generated image based on that caption. Your task is to evaluate this image "
    "based on two key criteria:\n"
    "1. Alignment with the Caption: Assess how well this image aligns with the provided caption. Consider the accuracy "
    "of depicted objects, their relationships, and attributes as described in the caption.\n"
    "2. Overall Image Quality: Examine the visual quality of this image, including clarity, detail preservation, color "
    "accuracy, and overall aesthetic appeal.\n"
)
CAPTION = "\nYour task is provided as follows:\nText Caption: [{prompt}]"
TEMPLATES = {
    "elements": (
        f"{CRITERIA}Extract key elements from the provided text caption, evaluate their presence in the generated "
        "image using the format: 'element (type): value' (where value=0 means not generated, and value=1 means "
        f"generated), and assign a score from 1 to 5 after 'Final Score:'.{CAPTION}"
    ),
    "short": f"{CRITERIA}Based on the above criteria, assign a score from 1 to 5 after 'Final Score:'.{CAPTION}",
}


class VlmJudge(Reward):
    """The number with which a vision-language model answers a question about the picture. It has no gradient.

    The answer must hold exactly one number, and this must be on the scale. "8", "Score: 8/10" and "8 out of 10" are
    read as 8. A model that answers otherwise is asked a second time, with a reminder. What a model thinks before
    "</think>" is not read.

    The model runs here, in transformers, or on a server with an OpenAI-compatible interface. There, several pictures
    are judged at the same time, and a request that fails in passing is repeated.

    Args:
        question: What is asked. {prompt}, {lowest} and {highest} stand for the picture's prompt and the scale.
        lowest: The lowest number of the scale.
        highest: The highest number of the scale.
        model: The hub name or folder of an image-text model, or the model's name at the endpoint.
        revision: The branch, tag or commit of the hub's repository. None: the newest.
        dtype: The precision of a model that runs here.
        endpoint: The address of a server, such as http://127.0.0.1:8000/v1. None: the model runs here.
        api_key_variable: The name of the environment variable with the endpoint's key. None: no key is sent.
        max_tokens: The longest answer in tokens.
        timeout: How many seconds the endpoint may keep a request waiting, before it is repeated.
        at_once: How many requests the endpoint gets at the same time.
        cache_dir: A folder that keeps the answers, so that the same question about the same picture is asked only
            once. Empty it if a model changes and keeps its name. None: no answer is kept.
        missing: The score of a picture for which the model gives no number. None: the run ends.

    Raises:
        RewardError: The model cannot be loaded or asked, an option is not allowed, or an answer has no number.
    """

    differentiable = False
    plannable = True
    group = "vlm_judge"
    reminder = "Answer with one number from {lowest} to {highest} and with nothing else."

    def __init__(
        self,
        question: str = (
            "How well does this picture show the following description? Give a number from {lowest} (not at all) to "
            "{highest} (perfectly), and nothing else. The description: {prompt}"
        ),
        lowest: float = 1.0,
        highest: float = 10.0,
        model: str = "Qwen/Qwen2.5-VL-7B-Instruct",
        revision: str | None = None,
        dtype: Precision = "bfloat16",
        endpoint: str | None = None,
        api_key_variable: str | None = None,
        max_tokens: Annotated[int, (1, 100000)] = 256,
        timeout: Annotated[float, (0, 3600), "exclusive"] = 120.0,
        at_once: Annotated[int, (1, 256)] = 8,
        cache_dir: str | None = None,
        missing: float | None = None,
    ):
        super().__init__()
        if not lowest < highest:
            raise RewardError(f"{self.group}.lowest={lowest!r} is not below {self.group}.highest={highest!r}")
        for name in PLACEHOLDER.findall(question):
            if name not in PLACES:
                hint = did_you_mean(name, PLACES)
                raise RewardError(
                    f"{self.group}.question has {{{name}}}; allowed: {{prompt}}, {{lowest}}, {{highest}}{hint}"
                )
        self.question, self.lowest, self.highest, self.missing = question, lowest, highest, missing
        if endpoint is None:
            self.vlm = load_vlm(model, revision, dtype, max_tokens, f"{self.group}.model")
        else:
            self.vlm = Endpoint(endpoint, model, max_tokens, api_key_variable, timeout, at_once, self.group)
        self.cache = AnswerCache(cache_dir, self.vlm.identity, f"{self.group}.cache_dir")

    @classmethod
    def skeleton(cls, options: Mapping, tower_config: TowerConfig) -> Reward:
        reward, field = blank(cls), f"{cls.group}.model"
        if options["endpoint"] is None:
            config = tower_config(options["model"], field, "vlm")
            reward.vlm = plan_vlm(config, options["dtype"], options["max_tokens"], f"{field}={options['model']!r}")
        return reward

    def score(self, images: torch.Tensor, prompts: list[str], metadata: Sequence[dict] | None) -> torch.Tensor:
        if images.is_meta:  # A plan counts the model's weights alone. How long an answer gets is not known before.
            return images.mean(dim=(1, 2, 3))
        scores = self.judge_all(list(zip(to_pictures(images), prompts, strict=True)))
        return torch.tensor(scores, device=images.device, dtype=torch.float32)

    def judge_all(self, rows: Sequence[tuple[Any, str]]) -> list[float]:
        """Returns the scores of PIL pictures with their prompts, as many at the same time as the model takes."""
        if self.vlm.at_once == 1:
            return [self.judge(*row) for row in rows]
        with ThreadPoolExecutor(self.vlm.at_once) as pool:
            jobs = [pool.submit(self.judge, *row) for row in rows]
            try:
                return [job.result() for job in jobs]
            finally:  # after an error, the questions that are not yet asked are of no use
                pool.shutdown(wait=False, cancel_futures=True)

    def judge(self, picture: Any, prompt: str) -> float:
        """Returns the score of one PIL picture.

        Raises:
            RewardError: The model gives no number, twice, and `missing` is None.
        """
        first = self.fill(self.question, prompt)
        for question in (first, f"{first}\n{self.fill(self.reminder, prompt)}"):
            kept = self.cache.find(picture, question)
            answer = self.vlm.answer(picture, question) if kept is None else kept
            score = self.read(THOUGHTS.sub("", answer).replace("*", ""))
            if score is not None:
                if kept is None:
                    self.cache.keep(picture, question, answer)
                return score
        if self.missing is None:
            raise RewardError(
                f"{self.group}: the model answers {beginning(answer)} for prompt {prompt!r}, without one number from "
                f"{self.lowest:g} to {self.highest:g}; change the model, the question or max_tokens="
                f"{self.vlm.max_tokens}, or set {self.group}.missing to the score of such pictures"
            )
        return self.missing

    def fill(self, text: str, prompt: str) -> str:
        """Returns a text with values in the places of its placeholders."""
        values = {"prompt": prompt, "lowest": f"{self.lowest:g}", "highest": f"{self.highest:g}"}
        return PLACEHOLDER.sub(lambda found: values[found[1]], text)

    def read(self, answer: str) -> float | None:
        """Returns the score that an answer gives, or None if it does not give one."""
        of_highest = rf"(?:/|\bout of)\s*{re.escape(f'{self.highest:g}')}(?!\.?\d)"
        numbers = [float(number) for number in NUMBER.findall(re.sub(of_highest, " ", answer))]
        return numbers[0] if len(numbers) == 1 and self.lowest <= numbers[0] <= self.highest else None


class UnifiedReward(VlmJudge):
    """UnifiedReward (arXiv 2503.05236): a model's score from 1 to 5 for prompt and quality, divided by 5; no gradient.

    Only the number after "Final Score:" is read. The pictures are given as they are.

    Args:
        template: The text of the question. "elements" is that of the authors' script for single pictures, "short" that
            of their server for reinforcement learning.
        model: The hub name or folder of a UnifiedReward in transformers' format, or its name at the endpoint.
        revision: The branch, tag or commit of the hub's repository. None: the newest.
        dtype: The precision of a model that runs here.
        endpoint: The address of a server, such as http://127.0.0.1:8000/v1. None: the model runs here.
        api_key_variable: The name of the environment variable with the endpoint's key. None: no key is sent.
        max_tokens: The longest answer in tokens.
        timeout: How many seconds the endpoint may keep a request waiting, before it is repeated.
        at_once: How many requests the endpoint gets at the same time.
        cache_dir: A folder that keeps the answers, so that the same question about the same picture is asked only
            once. Empty it if a model changes and keeps its name. None: no answer is kept.
        missing: The score of a picture for which the model gives no number. None: the run ends.

    Raises:
        RewardError: As `VlmJudge`.
    """

    group = "unifiedreward"
    reminder = "Give the score, from {lowest} to {highest}, after 'Final Score:'."

    def __init__(
        self,
        template: Literal["elements", "short"] = "elements",
        model: str = "CodeGoat24/UnifiedReward-qwen-7b",
        revision: str | None = None,
        dtype: Precision = "bfloat16",
        endpoint: str | None = None,
        api_key_variable: str | None = None,
        max_tokens: Annotated[int, (1, 100000)] = 512,
        timeout: Annotated[float, (0, 3600), "exclusive"] = 120.0,
        at_once: Annotated[int, (1, 256)] = 8,
        cache_dir: str | None = None,
        missing: float | None = None,
    ):
        super().__init__(
            TEMPLATES[template], 1.0, 5.0, model, revision, dtype, endpoint, api_key_variable, max_tokens, timeout,
            at_once, cache_dir, missing,
        )  # fmt: skip

    def read(self, answer: str) -> float | None:
        found = FINAL_SCORE.search(answer)
        return float(found[1]) / 5 if found and float(found[1]) <= 5 else None
