"""The Hub on this machine, by the real client: what the other tests of pushing and loading stand on."""

import pytest
import torch
from huggingface_hub import HfApi, constants
from local_hub import Hub


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with Hub() as hub:
        yield hub


@pytest.fixture
def api(hub):
    return HfApi(endpoint=hub.address, token="hf_write")


@pytest.fixture
def folder(tmp_path):
    """Small and large files, in folders, one empty."""
    files = {"config.json": b"{}", "model.safetensors": bytes(range(256)) * 1000, "pictures/one.png": b"\x89PNG"}
    files |= {"README.md": b"---\nlibrary_name: transformers\n---\n# A model\n", "empty.bin": b""}
    for path, content in files.items():
        (tmp_path / "folder" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / path).write_bytes(content)
    return tmp_path / "folder"


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pushed(hub, id="someone/toy", revision="main"):
    files = hub.files(id, revision=revision)
    del files[".gitattributes"]
    return files


def test_a_folder_goes_up_and_comes_down(hub, api, folder, tmp_path):
    assert api.whoami()["name"] == "someone"
    address = api.create_repo("someone/toy", private=True)
    assert address == api.create_repo("someone/toy", exist_ok=True) == f"{hub.address}/someone/toy"
    with pytest.raises(Exception, match="already created"):
        api.create_repo("someone/toy")
    commit = api.upload_folder(repo_id="someone/toy", folder_path=folder)
    assert commit.oid == hub.head("someone/toy")
    assert pushed(hub) == content(folder)
    assert set(api.list_repo_files("someone/toy")) == {*content(folder), ".gitattributes"}
    info = api.model_info("someone/toy", files_metadata=True)
    assert (info.sha, info.private, info.library_name) == (commit.oid, True, "transformers")
    large = {sibling.rfilename for sibling in info.siblings if sibling.lfs}
    assert large == {"model.safetensors", "pictures/one.png"}
    came = api.snapshot_download("someone/toy", local_dir=tmp_path / "came", cache_dir=tmp_path / "cache")
    assert {path: bytes for path, bytes in content(tmp_path / "came").items() if path[0] != "."} == content(folder)
    assert came == str(tmp_path / "came")
    # no token goes where large files are
    assert {request.method for request in hub.requests if request.large} == {"PUT", "GET"}
    assert not any(request.token for request in hub.requests if request.large)


LOAD = """
import sys, torch
from transformers import AutoConfig, AutoModel, AutoModelForZeroShotObjectDetection, AutoProcessor
name, revision, output = sys.argv[1:]
options = {"revision": revision, "trust_remote_code": True}
config = AutoConfig.from_pretrained(name, **options)
assert type(config).__module__.startswith("transformers_modules"), type(config)
model = AutoModelForZeroShotObjectDetection.from_pretrained(name, **options)
AutoModel.from_pretrained(name, **options)
AutoProcessor.from_pretrained(name, **options)
assert not any(module.startswith("modeling_reftr") for module in sys.modules), "our package was imported"
torch.save(model.state_dict(), output)
"""


@pytest.mark.parametrize("way", ["folder", "push_to_hub"])
def test_a_model_comes_back_in_a_clean_process(hub, api, make_model, processor, run, tmp_path, way):
    model, saved = make_model(), tmp_path / "saved"
    environment = hub.environment("hf_read", tmp_path / "home")
    model.save_pretrained(saved)
    processor.save_pretrained(saved)
    if way == "folder":
        api.create_repo("someone/toy", private=True)
        api.upload_folder(repo_id="someone/toy", folder_path=saved)
    else:
        code = "import sys; from modeling_reftr import *; folder, name = sys.argv[1:]; "
        code += "RefTRForVisualGrounding.from_pretrained(folder).push_to_hub(name, private=True); "
        code += "RefTRProcessor.from_pretrained(folder).push_to_hub(name)"
        run("-c", code, saved, "someone/toy", **hub.environment("hf_write", tmp_path / "home_of_author"))
    revision = hub.head("someone/toy")
    # a later commit is not what was asked for
    api.upload_file(repo_id="someone/toy", path_in_repo="config.json", path_or_fileobj=b"{}")
    output = tmp_path / "weights.pt"
    run("-I", "-c", LOAD, "someone/toy", revision, output, cwd=tmp_path, **environment)
    weights = torch.load(output)
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert all(request.token in ("hf_write", "hf_read") for request in hub.requests if not request.large)
