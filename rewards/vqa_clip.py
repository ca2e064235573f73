"""What CLIP-FlanT5 (arXiv 2404.01291) and LLaVA-1.5 (2310.03744) share: the pixels, CLIP's features, the question."""

from collections.abc import Sequence

import torch
from torch import nn

from rewards.checkpointing import checkpoint_modules
from rewards.preprocess import ClipPreprocess
from rewards.towers import DTYPES

# The conversation of both models, before and behind the picture.
BEFORE = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: "
)
AFTER = '\nDoes this figure show "{}"? Please answer yes or no. ASSISTANT:'
ANSWER = "Yes"
PROMPT_LENGTH = 77  # tokens of a prompt, to plan memory
BEFORE_LENGTH, AFTER_LENGTH = 35, 21  # tokens of the two texts, without the prompt


class SquarePreprocess(ClipPreprocess):
    """LLaVA-1.5's preprocessing: pads the picture to a square with CLIP's mean colour, and then does what CLIP does.

    The colour is rounded down to 8 bits. The picture is in the middle, and an odd row or column goes below it or to its
    right.
    """

    def fit(self, images: torch.Tensor) -> torch.Tensor:
        height, width = images.shape[-2:]
        side = max(height, width)
        if height == width:
            return super().fit(images)
        colour = (self.mean * 255).floor() / 255
        square = colour.expand(len(images), -1, side, side).clone()
        top, left = (side - height) // 2, (side - width) // 2
        square[..., top : top + height, left : left + width] = images
        return super().fit(square)


class ClipVQATower(nn.Module):
    """A frozen CLIP whose patches stand, after a projection, between the words that a language model reads.

    A subclass has the language model. CLIP's layers and the language model's blocks recompute their activations.

    Args:
        model: The language model and the projection.
        vision: transformers' CLIPVisionModel. The layers that are not needed are removed from it.
        layer: Which of CLIP's states are read, counted as in `hidden_states`: 0 is before the first layer, -1 behind
            the last one.
        blocks: The blocks of the language model.
        answer: The tokens [T] of the answer, with the end token.
        vocabulary: The answer competes with the tokens below this number. A model may have more of them than its
            tokenizer, and the t2v_metrics package cuts those off.
        dtype: The precision of all weights, a key of DTYPES (towers.py).
    """

    def __init__(
        self,
        model: nn.Module,
        vision: nn.Module,
        layer: int,
        blocks: Sequence[nn.Module],
        preprocess: SquarePreprocess,
        tokenizer,
        answer: torch.Tensor,
        vocabulary: int,
        dtype: str = "bfloat16",
    ):
        super().__init__()
        self.dtype = DTYPES[dtype]
        layers = vision.encoder.layers
        del layers[layer % (len(layers) + 1) :], vision.post_layernorm
        for network in (model, vision):
            for weight in network.parameters():
                weight.data = weight.data.to(self.dtype)
            network.requires_grad_(False).eval()
        checkpoint_modules([*layers, *blocks])
        self.model, self.vision = model, vision
        self.preprocess, self.tokenizer, self.vocabulary = preprocess, tokenizer, vocabulary
        self.register_buffer("answer", answer, persistent=False)

    def forward(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Returns the mean logarithm [B] float32 of the probabilities of the answer's tokens.

        It is minus the loss that the model is trained with.

        Args:
            images: [B, 3, H, W] in [0, 1]; differentiable.
        """
        pictures = self.project(self.see(self.preprocess(images).to(self.dtype)))
        before, after, length = (tensor.to(images.device) for tensor in self.tokenize(prompts))
        words = torch.cat([self.embed(before).expand(len(images), -1, -1), pictures, self.embed(after)], dim=1)
        logits = self.answer_logits(words, words.shape[1] - after.shape[1] + length)
        logarithms = logits[..., : self.vocabulary].float().log_softmax(dim=-1)
        return logarithms.gather(2, self.answer.expand(len(images), -1)[..., None]).mean(dim=(1, 2))

    def see(self, pixels: torch.Tensor) -> torch.Tensor:
        """Returns the states [B, N, D] of the patches of pixels [B, 3, H, W], without CLIP's own class token."""
        states = self.vision.pre_layrnorm(self.vision.embeddings(pixels))
        return self.vision.encoder(inputs_embeds=states).last_hidden_state[:, 1:]

    def project(self, states: torch.Tensor) -> torch.Tensor:
        """Returns the patches [B, N, E] as the language model reads them."""
        raise NotImplementedError

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Returns the language model's embeddings [..., E] of token ids [...]."""
        raise NotImplementedError

    def answer_logits(self, words: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        """Returns the logits [B, T, V] of the answer's tokens. Each is predicted from the right answer so far.

        Args:
            words: [B, L, E], the picture among the embeddings of the text, padded on the right.
            length: [B], how many of them count.
        """
        raise NotImplementedError

    def spell(self, prompts: Sequence[str]) -> tuple[list[int], list[list[int]]]:
        """Returns the token ids of the text before the picture, and for each prompt those of the text behind it."""
        raise NotImplementedError

    def tokenize(self, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns token ids [P] before and [B, L] behind the picture, and the number [B] of the latter, int64.

        The two texts are tokenized apart, as in the t2v_metrics package. Rows are padded to L on the right.
        """
        before, behind = self.spell(prompts)
        rows = [torch.tensor(ids) for ids in behind]
        return (
            torch.tensor(before),
            nn.utils.rnn.pad_sequence(rows, batch_first=True),
            torch.tensor([len(row) for row in rows]),
        )


def blank_tokens(prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns what `ClipVQATower.tokenize` does, without data, for long prompts."""
    after = torch.zeros(len(prompts), AFTER_LENGTH + PROMPT_LENGTH, dtype=torch.long, device="meta")
    return after.new_zeros(BEFORE_LENGTH), after, after[:, 0]
