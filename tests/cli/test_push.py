"""Models and Spaces on a local Hub: pushed completely or not at all, and loaded bit by bit in a clean process."""

import json
import shutil
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCard
from PIL import Image
from safetensors.torch import load, load_file, save_file

from modeling_reftr import RefTRForVisualGrounding, RefTRProcessor
from reftr_cli.push import main
from tests.helpers.local_hub import Hub, HubProcess
from tests.helpers.tiny import ROOT, trials
from training_reftr.card import write_card
from training_reftr.publishing import Publisher, push_model
from training_reftr.settings import TrainingSettings


REPOSITORY = "someone/toy"


@pytest.fixture
def hub():
    with Hub() as hub:
        yield hub


@pytest.fixture
def folder(trained, tmp_path):
    """Copy the output folder of a run and add private files to it."""
    folder = tmp_path / "model"
    shutil.copytree(trained[0], folder)
    (folder / ".env").write_text("HF_TOKEN=hf_write")
    (folder / "notes.txt").write_text("mine")
    return folder


def push(run, hub, folder, home, *argv, token="hf_write", **settings):
    command = ("-m", "reftr_cli", "push", "--model", folder, "--repo", REPOSITORY, *argv)
    return run(*command, **hub.environment(token, home), **settings)


def change_weights(folder):
    weights = {name: value + 1 for name, value in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


ASK = """
import json, sys
import torch
from PIL import Image
from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor, pipeline
repository, revision, image, out = sys.argv[1:]
settings = {"revision": revision, "trust_remote_code": True}
model = AutoModelForZeroShotObjectDetection.from_pretrained(repository, **settings)
processor = AutoProcessor.from_pretrained(repository, **settings)
ground = pipeline("visual-grounding", model=repository, **settings)
texts = ["the red circle", "the star"]
with torch.no_grad():
    boxes = model(**processor(Image.open(image), texts)).pred_boxes
weights = {"boxes": boxes, **model.state_dict()}
torch.save(weights, out)
json.dump([answer["box"] for answer in ground(image, text=texts)], sys.stdout)
assert not any(name.startswith("modeling_reftr") for name in sys.modules), "our package was imported"
"""


def test_pushed_model_loads_identically_in_clean_process(run, hub, folder, shapes, tmp_path):
    pushed = json.loads(push(run, hub, folder, tmp_path / "home", "--private").stdout)
    revision = hub.head(REPOSITORY)
    assert pushed == {"repo": REPOSITORY, "revision": revision}
    assert hub.repositories["model", REPOSITORY].private
    assert len(hub.repositories["model", REPOSITORY].commits) == 2  # the Hub's initial commit and one more
    files = hub.files(REPOSITORY)
    assert {"config.json", "model.safetensors", "modeling_reftr.py", "pipeline_reftr.py", "README.md"} <= files.keys()
    assert {"recipe.yaml", "metrics.json", "predictions.png", "processor_config.json"} <= files.keys()
    assert not {".env", "notes.txt"} & files.keys()
    assert not any(name.startswith("checkpoints") for name in files)
    for name, content in files.items():
        if name != ".gitattributes":
            assert (folder / name).read_bytes() == content
    # the next push changes the main branch, but not the requested revision
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dropout": 0.25}))
    push(run, hub, folder, tmp_path / "home")
    assert hub.head(REPOSITORY) != revision

    image = tmp_path / "image.png"
    shapes["test"][0]["image"].save(image)
    home = hub.environment("hf_write", tmp_path / "other_home")
    out = tmp_path / "weights.pt"
    result = run("-I", "-c", ASK, REPOSITORY, revision, image, out, cwd=tmp_path, **home)
    loaded = torch.load(out, weights_only=True)
    model, processor = RefTRForVisualGrounding.from_pretrained(folder), RefTRProcessor.from_pretrained(folder)
    texts = ["the red circle", "the star"]
    with torch.no_grad():
        boxes = model(**processor(Image.open(image), texts)).pred_boxes
    assert torch.equal(loaded.pop("boxes"), boxes)
    assert loaded.keys() == model.state_dict().keys()
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())
    assert len(json.loads(result.stdout)) == 2


def test_pushed_card_has_metadata_and_working_snippet(run, hub, folder, shapes, tmp_path):
    push(run, hub, folder, tmp_path / "home")
    card = ModelCard(hub.files(REPOSITORY)["README.md"].decode())
    assert card.data.pipeline_tag == "zero-shot-object-detection"
    assert card.data.library_name == "transformers"
    assert {"visual-grounding", "referring-expression-comprehension"} <= set(card.data.tags)
    metrics = json.loads((folder / "metrics.json").read_text())
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found["accuracy@0.5"] == pytest.approx(metrics["splits"]["test"]["accuracy@0.5"], abs=1e-5)
    (widget,) = card.data.to_dict()["widget"]
    assert widget["src"].endswith(f"{REPOSITORY}/resolve/main/example.png")
    assert "example.png" in hub.files(REPOSITORY)
    snippet = card.text.split("```python\n")[1].split("```")[0]
    assert REPOSITORY in snippet
    shapes["test"][0]["image"].save(tmp_path / "photo.jpg")
    result = run("-I", "-c", snippet, cwd=tmp_path, **hub.environment("hf_read", tmp_path / "reader"))
    assert len(result.stdout.splitlines()) == len(metrics["example"]["texts"])
    assert all("'xmin'" in line for line in result.stdout.splitlines())
    with Image.open(tmp_path / "answers.png") as drawn:
        assert drawn.width >= 320


def test_training_run_pushes_best_and_final_model(run, hub, recipe, tmp_path):
    flags = ("--push_to_hub", REPOSITORY, "--hub_private", "--output_dir", tmp_path / "run")
    result = run("train_reftr.py", recipe, *flags, **hub.environment("hf_write", tmp_path / "home"))
    repository = hub.repositories["model", REPOSITORY]
    assert repository.private
    assert f"Pushed to {REPOSITORY}, revision {hub.head(REPOSITORY)}" in result.stdout
    messages = [commit.message for commit in repository.commits[1:]]
    assert messages[-1] == "Upload model"
    assert messages[:-1]
    assert all(message.startswith("Best model, step ") for message in messages[:-1])
    # the best model was complete and had its own card
    files = hub.files(REPOSITORY, revision=repository.commits[1].oid)
    assert b"Training is not complete" in files["README.md"]
    assert "metrics.json" not in files
    assert load(files["model.safetensors"])
    card = hub.files(REPOSITORY)["README.md"].decode()
    assert "Training is not complete" not in card
    assert "It was initialized from random weights" in card
    # another run with the same settings starts from the pushed recipe
    pushed_recipe = yaml.safe_load(hub.files(REPOSITORY)["recipe.yaml"])
    assert pushed_recipe["dataset"] == "shapes"
    assert not {"output_dir", "data_cache_dir", "push_to_hub"} & pushed_recipe.keys()


def test_dry_run_pushes_nothing(run, hub, recipe, tmp_path):
    flags = ("--push_to_hub", REPOSITORY, "--output_dir", tmp_path / "run", "--dry_run")
    result = run("train_reftr.py", recipe, *flags, **hub.environment("hf_write", tmp_path / "home"))
    assert "The dry run succeeded." in result.stdout
    assert hub.repositories == {}


def test_publisher_waits_for_running_push_before_last_one(hub, folder, monkeypatch):
    hub.use(monkeypatch, "hf_write")
    settings = TrainingSettings.from_flat(output_dir=str(folder), push_to_hub=REPOSITORY)
    publisher = Publisher(settings, SimpleNamespace(is_main_process=True))
    messages = []

    def push_best():
        time.sleep(2)
        messages.extend(commit.message for commit in hub.repositories["model", REPOSITORY].commits)

    publisher.thread = threading.Thread(target=push_best)
    publisher.thread.start()
    publisher.finish()
    publisher.thread.join()
    assert len(messages) == 1
    assert [commit.message for commit in hub.repositories["model", REPOSITORY].commits] == [*messages, "Upload model"]


@pytest.mark.slow
@pytest.mark.row("S10")
def test_token_is_written_to_no_file(run, hub, recipe, tmp_path):
    """Neither pushed files nor files of the run, the client and the Hub contain it."""
    token = "hf_write"
    flags = ("--push_to_hub", REPOSITORY, "--output_dir", tmp_path / "run", "--trackers", "tensorboard")
    result = run("train_reftr.py", recipe, *flags, **hub.environment(token, tmp_path / "home"))
    push(run, hub, tmp_path / "run", tmp_path / "home", "--space", "someone/page")
    assert any(request.token == token for request in hub.requests)
    written = [path for folder in (tmp_path, hub.state) for path in folder.rglob("*") if path.is_file()]
    assert len(written) > 30
    assert [path for path in written if token.encode() in path.read_bytes()] == []
    assert token not in result.stdout + result.stderr


@pytest.mark.parametrize(
    ("token", "reason"),
    [("hf_wrong", "Invalid credentials"), ("hf_read", "write token"), ("hf_other", "rights"), ("", "401")],
)
def test_publisher_refuses_token_without_write_access(hub, monkeypatch, token, reason):
    hub.use(monkeypatch, token)
    main_process = SimpleNamespace(is_main_process=True)
    with pytest.raises(OSError, match=rf"cannot be pushed to, so the run did not start: .*{reason}.*hf auth login"):
        Publisher(TrainingSettings.from_flat(push_to_hub=REPOSITORY), main_process)
    assert hub.repositories == {}


def test_training_without_push_rights_does_not_start(run, hub, recipe, tmp_path):
    flags = ("--push_to_hub", REPOSITORY, "--output_dir", tmp_path / "run")
    result = run("train_reftr.py", recipe, *flags, check=False, **hub.environment("hf_read", tmp_path / "home"))
    assert result.returncode == 1
    assert "the run did not start" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_training_run_with_failing_hub_still_writes_results(run, hub, recipe, tmp_path, monkeypatch):
    """All results are written, and the last line says what was not pushed."""
    hub.fault("status", "POST .*/commit/", times=10_000)
    flags = ("--push_to_hub", REPOSITORY, "--output_dir", tmp_path / "run")
    result = run("train_reftr.py", recipe, *flags, check=False, **hub.environment("hf_write", tmp_path / "home"))
    assert result.returncode == 1
    assert "Training continues." in result.stderr
    assert f"was not pushed to '{REPOSITORY}'" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["splits"]
    assert REPOSITORY not in (tmp_path / "run" / "README.md").read_text()
    assert len(hub.repositories["model", REPOSITORY].commits) == 1
    hub.faults.clear()
    hub.use(monkeypatch, "hf_write")
    main(["--model", str(tmp_path / "run"), "--repo", REPOSITORY])
    assert "model.safetensors" in hub.files(REPOSITORY)


def test_failed_push_resumes_without_uploading_weights_again(hub, folder, monkeypatch):
    hub.use(monkeypatch, "hf_write")
    write_card(folder, REPOSITORY)
    first = push_model(folder, REPOSITORY)
    change_weights(folder)
    monkeypatch.setattr("training_reftr.hub.WAITS", ())
    fault = hub.fault("status", "POST .*/commit/", times=10_000)
    with pytest.raises(OSError, match="is complete, but was not pushed"):
        push_model(folder, REPOSITORY)
    assert fault.happened
    assert hub.head(REPOSITORY) == first
    hub.faults.clear()
    hub.requests.clear()
    second = push_model(folder, REPOSITORY)
    assert second == hub.head(REPOSITORY) != first
    assert hub.files(REPOSITORY)["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    # the weights had been uploaded already
    assert not [request for request in hub.requests if request.method == "PUT"]
    # pushing again changes nothing
    assert push_model(folder, REPOSITORY) == second


def test_push_keeps_unrelated_files(hub, folder, monkeypatch):
    hub.use(monkeypatch, "hf_write")
    write_card(folder, REPOSITORY)
    push_model(folder, REPOSITORY)
    HfApi().upload_file(path_or_fileobj=b"mine", path_in_repo="notes/mine.txt", repo_id=REPOSITORY)
    push_model(folder, REPOSITORY)
    assert hub.files(REPOSITORY)["notes/mine.txt"] == b"mine"


def test_push_deletes_files_missing_from_folder(hub, folder, monkeypatch):
    hub.use(monkeypatch, "hf_write")
    write_card(folder, REPOSITORY)
    push_model(folder, REPOSITORY)
    assert "predictions.png" in hub.files(REPOSITORY)
    (folder / "predictions.png").unlink()
    push_model(folder, REPOSITORY)
    assert "predictions.png" not in hub.files(REPOSITORY)
    assert ".gitattributes" in hub.files(REPOSITORY)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "processor_config.json", "modeling_reftr.py"])
def test_push_refuses_incomplete_folder(hub, folder, monkeypatch, missing):
    hub.use(monkeypatch, "hf_write")
    write_card(folder)
    (folder / missing).unlink()
    with pytest.raises(OSError, match=rf"not a complete RefTR folder .*: it lacks {missing.split('.')[0]}"):
        push_model(folder, REPOSITORY)
    assert hub.repositories == {}


@pytest.mark.slow
def test_hub_killed_during_push_serves_previous_model(folder, tmp_path):
    """The server is killed at different moments of an upload and started again."""
    state = tmp_path / "hub"
    moments = ["POST .*/preupload/", "/objects/batch", "PUT", "WRITE .*/large/", "POST .*/commit/", "WRITE .*/small/"]
    moments += ["WRITE .*repository.json", "POST .*/repos/create", "PUT", "POST .*/commit/"]
    write_card(folder, REPOSITORY)
    command = (
        "import sys, types; import training_reftr.hub as u; u.WAITS = (); "
        "import huggingface_hub.utils._http as http; http.time = types.SimpleNamespace(sleep=lambda seconds: None); "
        "from training_reftr.publishing import push_model; sys.stdout.write(push_model(sys.argv[1], sys.argv[2]))"
    )

    def push_to(hub):
        environment = hub.environment("hf_write", tmp_path / "home")
        argv = [sys.executable, "-c", command, str(folder), REPOSITORY]
        return subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)

    with HubProcess(state) as hub:
        assert push_to(hub).returncode == 0
    for trial in trials(10, 1):
        change_weights(folder)
        (folder / "report.md").write_text(f"# trial {trial}\n")
        with Hub(state) as before:
            served, head = before.files(REPOSITORY), before.head(REPOSITORY)
        with HubProcess(state, faults=[("die", moments[trial % len(moments)])]) as hub:
            result = push_to(hub)
            died = hub.process.poll() is not None or hub.process.wait(10) is not None
        assert died
        assert result.returncode == 1
        with Hub(state) as after:
            assert after.head(REPOSITORY) == head
            assert after.files(REPOSITORY) == served
        with HubProcess(state) as hub:
            assert push_to(hub).returncode == 0
        with Hub(state) as after:
            assert after.files(REPOSITORY)["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_push_creates_space_for_model(hub, folder, monkeypatch):
    hub.use(monkeypatch, "hf_write")
    main(["--model", str(folder), "--repo", REPOSITORY, "--space", "someone/page", "--private"])
    space = hub.repositories["space", "someone/page"]
    assert (space.sdk, space.private) == ("gradio", True)
    assert space.variables == {"REFTR_MODEL": REPOSITORY}
    files = hub.files("someone/page", "space")
    for path in (ROOT / "demo").iterdir():
        if path.is_file() and path.name != "README.md":
            assert files[path.name] == path.read_bytes()
    card = yaml.safe_load(files["README.md"].decode().split("---")[1])
    assert card["models"] == [REPOSITORY]
    assert card["app_file"] in files


@pytest.mark.parametrize("caller", ["command", "end_of_training"])
@pytest.mark.parametrize("card", [None, "# Mine\n", "earlier"])
def test_failed_push_leaves_folder_unchanged(hub, folder, monkeypatch, caller, card):
    """The card in the folder names the repository only once a push has succeeded."""
    monkeypatch.setattr("training_reftr.hub.WAITS", ())
    (folder / "README.md").unlink()
    if card == "earlier":
        write_card(folder)
    elif card is not None:
        (folder / "README.md").write_text(card)
    before = content_of(folder)

    def push_by_caller():
        if caller == "command":
            main(["--model", str(folder), "--repo", REPOSITORY])
        else:
            settings = TrainingSettings.from_flat(output_dir=str(folder), push_to_hub=REPOSITORY)
            publisher = Publisher(settings, SimpleNamespace(is_main_process=True))
            hub.fault("status", "POST .*/commit/", times=10_000)
            publisher.finish()

    hub.use(monkeypatch, "hf_read" if caller == "command" else "hf_write")
    with pytest.raises(OSError, match="was not pushed"):
        push_by_caller()
    assert content_of(folder) == before
    hub.faults.clear()
    hub.use(monkeypatch, "hf_write")
    main(["--model", str(folder), "--repo", REPOSITORY])
    after, pushed = content_of(folder), hub.files(REPOSITORY)
    assert pushed["README.md"] == after["README.md"]
    assert (REPOSITORY.encode() in pushed["README.md"]) == (card != "# Mine\n")
    assert {name for name in after if after[name] != before.get(name)} <= {"README.md"}


def content_of(folder):
    """Return path -> content of the files in a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("folder", r"'someone/page' was not pushed because its model .* was not found on the Hub"),
        ("someone/nothing", r"There is no RefTR at 'someone/nothing', and .* has no such model"),
    ],
)
def test_push_refuses_space_of_model_missing_on_hub(hub, folder, monkeypatch, model, message):
    hub.use(monkeypatch, "hf_write")
    model = str(folder) if model == "folder" else model
    with pytest.raises(OSError, match=message):
        main(["--model", model, "--space", "someone/page"])
    assert hub.repositories == {}


def test_push_without_repository_is_refused(folder):
    with pytest.raises(ValueError, match="A repository is required"):
        main(["--model", str(folder)])


def test_private_push_refuses_public_repository(hub, folder, monkeypatch):
    hub.use(monkeypatch, "hf_write")
    main(["--model", str(folder), "--repo", REPOSITORY])
    head = hub.head(REPOSITORY)
    (folder / "report.md").write_text("secret")
    with pytest.raises(OSError, match="is there and public"):
        main(["--model", str(folder), "--repo", REPOSITORY, "--private"])
    assert hub.head(REPOSITORY) == head
