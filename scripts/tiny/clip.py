"""Stage ``clip``: trains a small ``transformers.CLIPModel`` on the drawn world. Some captions also name the style.

The text tower becomes the pipeline's text encoder, so that the embeddings that condition the UNet and the reward hold
words of both content and style. The image tower embeds the pictures for the reward.
"""

import json

import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize

from rewards.tiny_judge import CONTENT
from scripts.tiny import scenes, world
from scripts.tiny.training import TrainingLoop, augment, bfloat16, optimizer_step

CONTEXT = 16  # tokens
WIDTH = 128  # of both towers and of the shared embedding
STYLED_SHARE = 0.5  # the share of captions that end in a word about style
SEPARATION = 0.6  # the least relative distance between the text states of captions that differ in one word
CONTENT_SIZES = (len(world.COUNTS), len(world.COLOURS), len(world.SHAPES), len(world.BACKGROUNDS))
BATCH_SIZE = 96


def make_tokenizer():
    """Returns a CLIP byte-pair tokenizer that spends one token on each of the world's words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    words = {word for row in world.all_contents(4) for word in world.caption(row).split()}
    words = sorted(words | {word for pair in world.STYLE_WORDS for word in pair})
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=5000, min_frequency=1, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    learner.train_from_iterator(words, trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    symbols = alphabet + [c + "</w>" for c in alphabet] + ["".join(pair) for pair in merges]
    symbols += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({s: i for i, s in enumerate(symbols)}, merges, model_max_length=CONTEXT)


def make(tokenizer):
    from transformers import CLIPConfig, CLIPModel

    tower = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_attention_heads": 4, "projection_dim": WIDTH}
    text = {
        **tower, "num_hidden_layers": 2, "max_position_embeddings": CONTEXT, "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    vision = {**tower, "num_hidden_layers": 4, "image_size": world.SIZE, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))


def token_table(tokenizer):
    """Returns token ids [contents, 9, 16] of every content (see ``content_index``), plain and with each style word."""
    grid = torch.cartesian_prod(*(torch.arange(n) for n in CONTENT_SIZES))
    endings = ["", *(pair[0] for pair in world.STYLE_WORDS), *(pair[1] for pair in world.STYLE_WORDS)]
    captions = [world.caption(row, ending) for row in grid for ending in endings]
    ids = tokenizer(captions, padding="max_length", max_length=CONTEXT, return_tensors="pt").input_ids
    return ids.view(len(grid), len(endings), CONTEXT)


def content_index(contents):
    """Returns contents [N, 4] as indices [N] into the token table."""
    count, colour, shape, background = contents.unbind(1)
    return ((count * CONTENT_SIZES[1] + colour) * CONTENT_SIZES[2] + shape) * CONTENT_SIZES[3] + background


def train(work, out, steps=2000, minutes=14.0):
    """Trains both towers. The text tower is final after this stage, because the UNet is conditioned on it."""
    torch.manual_seed(21)
    tokenizer = make_tokenizer()
    clip = make(tokenizer)
    _fit(clip, tokenizer, work, "clip", 1e-3, steps, minutes)
    save(clip, tokenizer, out / "clip")


def finish_images(work, out, steps=2000, minutes=45.0):
    """Trains the image tower further, with the text tower frozen. This may run at the same time as stage ``unet``."""
    torch.manual_seed(22)
    clip, tokenizer = load(out)
    clip.requires_grad_(True).train()
    clip.text_model.requires_grad_(False)
    _fit(clip, tokenizer, work, "images", 7e-4, steps, minutes)
    save(clip, tokenizer, out / "clip")


def _fit(clip, tokenizer, work, name, learning_rate, steps, minutes):
    images, contents, styles = scenes.load(work, "train")
    tokens, order = token_table(tokenizer), content_index(contents).argsort()
    # The probe is thrown away afterwards. It makes linear in the embedding what alignment's linear heads have to read.
    probe = nn.Linear(WIDTH, sum(CONTENT_SIZES) + len(world.STYLES))
    parameters = [p for p in (*clip.parameters(), *probe.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, learning_rate, weight_decay=0.02)
    modules = {"clip": clip, "probe": probe}
    loop = TrainingLoop(name, work / f"{name}_state.pt", optimizer, modules, steps, minutes)
    for _ in loop:
        rows = _batch(order, BATCH_SIZE)
        with bfloat16():
            image_embeds = clip.get_image_features(pixel_values=2 * augment(world.to_float(images[rows])) - 1)
        image_embeds = normalize(image_embeds.pooler_output.float(), dim=1)
        endings, fits = _style_endings(styles[rows])
        index = content_index(contents[rows])
        text_embeds = normalize(clip.get_text_features(tokens[index, endings]).pooler_output, dim=1)
        matches = (index[:, None] == index[None]) & fits
        contrast = _contrastive(image_embeds @ text_embeds.T * clip.logit_scale.exp(), matches.float())
        loss = contrast + _probe_loss(probe(image_embeds * WIDTH**0.5), contents[rows], styles[rows])
        one_word_off = torch.cat([contents[rows], swap_one_word(contents[rows])])
        gap = relative_gaps(*text_states(clip, tokens, one_word_off).chunk(2))
        loss = loss + 2 * (SEPARATION - gap).clamp(min=0).mean()  # without it, circle and square became alike
        optimizer_step(loss, optimizer)
        clip.logit_scale.data.clamp_(max=4.0)
        loop.show(contrast=contrast, loss=loss, gap=gap.min())


def _batch(order, size):
    """Returns row numbers, half at random, half in runs of four pictures of one content (``order`` sorts by it)."""
    runs = torch.randint(len(order) - 3, (size // 8, 1)) + torch.arange(4)
    return torch.cat([torch.randint(len(order), (size - runs.numel(),)), order[runs.flatten()]])


def _style_endings(styles):
    """Returns the ending of each picture's caption (0: none), and [i, j]: whether ending j is true of picture i."""
    present = styles > world.STYLE_PRESENT
    chosen = torch.randint(4, (len(styles),))
    endings = torch.where(present.gather(1, chosen[:, None])[:, 0], 1 + chosen, 5 + chosen)
    endings = endings * (torch.rand(len(styles)) < STYLED_SHARE)
    true_of = torch.cat([torch.ones(len(styles), 1, dtype=torch.bool), present, ~present], 1)
    return endings, true_of[:, endings]


def _contrastive(logits, matches):
    """Returns CLIP's loss with several right answers. The target of a row or column is spread over its matches."""
    rows = cross_entropy(logits, matches / matches.sum(1, keepdim=True))
    columns = cross_entropy(logits.T, (matches / matches.sum(0)).T)
    return (rows + columns) / 2


def _probe_loss(output, contents, styles):
    *names, amounts = output.split([*CONTENT_SIZES, len(world.STYLES)], dim=1)
    naming = sum(cross_entropy(logits, contents[:, i]) for i, logits in enumerate(names))
    return 0.3 * naming + 8 * (amounts - styles).square().mean()


def swap_one_word(contents):
    """Replaces one word by another in each row of ``contents`` [N, 4]."""
    column = torch.randint(4, (len(contents), 1))
    size = torch.tensor(CONTENT_SIZES)[column]
    shift = 1 + (torch.rand(column.shape) * (size - 1)).long()
    return contents.scatter(1, column, (contents.gather(1, column) + shift) % size)


def text_states(clip, tokens, contents):
    """Returns the text tower's last hidden states, flattened [N, 16 * 128]. The UNet is conditioned on them."""
    return clip.text_model(tokens[content_index(contents), 0]).last_hidden_state.flatten(1)


def relative_gaps(first, second):
    """Returns the relative distances [N] of two lists of text states. Near 0, the UNet cannot tell captions apart."""
    return (first - second).norm(dim=1) / first.norm(dim=1)


def save(clip, tokenizer, folder):
    from transformers import CLIPImageProcessorPil

    clip.to(torch.float16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    side = {"height": world.SIZE, "width": world.SIZE}
    CLIPImageProcessorPil(
        size={"shortest_edge": world.SIZE}, crop_size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3
    ).save_pretrained(folder)
    use_in_float32(folder)


def use_in_float32(folder):
    """Makes transformers load the weights in float32 by default. They are stored in half precision to be small."""
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))


def load(out):
    """Loads the trained model (frozen, float32) and its tokenizer."""
    from transformers import CLIPModel, CLIPTokenizer

    clip = CLIPModel.from_pretrained(out / "clip", dtype=torch.float32)
    return clip.eval().requires_grad_(False), CLIPTokenizer.from_pretrained(out / "clip")


@torch.no_grad()
def embed_images(clip, images):
    """Returns the normalised embeddings [N, 128] of uint8 pictures."""
    parts = [clip.get_image_features(pixel_values=2 * world.to_float(p) - 1).pooler_output for p in images.split(256)]
    return normalize(torch.cat(parts), dim=1)


@torch.no_grad()
def report(work, out):
    """Measures on drawn test scenes how often the right caption is found among all and style words are told apart.

    It also measures the smallest gaps between text states.
    """
    clip, tokenizer = load(out)
    tokens = token_table(tokenizer)
    images, contents, styles = scenes.load(work, "test")
    embeds, index = embed_images(clip, images), content_index(contents)
    words = lambda ids: normalize(clip.get_text_features(ids).pooler_output, dim=1)  # noqa: E731
    known = content_index(world.all_contents(4))
    found = known[(embeds @ words(tokens[known, 0]).T).argmax(1)] == index
    present = styles > world.STYLE_PRESENT
    figures = {"captions": len(known), "retrieval": found.float().mean().item(), "style_words": {}, "text_gap": {}}
    for i, name in enumerate(world.STYLES):
        says = (embeds * (words(tokens[index, 1 + i]) - words(tokens[index, 5 + i]))).sum(1) > 0
        figures["style_words"][name] = (says == present[:, i]).float().mean().item()
    states = text_states(clip, tokens, torch.cartesian_prod(*(torch.arange(n) for n in CONTENT_SIZES)))
    prompts = world.all_contents(3)
    for column, name in enumerate(CONTENT):
        size, gaps = (3, *CONTENT_SIZES[1:])[column], []
        for shift in range(1, size):
            others = prompts.clone()
            others[:, column] = (others[:, column] + shift) % size
            gaps.append(relative_gaps(states[content_index(prompts)], states[content_index(others)]))
        figures["text_gap"][name] = torch.cat(gaps).min().item()
    return figures


@torch.no_grad()
def all_text_states(out):
    """Returns the text states [contents + 1, 16, 128] that condition the UNet. The empty prompt's are the last."""
    clip, tokenizer = load(out)
    empty = tokenizer([""], padding="max_length", max_length=CONTEXT, return_tensors="pt").input_ids
    return clip.text_model(torch.cat([token_table(tokenizer)[:, 0], empty])).last_hidden_state
