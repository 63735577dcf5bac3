"""
Require the release of transformers that this code is written for. Every module that the Auto classes may import first
imports this one before it imports anything that older releases lack.
"""

from transformers.utils.versions import require_version


MINIMUM_TRANSFORMERS = "5.23"

require_version(
    f"transformers>={MINIMUM_TRANSFORMERS}",
    f"RefTR does not run on older releases: pip install --upgrade 'transformers>={MINIMUM_TRANSFORMERS},<6'",
)
