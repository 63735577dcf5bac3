"""Load reference outputs of the published model, and build our model with the same generated weights."""

import json
import zlib
from pathlib import Path

import numpy as np
import torch

from modeling_reftr import RefTRConfig, RefTRForVisualGrounding
from modeling_reftr.convert_reftr_checkpoint import convert_state_dict


GOLDEN = Path(__file__).resolve().parents[1] / "fixtures" / "golden"


def load_case(name):
    """Return the settings, losses and gradient norms (JSON) of a golden case, and its arrays."""
    return json.loads((GOLDEN / f"{name}.json").read_text()), dict(np.load(GOLDEN / f"{name}.npz"))


def weight_by_rule(key, shape):
    """Generate the weight of a published key from its name and shape only."""
    x = np.random.RandomState(zlib.crc32(key.encode()) & 0xFFFFFFFF).standard_normal(shape).astype(np.float32)
    if key.endswith("running_var"):
        x = 1 + 0.1 * np.abs(x)
    elif key.endswith("running_mean"):
        x = 0.05 * x
    elif len(shape) >= 2:
        x = x / np.sqrt(np.prod(shape[1:]))
    elif key.endswith("weight"):
        x = 1 + 0.1 * x
    else:
        x = 0.1 * x
    return torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))


def published_state_dict(case):
    return {key: weight_by_rule(key, shape) for key, shape in case["state_dict_shapes"].items()}


def golden_config(case, **overrides):
    build = case["build"]
    text_config = {"model_type": case["text"], **case["text_config"], "layer_norm_eps": 1e-12}
    if case["text"] == "roberta":
        text_config |= {"type_vocab_size": 1, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    settings = {
        "text_config": text_config,
        "d_model": build["hidden"],
        "encoder_layers": build["enc"],
        "decoder_layers": build["dec"],
        "encoder_attention_heads": build["nheads"],
        "decoder_attention_heads": build["nheads"],
        "encoder_ffn_dim": build["ff"],
        "decoder_ffn_dim": build["ff"],
        "predict_masks": case["masks"],
        "auxiliary_loss": not case["masks"],
    }
    return RefTRConfig(**settings | overrides)


def golden_model(case, attn_implementation="eager", **overrides):
    model = RefTRForVisualGrounding._from_config(
        golden_config(case, **overrides), attn_implementation=attn_implementation
    ).eval()
    state_dict = model.state_dict()
    model.load_state_dict(convert_state_dict(published_state_dict(case), state_dict))
    return model


def golden_inputs(case, arrays):
    """Return the case's inputs for the model, with images padded at the right and at the bottom."""
    images = [torch.from_numpy(arrays[f"in.pixel_values_{i}"]) for i in range(len(case["sizes"]))]
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    pixel_values = torch.zeros(len(images), 3, height, width)
    pixel_mask = torch.zeros(len(images), height, width, dtype=torch.long)
    for i, image in enumerate(images):
        pixel_values[i, :, : image.shape[1], : image.shape[2]] = image
        pixel_mask[i, : image.shape[1], : image.shape[2]] = 1
    inputs = {"pixel_values": pixel_values, "pixel_mask": pixel_mask}
    for name in ("input_ids", "attention_mask", "phrase_input_ids", "phrase_attention_mask"):
        if f"in.{name}" in arrays:
            inputs[name] = torch.from_numpy(arrays[f"in.{name}"]).long()
    if "in.phrase_start" in arrays:
        spans = np.stack((arrays["in.phrase_start"], arrays["in.phrase_end"]), axis=-1)
        inputs["phrase_spans"] = torch.from_numpy(spans).long()
    inputs["labels"] = [
        {"boxes": torch.from_numpy(arrays[f"in.target_boxes_{i}"]).reshape(-1, 4)} for i in range(len(images))
    ]
    if case["masks"]:
        for i, (label, (rows, columns)) in enumerate(zip(inputs["labels"], case["sizes"], strict=True)):
            label["masks"] = torch.zeros(1, height, width, dtype=torch.bool)
            label["masks"][0, :rows, :columns] = golden_mask(arrays[f"in.target_masks_{i}"], (rows, columns))
    return inputs


def golden_mask(packed, size):
    """Unpack a mask of (height, width) from its bits."""
    return torch.from_numpy(np.unpackbits(packed)[: size[0] * size[1]].reshape(size).astype(bool))
