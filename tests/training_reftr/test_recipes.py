"""Recipes: values of the published runs, merging of files and command line, and refused settings."""

import os
import re
import subprocess

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.distributed.run import get_args_parser as torchrun_parser

from modeling_reftr import RefTRConfig, RefTRForVisualGrounding
from tests.helpers.tiny import ROOT, TINY_SET
from training_reftr.arguments import parse_arguments
from training_reftr.optimization import build_optimizer, build_scheduler
from training_reftr.recipes import list_recipes
from training_reftr.settings import FIELDS, TrainingSettings


RECIPES = ROOT / "recipes"
NAMES = list_recipes()
DETR = {"r50": "facebook/detr-resnet-50", "r101": "facebook/detr-resnet-101"}
MASKS = {"num_epochs": 40, "lr_drop_epochs": [30], "learning_rate": 1e-5, "mask_head_learning_rate": 1e-4}
REFCOCO = {
    "refcoco": ("refcoco_unc", "val,testA,testB"),
    "refcoco+": ("refcoco+_unc", "val,testA,testB"),
    "refcocog": ("refcocog_umd", "val,test"),
}

# settings of the published runs, typed from the publication
COMMON = {
    "learning_rate": 1e-4,
    "backbone_learning_rate": 1e-5,
    "text_learning_rate": 1e-5,
    "weight_decay": 1e-4,
    "adam_beta2": 0.999,
    "max_grad_norm": 0.1,
    "batch_size": 8,
    "image_size": 640,
    "seed": 42,
    "lr_schedule": "step",
    "warmup_epochs": 0,
    "warmup_steps": 0,
    "num_epochs": 90,
    "lr_drop_epochs": [60],
    "max_text_length": 40,
    "augmentation": "published",
}
FLICKR = {"dataset": "flickr30k_entities", "test_splits": "test", "max_text_length": 90}
REFERIT = {"dataset": "refclef_berkeley", "test_splits": "test", "num_epochs": 90, "lr_drop_epochs": [60]}
VISUAL_GENOME = {
    "dataset": "visual_genome",
    "batch_size": 32,
    "num_epochs": 15,
    "lr_drop_epochs": [6],
    "warmup_epochs": 3,
}
PUBLISHED = {
    "flickr30k/r50": FLICKR
    | {"init_detr": DETR["r50"], "batch_size": 16, "num_epochs": 60, "lr_schedule": "cosine", "warmup_epochs": 5},
    "flickr30k/r50_roberta": FLICKR
    | {
        "init_detr": DETR["r50"],
        "init_text": "FacebookAI/roberta-base",
        "batch_size": 16,
        "num_epochs": 60,
        "lr_drop_epochs": [40],
    },
    "flickr30k/refcoco_r50": {
        "dataset": "flickr30k_entities,refcoco_unc",
        "validation_split": "flickr30k_entities/val",
        "test_splits": "flickr30k_entities/test",
        "init_detr": DETR["r50"],
        "max_text_length": 90,
        "num_epochs": 60,  # no values were published, so these are the defaults of the published script
        "lr_drop_epochs": [40],
    },
}
for backbone in ("r50", "r101"):
    start = {"init_from": f"./runs/visual_genome_{backbone}", "init_detr": None, "init_text": None}
    detr = {"init_detr": DETR[backbone], "init_text": "google-bert/bert-base-uncased", "init_from": None}
    PUBLISHED |= {
        f"flickr30k/{backbone}_pretrained": FLICKR | start | {"num_epochs": 40, "lr_drop_epochs": [30]},
        f"referit/{backbone}": REFERIT | detr,
        f"referit/{backbone}_pretrained": REFERIT | start,
        f"visual_genome/{backbone}": VISUAL_GENOME | detr,
    }
    for name, (dataset, test_splits) in REFCOCO.items():
        splits = {
            "dataset": dataset,
            "train_split": "train",
            "validation_split": "val",
            "test_splits": test_splits,
        }
        PUBLISHED |= {
            f"{name}/{backbone}_boxes": splits | detr,
            f"{name}/{backbone}_masks": splits | MASKS | {"init_from": f"./runs/{name}_{backbone}_boxes"},
            f"{name}/{backbone}_boxes_pretrained": splits | start,
            f"{name}/{backbone}_masks_pretrained": splits
            | MASKS
            | {"init_from": f"./runs/{name}_{backbone}_boxes_pretrained"},
        }

# parameter counts of the published model, by backbones and masks
PARAMETERS = {
    ("resnet50", "bert", False): 151_981_508,
    ("resnet101", "bert", False): 170_921_412,
    ("resnet50", "roberta", False): 167_144_900,
    ("resnet50", "bert", True): 155_417_181,
    ("resnet101", "bert", True): 174_357_085,
}
DECODER_LAYER = 1_578_752  # two attentions of 4 x (256 x 256 + 256), 256 -> 2048 -> 256, three norms


def recipe_of(name):
    return parse_arguments([str(RECIPES / f"{name}.yaml")])


def test_recipes_cover_every_published_run():
    assert set(NAMES) == PUBLISHED.keys() | {
        "demo",
        "refcoco_m_demo",
        "cutouts/openmoji",
        "shapes/presence",
        "shapes/presence_frozen",
        "shapes/small",
    }


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipe_sets_published_values(name):
    args = recipe_of(name)
    for field, value in (COMMON | PUBLISHED[name]).items():
        assert args.to_flat()[field] == value, field
    assert args.checkpoints.output_dir == f"runs/{name.replace('/', '_')}"
    assert args.data.group_by_image  # published_order.yaml turns it off


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipe_builds_model_of_published_size(name):
    with torch.device("meta"):
        model = RefTRForVisualGrounding(RefTRConfig(**recipe_of(name).initialization.model))
    config = model.config
    with_masks = "masks" in name
    assert (config.predict_masks, config.auxiliary_loss) == (with_masks, not with_masks)
    backbone = "resnet101" if "r101" in name else "resnet50"
    text = "roberta" if "roberta" in name else "bert"
    fewer = 3 if name in ("referit/r50", "referit/r101") else 0
    assert config.decoder_layers == 6 - fewer
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == PARAMETERS[backbone, text, with_masks] - fewer * DECODER_LAYER


def recipe_that_writes(output_dir: str) -> str:
    return next(name for name in PUBLISHED if output_dir == f"./runs/{name.replace('/', '_')}")


def test_recipe_starts_from_output_folder_of_another_recipe():
    """Write the start as a relative path, which is never taken for a Hub id."""
    for name in PUBLISHED:
        start = recipe_of(name).initialization.init_from
        if start is not None:
            assert start.startswith("./")
            assert recipe_of(recipe_that_writes(start)).checkpoints.output_dir == start.removeprefix("./")


def test_common_recipes_switch_published_settings():
    switches = [str(RECIPES / "common" / name) for name in ("trainval.yaml", "published_order.yaml")]
    args = parse_arguments([str(RECIPES / "flickr30k/r50.yaml"), *switches])
    assert (args.data.train_split, args.data.validation_split, args.data.test_splits) == ("train+val", "test", "test")
    assert (args.data.group_by_image, args.data.bucket_by_shape) == (False, False)
    assert (args.evaluation.best_metric, args.evaluation.two_step_masks) == ("accuracy@0.5", True)
    assert (args.evaluation.evaluation_batching, args.evaluation.evaluation_batch_size) == ("published", 8)
    ours = recipe_of("flickr30k/r50")
    assert (ours.data.train_split, ours.data.validation_split, ours.data.group_by_image) == ("train", "val", True)
    other = parse_arguments([str(RECIPES / "refcoco/r50_boxes.yaml"), "--dataset", "reftr_refcoco_unc"])
    assert (other.data.dataset, other.data.test_splits) == ("reftr_refcoco_unc", "val,testA,testB")
    other = parse_arguments([str(RECIPES / "visual_genome/r50.yaml"), "--dataset", "resc_vg"])
    assert other.data.dataset_config == {}  # the flags belong to the builder of Visual Genome
    same = parse_arguments([str(RECIPES / "visual_genome/r50.yaml"), "--dataset_config.validation_images", "9"])
    assert same.data.dataset_config == {**recipe_of("visual_genome/r50").data.dataset_config, "validation_images": 9}
    held_out = recipe_of("visual_genome/r50").data.dataset_config["exclude"]
    assert held_out == ["refcoco_unc", "refcoco+_unc", "refcocog_umd"]


# published loaders, typed from the code: maximum text length, and the splits with brightness augmentation
LOADERS = {
    "captions": (90, ("train",)),  # Flickr30k's captions with their phrases
    "expressions": (40, ("train", "train+val", "trainval")),  # ReSC's indexes
    "masks": (40, ("train",)),
    "regions": (40, ("train", "train+val", "trainval")),  # Visual Genome, every split
}


def loader_of(name):
    if name.startswith("visual_genome"):
        return "regions"
    if "masks" in name:
        return "masks"
    # joined with RefCOCO, the published loader reads single phrases of Flickr30k where ours reads captions
    return "captions" if name.startswith("flickr30k") and "refcoco" not in name else "expressions"


@pytest.mark.parametrize("split", ["train", "train+val", "trainval", "val"])
def test_recipe_follows_its_published_loader(split):
    """Augment brightness as published: neither for trainval of Flickr30k nor for masks of any trainval."""
    overlay = [str(RECIPES / "common" / "trainval.yaml")] if split == "train+val" else ["--train_split", split]
    for name in PUBLISHED:
        length, augmented = LOADERS[loader_of(name)]
        args = parse_arguments([str(RECIPES / f"{name}.yaml"), *overlay])
        assert args.data.train_split == split
        is_augmented = split in augmented or loader_of(name) == "regions"
        assert args.data.augmentation == ("published" if is_augmented else "none"), name
        assert args.data.max_text_length == (90 if name == "flickr30k/refcoco_r50" else length), name
        assert args.data.image_size == 640
        chosen = parse_arguments([str(RECIPES / f"{name}.yaml"), *overlay, "--augmentation", "brightness"])
        assert chosen.data.augmentation == "brightness"


def test_custom_datasets_keep_published_augmentation():
    for dataset in ("shapes", "jsonl", "exports/flickr30k_entities", "./refcoco_unc"):
        args = TrainingSettings.from_flat(
            dataset=dataset, train_split="train+validation", model={"predict_masks": True}
        )
        assert args.data.augmentation == "published"
    for dataset in ("reftr_flickr", "flickr30k_entities"):
        assert TrainingSettings.from_flat(dataset=dataset, train_split="trainval").data.augmentation == "none"
    assert (
        TrainingSettings.from_flat(dataset="resc_flickr,resc_unc", train_split="trainval").data.augmentation
        == "published"
    )


@pytest.mark.parametrize("name", NAMES)
def test_print_config_prints_equivalent_recipe(name, tmp_path, capsys):
    argv = [str(RECIPES / f"{name}.yaml"), "--model.dropout", "0.2", "--run_name", "3"]
    with pytest.raises(SystemExit) as end:
        parse_arguments([*argv, "--print_config"])
    assert not end.value.code
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    args = parse_arguments(argv)
    assert parse_arguments([str(tmp_path / "printed.yaml")]) == args
    assert (args.initialization.model["dropout"], args.tracking.run_name) == (0.2, "3")


def test_print_config_prints_only_yaml_on_stdout(run):
    """Print only YAML on stdout, and build no dataset."""
    result = run("train_reftr.py", RECIPES / "referit/r50.yaml", "--print_config", "--model.decoder_layers", "4")
    settings = yaml.safe_load(result.stdout)
    assert settings["model"] == {"decoder_layers": 4}
    assert settings["dataset"] == "refclef_berkeley"
    assert settings.keys() == FIELDS.keys()


def test_help_names_every_setting(capsys):
    with pytest.raises(SystemExit) as end:
        parse_arguments(["--help"])
    assert not end.value.code
    text = capsys.readouterr().out
    for name in FIELDS:
        assert name in re.findall(r"\w+", text)


# inheritance


def write_recipes(folder, **recipes):
    """Write recipes, given by name, to a folder."""
    for name, text in recipes.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


def test_recipe_overrides_inherited_settings(tmp_path):
    (tmp_path / "below").mkdir()
    write_recipes(tmp_path / "below", a="batch_size: 2\nseed: 1\nmodel: {d_model: 32, text_config: {hidden_size: 8}}")
    write_recipes(
        tmp_path,
        b="inherit: below/a.yaml\nbatch_size: 3\nmodel: {decoder_layers: 2, text_config: {num_hidden_layers: 1}}",
        c="inherit: [below/a.yaml]\nseed: 7",
        d="inherit: [c.yaml, b.yaml]\nnum_workers: 1",
    )
    args = parse_arguments([str(tmp_path / "d.yaml"), "--model.text_config.hidden_size", "16"])
    assert (args.optimization.batch_size, args.data.num_workers) == (3, 1)
    assert args.optimization.seed == 7  # b inherits a again, which does not override c
    text_config = {"hidden_size": 16, "num_hidden_layers": 1}
    assert args.initialization.model == {"d_model": 32, "text_config": text_config, "decoder_layers": 2}


def test_later_recipe_on_command_line_overrides_earlier(tmp_path):
    write_recipes(tmp_path, a="batch_size: 2\nseed: 1", b="batch_size: 3")
    args = parse_arguments([str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")])
    assert (args.optimization.batch_size, args.optimization.seed) == (3, 1)


@pytest.mark.parametrize(
    ("recipes", "error", "message"),
    [
        ({"a": "inherit: a.yaml"}, ValueError, r"inherits itself: \S+a\.yaml -> \S+a\.yaml\."),
        (
            {"a": "inherit: b.yaml", "b": "inherit: [c.yaml]", "c": "inherit: a.yaml"},
            ValueError,
            r"inherits itself: \S+a\.yaml -> \S+b\.yaml -> \S+c\.yaml -> \S+a\.yaml\.",
        ),
        (
            {"a": "inherit: none.yaml"},
            OSError,
            r"The recipe '\S+none\.yaml', which \S+a\.yaml inherits, does not exist",
        ),
        ({"a": "inherit: 3"}, ValueError, r"inherit=3 in the recipe '\S+a\.yaml' must be a path or a list of paths"),
        ({"a": "inherit: [1]"}, ValueError, r"inherit=\[1\] in the recipe"),
        ({"a": "inherits: b.yaml"}, ValueError, r"a\.yaml' has no field 'inherits'\. Did you mean 'inherit'\?"),
        (
            {"a": "inherit: b.yaml", "b": "bach_size: 3"},
            ValueError,
            r"b\.yaml' has no field 'bach_size'\. Did you mean 'batch_size'\?",
        ),
        ({"a": "model: {d_modl: 3}"}, ValueError, r"model has no field 'd_modl'\. Did you mean 'd_model'\?"),
        ({"a": "- 1"}, ValueError, "must be a mapping"),
        ({"a": "batch_size: 0"}, ValueError, "batch_size=0 must be at least 1"),
        ({"a": "batch_size: two"}, ValueError, "batch_size='two' must be an integer"),
        ({"a": "batch_size: 1.5"}, ValueError, "batch_size=1.5 must be an integer"),
        ({"a": "batch_size: true"}, ValueError, "batch_size=True must be an integer"),
        ({"a": "dry_run: 1"}, ValueError, "dry_run=1 must be true or false"),
        ({"a": "dataset: [a, b]"}, ValueError, r"dataset=\['a', 'b'\] must be text"),
        ({"a": "model: 3"}, ValueError, "model=3 must be a mapping of names to values"),
        ({"a": "lr_drop_epochs: [1.5]"}, ValueError, r"lr_drop_epochs=\[1.5\] must be a list of integers"),
        ({"a": "lr_drop_epochs: [6, 3]"}, ValueError, r"lr_drop_epochs=\[6, 3\] must be increasing"),
        (
            {"a": "warmup_epochs: 1\nwarmup_steps: 5"},
            ValueError,
            "warmup_epochs=1 and warmup_steps=5 exclude each other",
        ),
        ({"a": "max_text_length: 0"}, ValueError, "max_text_length=0 must be at least 1"),
        ({"a": "a: ["}, ValueError, r"The recipe '\S+a\.yaml' is not YAML"),
    ],
)
def test_invalid_recipe_is_refused(tmp_path, recipes, error, message):
    write_recipes(tmp_path, **recipes)
    with pytest.raises(error, match=message):
        parse_arguments([str(tmp_path / "a.yaml")])


# the command line


def test_command_line_overrides_recipe(recipe):
    args = parse_arguments([str(recipe), "--batch_size", "3", "--learning_rate=5e-4", "--eval_only"])
    assert (args.optimization.batch_size, args.optimization.learning_rate, args.evaluation.eval_only) == (
        3,
        5e-4,
        True,
    )
    assert args.data.dataset_config == TINY_SET
    assert args.initialization.model["d_model"] == 32
    assert parse_arguments([]) == TrainingSettings.from_flat()
    assert parse_arguments(["--model", '{"d_model": 64}']).initialization.model == {"d_model": 64}
    assert parse_arguments([str(recipe), "--model", '{"d_model": 64}']).initialization.model == {
        **args.initialization.model,
        "d_model": 64,
    }


def test_command_line_values_have_yaml_types():
    argv = ["--dataset_config.exclude", '["refcoco_unc"]', "--dataset_config.refcocog_umd.integer_boxes", "true"]
    argv += ["--model.decoder_layers=3", "--model.dropout", "1e-1", "--model.backbone_config.backbone", "resnet101"]
    args = parse_arguments([*argv, "--lr_drop_epochs", "[6, 12]", "--max_grad_norm", "inf", "--seed", "7"])
    assert args.data.dataset_config == {"exclude": ["refcoco_unc"], "refcocog_umd": {"integer_boxes": True}}
    assert args.initialization.model == {
        "decoder_layers": 3,
        "dropout": 0.1,
        "backbone_config": {"backbone": "resnet101"},
    }
    assert (args.schedule.lr_drop_epochs, args.optimization.max_grad_norm, args.optimization.seed) == (
        [6, 12],
        float("inf"),
        7,
    )
    assert parse_arguments(["--lr_drop_epochs", "6"]).schedule.lr_drop_epochs == [6]
    boxes = str(RECIPES / "refcoco/r50_boxes.yaml")
    assert parse_arguments([boxes, "--init_detr", "null"]).initialization.init_detr is None


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--bach_size", "3"], "The command line has no field 'bach_size'. Did you mean 'batch_size'?"),
        (["--model.d_modl", "3"], "model has no field 'd_modl'. Did you mean 'd_model'?"),
        (["--seed.x", "3"], "'seed' has no keys; only dataset_config, stream_weights, model are mappings."),
        (["--output_dir"], "--output_dir requires a value."),
        (["--seed", "1", "2"], "'2' is not a setting; recipes come first"),
        (["--lr_schedule", "linear"], "lr_schedule='linear' must be one of 'step', 'cosine', 'constant'"),
        (["--learning_rate", "nan"], "learning_rate=nan"),
        (["--max_grad_norm", "0"], "max_grad_norm=0.0 must be greater than 0"),
        (["--adam_beta2", "1"], "adam_beta2=1.0 must be at least 0 and less than 1"),
        (["--model", "{"], "--model '{' is not YAML"),
        (["--model", "[1]"], "model=[1] must be a mapping"),
    ],
)
def test_invalid_command_line_is_refused(argv, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_arguments(argv)


def test_missing_recipe_is_named():
    with pytest.raises(OSError, match=r"'nowhere\.yaml' is neither"):
        parse_arguments(["nowhere.yaml"])


def test_unknown_backbone_field_is_refused(recipe, run, tmp_path):
    command = ("train_reftr.py", recipe, "--output_dir", tmp_path, "--model.text_config.hidden_sise", "8")
    result = run(*command, check=False)
    assert result.returncode != 0
    assert "model.text_config has no field 'hidden_sise'. Did you mean 'hidden_size'?" in result.stderr


# contradicting starting weights


def test_init_setting_replaces_inherited_initialization(tmp_path):
    boxes, masks = (str(RECIPES / f"refcoco/r50_{stage}.yaml") for stage in ("boxes", "masks"))
    args = parse_arguments([boxes, "--init_from", "published.pth", "--eval_only"])
    assert (args.initialization.init_from, args.initialization.init_detr, args.initialization.init_text) == (
        "published.pth",
        None,
        None,
    )
    args = parse_arguments([masks, "--init_detr", "detr.pth"])
    assert (args.initialization.init_from, args.initialization.init_detr) == (None, "detr.pth")
    args = parse_arguments([boxes, "--init_backbone", "timm"])
    assert (args.initialization.init_detr, args.initialization.init_backbone) == (None, "timm")
    assert args.initialization.init_text == "google-bert/bert-base-uncased"


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["--init_from", "a", "--init_detr", "b"], "init_from='a' and init_detr='b' contradict each other: a RefTR"),
        (["--init_from", "a", "--init_text", "b"], "init_from='a' and init_text='b' contradict each other: a RefTR"),
        (["--init_detr", "a", "--init_backbone", "b"], "contradict each other: a DETR has the image backbone"),
    ],
)
def test_contradicting_init_settings_are_refused(argv, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        parse_arguments(argv)


# schedules


def factors(num_steps=100, **settings):
    """Return the factor of the learning rate at every step."""
    args = TrainingSettings.from_flat(learning_rate=1.0, **settings)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = build_scheduler(optimizer, args.schedule, steps_per_epoch=10, num_steps=num_steps)
    values = []
    for _ in range(num_steps):
        values.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return values


def test_scheduler_follows_step_cosine_and_constant():
    step = factors(lr_drop_epochs=[6])
    assert (step[0], step[59], step[60], step[99]) == (1, 1, pytest.approx(0.1), pytest.approx(0.1))
    cosine = factors(lr_schedule="cosine", warmup_steps=20)
    assert cosine[:2] == [pytest.approx(1 / 20), pytest.approx(2 / 20)]
    assert cosine[60] == pytest.approx(0.5)
    assert min(cosine[20:]) == pytest.approx(0.01)
    assert factors(lr_schedule="cosine", warmup_epochs=2) == cosine
    assert set(factors(lr_schedule="constant")) == {1}


def test_scheduler_drops_after_warmup_to_a_hundredth_at_least():
    """Follow the schedule of Visual Genome: 3 epochs of warmup, a drop at epoch 6, never below a hundredth."""
    learning_rates = factors(150, lr_drop_epochs=[6], warmup_epochs=3)
    assert learning_rates[:30] == pytest.approx([(step + 1) / 30 for step in range(30)])
    assert set(learning_rates[30:60]) == {1}
    assert learning_rates[60:] == pytest.approx([0.1] * 90)
    assert factors(lr_drop_epochs=[2, 4, 6])[60:] == pytest.approx([0.01] * 40)


def test_optimizer_gives_each_part_its_learning_rate(make_model):
    args = recipe_of("refcoco/r50_masks")
    model = make_model(predict_masks=True)
    learning_rates = {}
    for group in build_optimizer(model, args.optimization).param_groups:
        learning_rates |= {id(parameter): group["lr"] for parameter in group["params"]}
    parts = {name.split(".")[0 if name.startswith("mask_head") else 1]: name for name, _ in model.named_parameters()}
    expected = {"mask_head": 1e-4, "backbone": 1e-5, "text_backbone": 1e-5, "decoder": 1e-5}
    for part, learning_rate in expected.items():
        assert learning_rates[id(model.get_parameter(parts[part]))] == learning_rate, part
    assert len(learning_rates) == sum(parameter.requires_grad for parameter in model.parameters())


# documents


PAGE = (ROOT / "docs" / "recipes.md").read_text()
PUBLISHED_FILES = [
    "flickr30k/RefTR_flickr.sh",
    "flickr30k/RefTR_flickr_roberta.sh",
    "flickr30k/Ref_flickr_pt.sh",
    "flickr30k/Ref_flickr_pt_101.sh",
    "refcoco/RefTR_refcoco.sh",
    "refcoco/RefTR_refcoco_101.sh",
    "refcoco+/RefTR_SEG_refcoco+.sh",
    "refcoco+/RefTR_SEG_refcoco+_101.sh",
    "refcoco+/RefTR_refcoco+.sh",
    "refcoco+/RefTR_refcoco+_101.sh",
    "refcocog/RefTR_SEG_refcocog.sh",
    "refcocog/RefTR_SEG_refcocog_101.sh",
    "refcocog/RefTR_refcocog.sh",
    "refcocog/RefTR_refcocog_101.sh",
    "referit/RefTR_referit.sh",
    "referit/RefTR_referit_101.sh",
    "referit/RefTR_referit_101_PT.sh",
    "referit/RefTR_referit_PT.sh",
]


def test_recipes_page_maps_every_published_file():
    table = PAGE.split("| published | here, in `recipes/` |")[1].split("\n\n")[0]
    rows = [line.split("|")[1:3] for line in table.splitlines()[2:]]
    for file in PUBLISHED_FILES:
        folder, name = file.split("/")
        ((published, ours),) = [row for row in rows if f"`{folder}/" in row[0] and f"{name}`" in row[0]]
        recipes = re.findall(r"`(\S+)\.yaml`", ours)
        names = re.findall(r"([\w+]+)\.sh`", published)
        recipes = recipes if len(names) == 1 else [recipes[names.index(name.removesuffix(".sh"))]]
        for recipe in recipes:
            assert recipe in PUBLISHED
            assert recipe.split("/")[0] == folder
            assert ("r101" in recipe) == ("_101" in name)
            assert ("pretrained" in recipe) == bool(re.search("_pt|_PT|SEG", name))
            assert ("masks" in recipe) == ("SEG" in name) or len(recipes) == 2
    mentioned = set(re.findall(r"`([\w+/]+)\.yaml`", table))
    assert mentioned <= PUBLISHED.keys()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("multi_gpu_bf16", {"distributed_type": "MULTI_GPU"}),
        ("fsdp2", {"distributed_type": "FSDP"}),
        ("deepspeed", {"distributed_type": "DEEPSPEED"}),
    ],
)
def test_accelerate_reads_its_config_files(name, expected):
    path = str(RECIPES / "accelerate" / f"{name}.yaml")
    config = load_config_from_file(path)  # refuses unknown keys
    assert {key: getattr(config, key) for key in expected} == expected
    assert (config.mixed_precision, config.num_processes) == ("bf16", 4)
    argv = ["--config_file", path, "--num_processes", "8", "train_reftr.py"]
    launch, _, _ = _validate_launch_command(launch_command_parser().parse_args(argv))
    assert launch.num_processes == 8
    assert launch.mixed_precision == "bf16"
    if name == "fsdp2":
        environment = prepare_multi_gpu_env(launch)
        assert environment["FSDP_VERSION"] == "2"
        assert environment["FSDP_AUTO_WRAP_POLICY"] == "TRANSFORMER_BASED_WRAP"
        # accelerate accepts unknown keys here and ignores them
        known = vars(launch_command_parser().parse_args(["train_reftr.py"]))
        assert config.fsdp_config.keys() <= known.keys()
    if name == "deepspeed":
        assert (
            config.deepspeed_config["gradient_clipping"] == recipe_of("refcoco/r50_boxes").optimization.max_grad_norm
        )
        assert config.deepspeed_config.keys() <= vars(launch).keys()


@pytest.fixture
def submit(tmp_path):
    """Run slurm.sbatch as SLURM does on the first node, with launchers that print their arguments."""

    def run_batch(*argv, **environment):
        tools = {
            "scontrol": 'printf "node7\\nnode8\\n"',
            "srun": 'while [[ "$1" == --* ]]; do shift; done; exec "$@"',  # the task of this node
            # SLURM signals the launcher before the time limit
            **dict.fromkeys(("torchrun", "accelerate"), 'kill -USR1 $$; printf "%s\\n" "${0##*/}" "$@"'),
        }
        for name, text in tools.items():
            (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
            (tmp_path / name).chmod(0o755)
        slurm = {"SLURM_JOB_ID": "12345", "SLURM_NNODES": "2", "SLURM_NODEID": "1", "SLURM_GPUS_ON_NODE": "4"}
        slurm |= {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_CPUS_PER_TASK": "16"}
        result = subprocess.run(
            ["bash", str(RECIPES / "slurm.sbatch"), *argv],
            env={"PATH": f"{tmp_path}:{os.environ['PATH']}", **slurm, **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout.splitlines()

    return run_batch


def test_slurm_script_starts_one_process_per_gpu(submit):
    argv = [str(RECIPES / "referit/r50.yaml"), "--data_dir", "two words"]
    launcher, *launched = submit(*argv, MASTER_PORT="29501")
    launch = torchrun_parser().parse_args(launched)
    assert launcher == "torchrun"
    assert (launch.nnodes, launch.nproc_per_node, launch.node_rank) == ("2", "4", 1)
    assert (launch.master_addr, launch.master_port) == ("node7", 29501)
    assert launch.training_script_args == [*argv, "--resume", "auto"]
    assert parse_arguments(launch.training_script_args).data.data_dir == "two words"
    launch = torchrun_parser().parse_args(submit(*argv, "--resume=runs/x", GPUS_PER_NODE="2")[1:])
    assert (launch.nproc_per_node, launch.master_port) == ("2", 22345)
    assert launch.training_script_args == [*argv, "--resume=runs/x"]


def test_slurm_script_accepts_accelerate_config(submit):
    path = str(RECIPES / "accelerate" / "fsdp2.yaml")
    launcher, command, *launched = submit(str(RECIPES / "referit/r50.yaml"), ACCELERATE_CONFIG=path)
    launch = launch_command_parser().parse_args(launched)
    assert (launcher, command) == ("accelerate", "launch")
    assert (launch.config_file, launch.num_machines, launch.num_processes) == (path, 2, 8)
    assert (launch.machine_rank, launch.main_process_ip, launch.main_process_port) == (1, "node7", 22345)
    assert launch.training_script_args == [str(RECIPES / "referit/r50.yaml"), "--resume", "auto"]


def test_slurm_script_requests_signal_before_time_limit():
    settings = dict(re.findall(r"#SBATCH --([\w-]+)=(\S+)", (RECIPES / "slurm.sbatch").read_text()))
    assert settings["signal"] == "USR1@300"
    assert settings["ntasks-per-node"] == "1"


def test_recipe_inherits_installed_recipe_by_name(tmp_path):
    (tmp_path / "own.yaml").write_text("inherit: [refcoco/r50_boxes, other.yaml]\nseed: 7\n")
    (tmp_path / "other.yaml").write_text("batch_size: 3\n")
    settings = parse_arguments([str(tmp_path / "own.yaml")])
    assert (settings.data.dataset, settings.optimization.batch_size) == ("refcoco_unc", 3)
    assert settings.optimization.seed == 7
