"""Hostile names, types and texts of user data are shown literally in reports, cards and terminals."""

import html.parser
import json
import logging
import re
import shutil

import pytest
import yaml
from huggingface_hub import DatasetCard, ModelCard
from markdown_it import MarkdownIt
from PIL import Image

import reftr_cli.data as data_command
from data_scripts.escaping import TerminalFormatter, for_code, for_markdown, for_terminal
from data_scripts.exporting import write_dataset_card
from data_scripts.loading import SOURCES
from modeling_reftr import RefTRConfig
from reftr_cli import predict
from tests.helpers.tiny import ROOT, TINY_MODEL, TINY_TEXT
from training_reftr.card import MARK, write_card
from training_reftr.recipes import to_recipe
from training_reftr.report import format_metrics, format_report
from training_reftr.settings import TrainingSettings


NAMES = {
    "script": "<script>alert(1)</script>",
    "image": "<img src=x onerror=alert(1)>",
    "table": "a | b | c",
    "lines": "a\n# b\n\n- c",
    "carriage returns": "a\r\n---\r\nb: c",
    "backticks": "a ``` b ` c",
    "link": "x](javascript:alert(1)) [y](http://evil.example)",
    "image link": "![x](http://evil.example/x.png)",
    "reference": "[x]: http://evil.example",
    "braces": "{{ 7 * 7 }} {front_matter} {0}",
    "YAML": "a: b #c, [d] {e}: *f &g !!python/name:os.system",
    "YAML start": "- &a [*a]",
    "document": "---\nlicense: evil\n---",
    "ANSI": "the \x1b[31mred\x1b]0;title\x07 cup",
    "direction": "the \u202ecup\u2066 of \u200btea",
    "end of comment": "--> </script></style></textarea> -->",
    "mark": MARK,
    "entity": "&lt;b&gt; &#60;",
    "emphasis": "*a* _b_ ~~c~~ **d**",
    "backslash": "a \\| b \\",
    "quotes": '"a" \'b\' """ $(c) `d`',
    "other letters": "die größte 猫",
    "autolink": "<http://evil.example>",
}


class Shown(html.parser.HTMLParser):
    """Collect the elements, addresses and texts of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.addresses, self.texts = set(), [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.addresses += [value for name, value in attrs if name in ("href", "src")]
        for name, _ in attrs:
            assert name in ("href", "src", "alt", "class", "style"), name

    def handle_data(self, data):
        self.texts.append(data)


def show(text: str) -> Shown:
    """Render Markdown with embedded HTML, as the Hub does."""
    return Shown(MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(text))


def check_shown(text: str, harmless: str):
    """Check that a page has the structure of the same page with harmless names; return its visible text."""
    shown, expected = show(text), show(harmless)
    assert shown.tags == expected.tags
    assert shown.addresses == expected.addresses
    tokens, wanted = ([token.type for token in MarkdownIt().enable("table").parse(part)] for part in (text, harmless))
    assert tokens == wanted
    assert for_terminal(text) == text
    return " ".join("".join(shown.texts).split())


def make_metrics(name: str) -> dict:
    """Return metrics of a run with a hostile name wherever there is text."""
    values = {
        "integer_boxes": True,
        "accuracy@0.5": 0.8,
        "mean_iou": 0.7,
        **{f"precision@0.{tenths}": 0.5 for tenths in range(5, 10)},
        "num_phrases": 57,
        "left_out": {f"lines {name}": 3},
    }
    return {
        "model": name,
        "dataset": name,
        "two_step_masks": False,
        "example": {"image": "example.png", "texts": [name, "the tree"]},
        "splits": {name: {**values, "per_kind": {name: values}}},
    }


def visible(name: str) -> str:
    """Return a name as a page shows it."""
    return " ".join(for_terminal(" ".join(name.split())).split())


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_report_escapes_hostile_names(name):
    report = format_report(make_metrics(name))
    text = check_shown(report, format_report(make_metrics("harmless")))
    # in the title, as model, as split and as kind of the tables, and in the list of omissions
    assert text.count(visible(name)) >= 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Save the configuration of a model."""
    folder = tmp_path_factory.mktemp("model")
    RefTRConfig(**TINY_MODEL, text_config=TINY_TEXT).save_pretrained(folder)
    return folder


def make_card(folder, name: str) -> str:
    """Return the card of a folder whose recipe and metrics contain a hostile name."""
    names = ("dataset", "init_text", "init_backbone", "train_split", "validation_split")
    (folder / "recipe.yaml").write_text(
        to_recipe(TrainingSettings.from_flat(**dict.fromkeys(names, name)), [f"from step 7 on: dataset={name}"]),
        encoding="utf-8",
    )
    (folder / "metrics.json").write_text(json.dumps(make_metrics(name)))
    (folder / "example.png").write_bytes(b"")
    (folder / "README.md").unlink(missing_ok=True)
    return write_card(folder, "someone/reftr").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_card_escapes_hostile_names(folder, name):
    card, harmless = ModelCard(make_card(folder, name)), ModelCard(make_card(folder, "harmless"))
    text = check_shown(card.text, harmless.text)
    assert visible(name) in text
    values = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card.content, re.DOTALL)[1])
    assert values.keys() == yaml.safe_load(re.match(r"---\n(.*?)\n---\n", harmless.content, re.DOTALL)[1]).keys()
    assert values["license"] == "apache-2.0"
    assert values["widget"] == [
        {
            "src": "https://huggingface.co/someone/reftr/resolve/main/example.png",
            "candidate_labels": f"{name}, the tree",
        }
    ]
    (first, *_) = card.data.eval_results
    assert first.dataset_split == name
    assert card.data.widget == values["widget"]


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_card_of_converted_model_escapes_hostile_names(folder, name, tmp_path):
    shutil.copy(folder / "config.json", tmp_path)
    pages = []
    for text in (name, "harmless"):
        (tmp_path / "origin.json").write_text(json.dumps({"converted_from": text, "sha256": text}))
        pages.append(ModelCard.load(write_card(tmp_path)).text)
    assert check_shown(*pages).count(visible(name)) == 2


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_card_of_exported_dataset_escapes_hostile_names(shapes, tmp_path, name):
    pages = []
    for text in (name, "harmless"):
        report = {"train": {"left_out": {f"lines of {text}": 2}, "suspected": {f"{text} looks odd": 1}}}
        settings = {"embed": True, "flags": {"exclude": text}, "build_report": report}
        write_dataset_card(tmp_path / "README.md", tmp_path, SOURCES["shapes"], {"test": shapes["test"]}, **settings)
        pages.append(DatasetCard.load(tmp_path / "README.md").text)
    text = check_shown(*pages)
    assert text.count(visible(name)) >= 2


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_data_commands_escape_hostile_names(tmp_path, capsys, name):
    """Print and draw hostile texts and types with the data commands."""
    Image.new("RGB", (64, 48)).save(tmp_path / "1.png")
    phrases = [{"start": 0, "end": len(name), "box": [8, 8, 24, 24], "types": [name], "category": name}]
    line = {"image": "1.png", "image_id": name, "expressions": [{"text": f"{name} here", "phrases": phrases}]}
    (tmp_path / "train.jsonl").write_text(json.dumps(line) + "\n")
    argv = ["jsonl", "--data_dir", str(tmp_path), "--cache_dir", str(tmp_path / "cache")]
    for command in (["stats"], ["check"], ["preview", "--output", str(tmp_path / "preview.png")]):
        data_command.main([command[0], *argv, *command[1:]])
        printed = capsys.readouterr()
        assert for_terminal(printed.out) == printed.out, command
        errors = printed.err.replace("\r", "")  # progress bars use it
        assert for_terminal(errors) == errors, command
    assert Image.open(tmp_path / "preview.png").width > 64


def test_predict_escapes_hostile_texts_in_json(make_model, processor, tmp_path, capsys):
    make_model().save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    Image.new("RGB", (64, 48)).save(tmp_path / "1.png")
    argv = ["--model", str(tmp_path / "model"), "--image", str(tmp_path / "1.png")]
    predict.main([*argv, "--output", str(tmp_path / "out.png"), "--text", *NAMES.values()])
    printed = capsys.readouterr().out
    assert for_terminal(printed) == printed
    assert [answer["phrase"] for answer in json.loads(printed)] == list(NAMES.values())


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_log_and_table_escape_hostile_names(name):
    record = logging.LogRecord("x", logging.WARNING, "x.py", 1, "%s is odd", (name,), None)
    line = TerminalFormatter("%(levelname)s: %(message)s").format(record)
    assert line == f"WARNING: {for_terminal(name)} is odd"
    assert for_terminal(format_metrics(make_metrics(name))).count(for_terminal(name)) >= 2


def test_data_and_train_commands_escape_log_lines(run, tmp_path):
    """Name a hostile dataset, which both commands quote in an error."""
    name = "a\x1b[31m\u202e"
    for command in (("-m", "reftr_cli", "data", "stats", name), ("train_reftr.py", "--dataset", name)):
        result = run(*command, cwd=ROOT, check=False)
        assert result.returncode != 0
        assert "\\x1b[31m" in result.stderr
        assert "\x1b[31m" not in result.stderr + result.stdout


def test_for_code_renders_hostile_names_literally():
    for name in NAMES.values():
        (shown,) = MarkdownIt().parseInline(for_code(name))[0].children
        assert (shown.type, shown.content) == ("code_inline", visible(name).strip())
        assert "\n" not in for_markdown(name)
