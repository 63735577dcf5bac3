"""A resume with one changed setting is refused without touching the run, or applied and recorded."""

import hashlib
import json
import logging
import shutil

import pytest
import yaml

import train_reftr
from data_scripts.escaping import for_markdown
from modeling_reftr import RefTRConfig, RefTRProcessor
from tests.helpers.tiny import trials
from training_reftr.arguments import parse_arguments
from training_reftr.checkpoints import TrainingState, checkpoints_of, load_state
from training_reftr.resuming import find_changes, with_model_of
from training_reftr.settings import Scope, TrainingSettings, names_in_scope


# (setting, value on the command line): settings of every scope, and all settings of the model
CHANGES = [
    ("image_size", "32"),
    ("learning_rate", "0.01"),
    ("num_workers", "1"),
    ("model.dropout", "0.3"),
    ("num_epochs", "3"),
    ("max_text_length", "12"),
    ("batch_size", "4"),
    ("image_size", "640"),
    ("max_text_length", "40"),
    ("size_divisor", "32"),
    ("keep_aspect_ratio", "false"),
    ("tokenizer", "./tokenizer"),
    ("init_from", "./elsewhere"),
    ("init_detr", "detr.pth"),
    ("init_backbone", "timm"),
    ("init_text", "./bert"),
    ("model.decoder_layers", "1"),
    ("model.d_model", "64"),
    ("model.predict_masks", "true"),
    ("model.auxiliary_loss", "false"),
    ("model.box_head_init_std", "0.5"),
    ("model.num_frozen_backbone_stages", "1"),
    ("model.text_config.hidden_size", "16"),
    ("model.backbone_config.backbone", "test_resnet"),
    ("backbone_learning_rate", "0"),
    ("text_learning_rate", "1e-5"),
    ("weight_decay", "0.1"),
    ("adam_beta2", "0.9"),
    ("max_grad_norm", "inf"),
    ("lr_schedule", "cosine"),
    ("lr_drop_epochs", "[1]"),
    ("warmup_steps", "3"),
    ("max_steps", "9"),
    ("seed", "1"),
    ("gradient_accumulation_steps", "2"),
    ("augmentation", "none"),
    ("expressions_per_image", "2"),
    ("mask_resampling", "nearest-exact"),
    ("bucket_by_shape", "false"),
    ("best_metric", "mean_iou"),
    ("log_every", "2"),
    ("attn_implementation", "eager"),
]


@pytest.fixture
def stopped_run(trained, tmp_path):
    """Copy the trained run as if it had stopped after its first epoch without a best model."""
    folder = tmp_path / "run"
    shutil.copytree(trained[0], folder)
    shutil.rmtree(checkpoints_of(folder)[0])
    (folder / "model.safetensors").unlink()
    return folder


def digests(folder):
    """Return the hash of every file of a run, by relative path."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def resume(recipe, folder, *argv):
    return train_reftr.main([str(recipe), "--output_dir", str(folder), "--resume", "auto", *argv])


@pytest.mark.row("R22")
@pytest.mark.parametrize("trial", trials(len(CHANGES), short=3))
def test_resume_with_changed_setting_is_refused_or_recorded(recipe, stopped_run, trial, caplog):
    setting, value = CHANGES[trial]
    name = setting.split(".")[0]
    before, old = digests(stopped_run), load_state(checkpoints_of(stopped_run)[0])
    argv = ("--num_pictures", "0", f"--{setting}", value)
    if name in names_in_scope(Scope.MODEL):
        with pytest.raises(
            ValueError, match=rf"keeps its model, and '.*step_00000006' fixes {setting}=.*checkpoint has"
        ):
            resume(recipe, stopped_run, *argv)
        assert digests(stopped_run) == before
        return
    with caplog.at_level(logging.WARNING):
        assert resume(recipe, stopped_run, *argv) == 0
    expected = parse_arguments([str(recipe), f"--{setting}", value]).to_flat()[name]
    change = f"{name}={expected!r} (was {old.settings[name]!r})"
    warnings = [record.message for record in caplog.records if "not quite the one of the checkpoint" in record.message]
    state = load_state(checkpoints_of(stopped_run)[0])
    assert state.step > old.step
    assert state.settings[name] == expected != old.settings[name]
    text = (stopped_run / "recipe.yaml").read_text()
    written = yaml.safe_load(text)
    assert name in names_in_scope(Scope.MACHINE) or written[name] == expected
    # all other settings, above all those of the model, are as in the previous run
    apart = {name, *names_in_scope(Scope.MACHINE), "num_pictures"}
    assert {key: value for key, value in written.items() if key not in apart} == {
        key: value for key, value in old.settings.items() if key not in apart
    }
    card = (stopped_run / "README.md").read_text()
    if name in names_in_scope(Scope.RESULTS):
        assert len(warnings) == 1
        assert change in warnings[0]
        assert f"# from step 6 on: {change}" in text
        assert f"Settings were changed during training: from step 6 on: {for_markdown(change)}" in card
    else:
        assert not warnings
        assert not text.startswith("#")
        assert "Settings were changed" not in card


def test_resume_changes_cover_every_model_setting():
    assert set(names_in_scope(Scope.MODEL)) <= {setting.split(".")[0] for setting, _ in CHANGES}
    assert len(CHANGES) == 42


def resumed_settings(folder, settings=None, **given):
    """Return the settings with which a run resumes from the latest checkpoint of a folder."""
    checkpoint = checkpoints_of(folder)[0]
    settings = load_state(checkpoint).settings if settings is None else settings
    processor = RefTRProcessor.from_pretrained(checkpoint)
    return with_model_of(
        TrainingSettings.from_flat(**given), RefTRConfig.from_pretrained(checkpoint), processor, settings, checkpoint
    )


def test_find_changes_reports_other_global_batch_size():
    args = TrainingSettings.from_flat()
    state = TrainingState(settings=vars(args), seen=[[16, 2], [8, 3]])
    assert find_changes(state, args, 8) == []
    assert find_changes(state, args, 16) == ["16 samples of all processes in a batch (was 8)"]


def test_resume_takes_missing_settings_from_checkpoint(trained):
    """Give no model and sizes, then the same ones as in the checkpoint."""
    settings = load_state(checkpoints_of(trained[0])[0]).settings
    for given in ({}, {"image_size": 64, "model": settings["model"]}):
        args = resumed_settings(trained[0], **given)
        assert (args.data.image_size, args.initialization.model) == (64, settings["model"])
        assert args.data.max_text_length is None  # 40, and 90 for captions
    assert resumed_settings(trained[0], learning_rate=3.0).optimization.learning_rate == 3.0


def test_resume_accepts_older_checkpoint_with_fewer_settings(trained):
    """Accept settings that the older version lacked, and defaults that it did not apply."""
    settings = load_state(checkpoints_of(trained[0])[0]).settings
    older = {name: value for name, value in settings.items() if name not in ("tokenizer", "size_divisor", "init_text")}
    older["image_size"] = 640  # a former default, which did not apply to a loaded model of 64 pixels
    args = resumed_settings(trained[0], settings=older, image_size=64)
    assert (args.data.image_size, args.data.size_divisor, args.initialization.tokenizer) == (64, None, None)
    assert resumed_settings(trained[0], settings={}).initialization.model == {}
    with pytest.raises(ValueError, match=r"fixes image_size=640 \(the checkpoint has 64\)"):
        resumed_settings(trained[0], settings=older, image_size=640)


def test_resume_names_all_changed_model_settings_at_once(trained):
    with pytest.raises(ValueError, match=r"size_divisor=32 \(the checkpoint has None\), model\.dropout=0\.5 \(the"):
        resumed_settings(trained[0], size_divisor=32, model={"dropout": 0.5})


def test_dry_run_refuses_same_changes_as_resume(recipe, stopped_run):
    before = digests(stopped_run)
    with pytest.raises(ValueError, match="fixes image_size=32"):
        resume(recipe, stopped_run, "--dry_run", "--image_size", "32")
    assert digests(stopped_run) == before


def test_checkpoint_records_actual_settings(trained):
    """Record the sizes of the processor, even if none were given, in the checkpoint and in recipe.yaml."""
    settings = load_state(checkpoints_of(trained[0])[0]).settings
    assert settings.keys() == TrainingSettings().to_flat().keys()
    written = yaml.safe_load((trained[0] / "recipe.yaml").read_text())
    assert written == {name: value for name, value in settings.items() if name not in names_in_scope(Scope.MACHINE)}
    assert json.loads((trained[0] / "metrics.json").read_text())["image_size"] == settings["image_size"]
