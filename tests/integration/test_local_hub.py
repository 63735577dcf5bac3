"""The local Hub server behaves like the Hub for the real client, as other push and load tests require."""

import contextlib
import hashlib
import json
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest
import torch
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.helpers.local_hub import Hub, HubProcess


@pytest.fixture
def hub(monkeypatch):
    with Hub() as hub:
        hub.use(monkeypatch)
        yield hub


@pytest.fixture
def api(hub):
    return HfApi(endpoint=hub.address, token="hf_write")


@pytest.fixture
def folder(tmp_path):
    """Write small, large and empty files into folders."""
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


def test_folder_survives_upload_and_download(hub, api, folder, tmp_path):
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
    downloaded = api.snapshot_download("someone/toy", local_dir=tmp_path / "downloaded", cache_dir=tmp_path / "cache")
    assert {path: bytes for path, bytes in content(tmp_path / "downloaded").items() if path[0] != "."} == content(
        folder
    )
    assert downloaded == str(tmp_path / "downloaded")
    # requests for large files carry no token
    assert {request.method for request in hub.requests if request.large} == {"PUT", "GET"}
    assert not any(request.token for request in hub.requests if request.large)


@pytest.fixture
def toy(api):
    """Create a repository with a small and a large file; return the id of its commit."""
    api.create_repo("someone/toy")
    files = {"config.json": b"{}", "sub/model.safetensors": b"first"}
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    return api.create_commit("someone/toy", operations, commit_message="first").oid


def test_commit_applies_several_operations(hub, api, toy):
    operations = [
        CommitOperationAdd("config.json", b"[]"),
        CommitOperationAdd("sub/sub/new.png", b"new"),
        CommitOperationCopy("sub/model.safetensors", "copy.safetensors"),
        CommitOperationDelete("sub/model.safetensors"),
    ]
    first = pushed(hub)
    second = api.create_commit("someone/toy", operations, commit_message="second", parent_commit=toy)
    assert pushed(hub) == {"config.json": b"[]", "sub/sub/new.png": b"new", "copy.safetensors": b"first"}
    api.create_commit("someone/toy", [CommitOperationDelete("sub/")], commit_message="third")
    assert pushed(hub) == {"config.json": b"[]", "copy.safetensors": b"first"}
    assert pushed(hub, revision=toy) == first
    commits = hub.repositories["model", "someone/toy"].commits
    assert [commit.message for commit in commits] == ["initial commit", "first", "second", "third"]
    assert [commit.parent for commit in commits[1:]] == [commit.oid for commit in commits[:-1]]
    assert commits[2].oid == second.oid


@pytest.mark.parametrize(
    ("operations", "parent", "status"),
    [
        ([CommitOperationDelete("nothing.json")], None, 404),
        ([CommitOperationDelete("nothing/")], None, 404),
        ([], "0" * 40, 412),
    ],
    ids=["file", "folder", "parent"],
)
def test_commit_with_invalid_operation_changes_nothing(hub, api, toy, operations, parent, status):
    operations = [CommitOperationAdd("config.json", b"changed"), *operations]
    with pytest.raises(HfHubHTTPError) as refused:
        api.create_commit("someone/toy", operations, commit_message="half", parent_commit=parent)
    assert refused.value.response.status_code == status
    assert hub.head("someone/toy") == toy


def test_concurrent_commits_are_all_kept(hub, api, toy):
    def upload(number):
        api.upload_file(repo_id="someone/toy", path_in_repo=f"{number}.bin", path_or_fileobj=bytes([number]))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(upload, range(8)))
    assert {path: bytes for path, bytes in pushed(hub).items() if path[0].isdigit()} == {
        f"{number}.bin": bytes([number]) for number in range(8)
    }
    assert len(hub.repositories["model", "someone/toy"].commits) == 10


def test_existing_content_is_not_uploaded_again(hub, api, folder):
    api.create_repo("someone/toy")
    api.upload_folder(repo_id="someone/toy", folder_path=folder)
    head, before = hub.head("someone/toy"), len(hub.requests)
    assert api.upload_folder(repo_id="someone/toy", folder_path=folder).oid == head == hub.head("someone/toy")
    (folder / "again.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    api.upload_folder(repo_id="someone/toy", folder_path=folder)
    assert pushed(hub) == content(folder)
    assert not [request for request in hub.requests[before:] if request.method == "PUT"]
    # content uploaded before a failed commit is not sent again either
    hub.fault("status", "POST .*/commit/")
    (folder / "other.safetensors").write_bytes(b"other")
    for number in range(2):
        before = len(hub.requests)
        with pytest.raises(HfHubHTTPError) if number == 0 else contextlib.nullcontext():
            api.upload_folder(repo_id="someone/toy", folder_path=folder)
        assert len([request for request in hub.requests[before:] if request.method == "PUT"]) == 1 - number
    assert pushed(hub) == content(folder)


def test_models_datasets_and_spaces_are_separate(hub, api):
    for kind in ("model", "dataset", "space"):
        api.create_repo("someone/toy", repo_type=kind, space_sdk="gradio" if kind == "space" else None)
        api.upload_file(
            repo_id="someone/toy", repo_type=kind, path_in_repo=f"{kind}.png", path_or_fileobj=kind.encode()
        )
    for kind in ("model", "dataset", "space"):
        assert api.list_repo_files("someone/toy", repo_type=kind) == [".gitattributes", f"{kind}.png"]
        assert hub.files("someone/toy", kind)[f"{kind}.png"] == kind.encode()
        path = api.hf_hub_download("someone/toy", f"{kind}.png", repo_type=kind, local_dir=hub.state / "downloaded")
        assert Path(path).read_bytes() == kind.encode()
    assert api.space_info("someone/toy").sdk == "gradio"


def test_revisions_give_their_own_content(hub, api, toy, tmp_path):
    api.create_branch("someone/toy", branch="a/branch")
    api.create_tag("someone/toy", tag="v1", revision=toy)
    api.upload_file(repo_id="someone/toy", path_in_repo="config.json", path_or_fileobj=b"main")
    file = {"repo_id": "someone/toy", "path_in_repo": "config.json", "path_or_fileobj": b"branch"}
    branch = api.upload_file(**file, revision="a/branch").oid
    expected = {None: b"main", "main": b"main", "a/branch": b"branch", "v1": b"{}", toy: b"{}", branch: b"branch"}
    for revision, content in expected.items():
        path = api.hf_hub_download("someone/toy", "config.json", revision=revision, cache_dir=tmp_path)
        assert Path(path).read_bytes() == content
        folder = api.snapshot_download("someone/toy", revision=revision, cache_dir=tmp_path / "all")
        assert (Path(folder) / "config.json").read_bytes() == content
        assert (Path(folder) / "sub/model.safetensors").read_bytes() == b"first"
    refs = api.list_repo_refs("someone/toy")
    assert {ref.name: ref.target_commit for ref in refs.branches + refs.tags} == {
        "main": hub.head("someone/toy"),
        "a/branch": branch,
        "v1": toy,
    }
    assert pushed(hub, revision=toy)["config.json"] == b"{}"


def test_file_listings_match_repository(hub, api, toy):
    assert api.file_exists("someone/toy", "sub/model.safetensors")
    assert not api.file_exists("someone/toy", "sub")
    assert api.repo_exists("someone/toy")
    assert not api.repo_exists("someone/nothing")
    assert api.revision_exists("someone/toy", toy)
    assert not api.revision_exists("someone/toy", "nothing")
    for hub.page_size in (1000, 1):
        assert api.list_repo_files("someone/toy") == [".gitattributes", "config.json", "sub/model.safetensors"]
        assert [item.path for item in api.list_repo_tree("someone/toy")] == [".gitattributes", "config.json", "sub"]
    (item,) = api.list_repo_tree("someone/toy", "sub")
    assert item == api.get_paths_info("someone/toy", ["sub/model.safetensors", "nothing"])[0]
    assert (item.size, item.lfs.sha256) == (5, hashlib.sha256(b"first").hexdigest())


# missing permissions and missing content


@pytest.mark.parametrize(("token", "status"), [(False, 401), ("hf_bad", 401), ("hf_read", 403), ("hf_other", 403)])
def test_write_without_permission_is_refused(hub, toy, folder, token, status):
    api = HfApi(endpoint=hub.address, token=token)
    for push in (
        lambda: api.create_repo("someone/new"),
        lambda: api.upload_folder(repo_id="someone/toy", folder_path=folder),
        lambda: api.create_tag("someone/toy", tag="v1"),
        lambda: api.auth_check("someone/toy", write=True),
    ):
        with pytest.raises(HfHubHTTPError) as refused:
            push()
        assert refused.value.response.status_code == status
    assert hub.head("someone/toy") == toy
    assert list(hub.repositories) == [("model", "someone/toy")]


@pytest.mark.parametrize(("token", "status"), [(False, 401), ("hf_bad", 401), ("hf_read", 200), ("hf_other", 404)])
def test_read_of_private_repository_without_permission_is_refused(hub, toy, tmp_path, token, status):
    api = HfApi(endpoint=hub.address, token=token)
    hub.repositories["model", "someone/toy"].private = True
    for read in (
        lambda: api.model_info("someone/toy"),
        lambda: api.list_repo_files("someone/toy", revision=toy),
        lambda: api.hf_hub_download("someone/toy", "config.json", cache_dir=tmp_path / "file"),
        lambda: api.snapshot_download("someone/toy", revision=toy, cache_dir=tmp_path / "all"),
    ):
        if status == 200:
            read()
            continue
        with pytest.raises(HfHubHTTPError) as refused:
            read()
        assert refused.value.response.status_code == status
        # an unknown token is another error than an unknown repository
        assert isinstance(refused.value, RepositoryNotFoundError) == (token != "hf_bad")


def test_missing_files_revisions_and_repositories_raise(api, toy, folder, tmp_path):
    options = {"cache_dir": tmp_path / "cache"}
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download("someone/toy", "nothing.json", **options)
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree("someone/toy", "nothing"))
    for revision in ("nothing", "0" * 40):
        with pytest.raises(RevisionNotFoundError):
            api.hf_hub_download("someone/toy", "config.json", revision=revision, **options)
        with pytest.raises(RevisionNotFoundError):
            api.snapshot_download("someone/toy", revision=revision, **options)
    with pytest.raises(RevisionNotFoundError):
        api.upload_folder(repo_id="someone/toy", folder_path=folder, revision="nothing")
    for missing in ("someone/nothing", "nobody/toy"):
        with pytest.raises(RepositoryNotFoundError):
            api.hf_hub_download(missing, "config.json", **options)
        with pytest.raises(RepositoryNotFoundError):
            api.upload_folder(repo_id=missing, folder_path=folder)
    with pytest.raises(RepositoryNotFoundError):
        api.dataset_info("someone/toy")


def test_unclosed_card_and_oversized_files_are_refused(api, toy, folder, hub):
    (folder / "README.md").write_text("---\ntags: [one]\n# A model\n")
    with pytest.raises(ValueError, match="metadata without an end"):
        api.upload_folder(repo_id="someone/toy", folder_path=folder)
    (folder / "README.md").unlink()
    hub.max_size = 1000
    with pytest.raises(ValueError, match="larger than 1000 bytes"):
        api.upload_folder(repo_id="someone/toy", folder_path=folder)
    assert hub.head("someone/toy") == toy
    hub.max_size, hub.large_size = 10**6, 1
    api.upload_folder(repo_id="someone/toy", folder_path=folder)
    assert api.get_paths_info("someone/toy", "config.json")[0].lfs.size == 2


# network faults

# requests that the client retries, and requests that it does not
RETRIED = ["POST .*/preupload/", "POST .*/objects/batch", "PUT", "POST .*/objects/verify"]
NOT_RETRIED = ["POST .*/repos/create", "POST .*/commit/"]


def push(api, folder):
    api.create_repo("someone/toy", exist_ok=True)
    return api.upload_folder(repo_id="someone/toy", folder_path=folder)


@pytest.mark.parametrize("pattern", RETRIED)
@pytest.mark.parametrize("kind", ["status", "cut", "mute"])
def test_client_retries_upload_after_faults(hub, api, toy, folder, kind, pattern):
    fault = hub.fault(kind, pattern, times=2)
    assert push(api, folder).oid == hub.head("someone/toy")
    assert fault.happened == 2
    assert content(folder).items() <= pushed(hub).items()


@pytest.mark.parametrize("pattern", [*RETRIED, *NOT_RETRIED])
@pytest.mark.parametrize("kind", ["status", "cut"])
def test_failed_push_changes_nothing(hub, api, toy, folder, kind, pattern):
    fault = hub.fault(kind, pattern, times=100)
    with pytest.raises((HfHubHTTPError, httpx2.TransportError, RuntimeError)):
        push(api, folder)
    assert fault.happened == 1 if pattern in NOT_RETRIED else fault.happened > 5
    assert hub.head("someone/toy") == toy
    hub.faults.clear()
    assert push(api, folder).oid == hub.head("someone/toy")
    assert content(folder).items() <= pushed(hub).items()


def test_commit_with_lost_response_is_found_on_next_push(hub, api, toy, folder):
    """Find the commit on the next push, because the client did not receive the response."""
    hub.fault("mute", "POST .*/commit/")
    with pytest.raises(httpx2.TransportError):
        push(api, folder)
    head = hub.head("someone/toy")
    assert content(folder).items() <= pushed(hub, revision=head).items()
    assert push(api, folder).oid == head == hub.head("someone/toy")


def test_corrupted_large_files_are_refused(hub, api, toy, folder):
    fault = hub.fault("corrupt", "PUT")
    with pytest.raises(RuntimeError) as refused:
        push(api, folder)
    assert isinstance(refused.value.__cause__, BadRequestError)
    assert fault.happened == 1
    assert hub.head("someone/toy") == toy
    push(api, folder)
    assert content(folder).items() <= pushed(hub).items()


def test_commit_of_lost_large_files_is_refused(hub, api, toy, folder):
    fault = hub.fault("lose", "PUT")
    with pytest.raises(BadRequestError, match=r"LFS object of .* does not exist"):
        push(api, folder)
    assert fault.happened == 1
    assert hub.head("someone/toy") == toy
    push(api, folder)
    assert content(folder).items() <= pushed(hub).items()


def test_aborted_commit_request_changes_nothing(hub, toy):
    """Ignore a shortened body even if it reads like a complete commit."""
    items = [{"key": "header", "value": {"summary": "half"}}]
    items.append({"key": "file", "value": {"path": "half.txt", "content": "aGFsZg==", "encoding": "base64"}})
    body = "".join(json.dumps(item) + "\n" for item in items).encode()
    for length, expected in ((len(body) + 100, b""), (len(body), b"HTTP/1.1 200 OK")):
        head = f"POST /api/models/someone/toy/commit/main HTTP/1.1\r\nContent-Length: {length}\r\n"
        head += "Authorization: Bearer hf_write\r\nConnection: close\r\n\r\n"
        assert hub.head("someone/toy") == toy
        with socket.create_connection(("127.0.0.1", int(hub.address.rsplit(":", 1)[1]))) as connection:
            connection.sendall(head.encode() + body)
            connection.shutdown(socket.SHUT_WR)
            assert connection.makefile("rb").read().startswith(expected)
    assert pushed(hub)["half.txt"] == b"half"


def test_slow_response_times_out(hub, api, toy):
    fault = hub.fault("slow", "GET /api/models", value=0.5)
    with pytest.raises(httpx2.TimeoutException):
        api.model_info("someone/toy", timeout=0.1)
    assert fault.happened == 1
    assert api.model_info("someone/toy", timeout=5).sha == toy


@pytest.mark.parametrize("name", ["config.json", "sub/model.safetensors"])
def test_cut_download_resumes_at_its_offset(hub, api, toy, tmp_path, monkeypatch, name):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100)
    content = bytes(range(250)) * 100
    api.upload_file(repo_id="someone/toy", path_in_repo=name, path_or_fileobj=content)
    hub.fault("cut", "GET /models/|GET .*/resolve/.*config")
    path = api.hf_hub_download("someone/toy", name, cache_dir=tmp_path)
    assert Path(path).read_bytes() == content
    assert hub.requests[-1].headers["Range"] == "bytes=12500-"


def test_download_retries_after_faults(hub, api, toy, tmp_path):
    fault = hub.fault("status", "HEAD", times=3)
    assert Path(api.hf_hub_download("someone/toy", "config.json", cache_dir=tmp_path)).read_bytes() == b"{}"
    assert fault.happened == 3


def test_hub_raises_errors_of_server():
    with pytest.raises(KeyError), Hub() as hub:
        httpx2.put(f"{hub.address}/models/no/one/{'0' * 64}", content=b"")


# killed server

FAULTS = [
    ("die", "POST .*/preupload/"),
    ("die", "POST .*/objects/batch"),
    ("die", "PUT"),
    ("die", "WRITE .*/large/"),
    ("die", "POST .*/objects/verify"),
    ("die", "POST .*/commit/"),
    ("die", "WRITE .*/small/"),
    ("die", "WRITE .*/repository.json"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=[fault[1] for fault in FAULTS])
def test_killed_server_serves_previous_revision_after_restart(folder, tmp_path, monkeypatch, fault):
    with HubProcess(tmp_path / "state") as hub:
        hub.use(monkeypatch, "hf_write")
        push(HfApi(), folder)
    previous = content(folder)
    for name in ("config.json", "model.safetensors", "new.txt"):
        (folder / name).write_bytes(b"new content of " + name.encode())
    with HubProcess(tmp_path / "state", [fault], hub.port) as hub:
        with pytest.raises((httpx2.TransportError, RuntimeError)):
            push(HfApi(), folder)
        assert hub.process.wait(10) == -signal.SIGKILL
    with HubProcess(tmp_path / "state", port=hub.port) as hub:
        downloaded = Path(HfApi().snapshot_download("someone/toy", cache_dir=tmp_path / "cache"))
        assert {path: (downloaded / path).read_bytes() for path in previous} == previous
        assert not (downloaded / "new.txt").exists()
        push(HfApi(), folder)
        downloaded = Path(HfApi().snapshot_download("someone/toy", cache_dir=tmp_path / "cache"))
        assert {path: (downloaded / path).read_bytes() for path in content(folder)} == content(folder)


# loading a model

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


@pytest.mark.parametrize("method", ["folder", pytest.param("push_to_hub", marks=pytest.mark.slow)])
def test_pushed_model_loads_in_clean_process(hub, api, make_model, processor, run, tmp_path, method):
    model, saved = make_model(), tmp_path / "saved"
    environment = hub.environment("hf_read", tmp_path / "home")
    model.save_pretrained(saved)
    processor.save_pretrained(saved)
    if method == "folder":
        api.create_repo("someone/toy", private=True)
        api.upload_folder(repo_id="someone/toy", folder_path=saved)
    else:
        code = "import sys; from modeling_reftr import *; folder, name = sys.argv[1:]; "
        code += "RefTRForVisualGrounding.from_pretrained(folder).push_to_hub(name, private=True); "
        code += "RefTRProcessor.from_pretrained(folder).push_to_hub(name)"
        run("-c", code, saved, "someone/toy", **hub.environment("hf_write", tmp_path / "home_of_author"))
    revision = hub.head("someone/toy")
    # the requested revision is older than this commit
    api.upload_file(repo_id="someone/toy", path_in_repo="config.json", path_or_fileobj=b"{}")
    output = tmp_path / "weights.pt"
    run("-I", "-c", LOAD, "someone/toy", revision, output, cwd=tmp_path, **environment)
    weights = torch.load(output)
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert all(request.token in ("hf_write", "hf_read") for request in hub.requests if not request.large)
