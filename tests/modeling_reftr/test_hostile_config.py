"""Hostile configurations: no network access, no file read outside the folder, no foreign code executed."""

import json
import socket
import sys

import pytest

from modeling_reftr import RefTRConfig, RefTRForVisualGrounding, RefTRProcessor


TIMM = {"model_type": "timm_backbone", "backbone": "test_resnet", "out_indices": [1, 2, 3, 4]}
FOREIGN = {"AutoConfig": "evil/code--evil.Config", "AutoModel": "evil/code--evil.Model"}


@pytest.fixture
def no_network(monkeypatch):
    """Record any attempt to reach the network and make it fail."""
    attempts = []

    def refuse(self, address, *_):
        attempts.append(address)
        raise OSError(f"the test has no network, {address} was requested")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **_: refuse(None, address))
    yield
    assert attempts == []


@pytest.fixture
def folder(make_model, processor, tmp_path):
    """Save a model whose `config.json` the test may change."""
    make_model().save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def change(path, **changes):
    values = json.loads(path.read_text())
    for name, value in changes.items():
        values[name] = {**values[name], **value} if isinstance(values.get(name), dict) else value
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone_config": {"backbone": "hf-hub:evil/model"}}, "names a location to load from"),
        ({"backbone_config": {"backbone": "local-dir:/etc"}}, "names a location to load from"),
        ({"text_config": {"model_type": "timm_wrapper", "architecture": "hf-hub:evil/model"}}, "architecture inside"),
        ({"text_config": {"model_type": "detr", "backbone_config": {**TIMM, "backbone": "hf-hub:evil/m"}}}, "inside"),
        ({"text_config": {"model_type": "detr", "backbone": "resnet50", "use_pretrained_backbone": True}}, "inside"),
        ({"backbone_config": {"model_type": "detr", "backbone_config": TIMM}}, "inside"),
        ({"backbone_config": {"model_type": "detr", "use_pretrained_backbone": True}}, "backbone inside"),
        ({"text_config": {"model_type": "evil", "auto_map": FOREIGN}}, "evil"),
        ({"attn_implementation": "evil/kernel"}, "names code to download"),
        ({"_attn_implementation": "evil/kernel"}, "names code to download"),
        ({"text_config": {"attn_implementation": "evil/kernel:main"}}, "names code to download"),
        ({"backbone": "resnet50"}, "backbone='resnet50' is not taken"),
    ],
)
@pytest.mark.row("S3")
def test_config_naming_external_code_or_weights_is_refused(folder, no_network, changes, message):
    change(folder / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        RefTRForVisualGrounding.from_pretrained(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"auto_map": FOREIGN},
        {"text_config": {"auto_map": FOREIGN, "trust_remote_code": True, "_name_or_path": "evil/code"}},
        {"backbone_config": {"auto_map": FOREIGN, "name_or_path": "evil/code"}},
        {"backbone_config": {"use_pretrained_backbone": True, "backbone_kwargs": {"pretrained": True}}},
        {"backbone_config": {"pretrained": True, "checkpoint_path": "/etc/hostname"}},
        {"trust_remote_code": True, "_name_or_path": "evil/code", "name_or_path": "evil/code"},
    ],
    ids=["auto_map", "text", "backbone", "pretrained_backbone", "checkpoint_path", "trust"],
)
@pytest.mark.row("S3")
def test_model_ignores_foreign_config_entries_and_drops_them_on_save(folder, no_network, tmp_path, changes):
    change(folder / "config.json", **changes)
    modules = set(sys.modules)
    model = RefTRForVisualGrounding.from_pretrained(folder)
    assert not [name for name in set(sys.modules) - modules if "transformers_modules" in name or "evil" in name]
    model.save_pretrained(tmp_path / "again")
    assert "evil--" not in (text := (tmp_path / "again" / "config.json").read_text())
    assert "evil/code--" not in text
    assert RefTRConfig.from_pretrained(tmp_path / "again").auto_map["AutoModel"] == "modeling_reftr.RefTRModel"


@pytest.mark.parametrize("file", ["processor_config.json", "tokenizer_config.json"])
@pytest.mark.row("S3")
def test_processor_drops_foreign_auto_map_on_save(folder, no_network, tmp_path, file):
    foreign = {"AutoProcessor": "evil/code--evil.P", "AutoTokenizer": ["evil/code--evil.T", None]}
    changes = {"auto_map": foreign}
    if file == "processor_config.json":
        changes["image_processor"] = {"auto_map": {"AutoImageProcessor": "evil/code--evil.I"}}
    values = json.loads((folder / file).read_text())
    values.update(changes) if file == "tokenizer_config.json" else values.update(
        {"auto_map": foreign, "image_processor": {**values["image_processor"], **changes["image_processor"]}}
    )
    (folder / file).write_text(json.dumps(values))
    RefTRProcessor.from_pretrained(folder).save_pretrained(tmp_path / "again")
    for path in (tmp_path / "again").iterdir():
        assert "evil" not in path.read_text(), path.name
