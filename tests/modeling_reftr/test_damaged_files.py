"""Damaged model files, one at a time: every function that reads them raises an error that names the file."""

import itertools
import json
import math
import pickle
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import pipeline

from modeling_reftr import (
    RefTRConfig,
    RefTRForVisualGrounding,
    RefTRImageProcessor,
    RefTRModel,
    RefTRProcessor,
)
from modeling_reftr.configuration_reftr import check_values
from modeling_reftr.loading_reftr import CONFIG_FILES, DamagedFilesError, naming_files
from reftr_cli import predict
from tests.helpers.tiny import TINY_MODEL, TINY_TEXT, trials
from training_reftr.build import load_reftr
from training_reftr.card import card_files
from training_reftr.settings import TrainingSettings


INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
SHARD = "model-00001-of-00001.safetensors"
DEPTH = 20_000
CONTENTS = {
    "cut": None,  # the first half of the file
    "empty": b"",
    "a list": b"[1]",
    "a number": b"5",
    "a text": b'"x"',
    "null": b"null",
    "brackets": b"[" * DEPTH,
    "closed brackets": b"[" * DEPTH + b"]" * DEPTH,
    "braces": b'{"a":' * DEPTH + b"1" + b"}" * DEPTH,
    "not UTF-8": b'{"a": "\xff\xfe"}',
    "long digits": b'{"a": ' + b"9" * 5_000 + b"}",
}
VALUES = ["x", 5, None, [], {}, math.nan, 1e30, -1, 10**400, True, [[None]], {"a": {"b": []}}, 0, 0.5, "\ud800"]


def damage_contents(name):
    """Return cases that replace the complete content of a file, by name."""

    def damage(content):
        def change(folder):
            path = folder / name
            if name == INDEX:
                split_weights(folder)
            original = path.read_bytes() if path.exists() else b'{"a": 1}'
            path.write_bytes(original[: len(original) // 2] if content is None else content)

        return change

    return {f"{name}: {kind}": damage(content) for kind, content in CONTENTS.items()}


def set_value(name, keys, value):
    """Return a change that sets one value of a JSON file."""

    def change(folder):
        path = folder / name
        if name == INDEX:
            split_weights(folder)
        values = json.loads(path.read_text())
        parent = values
        for key in keys[:-1]:
            parent = parent[key]
        parent[keys[-1]] = value
        path.write_text(json.dumps(values))

    return change


def keys_of(values, depth=2):
    """Yield the path of each key, also of nested objects."""
    for key, value in values.items():
        yield (key,)
        if isinstance(value, dict) and depth > 1:
            yield from ((key, *inner) for inner in keys_of(value, depth - 1))


def split_weights(folder):
    """Move the weights to a shard that an index names."""
    if (folder / WEIGHTS).exists():
        (folder / WEIGHTS).rename(folder / SHARD)
        index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(load_file(folder / SHARD), SHARD)}
        (folder / INDEX).write_text(json.dumps(index))


def name_shard(shard):
    """Return a change that makes the index name another file."""

    def change(folder):
        shutil.copy(folder / WEIGHTS, folder.parent / "outside.safetensors")
        split_weights(folder)
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"][min(index["weight_map"])] = shard
        (folder / INDEX).write_text(json.dumps(index))

    return change


def write(name, content):
    """Return a change that replaces a file."""
    return lambda folder: (folder / name).write_bytes(content)


def cut(name, length):
    """Return a change that truncates a file."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:length])


def reshape(folder):
    weights = load_file(folder / WEIGHTS)
    save_file({name: torch.zeros(3, 1) for name in weights}, folder / WEIGHTS, metadata={"format": "pt"})


def damage_shard(folder):
    split_weights(folder)
    (folder / SHARD).write_bytes(b"\x10")


def use_preprocessor(change):
    """Return a change of preprocessor_config.json, read if processor_config.json has no image processor."""

    def damage(folder):
        values = json.loads((folder / "processor_config.json").read_text())
        image_processor = values.pop("image_processor")
        (folder / "processor_config.json").write_text(json.dumps(values))
        (folder / "preprocessor_config.json").write_text(json.dumps(image_processor))
        change(folder)

    return damage


FILES = ("config.json", "processor_config.json", "tokenizer_config.json", "tokenizer.json", INDEX)
EXTRA = ("special_tokens_map.json", "added_tokens.json", "generation_config.json", "adapter_config.json")
OTHERS = {
    f"{WEIGHTS}: empty": write(WEIGHTS, b""),
    f"{WEIGHTS}: cut": cut(WEIGHTS, 5_000),
    f"{WEIGHTS}: header of 1e18 bytes": write(WEIGHTS, (10**18).to_bytes(8, "little") + b"{}"),
    f"{WEIGHTS}: header of a gigabyte": write(WEIGHTS, (10**9).to_bytes(8, "little") + b"{}"),
    f"{WEIGHTS}: header not JSON": write(WEIGHTS, (8).to_bytes(8, "little") + b"not json"),
    f"{WEIGHTS}: header brackets": write(WEIGHTS, (DEPTH).to_bytes(8, "little") + b"[" * DEPTH),
    f"{WEIGHTS}: other shapes": reshape,
    f"{INDEX}: missing file": name_shard("model-00002-of-00002.safetensors"),
    f"{INDEX}: file outside": name_shard("../outside.safetensors"),
    f"{INDEX}: absolute": name_shard("/etc/hostname"),
    f"{INDEX}: number": name_shard(5),
    f"{INDEX}: pickle": name_shard("weights.bin"),
    f"{SHARD}: cut": damage_shard,
    "config.json: weights outside": set_value("config.json", ["transformers_weights"], "../outside.safetensors"),
    "config.json: weights number": set_value("config.json", ["transformers_weights"], 5),
}


READ_BY_AUTO_CLASSES = ("preprocessor_config.json", "adapter_config.json")
COUNTS = (
    ("num_labels",),
    ("text_config", "num_labels"),
    ("backbone_config", "num_labels"),
    ("encoder_layers",),
    ("text_config", "num_hidden_layers"),
    ("text_config", "num_attention_heads"),
    ("text_config", "vocab_size"),
    ("text_config", "max_position_embeddings"),
)


def drop(name, keys):
    """Return a change that removes a key of a JSON file."""

    def change(folder):
        values = json.loads((folder / name).read_text())
        parent = values
        for key in keys[:-1]:
            parent = parent[key]
        del parent[keys[-1]]
        (folder / name).write_text(json.dumps(values))

    return change


MESSAGE_CASES = {
    "tokenizer.json: without model": drop("tokenizer.json", ["model"]),
    "tokenizer.json: without special tokens": set_value("tokenizer.json", ["post_processor", "special_tokens"], {}),
    "tokenizer_config.json: model_max_length": set_value("tokenizer_config.json", ["model_max_length"], "x"),
    "processor_config.json: length": set_value("processor_config.json", ["max_expression_length"], "x"),
}


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    """Save an undamaged model folder with an image next to it."""
    folder = tmp_path_factory.mktemp("saved")
    text_config = {**TINY_TEXT, "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    RefTRForVisualGrounding(RefTRConfig(**TINY_MODEL, text_config=text_config)).save_pretrained(folder / "model")
    processor = RefTRProcessor(RefTRImageProcessor(size={"shortest_edge": 64, "longest_edge": 64}), tokenizer)
    processor.save_pretrained(folder / "model")
    Image.new("RGB", (64, 48), "gray").save(folder / "image.png")
    return folder


def make_cases(folder) -> dict:
    """Return the changes by the name of their case, which begins with the file name."""
    cases = dict(OTHERS)
    for name in (*FILES, *EXTRA):
        cases |= damage_contents(name)
    cases |= {
        f"preprocessor_config.json: {kind.partition(': ')[2]}": use_preprocessor(change)
        for kind, change in damage_contents("preprocessor_config.json").items()
    }
    # each key gets a value of another type, in turn
    values = itertools.cycle(VALUES)
    for name in FILES[:4]:
        for keys in keys_of(json.loads((folder / name).read_text())):
            if keys[:2] != ("model", "vocab") or len(keys) == 2:
                value = next(values)
                cases[f"{name}: {'.'.join(keys)}={str(value)[:12]}"] = set_value(name, keys, value)
    for keys, value in itertools.product(COUNTS, (10**400, 10**9, -1, 1e30, "x")):
        cases[f"config.json: {'.'.join(keys)}={str(value)[:12]}"] = set_value("config.json", keys, value)
    for keys, value in itertools.product((("weight_map",), ("metadata",)), ("x", None, [], {})):
        cases[f"{INDEX}: {'.'.join(keys)}={value}"] = set_value(INDEX, keys, value)
    return cases


def make_readers(image) -> dict:
    """Return the functions that read a folder, by name."""
    arguments = TrainingSettings.from_flat(dataset="shapes")
    return {
        "configuration": RefTRConfig.from_pretrained,
        "base model": RefTRModel.from_pretrained,
        "model": RefTRForVisualGrounding.from_pretrained,
        "image processor": RefTRImageProcessor.from_pretrained,
        "processor": RefTRProcessor.from_pretrained,
        "pipeline": lambda folder: pipeline("visual-grounding", model=str(folder)),
        "predict": lambda folder: predict.main(
            ["--model", str(folder), "--image", str(image), "--text", "the red circle"]
        ),
        "training": lambda folder: load_reftr(str(folder), arguments),
        "push": lambda folder: card_files(folder, "someone/toy"),
    }


def outcome(read, folder, name):
    """Return the outcome of reading a damaged folder: "accepted", "named", or the error raised instead."""
    try:
        read(folder)
    except (ValueError, OSError) as error:
        return "named" if name in str(error) else f"{type(error).__name__} without the file: {error}"
    except BaseException as error:  # Rust panics are not an Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        return repr(error)
    return "accepted"


def is_read_by_library_first(case, reader) -> bool:
    """
    Return whether `pipeline` fails in the Auto classes, before it knows that our classes read the file: on a file of
    the wrong JSON type, and on the names of the classes and the model type.
    """
    name, _, kind = case.partition(": ")
    replaces_file = kind in CONTENTS and (name in FILES[:2] or name in READ_BY_AUTO_CLASSES)
    return reader == "pipeline" and (replaces_file or kind.startswith(("auto_map", "model_type", "processor_class")))


@pytest.mark.row("S17")
def test_every_reader_names_damaged_file(saved, tmp_path, capsys, record_property):
    """Pass every case to every reader; the everyday suite runs a few cases."""
    cases, readers, failed, number = make_cases(saved / "model"), make_readers(saved / "image.png"), [], 0
    names = list(cases)
    chosen = trials(len(names), short=8)
    for index in chosen:
        case = names[index * (len(names) // len(chosen))]
        name = case.partition(":")[0]
        folder = tmp_path / "model"
        shutil.copytree(saved / "model", folder)
        cases[case](folder)
        for reader, read in readers.items():
            if is_read_by_library_first(case, reader):
                continue
            number += 1
            found = outcome(read, folder, name)
            # predict reads every file that a folder must have
            must_fail = reader == "predict" and name in FILES and case.partition(": ")[2] in CONTENTS
            if found not in (("named",) if must_fail else ("named", "accepted")):
                failed.append((case, reader, found))
        shutil.rmtree(folder)
    record_property("counted", (number - len(failed), number))
    assert not failed


@pytest.mark.parametrize(
    ("case", "reader", "message"),
    [
        ("config.json: closed brackets", "model", "config.json of .*: its values are nested too deeply"),
        ("config.json: a list", "configuration", "it must be a JSON object, and it is list"),
        ("config.json: num_labels=1000000000", "processor", "num_labels is over 100,000"),
        ("config.json: text_config.num_labels=1000000000", "processor", "text_config.num_labels is over 100,000"),
        ("config.json: weights outside", "model", "transformers_weights"),
        ("processor_config.json: null", "image processor", "processor_config.json of .* it is NoneType"),
        ("preprocessor_config.json: cut", "image processor", "preprocessor_config.json"),
        ("tokenizer.json: a number", "processor", "tokenizer.json of .* it is int"),
        ("tokenizer.json: without model", "processor", "tokenizer.json"),
        ("tokenizer.json: without special tokens", "processor", "must add a token before and after"),
        ("tokenizer_config.json: model_max_length", "processor", "tokenizer_config.json"),
        ("processor_config.json: length", "processor", "max_expression_length='x' must be an integer"),
        (f"{WEIGHTS}: header of 1e18 bytes", "model", f"{WEIGHTS} of .* SafetensorError"),
        (f"{WEIGHTS}: other shapes", "model", f"config.json or {WEIGHTS} of .*ignore_mismatched_sizes"),
        (f"{INDEX}: file outside", "model", "names '../outside.safetensors', .* not a safetensors file next to it"),
        (f"{INDEX}: missing file", "model", "names 'model-00002-of-00002.safetensors', which is not there"),
        (f"{SHARD}: cut", "training", SHARD),
        (f"{WEIGHTS}: cut", "push", WEIGHTS),
    ],
)
def test_reader_error_names_file_and_reason(saved, tmp_path, case, reader, message):
    shutil.copytree(saved / "model", tmp_path / "model")
    {**make_cases(saved / "model"), **MESSAGE_CASES}[case](tmp_path / "model")
    with pytest.raises((ValueError, OSError), match=message):
        make_readers(saved / "image.png")[reader](tmp_path / "model")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"encoder_layers": 2_000}, "encoder_layers is over 1,000"),
        ({"text_config": {"model_type": "bert", "num_hidden_layers": 2_000}}, "text_config.num_hidden_layers is over"),
        ({"backbone_config": {"num_labels": 200_000}}, "backbone_config.num_labels is over 100,000"),
        (
            {"text_config": {"model_type": "bert", "num_attention_heads": -1}},
            "num_attention_heads=-1 must be at least",
        ),
        ({"text_config": {"model_type": "bert", "hidden_dropout_prob": math.nan}}, "must be a finite number"),
        ({"backbone_config": {"output_hidden_states": True}}, "output_hidden_states=True must be false"),
    ],
)
def test_config_rejects_excessive_and_invalid_values(values, message):
    with pytest.raises(ValueError, match=message):
        RefTRConfig(**values)


def test_every_reader_accepts_undamaged_folder(saved, tmp_path, capsys):
    for split in (False, True):
        folder = tmp_path / str(split)
        shutil.copytree(saved / "model", folder)
        if split:
            split_weights(folder)
        for name, read in make_readers(saved / "image.png").items():
            assert outcome(read, folder, "") == "accepted", name


def test_from_pretrained_raises_type_error_for_wrong_arguments(saved):
    for model_class in (RefTRModel, RefTRForVisualGrounding):
        with pytest.raises(TypeError, match="unexpected keyword argument 'unknown'"):
            model_class.from_pretrained(saved / "model", unknown=1)
    with pytest.raises(TypeError, match="required positional argument"):
        RefTRModel.from_pretrained()


@pytest.mark.parametrize("reader", ["model", "image processor", "processor"])
def test_readers_raise_library_error_for_missing_files(saved, tmp_path, reader):
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match="empty") as raised:
        make_readers(saved / "image.png")[reader](tmp_path / "empty")
    assert not isinstance(raised.value, ValueError)
    with pytest.raises((OSError, ValueError), match="absent") as raised:
        make_readers(saved / "image.png")[reader](tmp_path / "absent")
    assert not isinstance(raised.value, DamagedFilesError)


def test_naming_files_names_file_of_rust_panic(saved, tmp_path):
    shutil.copytree(saved / "model", tmp_path / "model")
    MESSAGE_CASES["tokenizer.json: without special tokens"](tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    with (
        pytest.raises(DamagedFilesError, match=r"tokenizer.json of .*: PanicException"),
        naming_files(tmp_path / "model", ["tokenizer.json"], {}),
    ):
        tokenizer.encode("the red circle")


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, SystemExit, GeneratorExit])
def test_naming_files_passes_unrelated_exceptions_through(saved, error):
    with pytest.raises(error) as raised, naming_files(saved / "model", CONFIG_FILES, {}):
        raise error("stop")
    assert type(raised.value) is error


def test_damaged_files_error_survives_pickling():
    error = pickle.loads(pickle.dumps(DamagedFilesError("config.json", "d_model=0", "runs/demo")))
    assert str(error) == "config.json of 'runs/demo' cannot be used: d_model=0."
    assert isinstance(error, RuntimeError)


def test_check_values_accepts_any_backbone_label():
    """ImageNet has 21,841 labels, such as "CD player"; their names are not checked as settings are."""
    labels = {"label2id": {"CD player": 21_000, "dust": 0}, "id2label": {"0": "dust", "21000": "CD player"}}
    check_values({"backbone_config": {"num_labels": 21_841, **labels}}, "")
