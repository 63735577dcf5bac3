"""
The model card, made from the files of a model's folder: `config.json` and the weights, `recipe.yaml` of its training
or `origin.json` of its conversion, `metrics.json`, `metrics.jsonl`, images. Nothing here is a collective.
"""

import json
import math
import re
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData
from huggingface_hub import eval_result_entries_to_yaml as to_entries
from safetensors import safe_open

from data_scripts.escaping import for_code, for_markdown
from data_scripts.reading import read_text
from data_scripts.yaml_values import read_yaml
from modeling_reftr.configuration_reftr import RefTRConfig
from modeling_reftr.loading_reftr import naming_files
from modeling_reftr.requirements_reftr import MINIMUM_VERSIONS
from training_reftr.evaluation import default_best_metric
from training_reftr.hub import write_contents
from training_reftr.json_files import read_json, read_json_lines
from training_reftr.published_results import DATASET_NAMES, find_cut, has_coco_images
from training_reftr.report import format_results
from training_reftr.run_folder import RunFolder


MARK = "<!-- written by train_reftr.py from the files beside it; without this line it is left alone -->"
EXAMPLE = """
![Images with the predicted boxes{and_masks} of expressions, and with the annotated boxes dashed](predictions.png)
"""
TEMPLATE = (
    """---
{front_matter}
---

# {title}

This model locates what a text refers to in an image: for an expression, or for every phrase of a caption, it predicts
a bounding box{and_mask} (visual grounding: referring expression {tasks}, phrase grounding).
{example}
It is a RefTR ("[Referring Transformer](https://arxiv.org/abs/2106.03089)", NeurIPS 2021) with {num_parameters} million
parameters, {backbone} for the image and {text_model} for the text.

## Usage

With Python {python} or newer:

```bash
pip install {requirements}
```
{where}
```python
from transformers import pipeline

ground = pipeline("visual-grounding", model={model}, trust_remote_code=True)
answers = ground("photo.jpg", text=[{questions}])
for answer in answers:
    print({printed})
ground.draw("photo.jpg", answers).save("answers.png")
```

{code} Several images, batches, and captions with their phrases are accepted too.

## Results

{results}

## Training

{training}

## Limits

{limits} It works on images and expressions like those it was trained on, and reproduces their errors and biases.

## Licence

{licence}

## Citation

```bibtex
@inproceedings{{muchen2021referring,
  title={{Referring Transformer: A One-step Approach to Multi-task Visual Grounding}},
  author={{Muchen, Li and Leonid, Sigal}},
  booktitle={{Thirty-Fifth Conference on Neural Information Processing Systems}},
  year={{2021}}
}}
```

"""
    + MARK
    + "\n"
)
LIMITS = {
    False: "The model always predicts a box: it gives no confidence, and cannot tell that an object is absent. It "
    "predicts one box{and_one_mask} per phrase, even if the phrase refers to several objects.",
    True: "The model answers a phrase with none, one or several boxes (at most {num_queries}), each with its "
    "probability as `score`; boxes with a score over {threshold:.3f} are answers (`threshold` of the call), as fitted "
    "to the validation split.",
}
# metrics of all phrases of a split in a card's front matter, by their names in metrics.json
METRICS = {
    "accuracy@0.5": "boxes: accuracy at IoU 0.5",
    "mean_iou": "boxes: mean IoU",
    "any_box_recall@1": "boxes: any-box recall@1",
    "mask_mean_iou": "masks: mean IoU at the original size",
    "mask_overall_iou": "masks: overall IoU at the original size",
    "mask_mean_iou_resized": "masks: mean IoU at the resized size",
    "pr_f1_iou@0.5": "none, one or several: Pr@(F1=1, IoU>=0.5)",
    "n_acc": "none, one or several: N-acc",
    "t_acc": "none, one or several: T-acc",
    "mask_giou": "none, one or several: gIoU of masks",
    "mask_ciou": "none, one or several: cIoU of masks",
}
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")  # starts with a user's name: ./runs is a folder
TITLE = "RefTR"  # title of a card that was not pushed, and has no name of its own


def write_card(folder: str | Path, repository: str | None = None) -> Path:
    """
    Write `README.md`, and `.eval_results/` if the dataset has a Hub id, into a model's folder. A card that was written
    or edited by hand stays as it is.

    Args:
        folder (`str` or `Path`): of a saved RefTR.
        repository (`str`, *optional*): see `card_files`.

    Returns:
        `Path`: of the card.

    Raises:
        OSError: if there is no model in the folder.
    """
    folder = Path(folder)
    write_contents(folder, card_files(folder, repository))
    return RunFolder(folder).card


def card_files(folder: str | Path, repository: str | None = None) -> dict[str, bytes]:
    """
    Return the card of a model's folder, and its entries for leaderboards; nothing is written.

    Args:
        folder (`str` or `Path`): of a saved RefTR.
        repository (`str`, *optional*):
            Hub id of the model, for the snippet, the widget and the title. Absent: the card describes the folder that
            it is in, and has no id or address that only a push creates.

    Returns:
        `dict[str, bytes]`: the files by their names in the folder; empty if the existing card was written or edited
        by hand.

    Raises:
        OSError: if there is no model in the folder.
        ValueError: if one of its files is damaged, naming it.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise OSError(f"There is no RefTR in {str(folder)!r}: no config.json.")
    path = RunFolder(folder).card
    if path.exists() and MARK not in path.read_text(encoding="utf-8"):
        return {}
    run = RunFolder(folder)
    with naming_files(folder, [file.name for file in (run.metrics, run.log, run.recipe, run.origin)], {}):
        facts = read_facts(folder)
        files = {path.name: make_card(facts, repository)}
        entries = make_eval_results(facts)
    if entries:
        name = f"{facts['recipe']['hub_dataset'].replace('/', '_')}.yaml"
        files[f".eval_results/{name}"] = yaml.safe_dump(to_entries(entries), sort_keys=False)
    return {name: text.encode("utf-8") for name, text in files.items()}


def read_facts(folder: Path) -> dict:
    """Read the files of a folder into one mapping: "config", "recipe", "origin", "metrics" and so on."""

    run = RunFolder(folder)

    def read(path: Path) -> dict:
        if not path.is_file():
            return {}
        if path.suffix == ".json":
            return read_json(path)
        values = read_yaml(read_text(path), repr(str(path))) or {}
        if not isinstance(values, dict):
            raise ValueError(f"{str(path)!r} is damaged: expected a mapping, found {type(values).__name__}.")
        return values

    num_parameters = 0
    for file in sorted(folder.glob("model*.safetensors")):
        with naming_files(folder, [file.name], {}), safe_open(file, "pt") as weights:
            names = list(weights.keys())
            num_parameters += sum(math.prod(weights.get_slice(name).get_shape()) for name in names)
    config, recipe = RefTRConfig.from_pretrained(folder).to_dict(), read(run.recipe)
    comments = read_text(run.recipe).splitlines() if recipe else []
    metrics = read(run.metrics)
    return {
        "config": config,
        "recipe": recipe,
        # changes of settings when the run was resumed
        "changes": [line.removeprefix("# ") for line in comments if line.startswith("# from step ")],
        "origin": read(run.origin),
        "metrics": metrics,
        "validation": best_validation(
            run.log, recipe.get("validation_split", "validation"), config.get("predict_presence", False)
        ),
        "num_parameters": num_parameters,
        "has_pictures": run.drawn_predictions.is_file(),
        "has_example": "example" in metrics and (folder / metrics["example"]["image"]).is_file(),
    }


def best_validation(path: Path, split: str, predicts_presence: bool = False) -> dict:
    """Return the record of the best validation in a run's metrics.jsonl, by `default_best_metric`."""
    if not path.is_file():
        return {}
    records = [record for _, _, record in read_json_lines(path) if isinstance(record, dict)]
    records = [record for record in records if f"{split}/accuracy@0.5" in record]

    def value_of(record: dict) -> float:
        names = [name.removeprefix(f"{split}/") for name in record]
        return record.get(f"{split}/{default_best_metric(names, predicts_presence)}", 0.0)

    return max(records, key=value_of, default={})


def make_card(facts: dict, repository: str | None = None) -> str:
    """Return the text of a card, front matter included; `facts` are those of `read_facts`."""
    config, metrics = facts["config"], facts["metrics"]
    masks = config.get("predict_masks", False)
    backbone, text_model = config["backbone_config"], config["text_config"]["model_type"]
    texts = metrics["example"]["texts"] if "example" in metrics else ["the red cup", "the cup on the left"]
    values = {
        "front_matter": front_matter(facts, repository).to_yaml(),
        "title": for_markdown(title_of(repository)),
        "model": quoted(repository or "."),
        "tasks": "comprehension and segmentation" if masks else "comprehension",
        "example": EXAMPLE.format(and_masks=" and masks" if masks else "") if facts["has_pictures"] else "",
        "python": MINIMUM_VERSIONS["python"],
        "requirements": " ".join(f'"{requirement}"' for requirement in requirements()),
        "where": "" if repository else "\nIn the folder of this card:\n",
        "code": (
            "The code of this repository is run: pin what you have read with `revision=`."
            if repository
            else "The code in the folder is run."
        ),
        "and_mask": " and a mask" if masks else "",
        "limits": LIMITS[config.get("predict_presence", False)].format(
            and_one_mask=" and one mask" if masks else "",
            num_queries=config.get("num_queries_per_phrase"),
            threshold=config.get("presence_threshold", 0.0),
        ),
        "printed": 'answer["label"], answer["box"]' + (', answer["mask"]' if masks else ""),
        "num_parameters": f"{facts['num_parameters'] / 1e6:.3g}",
        "backbone": for_markdown(backbone.get("backbone") or backbone["model_type"]),
        "text_model": for_markdown(text_model),
        "questions": ", ".join(map(quoted, texts)),
        "training": describe_training(facts),
        "results": describe_evaluation(facts),
        "licence": describe_licence(facts),
    }
    return str(ModelCard(TEMPLATE.format(**values)))


def requirements() -> list[str]:
    """Return the requirements of a saved model as pip takes them."""
    limits = {"transformers": ",<6"}
    names = [name for name in MINIMUM_VERSIONS if name != "python"]
    return [f"{name}>={MINIMUM_VERSIONS[name]}{limits.get(name, '')}" for name in names]


def quoted(text: str) -> str:
    """Return a text as Python and JSON spell it, with escapes for what is invisible."""
    return json.dumps(text, ensure_ascii=not text.isprintable())


def title_of(repository: str | None) -> str:
    """Return the title of a card: the name of the repository, if there is one."""
    return TITLE if repository is None else repository.split("/")[-1]


def front_matter(facts: dict, repository: str | None = None) -> ModelCardData:
    """Return the front matter of a card, which the Hub reads."""
    recipe, metrics = facts["recipe"], facts["metrics"]
    hub_dataset = recipe.get("hub_dataset")
    tags = ["reftr", "visual-grounding", "referring-expression-comprehension", "phrase-grounding"]
    tags += ["referring-image-segmentation"] if facts["config"].get("predict_masks") else []
    starts = [recipe.get(name) for name in ("init_from", "init_detr", "init_text")]
    base_model = [start for start in starts if start and is_hub_id(start)]
    widget = []
    if facts["has_example"] and repository:
        address = f"https://huggingface.co/{repository}/resolve/main/{metrics['example']['image']}"
        widget = [{"src": address, "candidate_labels": ", ".join(metrics["example"]["texts"])}]
    results = [
        EvalResult(
            task_type="zero-shot-object-detection",
            task_name="visual grounding",
            # the name of a folder, because its path reads as a Hub id
            dataset_type=hub_dataset or Path(metrics["dataset"]).name,
            dataset_name=pretty_name(metrics["dataset"]) + suffix_of_part(values),
            dataset_split=split,
            metric_type=metric,
            metric_name=METRICS[metric],
            metric_value=round(values[metric], 5),
        )
        for split, values in metrics.get("splits", {}).items()
        for metric in METRICS
        if metric in values
    ]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="zero-shot-object-detection",
        tags=tags,
        license="mit" if facts["origin"] else "apache-2.0",
        language="en",
        datasets=[hub_dataset] if hub_dataset else None,
        base_model=base_model or None,
        model_name=title_of(repository) if results else None,
        eval_results=results or None,
        **({"widget": widget} if widget else {}),
    )


def suffix_of_part(values: dict) -> str:
    """Return which split the metrics are a part of, for the name of a dataset; empty for a complete split."""
    return f", a part of {values['cut_from']['split']}" if "cut_from" in values else ""


def is_hub_id(start: str) -> bool:
    """Return whether starting weights were named by a Hub id, and are not a folder or a file."""
    is_file = Path(start).suffix in (".pth", ".pt", ".bin", ".safetensors")
    return bool(HUB_ID.fullmatch(start)) and not is_file and not Path(start).exists()


def make_eval_results(facts: dict) -> list[EvalResultEntry]:
    """
    Return the metrics in the format of `.eval_results/` if the recipe names the dataset's Hub id. Leaderboards are of
    complete splits, so parts are left out.
    """
    hub_dataset = facts["recipe"].get("hub_dataset")
    if not hub_dataset:
        return []
    return [
        EvalResultEntry(
            dataset_id=hub_dataset, task_id=f"{split}/{metric}", value=round(values[metric], 5), notes=name
        )
        for split, values in facts["metrics"].get("splits", {}).items()
        for metric, name in METRICS.items()
        if metric in values and "cut_from" not in values
    ]


def pretty_name(dataset: str) -> str:
    """Return the display name of a dataset, or of several joined by commas."""
    titles = {name: title for title, names in DATASET_NAMES.items() for name in names}
    return ", ".join(titles.get(name.strip(), name.strip()) for name in dataset.split(","))


def describe_training(facts: dict) -> str:
    """Describe the data, the starting weights, and which held-out images they may have seen."""
    recipe, origin = facts["recipe"], facts["origin"]
    if origin:
        lines = [
            f"Converted from the published checkpoint {for_code(origin['converted_from'])} (SHA-256 "
            f"{for_code(origin['sha256'])}) of "
            "[the authors' code](https://github.com/ubc-vision/RefTR), and not trained further.",
            *leak_warnings({"dataset": "refcoco_unc", "init_from": origin["converted_from"]}),
        ]
        return "\n\n".join(lines)
    if not recipe:
        return "This folder has no record of its training."
    length = f"{recipe['max_steps']} steps" if recipe["max_steps"] else f"{recipe['num_epochs']} epochs"
    size = f"images of {recipe['image_size']} pixels, " if recipe.get("image_size") else ""
    changes = for_markdown("; ".join(facts["changes"]))
    lines = [
        f"Trained on {for_markdown(pretty_name(recipe['dataset']))} ({for_code(recipe['dataset'])}, split "
        f"{for_code(recipe['train_split'])}) for "
        f"{length}, {size}{recipe['batch_size']} "
        f"{'images' if recipe['group_by_image'] else 'sentences'} per process and step, peak learning rate "
        f"{recipe['learning_rate']:g}; the best checkpoint on the split {for_code(recipe['validation_split'])} was "
        "kept. [recipe.yaml](recipe.yaml) has all settings of `train_reftr.py`.",
        *describe_cuts(recipe),
        f"It was initialized from {describe_start(recipe)}.",
        *([f"Settings were changed during training: {changes}."] if changes else []),
        *leak_warnings(recipe),
    ]
    return "\n\n".join(lines)


def describe_cuts(recipe: dict) -> list[str]:
    """Describe which splits of a run are parts of one that was cut by image."""
    names = ",".join(recipe[name] for name in ("train_split", "validation_split", "test_splits"))
    sentences = []
    for name in dict.fromkeys(name.strip() for name in re.split(r"[,+]", names)):
        if cut := find_cut(recipe["dataset"], name, recipe.get("dataset_config") or {}):
            sentences.append(f"{for_code(name)} is about {100 * cut['share']:g} % of {for_code(cut['split'])}")
    if not sentences:
        return []
    return [
        f"Splits were cut by image, by a hash of its id: {', '.join(sentences)}. Results on a part of a split are not "
        "comparable with published results on the split."
    ]


def describe_start(recipe: dict) -> str:
    """Describe where the initial weights of a run came from, in its order of precedence."""
    if recipe.get("init_from"):
        return f"the RefTR {for_code(recipe['init_from'])}"
    starts = []
    if recipe.get("init_detr"):
        starts.append(f"image backbone and encoder of the DETR {for_code(recipe['init_detr'])}")
    if recipe.get("init_backbone"):
        starts.append(f"the image backbone {for_code(recipe['init_backbone'])}")
    if recipe.get("init_text"):
        starts.append(f"the text encoder {for_code(recipe['init_text'])}")
    return " and ".join(starts) or "random weights"


def leak_warnings(recipe: dict) -> list[str]:
    """Describe which evaluated images the starting weights or the training may have seen."""
    warnings = []
    if has_coco_images(recipe["dataset"]) and (recipe.get("init_detr") or recipe.get("init_from")):
        warnings.append(
            "**Data leakage:** the images of this dataset, held-out ones too, are from COCO's train2014, and a "
            "detector trained on COCO (such as DETR) that the weights come from has seen them, though not their "
            "expressions."
        )
    flags = recipe.get("dataset_config") or {}
    if "visual_genome" in recipe["dataset"] and not (flags.get("exclude") or flags.get("held_out_file")):
        warnings.append(
            "**Data leakage:** this run trained on all images of Visual Genome, and held-out images of RefCOCO, "
            "RefCOCO+ and RefCOCOg are among them: metrics of this model on those datasets, and of models initialized "
            "from it, are too high."
        )
    return warnings


def describe_evaluation(facts: dict) -> str:
    """Return the tables of the report, the best validation if the run is not complete, or how to evaluate."""
    metrics, validation = facts["metrics"], facts["validation"]
    if metrics:
        size, trained_at = metrics.get("image_size"), facts["recipe"].get("image_size")
        at = f", images of {size} pixels" if size and size != trained_at else ""
        return "\n".join([f"On {for_markdown(pretty_name(metrics['dataset']))}{at}:", *format_results(metrics, "###")])
    if validation:
        values = {name.split("/")[1]: value for name, value in validation.items() if "/" in name}
        named = ", ".join(f"{METRICS[name]} {values[name]:.3f}" for name in METRICS if name in values)
        return f"Training is not complete. Best validation so far, at step {validation['step']}: {named}."
    return (
        "Not evaluated yet: `reftr train recipe.yaml --eval_only --output_dir .` in this folder adds its results here."
    )


def describe_licence(facts: dict) -> str:
    """Return the licences of the weights, of the code and of the dataset."""
    if facts["origin"]:
        return "The weights are the authors', under the MIT licence; the code is under Apache-2.0."
    if licenses := facts["metrics"].get("dataset_license"):
        return f"Code and weights: Apache-2.0. Images and annotations of the dataset: {for_markdown(licenses)}."
    return "Apache-2.0. Images and annotations of the training data stay under their authors' licences."
