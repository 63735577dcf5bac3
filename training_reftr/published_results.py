"""
Published results as data, and which of them a model's own results are comparable with. Nothing here is a collective.
"""

from dataclasses import dataclass

from data_scripts.split_parts import name_of_part


# datasets of data_scripts with the images, expressions and splits of a published one. ReSC's index of Flickr30k is
# left out, because it has phrases where the others have captions.
DATASET_NAMES = {
    "RefCOCO (unc)": ("refcoco_unc", "reftr_refcoco_unc", "resc_unc"),
    "RefCOCO+ (unc)": ("refcoco+_unc", "reftr_refcoco+_unc", "resc_unc+"),
    "RefCOCOg (umd)": ("refcocog_umd", "reftr_refcocog_umd", "resc_gref_umd"),
    "Flickr30k Entities": ("flickr30k_entities", "reftr_flickr"),
}
# datasets whose published loader changes the brightness of the split "train" alone: captions with several phrases. So
# does the loader with masks; the loaders of ReSC's indexes do it to "train" and to "trainval", and that of Visual
# Genome always
CAPTION_DATASETS = ("flickr30k_entities", "reftr_flickr")
ALWAYS_AUGMENTED = ("visual_genome", "resc_vg")
# also those without a published result here
REFCOCO_DATASETS = ("refcoco", "reftr_refcoco", "resc_unc", "resc_gref")
COCO_DATASETS = (*REFCOCO_DATASETS, "jxu124/refcoco", "lmms-lab/RefCOCO", "moondream/refcoco-m")
PUBLISHED_DATASETS = (*REFCOCO_DATASETS, "refclef", "resc_", "reftr_", "flickr30k_entities", "visual_genome")
REFTR = "Li & Sigal, Referring Transformer, NeurIPS 2021"


@dataclass(frozen=True)
class PublishedResult:
    """
    One row of a published table.

    Args:
        dataset (`str`): name of the dataset, a key of `DATASET_NAMES`.
        metric (`str`): name of the metric in `metrics.json`.
        percentages (`dict[str, float]`): percent, by split.
        model, backbone, pre_training, source (`str`): the model and the paper.
        size (`str`): what the metric is measured at: the resized image, the original one, or either (boxes).
        confirmed (`bool`): whether the percentages were checked against their source.
    """

    dataset: str
    metric: str
    percentages: dict[str, float]
    backbone: str
    pre_training: str
    model: str = "RefTR"
    source: str = REFTR
    size: str = "either"
    confirmed: bool = True


def _val_a_b(*percentages: float) -> dict[str, float]:
    return dict(zip(("val", "testA", "testB"), percentages, strict=True))


def _val_test(*percentages: float) -> dict[str, float]:
    return dict(zip(("val", "test"), percentages, strict=True))


_PRE_TRAINED = {"backbone": "ResNet-101", "pre_training": "Visual Genome"}
_BOXES = {"metric": "accuracy@0.5", **_PRE_TRAINED}
# the published evaluation compares masks at the size that images are resized to
_MASKS = {"metric": "mask_mean_iou_resized", "size": "resized", **_PRE_TRAINED}
_BOXES_ALONE = {"metric": "accuracy@0.5", "backbone": "ResNet-101", "pre_training": "none", "confirmed": False}
_FLICKR = {"metric": "accuracy@0.5", "pre_training": "none", "confirmed": False}

RESULTS = (
    PublishedResult("RefCOCO (unc)", percentages=_val_a_b(85.65, 88.73, 81.16), **_BOXES),
    PublishedResult("RefCOCO+ (unc)", percentages=_val_a_b(77.55, 82.26, 68.99), **_BOXES),
    PublishedResult("RefCOCOg (umd)", percentages=_val_test(79.25, 80.01), **_BOXES),
    PublishedResult("RefCOCO (unc)", percentages=_val_a_b(74.34, 76.77, 70.87), **_MASKS),
    PublishedResult("RefCOCO+ (unc)", percentages=_val_a_b(66.75, 70.58, 59.40), **_MASKS),
    PublishedResult("RefCOCOg (umd)", percentages=_val_test(66.63, 67.39), **_MASKS),
    PublishedResult("RefCOCO (unc)", percentages=_val_a_b(82.23, 85.59, 76.57), **_BOXES_ALONE),
    PublishedResult("RefCOCO+ (unc)", percentages=_val_a_b(71.58, 75.96, 62.16), **_BOXES_ALONE),
    PublishedResult("RefCOCOg (umd)", percentages=_val_test(69.41, 69.40), **_BOXES_ALONE),
    PublishedResult("Flickr30k Entities", percentages={"test": 78.66}, backbone="ResNet-50", **_FLICKR),
    PublishedResult("Flickr30k Entities", percentages={"test": 81.18}, backbone="ResNet-101", **_FLICKR),
)


def is_augmented_as_published(dataset: str, train_split: str, with_masks: bool) -> bool:
    """
    Return whether the published loader of a dataset changes the brightness of the images of a split.

    Args:
        dataset (`str`): a name of `data_scripts`, or several joined by commas, which the published code reads from
            ReSC's indexes. One of which nothing is published is augmented.
        train_split (`str`): what is trained on; "train+val" is the published "trainval", "train_of_train" a part of
            "train".
        with_masks (`bool`): whether masks are trained.

    Example:

    ```python
    >>> from training_reftr.published_results import is_augmented_as_published

    >>> is_augmented_as_published("flickr30k_entities", "train+val", with_masks=False)
    False
    >>> is_augmented_as_published("refclef_berkeley", "train+val", with_masks=False)
    True

    ```"""
    if dataset in ALWAYS_AUGMENTED or not is_published(dataset):
        return True
    # a part of a split, see `data_scripts.split_parts`, is augmented as the split
    parts = {name.rpartition("_of_")[2] for name in train_split.split("+")}
    if with_masks or dataset in CAPTION_DATASETS:
        return parts == {"train"}
    return parts in ({"train"}, {"trainval"}, {"train", "val"})


def is_published(dataset: str) -> bool:
    """Return whether the published code has a loader for a dataset, or for several joined by commas."""
    # a name with a slash is a folder
    return "/" not in dataset and all(name.strip().startswith(PUBLISHED_DATASETS) for name in dataset.split(","))


def dataset_and_split(dataset: str, split: str) -> tuple[str, str]:
    """Return the dataset and the name of a split; splits of joined datasets are called "dataset/split"."""
    return tuple(split.rsplit("/", 1)) if "/" in split else (dataset, split)


def find_cut(dataset: str, split: str, dataset_config: dict) -> dict | None:
    """
    Return what a part of a split is cut from, see `data_scripts.split_parts`; None for a complete split.

    Args:
        dataset (`str`): a name of `data_scripts`, or several joined by commas.
        split (`str`): one of its splits or parts, "set/part" where several are joined.
        dataset_config (`dict`): flags of the dataset, for several by dataset name.

    Returns:
        `dict`: `split` and `share`.

    Example:

    ```python
    >>> from training_reftr.published_results import find_cut

    >>> find_cut("someone/photos", "test_of_val", {"split_parts": {"val": {"train": 0.8, "test": 0.2}}})
    {'split': 'val', 'share': 0.2}

    ```"""
    flags = flags_of_split(dataset, split, dataset_config)
    part_name = dataset_and_split(dataset, split)[1]
    for name, shares in (flags.get("split_parts") or {}).items():
        for part, share in shares.items():
            if part_name == name_of_part(part, name):
                return {"split": name, "share": share}
    return None


def flags_of_split(dataset: str, split: str, dataset_config: dict) -> dict:
    """Return the flags of the dataset that a split is of; joined datasets have separate flags."""
    return dataset_config.get(dataset_and_split(dataset, split)[0], {}) if "/" in split else dataset_config


def comparable_results(dataset: str, split: str) -> list[PublishedResult]:
    """
    Return the published results on exactly this split of this dataset.

    Args:
        dataset (`str`): a name of `data_scripts`, or several joined by commas.
        split (`str`): a split of it, "set/split" where several are joined.

    Example:

    ```python
    >>> from training_reftr.published_results import comparable_results

    >>> [(result.metric, result.percentages["testA"]) for result in comparable_results("refcoco_unc", "testA")]
    [('accuracy@0.5', 88.73), ('mask_mean_iou_resized', 76.77), ('accuracy@0.5', 85.59)]
    >>> comparable_results("refcoco_google", "val"), comparable_results("refcoco_unc", "train")
    ([], [])

    ```"""
    name, split = dataset_and_split(dataset, split)
    return [result for result in RESULTS if name in DATASET_NAMES[result.dataset] and split in result.percentages]


def has_coco_images(dataset: str) -> bool:
    """Return whether held-out images of a dataset, or of one joined by commas, are from COCO's train2014."""
    return any(name.strip().startswith(COCO_DATASETS) for name in dataset.split(","))
