"""A small Qwen2.5-VL in the layout of the released ones, with random weights, that gives one answer."""

import json
from pathlib import Path

import torch
from PIL import Image

from tests.helpers.reward_files import byte_symbols

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
)  # fmt: skip
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_vlm(folder, says: str = "") -> Path:
    """Writes the model, the tokenizer and the preprocessor file; `says` is one character, "" for random answers."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

    tokenizer = make_tokenizer()
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(list(SPECIAL)), strict=True))
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    text = dict(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, rope_parameters=rope, bos_token_id=ids["<|endoftext|>"], eos_token_id=ids["<|im_end|>"],
    )  # fmt: skip
    vision = dict(
        depth=2, hidden_size=32, out_hidden_size=32, num_heads=2, intermediate_size=48, fullatt_block_indexes=[1]
    )
    tokens = {f"{name}_token_id": ids[f"<|{name}_pad|>"] for name in ("image", "video")}
    tokens |= {f"vision_{end}_token_id": ids[f"<|vision_{end}|>"] for end in ("start", "end")}
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    model.generation_config.update(eos_token_id=ids["<|im_end|>"], do_sample=True, temperature=0.1, top_k=1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(min_pixels=4 * 28**2, max_pixels=16 * 28**2).save_pretrained(folder)
    file = Path(folder, "preprocessor_config.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "processor_class": "Qwen2_5_VLProcessor"}))
    if says:
        teach(folder, model, tokenizer.convert_tokens_to_ids(says), ids["<|im_end|>"])
    return Path(folder)


def make_tokenizer():
    """A Qwen2Tokenizer of single bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import Qwen2Tokenizer

    core = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate([*byte_symbols(), *SPECIAL])}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = dict(additional_special_tokens=list(SPECIAL), eos_token="<|im_end|>", pad_token="<|endoftext|>")
    return Qwen2Tokenizer(tokenizer_object=core, unk_token=None, chat_template=TEMPLATE, **special)


@torch.no_grad()
def teach(folder, model, token: int, end: int) -> None:
    """Sets the output layer so that the answer is `token` and then `end`, and saves the model again."""
    from rewards.vlm import load_vlm

    vlm, states = load_vlm(str(folder), None, "float32", 2, "model"), []
    head = vlm.model.lm_head
    hook = head.register_forward_pre_hook(lambda layer, inputs: states.append(inputs[0][0, -1]))
    head.weight.zero_()
    vlm.answer(Image.new("RGB", (60, 60)), "a question")
    head.weight[token] = states[0]  # so that the next time the second state is that after the token
    states.clear()
    vlm.answer(Image.new("RGB", (60, 60)), "a question")
    hook.remove()
    direction = states[0] / states[0].norm() ** 2 - states[1] / states[1].norm() ** 2
    model.lm_head.weight.zero_()
    model.lm_head.weight[token], model.lm_head.weight[end] = direction, -direction
    model.save_pretrained(folder)
