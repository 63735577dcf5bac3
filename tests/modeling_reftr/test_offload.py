"""Offloaded parameters, loaded only for the forward of their module, and parts on several devices."""

import random

import accelerate
import pytest
import torch
from accelerate.hooks import attach_align_device_hook_on_blocks
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from modeling_reftr import RefTRForVisualGrounding, VisualGroundingPipeline
from tests.modeling_reftr.test_inference import shake
from training_reftr.data import GroundingCollator


BACKBONE = {"backbone": "test_resnet", "out_indices": [1, 2, 3, 4]}
CAPTION, PHRASES = "the red circle is left of the star", ["the red circle", "the star"]
PARTS = [
    "model.backbone",
    "model.image_projection",
    "model.image_position_embedding",
    "model.text_backbone",
    "model.text_projection",
    "model.phrase_projection",
    "model.text_position_embeddings",
    "model.token_type_embeddings",
    "model.encoder",
    "model.query_encoder",
    "model.decoder",
    "box_head",
    "mask_head",
]


@pytest.fixture(params=[pytest.param("sine", marks=pytest.mark.slow), "learned"])
def folder(request, make_model, processor, tmp_path):
    settings = {"predict_masks": True, "position_embedding_type": request.param, "backbone_config": BACKBONE}
    shake(make_model(**settings)).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@torch.no_grad()
def ask(model, processor, image) -> list[torch.Tensor]:
    """Return answers about phrases of a caption, and about expressions with precomputed features and cached texts."""
    captions = processor(image, CAPTION, phrases=PHRASES)
    outputs = [model(**captions)]
    features = model.get_image_features(captions["pixel_values"], captions["pixel_mask"])
    with model.cache_text():
        outputs += [model(image_features=features, **processor(text=["the star", "a square"])) for _ in range(2)]
    return [values for output in outputs for values in (output.pred_boxes, output.pred_masks)]


def on_disk(*parts: str) -> dict:
    """Return a device map with some parts on disk and the rest of the model on the CPU."""
    return {"model.level_embedding": "cpu"} | {part: "disk" if part in parts else "cpu" for part in PARTS}


def load(folder, tmp_path, **settings):
    return RefTRForVisualGrounding.from_pretrained(folder, offload_folder=tmp_path / "offload", **settings).eval()


@pytest.mark.filterwarnings("ignore:The following device_map keys")  # it belongs to a parameter without a module
def test_offloaded_model_gives_same_answers(folder, processor, shapes, tmp_path):
    image = shapes["test"][0]["image"]
    plain = RefTRForVisualGrounding.from_pretrained(folder).eval()
    assert len(PARTS) == sum(1 for _ in plain.model.children()) + 2
    expected = ask(plain, processor, image)
    grounded = VisualGroundingPipeline(plain, processor=processor)(image, text=CAPTION, phrases=PHRASES)

    maps = {"even": on_disk(*PARTS[::2]), "odd": on_disk(*PARTS[1::2]), "all": {"": "disk"}}
    variants = {name: lambda name=name: load(folder, tmp_path, device_map=maps[name]) for name in maps}
    variants["auto"] = lambda: load(folder, tmp_path, device_map="auto", max_memory={"cpu": "1500KB"})
    variants["cpu_offload"] = lambda: accelerate.cpu_offload(load(folder, tmp_path), execution_device="cpu")
    variants["disk_offload"] = lambda: accelerate.disk_offload(
        load(folder, tmp_path), tmp_path / "other", execution_device="cpu"
    )
    device_counts, num_grounded = set(), 0
    for name, make in variants.items():
        model = make()
        assert any(parameter.is_meta for parameter in model.parameters()), name
        device_counts.add(len(set(getattr(model, "hf_device_map", {}).values())))
        for answer, value in zip(ask(model, processor, image), expected, strict=True):
            torch.testing.assert_close(answer, value, atol=1e-5, rtol=0, msg=name)
        # library pipelines place inputs on the device of the first part in the map, which must not be the disk
        if next(iter(getattr(model, "hf_device_map", {"": "disk"}).values())) == "cpu":
            ground = VisualGroundingPipeline(model, processor=processor)
            for answer, value in zip(ground(image, text=CAPTION, phrases=PHRASES), grounded, strict=True):
                assert answer["box"] == pytest.approx(value["box"], abs=1e-3), name
            num_grounded += 1
    assert num_grounded == 3
    assert device_counts == {0, 1, 2}  # no map, everything on disk, and parts on both


def test_fused_copy_must_be_made_before_offloading(folder, processor, shapes, tmp_path):
    image = shapes["test"][0]["image"]
    with pytest.raises(ValueError, match=r"offloaded.*call fused_copy\(\), and offload the copy"):
        load(folder, tmp_path, device_map={"": "disk"}).fused_copy()
    fused = load(folder, tmp_path, device_map={"": "cpu"}).fused_copy()
    expected = ask(fused, processor, image)
    offloaded = accelerate.cpu_offload(fused, execution_device="cpu")
    for answer, value in zip(ask(offloaded, processor, image), expected, strict=True):
        torch.testing.assert_close(answer, value, atol=1e-5, rtol=0)


def move_parameters(module: nn.Module, device: str):
    """Move the tensors of a module to a device, also fake tensors, which `Module.to` does not move."""
    for child in module.modules():
        for name, parameter in child.named_parameters(recurse=False):
            setattr(child, name, nn.Parameter(parameter.detach().to(device)))
        for name, buffer in child.named_buffers(recurse=False):
            setattr(child, name, buffer.to(device))


def blocks_of(module: nn.Module, undivided: set[str], prefix: str = "") -> list[str]:
    """Return the smallest parts that a device map may separate."""
    children = list(module.named_children())
    if type(module).__name__ in undivided or not children:
        return [prefix] if any(True for _ in module.parameters()) else []
    return [
        block
        for name, child in children
        for block in blocks_of(child, undivided, f"{prefix}.{name}".removeprefix("."))
    ]


@pytest.mark.parametrize(
    ("position_embedding_type", "seed"),
    [
        ("learned", None),  # every part on another device than the inputs
        *(pytest.param(kind, seed, marks=pytest.mark.slow) for kind in ("sine", "learned") for seed in range(8)),
    ],
)
def test_model_runs_with_parts_on_two_devices(make_model, processor, shapes, position_embedding_type, seed):
    """Use two fake GPUs: tensors have sizes and devices but no values; mixed devices are errors."""
    batch = GroundingCollator(processor, with_targets=False, with_masks=True)([shapes["test"][0]])
    question = dict(processor(shapes["test"][0]["image"], ["the star", "the red circle"]))
    rng = random.Random(seed)

    def to_fake(value):
        return torch.zeros(value.shape, dtype=value.dtype, device="cuda:0") if torch.is_tensor(value) else value

    with FakeTensorMode(), torch.no_grad():
        model = make_model(predict_masks=True, position_embedding_type=position_embedding_type)
        blocks = blocks_of(model, model._no_split_modules)
        assert len(blocks) > 20
        devices = {block: "cuda:1" if seed is None else f"cuda:{rng.randrange(2)}" for block in blocks}
        assert "model.backbone" in blocks  # not divided: its forward adds outputs of several blocks
        model.model.level_embedding = nn.Parameter(model.model.level_embedding.to("cuda:0"))
        for block, device in devices.items():
            move_parameters(model.get_submodule(block), device)
        attach_align_device_hook_on_blocks(
            model, execution_device={**devices, "": "cuda:0"}, offload=dict.fromkeys(devices, False)
        )
        outputs = model(**tree_map(to_fake, batch))
        assert outputs.pred_boxes.device == outputs.pred_masks.device == outputs.loss.device == torch.device("cuda:0")
        phrases = [to_fake(batch[name]) for name in ("phrase_input_ids", "phrase_attention_mask")]
        states, indices = model.model.encode_phrases(*phrases, outputs.phrase_mask, to_fake(batch["phrase_index"]))
        assert states.device == indices.device  # fake tensors do not check the device of their indices
        images = {name: to_fake(question.pop(name)) for name in ("pixel_values", "pixel_mask")}
        for encoder in (model, model.model):
            model(image_features=encoder.get_image_features(**images), **tree_map(to_fake, question))
