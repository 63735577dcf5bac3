"""What the documents take for granted, in miniature: a user's folder with the checkout's files, sets and weights."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from transformers import BertConfig, BertForPreTraining, DetrConfig, DetrForObjectDetection

from modeling_reftr import RefTRConfig, RefTRForVisualGrounding, RefTRImageProcessor, RefTRProcessor
from tests.helpers.golden import GOLDEN, load_case, published_state_dict
from tests.helpers.layout_cutouts import make_cutouts
from tests.helpers.layout_flickr30k import make_flickr30k
from tests.helpers.layout_refcoco import make_refcoco
from tests.helpers.layout_reftr_index import make_reftr_index
from tests.helpers.layout_visual_genome import make_visual_genome
from tests.helpers.tiny import ROOT, TINY_MODEL, TINY_SET, TINY_TEXT
from tests.modeling_reftr.test_detr_start import original_layout, randomise


RESNET = {"backbone": "resnet18", "out_indices": [1, 2, 3, 4]}  # the start from DETR requires a ResNet
TEXT = {**TINY_TEXT, "max_position_embeddings": 128}  # for the long captions
PUBLISHED_MODEL = {
    **TINY_MODEL,
    "backbone_config": RESNET,
    "max_text_positions": 128,
    "freeze_backbone_batch_norm": True,
}
# settings that shorten the runs of the documents
SHORT = {"max_steps": 2, "batch_size": 2, "num_workers": 0, "num_pictures": 2, "log_every": 1}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def make_program(path: Path, *argv):
    """Write an executable file that runs `argv`, followed by its own arguments."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\nexec {" ".join(map(str, argv))} "$@"\n')
    path.chmod(0o755)


def make_checkout(folder: Path) -> dict:
    """Link the files of the checkout, with recipes of a few steps, and return the configuration of the demo model."""
    for name in ("train_reftr.py", "metrics", "demo", "benchmarks", "Makefile", "setup.cfg", "pyproject.toml"):
        if (ROOT / name).exists():
            (folder / name).symlink_to(ROOT / name)
    make_program(folder / ".venv" / "bin" / "python", sys.executable)
    make_program(folder / ".venv" / "bin" / "reftr", sys.executable, "-m", "reftr_cli")
    (folder / ".venv" / ".installed").touch()  # the current time, so that make does not install anything

    recipes = folder / "recipes"
    shutil.copytree(ROOT / "recipes", recipes)
    demo = yaml.safe_load((recipes / "demo.yaml").read_text())
    demo |= SHORT | {"dataset_config": TINY_SET, "warmup_steps": 0, "num_epochs": 1}
    (recipes / "demo.yaml").write_text(yaml.safe_dump(demo))
    published = yaml.safe_load((recipes / "common" / "published.yaml").read_text())
    published |= SHORT | {"model": PUBLISHED_MODEL, "image_size": 64}
    (recipes / "common" / "published.yaml").write_text(yaml.safe_dump(published))
    for recipe in recipes.rglob("*.yaml"):  # the datasets have about a dozen images
        text = re.sub(r"^batch_size: .*$", "batch_size: 2", recipe.read_text(), flags=re.MULTILINE)
        recipe.write_text(text.replace("validation_images: 1000", "validation_images: 2"))
    for recipe in (recipes / "shapes").glob("*.yaml"):
        recipe.write_text(re.sub(r"(num_(train|validation)): \d+", r"\1: 20", recipe.read_text()))
    return demo["model"]


def make_sets(folder: Path):
    """Write the published folders, the authors' files, and a user's own images."""
    make_reftr_index(folder / "elsewhere")
    (folder / "data").mkdir()
    for part in (folder / "elsewhere").iterdir():
        (folder / "data" / part.name).symlink_to(part)
    for name in ("refcoco_unc", "refcoco+_unc", "refcocog_umd"):
        make_refcoco(folder / "refer", name)
    make_visual_genome(folder / "visual_genome", (581857, 100, 20, 101, 102))
    make_flickr30k(folder / "flickr30k")
    make_cutouts(folder / "objects")
    (folder / "backgrounds").mkdir()
    (folder / "mine").mkdir()
    for name in ("photo.jpg", "backgrounds/1.jpg", "mine/1.jpg", "mine/2.jpg", "mine/3.jpg"):
        Image.effect_noise((200, 100), 90).convert("RGB").save(folder / name)
    expressions = [{"text": "the red car", "box": [10, 20, 110, 90]}]
    for split, image in (("train", "1.jpg"), ("validation", "2.jpg")):
        line = json.dumps({"image": image, "expressions": expressions})
        (folder / "mine" / f"{split}.jsonl").write_text(line)


def make_weights(folder: Path, tokenizer, demo_model: dict):
    """Write a trained model, a published checkpoint, and initial weights as files and in the Hub's cache."""
    vocabulary = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    processor = RefTRProcessor(RefTRImageProcessor(size={"shortest_edge": 64, "longest_edge": 64}), tokenizer)
    models = {
        "runs/demo": {**demo_model, "text_config": {**demo_model["text_config"], **vocabulary}},
        "reftr-refcoco": {**PUBLISHED_MODEL, "text_config": {**TEXT, **vocabulary}, "predict_masks": True},
    }
    for name, settings in models.items():
        RefTRForVisualGrounding(RefTRConfig(**settings)).save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    torch.save({"model": published_state_dict(load_case("res_bert")[0])}, folder / "refcoco.pth")

    bert = BertForPreTraining(BertConfig(**{**TEXT, **vocabulary}))
    sizes = {"d_model": 32, "encoder_layers": 1, "encoder_ffn_dim": 64, "encoder_attention_heads": 2}
    rest = {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 16, "num_queries": 3}
    backbone = {"backbone": RESNET["backbone"], "use_timm_backbone": True, "use_pretrained_backbone": False}
    detr = randomise(DetrForObjectDetection(DetrConfig(**sizes, **rest, **backbone)))
    torch.save({"model": original_layout(detr)}, folder / "detr-r50-e632da11.pth")
    save_file(timm.create_model(RESNET["backbone"]).state_dict(), folder / "resnet50.safetensors")
    for name, weights in (("google-bert/bert-base-uncased", bert), ("facebook/detr-resnet-50", detr)):
        cached = folder / "hub" / f"models--{name.replace('/', '--')}"
        weights.save_pretrained(cached / "snapshots" / COMMIT)
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text(COMMIT)
    tokenizer.save_pretrained(folder / "hub" / "models--google-bert--bert-base-uncased" / "snapshots" / COMMIT)
    bert.save_pretrained(folder / "bert-base-uncased")
    tokenizer.save_pretrained(folder / "bert-base-uncased")


def make_published_sizes(folder: Path):
    """
    Prepare the document about published weights: the recipe sets no model sizes, and the original DETR file contains
    zeros of the published sizes and one weight that is not used.
    """
    shutil.rmtree(folder / "reftr-refcoco")
    recipe = folder / "recipes" / "common" / "published.yaml"
    recipe.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | {"model": {}}))
    shapes = json.loads((GOLDEN / "full_size_keys.json").read_text())["rec_resnet50_bert"]
    weights = {"query_embed.weight": torch.zeros(100, 256)}
    for key, shape in shapes.items():
        if key.startswith(("img_backbone.0.", "vl_transformer.encoder.")):
            name = key.replace("img_backbone", "backbone").replace("vl_transformer", "transformer")
            weights[name] = torch.from_numpy(np.zeros(shape, np.float32))
    torch.save({"model": weights}, folder / "detr-r50-e632da11.pth")


def make_user_folder(folder: Path, tokenizer) -> dict[str, str]:
    """Write the folder of a user who follows the documents, and return the environment for its commands."""
    demo_model = make_checkout(folder)
    make_sets(folder)
    make_weights(folder, tokenizer, demo_model)
    return environment_of(folder)


def environment_of(folder: Path) -> dict[str, str]:
    """Return the environment of such a folder: `reftr` and `python` on the path, separate caches, no network."""
    path = [folder / ".venv" / "bin", Path(sys.executable).parent, os.environ["PATH"]]
    caches = {"HF_HUB_CACHE": "hub", "HF_DATASETS_CACHE": "sets", "HF_MODULES_CACHE": "modules"}
    return {
        **os.environ,
        **{name: str(folder / cache) for name, cache in caches.items()},
        "PATH": os.pathsep.join(map(str, path)),
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
