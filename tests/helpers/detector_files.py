"""Small random models that find objects, in the hub's layout."""

import torch

from tests.helpers.reward_files import make_tokenizer

LABELS = {0: "N/A", 1: "person", 2: "apple", 3: "bear", 4: "teddy bear"}


def make_owlvit(folder, side=64):
    from transformers import OwlViTConfig, OwlViTForObjectDetection, OwlViTImageProcessorPil

    tokenizer = make_tokenizer()
    tower = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2, num_hidden_layers=2)
    text = dict(tower, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, max_position_embeddings=24)
    vision = dict(tower, image_size=side, patch_size=16)
    torch.manual_seed(0)
    model = OwlViTForObjectDetection(OwlViTConfig(text_config=text, vision_config=vision, projection_dim=32))
    spread(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"height": side, "width": side}
    OwlViTImageProcessorPil(size=size, image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.25]).save_pretrained(folder)
    return folder


def make_yolos(folder, **processor):
    from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessorPil

    torch.manual_seed(0)
    config = YolosConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=[64, 96],
        num_detection_tokens=12, id2label=LABELS, label2id={v: k for k, v in LABELS.items()},
    )  # fmt: skip
    model = YolosForObjectDetection(config)
    spread(model)
    model.save_pretrained(folder)
    YolosImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 128}, **processor).save_pretrained(folder)
    return folder


def make_detr(folder):
    from transformers import DetrConfig, DetrForObjectDetection, DetrImageProcessorPil, ResNetConfig

    torch.manual_seed(0)
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    config = DetrConfig(
        use_timm_backbone=False, backbone=None, use_pretrained_backbone=False, backbone_config=backbone, d_model=32,
        encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32,
        decoder_ffn_dim=32, num_queries=10, id2label=LABELS, label2id={v: k for k, v in LABELS.items()},
    )  # fmt: skip
    model = DetrForObjectDetection(config)
    spread(model)
    model.save_pretrained(folder)
    DetrImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 128}).save_pretrained(folder)
    return folder


def spread(model):
    """Weights large enough that pictures and names matter to the scores."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1.5 / parameter[0].numel() ** 0.5)


# COCO's classes as far as the tests name them, in the names of the released model's config.
COCO = ("person", "bench", "bear", "mouse", "remote", "keyboard", "hot dog", "teddy bear")


def make_mask2former(folder, labels=COCO, size=None):
    """A Mask2Former for instances; size: that of the preprocessor file, else shortest and longest edge."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessorPil

    torch.manual_seed(0)
    swin = {
        "model_type": "swin", "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 2,
        "out_features": ["stage1", "stage2", "stage3", "stage4"],
    }  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=16, num_queries=12,
        id2label=dict(enumerate(labels)), label2id={label: i for i, label in enumerate(labels)},
    )  # fmt: skip
    model = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():  # large enough that the queries have masks of their own, and classes that they are sure of
        for name, weight in model.named_parameters():
            if name.startswith(("class_predictor", "model.transformer_module.queries")):
                weight.normal_(std=2)
    model.save_pretrained(folder)
    size = size or {"shortest_edge": 64, "longest_edge": 128}
    Mask2FormerImageProcessorPil(size=size, image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.25]).save_pretrained(
        folder
    )
    return folder
