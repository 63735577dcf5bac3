"""
Measure the time to load a saved full-size RefTR, compared with loading a BERT of the size of RefTR without its image
backbone, and that backbone, and importing `modeling_reftr`, compared with importing a DETR from transformers:
`python benchmarks/loading.py`.

All models have random weights and are loaded by the library, alternating within one run, without a network. Compare
the ratio of the shortest times, not the absolute times.
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from transformers import BertConfig, BertModel, PreTrainedModel, TimmBackbone

from modeling_reftr import RefTRConfig, RefTRForVisualGrounding


ROUNDS = 15


def seconds(action) -> float:
    """Measure an action once."""
    re.purge()  # the library compiles a pattern per weight name, which a new process has not cached yet
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def import_seconds(statement: str) -> float:
    """Measure an import statement in a new process."""
    code = f"import time; start = time.perf_counter(); {statement}; print(time.perf_counter() - start)"
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def main():
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        model = RefTRForVisualGrounding(RefTRConfig())
        model.save_pretrained(folder / "reftr")
        # 15 layers are closest in size: 131 million parameters; RefTR has 128 million without its image backbone
        BertModel(BertConfig(num_hidden_layers=15)).save_pretrained(folder / "bert")
        model.model.backbone.save_pretrained(folder / "backbone")
        loads = {
            "RefTR": lambda: RefTRForVisualGrounding.from_pretrained(folder / "reftr"),
            "BERT": lambda: BertModel.from_pretrained(folder / "bert"),
            # TimmBackbone.from_pretrained only accepts Hub ids
            "backbone": lambda: PreTrainedModel.from_pretrained.__func__(TimmBackbone, folder / "backbone"),
        }
        times = {name: [] for name in loads}
        for _ in range(ROUNDS):
            for name, load in loads.items():
                times[name].append(seconds(load))
    shortest = {name: min(values) for name, values in times.items()}
    ratio = shortest["RefTR"] / (shortest["BERT"] + shortest["backbone"])
    # transformers alone imports no torch; a model of it does, as this package does
    statements = ("from transformers import DetrForObjectDetection, DetrImageProcessor", "import modeling_reftr")
    imports = {statement: [] for statement in statements}
    for _ in range(ROUNDS):
        for statement in statements:
            imports[statement].append(import_seconds(statement))
    detr, reftr = (min(imports[statement]) for statement in statements)
    result = {
        "seconds": {name: round(value, 3) for name, value in shortest.items()},
        "RefTR / (BERT + backbone), goal: under 1.5": round(ratio, 3),
        "import": {"DETR": round(detr, 3), "RefTR": round(reftr, 3)},
        "import, RefTR - DETR, goal: under 0.3": round(reftr - detr, 3),
    }
    sys.stdout.write(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
