"""
What coarser numbers cost: a trained model's figures on its test split, and how its boxes overlap with those of
float32, in float32, in bfloat16, with weights and activations of eight bits in its linear layers, and with pictures
padded to a multiple of 96 pixels.

    python benchmarks/precision.py --model runs/shapes_small --recipe recipes/shapes/small.yaml \
        --output benchmarks/results/precision.json
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torchao.quantization import Int8DynamicActivationInt8WeightConfig
from torchvision.ops import box_iou
from transformers import TorchAoConfig

from modeling_reftr import RefTRForVisualGrounding, RefTRProcessor
from training_reftr.arguments import parse_arguments
from training_reftr.evaluation import evaluate, summarize
from training_reftr.sources import load_rows, split_of


PRECISIONS = {
    "float32": ({"dtype": torch.float32}, None),
    "bfloat16": ({"dtype": torch.bfloat16}, None),
    "int8": ({"quantization_config": TorchAoConfig(Int8DynamicActivationInt8WeightConfig())}, None),
    "float32, padded to 96": ({"dtype": torch.float32}, 96),
}
FIGURES = ("accuracy@0.5", "mean_iou", "mask_mean_iou")


def main():
    parser = argparse.ArgumentParser(description="What coarser numbers cost.")
    parser.add_argument("--model", required=True, help="folder of a trained model")
    parser.add_argument("--recipe", required=True, help="the recipe it was trained by, for its data")
    parser.add_argument("--output", help="where to write the rows as JSON")
    options = parser.parse_args()
    args = parse_arguments([options.recipe, "--eval_only", "true"])
    split, accelerator = split_of(load_rows(args.data), args.data.test_splits), Accelerator(cpu=True)
    rows, exact = [], None
    for name, (settings, size_divisor) in PRECISIONS.items():
        model = RefTRForVisualGrounding.from_pretrained(options.model, **settings).eval()
        processor = RefTRProcessor.from_pretrained(options.model)
        processor.image_processor.size_divisor = size_divisor
        records = evaluate(model, processor, split, args, accelerator, name)
        boxes = torch.tensor([record["pred_box"] for record in records])
        exact = boxes if exact is None else exact
        metrics = summarize(records)
        rows.append({"name": name, **{figure: round(metrics[figure], 4) for figure in FIGURES}})
        rows[-1]["iou_with_float32"] = round(box_iou(boxes, exact).diagonal().mean().item(), 4)
        sys.stdout.write(json.dumps(rows[-1]) + "\n")
    if options.output:
        result = {"model": Path(options.recipe).stem, "phrases": metrics["num_phrases"], "rows": rows}
        Path(options.output).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
