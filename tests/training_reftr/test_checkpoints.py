"""A checkpoint is validated before a resume; a damaged one is refused and the previous one is used."""

import json
import os
import re
import shutil

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

import train_reftr
from tests.helpers.faults import change_state, write_manifest
from training_reftr.card import write_card
from training_reftr.checkpoints import (
    MANIFEST,
    OPTIMIZER,
    STATE,
    TrainingState,
    checkpoints_of,
    find_latest_valid_checkpoint,
    load_optimizer,
    load_state,
    rename_later,
    save_checkpoint,
    validate_checkpoint,
)
from training_reftr.settings import CheckpointSettings
from training_reftr.tracking import keep_until


@pytest.fixture
def run_folder(trained, tmp_path):
    """Copy a run with two checkpoints."""
    shutil.copytree(trained[0], tmp_path / "run")
    assert len(checkpoints_of(tmp_path / "run")) == 2
    return tmp_path / "run"


def change_optimizer(path, change):
    """Change the optimizer file of a checkpoint and update its manifest."""
    tensors = load_file(path / OPTIMIZER)
    change(tensors)
    save_file(tensors, path / OPTIMIZER)
    write_manifest(path)


STATES = {
    "later": ({"ema_step": 3}, "was written by a later version of this code, which adds the field 'ema_step'"),
    "step negative": ({"step": -5}, "has step=-5, expected an integer from 0"),
    "step of another folder": ({"step": 7}, "is of step 7, but its folder is 'step_00000012'"),
    "step of an earlier folder": ({"step": 13}, "is of step 13, but its folder is 'step_00000012'"),
    "step text": ({"step": "12"}, "has step='12', expected an integer"),
    "step true": ({"step": True}, "has step=True, expected an integer"),
    "step fraction": ({"step": 12.0}, "has step=12.0, expected an integer"),
    "step huge": ({"step": 10**30}, r"expected an integer from 0 to 2\*\*63 - 1"),
    "epoch negative": ({"epoch": -1}, "has epoch=-1"),
    "seen of numbers": ({"seen": [8, 2]}, "expected a list of \\[global batch size, number of batches\\]"),
    "seen of three": ({"seen": [[8, 2, 1]]}, "expected a list of \\[global batch size, number of batches\\]"),
    "seen of nothing": ({"seen": [[0, 2]]}, "expected a list of \\[global batch size, number of batches\\]"),
    "seen null": ({"seen": None}, "has seen=None"),
    "flag as number": ({"is_evaluation_due": 1}, "has is_evaluation_due=1, expected true or false"),
    "best text": ({"best": "0.5"}, "has best='0.5', expected a finite number or null"),
    "best not a number": ({"best": float("nan"), "best_step": 6}, "has best=nan, expected a finite number or null"),
    "best infinite": ({"best": float("inf"), "best_step": 6}, "has best=inf"),
    "best without its step": ({"best": 0.5, "best_step": None}, "expected both or neither"),
    "best of later": ({"best": 0.5, "best_step": 13}, "of step 12 or earlier"),
    "schedule negative": ({"schedule_step": -1}, "has schedule_step=-1"),
    "epoch's steps": ({"steps_per_epoch": 2.5}, "has steps_per_epoch=2.5"),
    "scaler": ({"scaler": {"scale": "big"}}, "expected the numbers of a gradient scaler or null"),
    "run id": ({"run_id": 5}, "has run_id=5, expected text"),
    "settings": ({"settings": []}, "has settings=\\[\\], expected a mapping"),
    "missing": ({"epoch": ...}, "has no field 'epoch'"),
}


@pytest.mark.parametrize(("changes", "message"), STATES.values(), ids=STATES)
def test_checkpoint_with_invalid_state_is_refused(run_folder, changes, message):
    latest, before = checkpoints_of(run_folder)
    change_state(latest, **changes)
    assert re.search(message, validate_checkpoint(latest))
    assert validate_checkpoint(before) is None


FILES = {
    "state is a list": (STATE, b"[1]", "state.json' is damaged: expected a JSON object, found list"),
    "state is not UTF-8": (STATE, b'{"step": "\xff"}', "state.json' is damaged: 'utf-8' codec can't decode"),
    "state is nested": (STATE, b"[" * 100_000, "state.json' is damaged: its values are nested too deeply"),
    "state is empty": (STATE, b"", "state.json' is damaged: Expecting value"),
    "optimizer is text": (OPTIMIZER, b"no tensors", "is damaged: .*header"),
}


@pytest.mark.parametrize(("name", "content", "message"), FILES.values(), ids=FILES)
def test_checkpoint_with_damaged_file_is_refused(run_folder, name, content, message):
    latest = checkpoints_of(run_folder)[0]
    (latest / name).write_bytes(content)
    write_manifest(latest)
    assert re.search(message, validate_checkpoint(latest))


ENTRY = [1, "0" * 64]
MANIFESTS = {
    "empty": (
        lambda manifest: manifest.clear(),
        r"is not a complete checkpoint: manifest.json does not list config.json",
    ),
    **{
        f"without {name}": (
            lambda manifest, name=name: manifest.pop(name),
            rf"is not a complete checkpoint: manifest.json does not list {name.replace('model.', 'model.?')}",
        )
        for name in ("config.json", OPTIMIZER, STATE, "processor_config.json", "tokenizer_config.json")
    },
    "without weights": (lambda manifest: manifest.pop("model.safetensors"), "does not list model.*safetensors"),
    "outside": (lambda manifest: manifest.update({"../../x": ENTRY}), "lists '../../x', which is not a file in its"),
    "absolute": (lambda manifest: manifest.update({"/etc/passwd": ENTRY}), "lists '/etc/passwd', which is not a file"),
    "windows": (lambda manifest: manifest.update({"..\\x": ENTRY}), "which is not a file in its folder"),
    "number": (lambda manifest: manifest.update({STATE: 3}), r"has 3 for 'state.json', expected \[size in bytes, SHA"),
    "null": (lambda manifest: manifest.update({STATE: [1, None]}), "expected .size in bytes, SHA-256"),
    "not a number": (lambda manifest: manifest.update({STATE: [float("nan"), "0" * 64]}), "expected .size in bytes"),
    "negative": (lambda manifest: manifest.update({STATE: [-1, "0" * 64]}), "expected .size in bytes"),
    "missing file": (
        lambda manifest: manifest.update({"more.json": ENTRY}),
        "is not a complete checkpoint: .*more.json",
    ),
}


@pytest.mark.parametrize(("change", "message"), MANIFESTS.values(), ids=MANIFESTS)
def test_checkpoint_with_invalid_manifest_is_refused(run_folder, change, message):
    latest = checkpoints_of(run_folder)[0]
    manifest = json.loads((latest / MANIFEST).read_text())
    change(manifest)
    (latest / MANIFEST).write_text(json.dumps(manifest))
    assert re.search(message, validate_checkpoint(latest))
    for content in ("[]", "null", "{", '{"a": }'):
        (latest / MANIFEST).write_text(content)
        assert "manifest.json' is damaged" in validate_checkpoint(latest)


def test_checkpoint_with_mismatched_optimizer_is_refused(run_folder):
    latest, before = checkpoints_of(run_folder)
    change_optimizer(latest, lambda tensors: tensors.update({"model.unknown/exp_avg": torch.zeros(2)}))
    assert "does not fit the model, which has no weight 'model.unknown'" in validate_checkpoint(latest)
    key = next(key for key, value in load_file(before / OPTIMIZER).items() if value.dim() > 1)
    change_optimizer(before, lambda tensors: tensors.update({key: tensors[key][:1].clone()}))
    assert f"{key!r} has shape [1, " in validate_checkpoint(before)


def test_find_latest_valid_checkpoint_skips_damaged_ones(run_folder, caplog):
    latest, before = checkpoints_of(run_folder)
    for changes in ({"step": -5}, {"later": 1}):  # twice, as if a run had written the same step again
        if not latest.exists():
            shutil.copytree(latest.with_name(f"{latest.name}.damaged"), latest)
        change_state(latest, **changes)
        assert find_latest_valid_checkpoint(run_folder) == before
        rename_later(run_folder, before)
    assert "which adds the field 'later'" in caplog.text
    names = {path.name for path in before.parent.iterdir()}
    assert names == {before.name, f"{latest.name}.damaged", f"{latest.name}.damaged1"}
    change_state(before, epoch=-1)
    with pytest.raises(OSError, match=r"All 1 checkpoints .* are damaged, the latest because .*has epoch=-1"):
        find_latest_valid_checkpoint(run_folder)


def test_resume_takes_previous_valid_checkpoint_and_keeps_log(trained, recipe, run_folder, caplog):
    latest = checkpoints_of(run_folder)[0]
    change_state(latest, of_later=True)
    log = run_folder / "metrics.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join([*lines[:2], b'{"step": 2, "note": "\xe9"}\n', *lines[2:], b'{"step": 99, "tr']))
    content = log.read_bytes()

    with pytest.raises(OSError, match=r"--resume .* was written by a later version .* 'of_later'"):
        train_reftr.main([str(recipe), "--output_dir", str(run_folder), "--resume", str(latest)])
    assert log.read_bytes() == content

    train_reftr.main([str(recipe), "--output_dir", str(run_folder), "--resume", "auto"])
    assert "The training data changed" not in caplog.text
    assert "metrics.jsonl', line 3 is left out" in caplog.text
    assert f"metrics.jsonl', line {len(lines) + 2} is left out" in caplog.text
    assert (run_folder / "metrics.jsonl.damaged").read_bytes() == content
    steps = [record["step"] for record in map(json.loads, log.read_text().splitlines()) if "train/loss" in record]
    assert steps == list(range(1, 13))
    one, two = (
        load_file(folder / "checkpoints" / latest.name / "model.safetensors") for folder in (trained[0], run_folder)
    )
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


def test_resume_warns_of_changed_training_data(recipe, run_folder, caplog):
    before = load_state(checkpoints_of(run_folder)[0])
    argv = ["--output_dir", str(run_folder), "--resume", "auto", "--dataset_config.num_train", "47", "--test_splits"]
    train_reftr.main([str(recipe), *argv, "validation"])
    (warning,) = re.findall("The training data changed .*", caplog.text)
    now, then = re.findall(r"(\d+) rows with fingerprint (\w{16})", warning)
    assert then == (str(before.num_rows), before.fingerprint)
    assert now[0] == "47"
    assert now[1] != then[1]


def test_keep_until_drops_cut_last_line_without_copy(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_bytes(b'{"step": 1, "text": "\xe2\x80\xa8"}\n{"step": 2}\n{"st')
    keep_until(log, 1)
    assert log.read_bytes() == b'{"step": 1, "text": "\xe2\x80\xa8"}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("content", [b"\xff", b"[1]", b"{", b'"text"'])
@pytest.mark.parametrize("name", ["metrics.json", "origin.json", "recipe.yaml"])
def test_write_card_names_damaged_file(make_model, tmp_path, name, content):
    make_model().save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(content)
    message = rf"{name}('(, line 1)? is (damaged|not UTF-8|not YAML)| of .* cannot be used: )"
    with pytest.raises(ValueError, match=message):
        write_card(tmp_path)


@pytest.fixture
def disk_events(monkeypatch):
    """Record fsync and rename calls in order, because a test cannot cut the power."""
    events = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def record_fsync(descriptor):
        events.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def record_rename(source, target, call):
        events.append(("rename", os.path.abspath(source), os.path.abspath(target)))
        call(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", lambda source, target: record_rename(source, target, rename))
    monkeypatch.setattr(os, "replace", lambda source, target: record_rename(source, target, replace))
    return events


def test_checkpoint_files_are_synced_before_rename(recipe, tmp_path, disk_events):
    assert train_reftr.main([str(recipe), "--output_dir", str(tmp_path), "--max_steps", "1"]) == 0

    path = str(tmp_path / "checkpoints" / "step_00000001")
    (rename_index,) = [index for index, event in enumerate(disk_events) if event[0] == "rename" and event[2] == path]
    temporary = disk_events[rename_index][1]
    synced = {event[1] for event in disk_events[:rename_index] if event[0] == "fsync"}
    assert {temporary, *(f"{temporary}/{name}" for name in os.listdir(path))} <= synced
    assert ("fsync", str(tmp_path / "checkpoints")) in disk_events[rename_index:]

    best_indices = [index for index, event in enumerate(disk_events) if event[1].startswith(f"{tmp_path}/.files.")]
    renames = [index for index in best_indices if disk_events[index][0] == "rename"]
    before = {event[1] for event in disk_events[: renames[0]]}
    assert {disk_events[index][1] for index in renames} <= before, "every file is synced before the first rename"
    assert [disk_events[index][2] for index in renames].index(str(tmp_path / "model.safetensors")) == len(renames) - 1
    assert ("fsync", str(tmp_path)) in disk_events[renames[-1] :]


def test_gradient_scaler_is_saved_and_restored(make_model, processor, tmp_path):
    accelerator = Accelerator(cpu=True)
    args = CheckpointSettings(output_dir=str(tmp_path), keep_checkpoints=1)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=7)  # accelerate: GPUs only
    save_checkpoint(model, optimizer, processor, TrainingState(step=3), args, accelerator)
    path = find_latest_valid_checkpoint(tmp_path)
    accelerator.scaler = torch.amp.GradScaler("cpu", growth_interval=9)
    load_optimizer(path, model, optimizer, load_state(path), accelerator)
    assert accelerator.scaler.get_scale() == 1024.0
    assert accelerator.scaler.get_growth_interval() == 7


def test_new_run_in_folder_with_checkpoints_is_refused(recipe, run_folder):
    with pytest.raises(OSError, match=r"has checkpoints of another run.*step_00000012.*choose another --output_dir"):
        train_reftr.main([str(recipe), "--output_dir", str(run_folder)])
    assert len(checkpoints_of(run_folder)) == 2


def test_rescale_schedule_follows_new_steps_per_epoch():
    state = TrainingState(schedule_step=12, steps_per_epoch=6)
    state.rescale_schedule(3)
    assert (state.schedule_step, state.steps_per_epoch) == (6, 3)
    state.rescale_schedule(9)
    assert (state.schedule_step, state.steps_per_epoch) == (18, 9)


def test_checkpoint_with_missing_weight_is_refused(recipe, run_folder):
    path = find_latest_valid_checkpoint(run_folder)
    name = "model.encoder.layers.0.mlp.fc1.weight"
    tensors = load_file(path / "model.safetensors")
    del tensors[name]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    change_optimizer(path, lambda moments: [moments.pop(key) for key in list(moments) if key.startswith(f"{name}/")])
    with pytest.raises(OSError, match=rf"lacks 1 weights of its model, the first is '{re.escape(name)}'"):
        train_reftr.main([str(recipe), "--output_dir", str(run_folder), "--resume", "auto"])
