"""
Export a model as one graph that runs without this code:

    reftr export --model runs/demo --output runs/demo-onnx

writes `model.onnx` for ONNX Runtime (`--format dynamo`: a program of `torch.export`), with the processor next to it.
`--phrases` exports for captions with several phrases.
"""

import argparse
import json
import sys

from data_scripts.progress import disable_library_bars
from training_reftr.locating import check_model


def main(argv: list[str] | None = None) -> None:
    """Print the output folder, and how far the graph's outputs are from the model's, as JSON."""
    parser = argparse.ArgumentParser(prog="reftr export", description="Export a model as one graph.")
    parser.add_argument("--model", required=True, help="RefTR folder or Hub id")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument(
        "--format", default="onnx", choices=("onnx", "dynamo"), help="onnx (default), or dynamo: torch.export"
    )
    parser.add_argument("--phrases", action="store_true", help="export for captions with several phrases")
    args = parser.parse_args(argv)
    check_model(args.model)

    from reftr_cli.graph_export import write_graph

    disable_library_bars()
    found = write_graph(args.model, args.output, args.format, args.phrases)
    sys.stdout.write(json.dumps({"output": args.output, "largest_differences": found}) + "\n")
