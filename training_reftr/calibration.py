"""
Fit the temperature and the threshold of presence to the validation split. `calibrate` is a collective: all processes
call it.
"""

import logging
import math
from collections.abc import Iterable

import datasets
import numpy as np
from accelerate import Accelerator
from scipy.optimize import minimize_scalar

from data_scripts.atomic_files import write_file
from modeling_reftr import RefTRForVisualGrounding, RefTRProcessor
from training_reftr.checkpoints import on_main_process
from training_reftr.evaluation import evaluate
from training_reftr.generalized import best_score, is_best_right, is_exact, targets_in
from training_reftr.settings import TrainingSettings
from training_reftr.sources import split_of


logger = logging.getLogger(__name__)

TEMPERATURES = (0.05, 20.0)
CERTAIN = 1e-7  # scores closer to 0 or 1 than this count as this


def calibrate(
    model: RefTRForVisualGrounding,
    processor: RefTRProcessor,
    rows: dict[str, datasets.Dataset],
    settings: TrainingSettings,
    accelerator: Accelerator,
) -> None:
    """
    Fit `presence_temperature` and `presence_threshold` to the validation split, set them in the model's configuration,
    and write it into the folder of the run. A collective.

    Args:
        model ([`RefTRForVisualGrounding`]): the best model of the run.
        processor ([`RefTRProcessor`]): of the model.
        rows (`dict[str, datasets.Dataset]`): by split.
        settings ([`TrainingSettings`]): of the run.
        accelerator (`Accelerator`): of the run.
    """
    config, split = model.config, settings.data.validation_split
    config.presence_temperature, config.presence_threshold = 1.0, 0.5
    records = evaluate(model, processor, split_of(rows, split), settings, accelerator, split)
    config.presence_temperature = fit_temperature(records)
    scaled = []
    for record in records:
        scores = [scale_score(score, config.presence_temperature) for score in record["query_scores"]]
        scaled.append({**record, "query_scores": scores})
    config.presence_threshold = fit_threshold(scaled)
    logger.info(
        f"Presence, fitted to {split}: temperature {config.presence_temperature:.3f}, threshold "
        f"{config.presence_threshold:.3f}."
    )
    with on_main_process(accelerator, "The configuration was not written"):
        if accelerator.is_main_process:
            write_file(settings.checkpoints.folder.config, config.to_json_string(use_diff=True))


def fit_temperature(records: Iterable[dict]) -> float:
    """
    Return the temperature with which the highest scores of phrases are the most likely probabilities that their boxes
    are right (Guo et al., ICML 2017, section 4.2).

    Args:
        records (`Iterable[dict]`): see `evaluate`, of a model whose temperature is 1.

    Returns:
        `float`: within `TEMPERATURES`; 1 if all boxes are right, or none is.
    """
    answered = [record for record in records if record["query_scores"]]
    logits = np.array([logit(best_score(record)) for record in answered])
    is_right = np.array([is_best_right(record) for record in answered], dtype=bool)
    if is_right.all() or not is_right.any():
        return 1.0
    signed = np.where(is_right, logits, -logits)

    def negative_log_likelihood(log_temperature: float) -> float:
        return float(np.logaddexp(0, -signed / math.exp(log_temperature)).mean())

    bounds = tuple(math.log(temperature) for temperature in TEMPERATURES)
    return math.exp(minimize_scalar(negative_log_likelihood, bounds=bounds, method="bounded").x)


def logit(score: float) -> float:
    """Return the logit of a probability, which is kept from 0 and 1."""
    score = min(max(score, CERTAIN), 1 - CERTAIN)
    return math.log(score / (1 - score))


def scale_score(score: float, temperature: float) -> float:
    """
    Return the score that a temperature makes of one.

    Example:

    ```python
    >>> from training_reftr.calibration import scale_score

    >>> [round(scale_score(0.9, temperature), 2) for temperature in (1, 2, 1000)]
    [0.9, 0.75, 0.5]

    ```"""
    return 1 / (1 + math.exp(-logit(score) / temperature))


def fit_threshold(records: Iterable[dict]) -> float:
    """
    Return the threshold with which the most phrases are answered with exactly their targets (`pr_f1_iou@0.5`): the
    middle of the widest range of the best ones.

    Args:
        records (`Iterable[dict]`): see `evaluate`.

    Example:

    ```python
    >>> from training_reftr.calibration import fit_threshold

    >>> box = [0.0, 0.0, 8.0, 8.0]
    >>> right = {"targets": [{"box": box}], "query_boxes": [box], "query_scores": [0.9]}
    >>> nothing = {"targets": [], "query_boxes": [box], "query_scores": [0.3]}
    >>> round(fit_threshold([right, nothing]), 2)
    0.6

    ```"""
    ranges = [found for found in map(exact_range, records) if found is not None]
    if not ranges:
        return 0.5
    bounds = np.unique([0.0, 1.0, *(bound for found in ranges for bound in found)])
    starts, ends = (np.sort([found[side] for found in ranges]) for side in (0, 1))
    # between two bounds, as many phrases are exact as ranges have begun and not ended
    counts = np.searchsorted(starts, bounds[:-1], side="right") - np.searchsorted(ends, bounds[:-1], side="right")
    best = np.flatnonzero(counts == counts.max())
    widest = best[np.diff(bounds)[best].argmax()]
    return float(bounds[widest] + bounds[widest + 1]) / 2


def exact_range(record: dict) -> tuple[float, float] | None:
    """
    Return the thresholds [low, high) with which the answers of a record are exactly its targets; None if no threshold
    achieves that.
    """
    number, bounds = len(targets_in(record)), [1.0, *record["query_scores"], 0.0]
    if number + 2 > len(bounds):
        return None
    high, low = bounds[number : number + 2]
    return (low, high) if low < high and is_exact(record, low) else None
