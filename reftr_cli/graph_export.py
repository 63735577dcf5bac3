"""
Export a model as one graph that runs without this code.

The graph takes any number of images, sentences and tokens, and images of any size. Its outputs are compared with the
model's at other shapes than it was traced with.
"""

import contextlib
import logging
import re
import sys
from pathlib import Path
from typing import Any

import torch
from transformers.exporters import DynamoConfig, DynamoExporter, OnnxConfig, OnnxExporter
from transformers.exporters.base import ExportedModel

from modeling_reftr import RefTRForVisualGrounding, RefTRProcessor, __version__


FORMATS = {"onnx": (OnnxExporter, OnnxConfig), "dynamo": (DynamoExporter, DynamoConfig)}
TOLERANCE = 1e-4  # of boxes relative to the image, and of mask logits relative to the largest
# names of the dynamic dimensions
AXES = {
    "pixel_values": {0: "images", 2: "height", 3: "width"},
    "pixel_mask": {0: "images", 1: "height", 2: "width"},
    "input_ids": {0: "sentences", 1: "tokens"},
    "attention_mask": {0: "sentences", 1: "tokens"},
    "image_index": {0: "sentences"},
    "phrase_input_ids": {0: "sentences", 1: "phrases", 2: "phrase_tokens"},
    "phrase_attention_mask": {0: "sentences", 1: "phrases", 2: "phrase_tokens"},
    "phrase_spans": {0: "sentences", 1: "phrases"},
    "phrase_index": {0: "real_phrases"},
}
DESCRIPTION = (
    "RefTR for visual grounding. pred_boxes: (center_x, center_y, width, height) in 0..1 of each image without its "
    "padding. pred_masks: logits over the padded image. phrase_mask: true for real phrases. Of a model that predicts "
    "presence, query_boxes are the boxes of all queries of a phrase and presence their scores; those above "
    "presence_threshold are its answers."
)


def make_inputs(model: RefTRForVisualGrounding, sizes: dict[str, int], phrases: bool, seed: int = 0) -> dict:
    """
    Return random inputs of a model, with padding.

    Args:
        model ([`RefTRForVisualGrounding`]): the model.
        sizes (`dict[str, int]`): of each of `AXES` but `real_phrases`.
        phrases (`bool`): whether there are several phrases per sentence.
        seed (`int`, *optional*, defaults to 0): random seed.
    """
    generator = torch.Generator().manual_seed(seed)
    images, sentences, tokens = (sizes[name] for name in ("images", "sentences", "tokens"))
    channels = model.config.backbone_config.num_channels
    pixel_mask = torch.ones(images, sizes["height"], sizes["width"], dtype=torch.long)
    pixel_mask[-1, :, sizes["width"] * 3 // 4 :] = 0

    def texts(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.randint(model.config.text_config.vocab_size, shape, generator=generator)
        mask = torch.ones_like(ids)
        mask[-1, ..., -1] = 0
        return ids * mask, mask

    inputs = {
        "pixel_values": torch.randn(images, channels, sizes["height"], sizes["width"], generator=generator),
        "pixel_mask": pixel_mask,
        **dict(zip(("input_ids", "attention_mask"), texts(sentences, tokens), strict=True)),
        "image_index": torch.arange(sentences) % images,
    }
    inputs["pixel_values"] *= pixel_mask[:, None]
    if phrases:
        shape = (sentences, sizes["phrases"])
        names = ("phrase_input_ids", "phrase_attention_mask")
        inputs |= dict(zip(names, texts(*shape, sizes["phrase_tokens"]), strict=True))
        inputs["phrase_spans"] = torch.tensor([1, 3]).expand(*shape, 2).clone()
        inputs["phrase_index"] = torch.ones(shape).nonzero()[1:]  # the first slot is padding
    return {name: value.to(model.device) for name, value in inputs.items()}


def export(model: RefTRForVisualGrounding, target: str = "onnx", phrases: bool = False) -> ExportedModel:
    """
    Export a model as one graph, its batch norms folded.

    Args:
        model ([`RefTRForVisualGrounding`]): a copy of it is exported, in evaluation mode.
        target (`str`, *optional*, defaults to `"onnx"`): or `"dynamo"`.
        phrases (`bool`, *optional*, defaults to `False`):
            Whether inputs have several phrases per sentence, instead of complete sentences.

    Returns:
        `transformers.exporters.base.ExportedModel`: called as the model, with all inputs but `labels`.

    Raises:
        ValueError: if the graph's outputs differ from the model's.
    """
    sizes = {"images": 2, "sentences": 3, "tokens": 7, "phrases": 4, "phrase_tokens": 5, "height": 192, "width": 256}
    exporter, config = FORMATS[target]
    model = model.fused_copy()
    inputs = make_inputs(model, sizes, phrases)
    shapes = {name: dict.fromkeys(AXES[name], torch.export.Dim.DYNAMIC) for name in inputs}
    exported = exporter().export(model, inputs, config(dynamic_shapes=shapes))
    if target == "onnx":
        name_inputs_and_axes(exported.program)
        add_metadata(exported.program, "phrases" if phrases else "sentences")
    for name, difference in compare_outputs(exported, model, phrases).items():
        if not difference <= TOLERANCE:
            raise ValueError(
                f"The exported graph's {name} differ from the model's by {difference:.1e}, more than {TOLERANCE:.0e}."
            )
    return exported


def name_inputs_and_axes(program: Any) -> None:
    """
    Name the inputs of an ONNX graph as the processor does, and its dynamic dimensions as `AXES` does.

    The exporter prefixes an input with "input." if it is an output as well, because names in ONNX are unique. Here
    only the output keeps its prefix, "output.".

    Args:
        program (`onnx_ir.Model`): changed in place.
    """
    graph, axes = program.graph, {}
    for value in graph.inputs:
        value.name = value.name.removeprefix("input.")
        axes |= {str(value.shape[axis]): name for axis, name in AXES[value.name].items()}
    for value in [*graph.inputs, *(output for node in graph for output in node.outputs)]:
        for axis, dim in enumerate(value.shape or ()):
            if getattr(dim, "value", None):  # a symbol, neither a number nor unknown
                value.shape[axis] = re.sub(r"\w+", lambda word: axes.get(word[0], word[0]), dim.value)


def add_metadata(program: Any, text: str) -> None:
    """Add the producer, a description of the outputs and the kind of text input to an ONNX program."""
    program.producer_name, program.producer_version, program.doc_string = "modeling_reftr", __version__, DESCRIPTION
    program.metadata_props.update(task="visual-grounding", text=text)


@torch.no_grad()
def compare_outputs(exported: ExportedModel, model: RefTRForVisualGrounding, phrases: bool) -> dict[str, float]:
    """
    Return the largest differences between the outputs of a graph and of a model over a few shapes.

    Boxes are relative to the image, `pred_masks` to the largest logit.
    """
    found = {}
    for seed, (images, sentences) in enumerate([(1, 1), (1, 4), (3, 5)]):
        sizes = {"images": images, "sentences": sentences, "tokens": 5 + seed, "phrases": 2 + seed}
        sizes |= {"phrase_tokens": 4 + seed, "height": 160 + 37 * seed, "width": 224 - 40 * seed}
        inputs = make_inputs(model, sizes, phrases, seed)
        answers, expected = exported(**inputs), model(**inputs)
        for name in ("pred_boxes", "pred_masks", "query_boxes", "presence"):
            if name not in expected:
                continue
            largest = expected[name].abs().max().item() if name == "pred_masks" else 1.0
            difference = (answers[name] - expected[name])[expected.phrase_mask].abs().max().item() / largest
            found[name] = max(found.get(name, 0.0), difference)
    return found


def write_graph(model_name: str, output: str | Path, target: str, phrases: bool) -> dict[str, float]:
    """
    Export a saved model into a folder, with its processor.

    Args:
        model_name (`str`): RefTR folder or Hub id.
        output (`str` or `Path`): the folder to write.
        target (`str`): one of `FORMATS`.
        phrases (`bool`): for captions with several phrases.

    Returns:
        `dict[str, float]`: the largest differences between the written graph and the model, see `compare_outputs`.

    Raises:
        ValueError: if the graph's outputs differ from the model's, or torch cannot save the graph.
    """
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    model = RefTRForVisualGrounding.from_pretrained(model_name, dtype=torch.float32).eval()
    with contextlib.redirect_stdout(sys.stderr):  # torch prints its progress to stdout
        exported = export(model, target, phrases)
    try:
        exported.save_pretrained(output)
        # a program of torch.export is a pickle, which runs code when it is loaded; this one was written just now
        written = ExportedModel.from_pretrained(output, trust_remote_code=True)
    except (AssertionError, RuntimeError) as error:  # torch cannot serialize every operation that it can export
        reason = str(error).splitlines()[0]
        raise ValueError(f"torch cannot save this model's graph ({reason}); use --format onnx.") from error
    RefTRProcessor.from_pretrained(model_name).save_pretrained(output)
    return compare_outputs(written, model, phrases)
