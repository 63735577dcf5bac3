"""
How well probabilities say whether phrases refer to something in the image, as a module of `evaluate`. This file works
alone: it imports `evaluate`, `datasets` and `numpy` only.
"""

import math
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

import datasets
import evaluate
import numpy as np


DESCRIPTION = """
AUROC, average precision, calibration (expected calibration error, reliability), risk and coverage, and N-acc at
T-acc 0.95 of one probability of presence per phrase.
"""
INPUTS = """
Args:
    predictions: for each phrase the probability, 0 to 1, that what it refers to is in the image.
    references: for each phrase whether it is: booleans, or zeros and ones. For the calibration of answers, give the
        probability that an answer is right and whether it is.
Returns:
    auroc: probability that a present phrase has a higher prediction than an absent one; ties count half
    average_precision: mean precision over the recalls of all thresholds, without interpolation
    expected_calibration_error: mean of |share_right - mean_confidence| over 15 bins of equal width, weighted by count
    n_acc@t_acc_0.95, threshold@t_acc_0.95: the highest threshold at which at least 0.95 of the present phrases are
        answered, that is, predictions >= threshold; and the share of the absent ones that are not answered there
    risk_coverage: for coverage 0.05 to 1, the share of phrases answered, highest predictions first, the risk: the
        share of absent ones among them
    risk_coverage_area: mean risk over all numbers of answered phrases
    reliability: for each bin its bounds, count, mean_confidence (mean prediction) and share_right (share of present
        phrases)
    num_present, num_phrases
    Equal predictions count as the mean over all their orders. Values of nothing are 0.
Raises:
    ValueError: if a prediction is not a number from 0 to 1, or a reference is not a boolean.
Example:

    >>> metric = evaluate.load("metrics/grounding_presence")
    >>> metric.compute(predictions=[0.9, 0.6, 0.2], references=[True, False, True])["auroc"]
    0.5
"""
CITATION = """
@inproceedings{guo2017calibration,
  title={On Calibration of Modern Neural Networks},
  author={Guo, Chuan and Pleiss, Geoff and Sun, Yu and Weinberger, Kilian Q.},
  booktitle={ICML},
  year={2017}
}
@inproceedings{geifman2017selective,
  title={Selective Classification for Deep Neural Networks},
  author={Geifman, Yonatan and El-Yaniv, Ran},
  booktitle={NeurIPS},
  year={2017}
}
"""
NUM_BINS = 15
MIN_T_ACC = 0.95
COVERAGES = tuple(step / 20 for step in range(1, 21))

QUOTED = reprlib.Repr()  # in messages, which lists that hold each other would fill without end
QUOTED.maxlevel = 2
QUOTED.repr_instance = lambda value, level: (
    repr(value) if value is None or isinstance(value, (bool, float)) else f"<{type(value).__name__}>"
)


def quote(value: Any) -> str:
    """Return a value as `repr` writes it, shortened: a few entries of lists in lists, and arrays by their type."""
    try:
        return QUOTED.repr(value)
    except ValueError:  # Python writes no number of more than 4300 digits
        return f"<{type(value).__name__}>"


def mean(values: Iterable[float]) -> float:
    """Return the mean, 0 of nothing. Sums are exactly rounded, so that no order of the values changes a bit."""
    values = list(values)
    return math.fsum(values) / len(values) if values else 0.0


def entries(values: Any, expectation: str) -> list:
    """
    Return a sequence as a list: a list, tuple, array, Series, column of a dataset or a dataset of torch.

    Raises:
        ValueError: if it is a text, a mapping, a table or has no length.
    """
    is_other = isinstance(values, (str, bytes, Mapping)) or hasattr(values, "columns")
    if (
        is_other
        or not hasattr(values, "__len__")
        or not hasattr(values, "__getitem__")
        or getattr(values, "ndim", 1) < 1
    ):
        raise ValueError(f"{expectation}, got {quote(values)}.")
    if hasattr(values, "__iter__"):
        return list(values)
    return [values[index] for index in range(len(values))]  # a dataset of torch


class PresenceMetrics:
    """
    Presence of phrases: how well a probability tells those that refer to something from those that do not.

    Example:

    ```python
    >>> from training_reftr.metrics import PresenceMetrics

    >>> metrics = PresenceMetrics()
    >>> metrics.update([0.9, 0.8, 0.3], [True, True, False])
    >>> metrics.update([0.6], [False])
    >>> values = metrics.compute()
    >>> values["auroc"], values["n_acc@t_acc_0.95"], values["threshold@t_acc_0.95"]
    (1.0, 1.0, 0.8)

    ```"""

    def __init__(self) -> None:
        self.probabilities = []
        self.truths = []

    def update(self, probabilities: Any, truths: Any) -> None:
        """Add phrases by their probability of presence and by whether they are present, see `pair_presences`."""
        probabilities, truths = pair_presences(probabilities, truths)
        self.probabilities.extend(probabilities)
        self.truths.extend(truths)

    def compute(self) -> dict[str, Any]:
        """Return the metrics that `INPUTS` lists."""
        probabilities, truths = np.array(self.probabilities, dtype=np.float64), np.array(self.truths, dtype=bool)
        bins = reliability(probabilities, truths)
        error = math.fsum(row["count"] * abs(row["share_right"] - row["mean_confidence"]) for row in bins)
        return {
            **rank_metrics(probabilities, truths),
            "expected_calibration_error": error / max(len(truths), 1),
            "reliability": bins,
            "num_present": int(truths.sum()),
            "num_phrases": len(truths),
        }


def reliability(probabilities: np.ndarray, truths: np.ndarray) -> list[dict[str, Any]]:
    """
    Return `NUM_BINS` bins of equal width, each with the `count`, `mean_confidence` and `share_right` of the
    probabilities (phrases,) in it. A bin contains its upper bound; only the first one contains its lower bound.
    """
    edges = np.arange(NUM_BINS + 1) / NUM_BINS
    indices = np.searchsorted(edges[1:-1], probabilities)
    return [
        {
            "bin": edges[index : index + 2].tolist(),
            "count": int((indices == index).sum()),
            "mean_confidence": mean(probabilities[indices == index].tolist()),
            "share_right": mean(truths[indices == index].tolist()),
        }
        for index in range(NUM_BINS)
    ]


def rank_metrics(probabilities: np.ndarray, truths: np.ndarray) -> dict[str, Any]:
    """Return the metrics that depend on the order of probabilities (phrases,) only, see `INPUTS`."""
    values, groups = np.unique(-probabilities, return_inverse=True)  # from the highest on, equal ones together
    present = np.bincount(groups[truths], minlength=len(values))
    absent = np.bincount(groups[~truths], minlength=len(values))
    num_present, num_absent, number = int(present.sum()), int(absent.sum()), len(truths)
    answered_present, answered_absent = present.cumsum(), absent.cumsum()
    answered = answered_present + answered_absent

    lower_absent = num_absent - answered_absent + absent / 2
    auroc = float((present * lower_absent).sum()) / max(num_present * num_absent, 1)
    precision = math.fsum(present * answered_present / answered) / max(num_present, 1)

    def risks(counts: Iterable[float]) -> list[float]:
        errors = np.interp(counts, [0, *answered], [0, *answered_absent])
        return (errors / counts).tolist()

    at_least = (answered_present / max(num_present, 1) >= MIN_T_ACC).nonzero()[0]
    n_acc, threshold = 0.0, 0.0
    if len(at_least):
        n_acc = (num_absent - int(answered_absent[at_least[0]])) / max(num_absent, 1)
        threshold = -float(values[at_least[0]])
    return {
        "auroc": auroc,
        "average_precision": precision,
        "n_acc@t_acc_0.95": n_acc,
        "threshold@t_acc_0.95": threshold,
        "risk_coverage_area": mean(risks(np.arange(1, number + 1))),
        "risk_coverage": [
            {"coverage": coverage, "risk": risk}
            for coverage, risk in zip(COVERAGES, risks(np.multiply(COVERAGES, max(number, 1))), strict=True)
        ],
    }


def to_number(value: Any) -> float:
    """Return a number as a float, NaN for everything else."""
    try:
        return math.nan if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # torch raises the last for several numbers
        return math.nan


def pair_presences(probabilities: Any, truths: Any) -> tuple[list[float], list[bool]]:
    """
    Return probabilities as floats and truths as booleans.

    Raises:
        ValueError: if one is not that, or their numbers differ.
    """
    probabilities = entries(probabilities, "predictions must be a sequence of probabilities")
    truths = entries(truths, "references must be a sequence of booleans")
    if len(probabilities) != len(truths):
        raise ValueError(
            f"predictions and references must have the same length, got {len(probabilities)} and {len(truths)}."
        )
    for index, value in enumerate(probabilities):
        if not 0 <= to_number(value) <= 1:
            raise ValueError(f"predictions[{index}] must be a probability from 0 to 1, got {quote(value)}.")
    for index, value in enumerate(truths):
        if to_number(value) not in (0, 1):
            raise ValueError(f"references[{index}] must be True or False, got {quote(value)}.")
    return [to_number(value) for value in probabilities], [to_number(value) == 1 for value in truths]


class GroundingPresence(evaluate.Metric):
    """Module of `evaluate` for probabilities of presence, see `DESCRIPTION` and `INPUTS`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("bool")}
            ),
        )

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Add phrases by their probability of presence and by whether they are present, see `pair_presences`."""
        predictions, references = pair_presences(predictions, references)
        super().add_batch(predictions=predictions, references=references, **kwargs)

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Add one phrase by its probability of presence and by whether it is present."""
        self.add_batch(predictions=[prediction], references=[reference], **kwargs)

    def _compute(self, predictions: list, references: list) -> dict[str, Any]:
        metrics = PresenceMetrics()
        metrics.update(predictions, references)
        return metrics.compute()
