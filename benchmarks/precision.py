"""
Measure the accuracy of a trained model at lower precision: its metrics on the test split, and the IoU of its boxes
with those of float32, in float32, in bfloat16, with 8-bit weights and activations in its linear layers, and with
images padded to a multiple of 96 pixels.

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
METRICS = ("accuracy@0.5", "mean_iou", "mask_mean_iou")


def main():
    parser = argparse.ArgumentParser(description="Measure the accuracy of a trained model at lower precision.")
    parser.add_argument("--model", required=True, help="folder of a trained model")
    parser.add_argument("--recipe", required=True, help="the recipe of its training, for the dataset")
    parser.add_argument("--output", help="JSON file to write the rows to")
    options = parser.parse_args()
    args = parse_arguments([options.recipe, "--eval_only", "true"])
    split, accelerator = split_of(load_rows(args.data), args.data.test_splits), Accelerator(cpu=True)
    rows, reference = [], None
    for name, (settings, size_divisor) in PRECISIONS.items():
        model = RefTRForVisualGrounding.from_pretrained(options.model, **settings).eval()
        processor = RefTRProcessor.from_pretrained(options.model)
        processor.image_processor.size_divisor = size_divisor
        records = evaluate(model, processor, split, args, accelerator, name)
        boxes = torch.tensor([record["pred_box"] for record in records])
        reference = boxes if reference is None else reference
        metrics = summarize(records)
        rows.append({"name": name, **{metric: round(metrics[metric], 4) for metric in METRICS}})
        rows[-1]["iou_with_float32"] = round(box_iou(boxes, reference).diagonal().mean().item(), 4)
        sys.stdout.write(json.dumps(rows[-1]) + "\n")
    if options.output:
        result = {"model": Path(options.recipe).stem, "phrases": metrics["num_phrases"], "rows": rows}
        Path(options.output).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
