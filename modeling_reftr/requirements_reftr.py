"""
Require the release of transformers that this code is written for. Every module that the Auto classes may import first
imports this one before it imports anything that older releases lack.
"""

from transformers.utils.versions import require_version


# what a saved model requires, in the oldest releases that work; setup.cfg declares the same ones
MINIMUM_VERSIONS = {
    "python": "3.11",
    "torch": "2.6",
    "torchvision": "0.21",
    "transformers": "5.23",
    "timm": "1.0.20",
    "pycocotools": "2.0.8",
}
MINIMUM_TRANSFORMERS = MINIMUM_VERSIONS["transformers"]

require_version(
    f"transformers>={MINIMUM_TRANSFORMERS}",
    f"RefTR does not run on older releases: pip install --upgrade 'transformers>={MINIMUM_TRANSFORMERS},<6'",
)
