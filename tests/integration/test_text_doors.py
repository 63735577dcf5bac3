"""Unusual texts are accepted in bounded time or refused with a message at every entry point."""

import contextlib
import io
import json
import logging
import pickle
import random
import re
import time

import datasets
import evaluate
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import data_scripts
import reftr_cli.data as data_command
from data_scripts import reading
from modeling_reftr import VisualGroundingPipeline, text_reftr
from modeling_reftr.drawing_reftr import draw_answers
from reftr_cli import predict
from tests.helpers.layout_flickr30k import boxes_xml
from tests.helpers.layout_reftr_index import save
from tests.helpers.tiny import ROOT, trials
from training_reftr.arguments import parse_arguments
from training_reftr.augmentation import mirror_sentence
from training_reftr.data import GroundingCollator
from training_reftr.settings import TrainingSettings
from training_reftr.sources import load_rows
from training_reftr.tokenizer_training import all_sentences, train_tokenizer


ACCEPTED = {
    "controls": "the \x01\x07\x1b[31m\x7f\x85 cup",
    "line ends": "the\u2028red\u2029\r\n\x0b\x0c cup",
    "byte order mark": "\ufeffthe cup\ufeff",
    "right to left": "the \u202ered\u202c \u2066cup\u2069",
    "combining marks": "the cup" + "\u0301" * 50_000,
    "joiners": "the cup \U0001f469" + "\u200d\U0001f469" * 20_000,
    "tags": "the cup" + "\U000e0061" * 50_000,
    "not characters": "the \ufffe\uffff\U0010ffff cup",
    "one word": "x" * 99_900,
    "longest": "the cup " * 12_480,
}
REFUSED = {
    "half of a pair": "the \ud83d cup",
    "the other half": "the \udcff cup",
    "pair in the wrong order": "\udc80\ud800 cup",
    "NUL": "the \0 cup",
    "10 MB of text": "the cup " * 1_250_000,
    "10 MB of one word": "x" * 10_000_000,
    "10 MB of marks": "e" + "\u0301" * 5_000_000,
    "10 MB of spaces": "the cup" + " " * 10_000_000 + "is red",
    "empty": "",
    "spaces": " \t\u3000 ",
    "invisible": "\u200b\ufeff\u2060\x01",
    "bytes": b"the cup",
    "nothing": None,
    "number": 7,
    "not a number": float("nan"),
    "true": True,
    "mapping": {"text": "the cup"},
    "nested list": [[["the cup"]]],
}
# without the scorecard only the first ones are tried
TEXTS = {
    "half of a pair": REFUSED["half of a pair"],
    "controls": ACCEPTED["controls"],
    **ACCEPTED,
    **REFUSED,
}
BOX = [8.0, 8.0, 24.0, 24.0]
MAX_SECONDS = 30
MAX_MESSAGE = 2_000


class CannotHold(Exception):
    """A file of this kind cannot contain such a value."""


def to_json(value) -> str:
    if isinstance(value, bytes):
        raise CannotHold
    return json.dumps(value)


def save_image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 48), "gray").save(path)


def write_refcoco(folder, text):
    save_image(folder / "images" / "train2014" / "COCO_train2014_000000000001.jpg")
    (folder / "refcoco").mkdir()
    instances = {
        "images": [{"id": 1, "width": 64, "height": 48}],
        "annotations": [{"id": 5, "image_id": 1, "category_id": 1, "bbox": [8, 8, 16, 16]}],
        "categories": [{"id": 1, "name": "cup"}],
    }
    (folder / "refcoco" / "instances.json").write_text(json.dumps(instances))
    refs = [{"ann_id": 5, "image_id": 1, "split": "train", "sentences": [{"sent": text, "sent_id": 3}]}]
    (folder / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps(refs, 2))
    return "refcoco_unc", "refs(unc).p"


def write_category(folder, text):
    write_refcoco(folder, "the cup")
    path = folder / "refcoco" / "instances.json"
    path.write_text(path.read_text().replace('"cup"', to_json(text)))
    return "refcoco_unc", "instances.json"


def write_flickr30k(folder, caption="[/EN#7/other the cup] .", chain="7"):
    for name in ("Annotations", "Sentences"):
        (folder / name).mkdir(parents=True)
    for image_id, split in (("1", "train"), ("2", "val"), ("3", "test")):
        save_image(folder / "flickr30k-images" / f"{image_id}.jpg")
        (folder / f"{split}.txt").write_text(f"{image_id}\n")
        (folder / "Sentences" / f"{image_id}.txt").write_text("[/EN#7/other the cup] .\n")
        (folder / "Annotations" / f"{image_id}.xml").write_text(boxes_xml(64, 48, [(["7"], (8, 8, 24, 24))]))
    (folder / "Sentences" / "1.txt").write_bytes(f"{caption}\n".encode("utf-8", "surrogatepass"))
    xml = boxes_xml(64, 48, [(["7", chain], (8, 8, 24, 24))])
    (folder / "Annotations" / "1.xml").write_bytes(xml.encode("utf-8", "surrogatepass"))


def write_caption(folder, text):
    if not isinstance(text, str) or "\n" in text:  # a line break ends a caption
        raise CannotHold
    write_flickr30k(folder, caption=f"[/EN#7/other {text.replace('[', '').strip()}] .")
    return "flickr30k_entities", "Sentences/1.txt" if reading.has_words(text) else "Sentences"


def write_chain(folder, text):
    if not isinstance(text, str):
        raise CannotHold
    write_flickr30k(folder, chain=text)
    return "flickr30k_entities", "1.xml"


def write_index(folder, text):
    save_image(folder / "flickr30k" / "f30k_images" / "1.jpg")
    for split in ("train", "val", "test"):
        records = [("1.jpg", [1, 2, 30, 20], text if split == "train" else "the cup")]
        save(records, folder / "annotations_resc" / "flickr" / f"flickr_{split}.pth", legacy=False)
    return "resc_flickr", "flickr_train.pth"


def write_index_phrases(folder, text):
    save_image(folder / "flickr30k" / "f30k_images" / "1.jpg")
    for split in ("train", "val", "test"):
        phrase = text if split == "train" else "the cup"
        records = [
            ("1.jpg", [0], [[1, 2, 30, 20]], [phrase], None, f"{phrase} ." if isinstance(phrase, str) else "cup")
        ]
        save(records, folder / "annotations" / "flickr" / f"flickr_{split}.pth", legacy=False)
    return "reftr_flickr", "flickr_train.pth"


def write_jsonl(folder, text):
    save_image(folder / "1.png")
    save_image(folder / "2.png")
    first = {"image": "2.png", "expressions": [{"text": "the lamp", "box": BOX}]}
    line = f'{{"image": "1.png", "expressions": [{{"text": {to_json(text)}, "box": {BOX}}}]}}'
    (folder / "train.jsonl").write_text(f"{json.dumps(first)}\n{line}\n")
    return "jsonl", "train.jsonl, line 2"


def write_jsonl_phrase(folder, text):
    save_image(folder / "1.png")
    phrases = f'[{{"text": {to_json(text)}, "box": {BOX}}}]'
    caption = to_json(f"{text} ." if isinstance(text, str) else "the cup")
    line = f'{{"image": "1.png", "expressions": [{{"text": {caption}, "phrases": {phrases}}}]}}'
    (folder / "train.jsonl").write_text(f"{line}\n")
    return "jsonl", "train.jsonl, line 1"


def write_visual_genome(folder, text):
    save_image(folder / "VG_100K" / "1.jpg")
    region = f'{{"region_id": 4, "phrase": {to_json(text)}, "x": 8, "y": 8, "width": 16, "height": 16}}'
    (folder / "region_descriptions.json").write_text(f'[{{"id": 1, "regions": [{region}]}}]')
    images = [{"image_id": 1, "width": 64, "height": 48, "coco_id": None}]
    (folder / "image_data.json").write_text(json.dumps(images))
    return "visual_genome", "region_descriptions.json"


FILES = {
    "refs": write_refcoco,
    "categories": write_category,
    "captions": write_caption,
    "chains": write_chain,
    "index": write_index,
    "phrases of an index": write_index_phrases,
    "jsonl": write_jsonl,
    "phrases of jsonl": write_jsonl_phrase,
    "regions": write_visual_genome,
}
# caption files fall back to Latin-1, XML cannot contain control characters, and a category may be blank
EITHER_WAY = {
    "captions": {"half of a pair", "the other half", "pair in the wrong order"},
    "chains": {*ACCEPTED, "empty", "spaces", "invisible"},
    "categories": {"empty", "spaces", "invisible"},
}


def run_data_command(*argv):
    """Run a command of `reftr data` in this process, and check that its output is printable."""
    logger, written = logging.getLogger("data_scripts"), io.StringIO()
    handlers = list(logger.handlers)
    try:
        with contextlib.redirect_stdout(written):
            data_command.main([str(word) for word in argv])
    finally:
        logger.handlers[:] = handlers
    assert all(character.isprintable() or character in "\n\t" for character in written.getvalue())


def build(folder, name):
    """Build, stream and combine a dataset, also by command; raise their common error if there is one."""
    messages, settings = set(), {"data_dir": str(folder), "cache_dir": str(folder / "cache")}
    for read in (
        lambda: data_scripts.load(name, **settings),
        lambda: list(data_scripts.load(name, streaming=True, decode=False, **settings)["train"]),
        lambda: run_data_command("build", name, "--data_dir", folder, "--cache_dir", folder / "cache"),
        lambda: run_data_command("stats", name, "--data_dir", folder, "--cache_dir", folder / "cache"),
        lambda: data_scripts.combine([name], **settings),
    ):
        try:
            read()
            messages.add(None)
        except (ValueError, OSError) as error:
            messages.add(type(error)(str(error).split(" Left out or changed")[0]))
    found = {str(message) for message in messages}
    assert len(found) == 1, found
    if (message := messages.pop()) is not None:
        raise message


def judge(name: str, ask, mentioned=(), either_way=()) -> str | None:
    """Give a text to an entry point; return what is wrong with its behavior. Its message must contain `mentioned`."""
    start, message = time.monotonic(), None
    try:
        ask(TEXTS[name])
    except CannotHold:
        return None
    except Exception as error:
        if isinstance(error, UnicodeError) or not isinstance(error, ValueError | OSError):
            return f"{type(error).__name__}: {error}"[:300]
        message = str(error)
    if time.monotonic() - start > MAX_SECONDS:
        return f"took {time.monotonic() - start:.0f} s"
    if name not in either_way and (message is None) != (name in ACCEPTED):
        return "accepted" if message is None else f"refused: {message[:300]}"
    if message is None:
        return None
    is_readable = len(message) <= MAX_MESSAGE and message.replace("\n", "").isprintable()
    if not is_readable or not all(mention in message for mention in mentioned):
        return f"{len(message)} characters without {mentioned}: {message[:300]!r}"
    return None


def check_count(failures: list, number: int, record_property):
    """Record how many of a number of trials passed, and assert that none failed."""
    record_property("counted", (number - len(failures), number))
    assert failures == []


def names_to_try() -> list[str]:
    """Return the names of all texts for the scorecard, else of the first ones."""
    return [list(TEXTS)[index] for index in trials(len(TEXTS), short=2)]


@pytest.mark.row("S14")
@pytest.mark.parametrize("file", FILES)
def test_text_in_dataset_file_is_accepted_or_refused_with_file(file, tmp_path, record_property):
    failures = []
    for number, name in enumerate(names_to_try()):
        folder, mentioned = tmp_path / str(number), []
        folder.mkdir()

        def ask(text, folder=folder, mentioned=mentioned):
            dataset, mention = FILES[file](folder, text)
            mentioned.append(mention)
            build(folder, dataset)

        if fault := judge(name, ask, mentioned, EITHER_WAY.get(file, ())):
            failures.append((name, fault))
    check_count(failures, len(names_to_try()), record_property)


def make_row(text) -> dict:
    end = len(text) if isinstance(text, str) else 7
    return {
        "image_id": "1",
        "image": Image.new("RGB", (64, 48), "gray"),
        "width": 64,
        "height": 48,
        "objects": [{"object_id": "1", "box": BOX, "boxes": [BOX], "category": None, "segmentation": None}],
        "sentences": [
            {"sentence_id": "1", "text": text, "phrases": [{"start": 0, "end": end, "objects": [0], "types": []}]}
        ],
        "positions": None,
    }


def write_parquet(folder, text):
    """Write a folder of Parquet files as another program may, also with bytes that are not UTF-8."""
    if not isinstance(text, str | None):
        raise CannotHold
    content = b"" if text is None else text.encode("utf-8", "surrogatepass")
    stand_in = None if text is None else "z" * len(content)
    rows = datasets.Dataset.from_list([make_row("the cup"), make_row(stand_in)], features=data_scripts.FEATURES)
    (folder / "data").mkdir(parents=True)
    path = folder / "data" / "train-00000-of-00001.parquet"
    table = rows.with_format("arrow")[:]
    pq.write_table(table, path, compression="none", use_dictionary=False, write_statistics=False)
    if stand_in:
        before = path.read_bytes()
        assert before.count(stand_in.encode()) == 1
        path.write_bytes(before.replace(stand_in.encode(), content))


def read_parquet(folder, text):
    """Read built and streamed rows as training does, and train a tokenizer on them."""
    write_parquet(folder, text)
    messages = []
    for streaming in (False, True):
        settings = {"validation_split": "none", "test_splits": "none"} if streaming else {}
        args = TrainingSettings.from_flat(
            dataset=str(folder),
            data_cache_dir=str(folder / "cache"),
            output_dir=str(folder / "run"),
            streaming=streaming,
            **settings,
        )
        try:
            rows = load_rows(args.data)
            tokenizer = train_tokenizer(all_sentences(rows["train"]), max_length=64)
            tokenizer.save_pretrained(folder / "tokenizer")
            messages.append(None)
        except (ValueError, OSError) as error:
            messages.append(str(error))
    # a stream converts several rows at once, so that it may name an earlier image
    assert len({message and re.sub(r"image \S+ or after it", "", message) for message in messages}) == 1, messages
    if messages[0] is not None:
        raise ValueError(messages[0])


@pytest.mark.row("S14")
def test_text_in_parquet_is_accepted_or_refused_with_image(tmp_path, record_property):
    failures = []
    for number, name in enumerate(names_to_try()):
        folder = tmp_path / str(number)
        if fault := judge(name, lambda text, folder=folder: read_parquet(folder, text), [f"{folder}", "image '1'"]):
            failures.append((name, fault))
    check_count(failures, len(names_to_try()), record_property)


@pytest.mark.row("S14")
def test_export_keeps_accepted_texts_unchanged(tmp_path, record_property):
    names = [name for name in names_to_try() if name in ACCEPTED]
    failures = []
    for number, name in enumerate(names):
        folder = tmp_path / str(number)
        folder.mkdir()
        write_jsonl(folder, ACCEPTED[name])
        settings = ("--data_dir", folder, "--cache_dir", folder / "cache")
        run_data_command("export", "jsonl", *settings, "--output", folder / "exported")
        run_data_command("check", "jsonl", *settings)
        run_data_command("preview", "jsonl", *settings, "--output", folder / "preview.png")
        rows = datasets.load_dataset(str(folder / "exported"), split="train", cache_dir=str(folder / "cache2"))
        if rows[1]["sentences"][0]["text"] != ACCEPTED[name]:
            failures.append(name)
    check_count(failures, len(names), record_property)


def answer_with_cache(ground, image, text):
    with torch.no_grad(), ground.model.cache_text():
        for _ in range(2):
            ground.model(**ground.processor(image, text))


def collate(processor, text):
    return GroundingCollator(processor)([make_row(text)])


def mirror_and_collate(processor, text):
    """Augment and encode a row, as training does."""
    collate(processor, text)
    row = make_row(text)
    sentence = mirror_sentence({**row["sentences"][0], "text": f"{text} on the left"})
    assert sentence is None or len(sentence["text"]) == len(text) + 13


def make_doors(ground):
    processor, image = ground.processor, Image.new("RGB", (64, 48), "gray")
    return {
        "processor": lambda text: processor(image, text),
        "processor, without images": lambda text: processor(text=text),
        "processor, list": lambda text: processor(image, ["the lamp", text]),
        "processor, nested": lambda text: processor([image, image], [["the lamp"], [text]]),
        "processor, fixed length": lambda text: processor(image, text, padding="max_length"),
        "processor, phrase": lambda text: processor(
            image, f"{text} ." if isinstance(text, str) and len(text) < 99_999 else text, phrases=[text]
        ),
        "pipeline": lambda text: ground(image, text=text),
        "pipeline, question": lambda text: ground({"image": image, "text": ["the lamp", text]}),
        "pipeline, questions": lambda text: ground([{"image": image, "text": text}]),
        "pipeline, columns": lambda text: ground({"image": [image, image], "text": ["the lamp", text]}),
        "pipeline, generator": lambda text: list(ground(iter([{"image": image, "text": text}]))),
        "pipeline, drawing": lambda text: ground.draw(image, ground(image, text=text)),
        "text cache": lambda text: answer_with_cache(ground, image, text),
        "training": lambda text: mirror_and_collate(processor, text),
    }


@pytest.fixture
def ground(make_model, processor):
    return VisualGroundingPipeline(make_model(), processor=processor, device="cpu")


@pytest.mark.row("S14")
def test_text_in_call_is_accepted_or_refused(ground, record_property):
    failures, doors = [], make_doors(ground)
    for name in names_to_try():
        # every entry point for one text, list, nested list or phrase
        failures += [(name, door, fault) for door, ask in doors.items() if (fault := judge(name, ask))]
    check_count(failures, len(names_to_try()) * len(doors), record_property)


@pytest.mark.row("S14")
def test_draw_answers_draws_or_refuses_labels(record_property):
    """Draw blank labels, too, which the pipeline never returns."""
    blank = {"empty", "spaces", "invisible"}
    failures = [
        (name, fault)
        for name in names_to_try()
        if (fault := judge(name, lambda text: draw_answers(Image.new("RGB", (64, 48)), [BOX], [text]), (), blank))
    ]
    check_count(failures, len(names_to_try()), record_property)


def ask_in_file(folder, text, capsys):
    """Run predict on a file of three questions, the second with the text, and check the answers of the others."""
    for name in ("1.png", "2.png", "3.png"):
        save_image(folder / name)
    lines = [
        f'{{"image": "{n}.png", "text": {value}}}' for n, value in enumerate(['["the cup"]', to_json(text), '"a"'], 1)
    ]
    (folder / "questions.jsonl").write_text("\n".join(lines))
    arguments = ["--model", folder / "model", "--image", folder / "questions.jsonl", "--output", folder / "drawn"]
    capsys.readouterr()
    with contextlib.suppress(ValueError):
        predict.main([str(word) for word in arguments])
    written = capsys.readouterr().out
    assert written.replace("\n", "").isprintable()
    first, second, third = map(json.loads, written.splitlines())
    assert len(first["answers"]) == len(third["answers"]) == 1
    if "error" in second:
        raise ValueError(second["error"])


@pytest.mark.row("S14")
def test_refused_text_in_questions_file_keeps_other_answers(ground, tmp_path, capsys, record_property):
    ground.model.save_pretrained(tmp_path / "model")
    ground.processor.save_pretrained(tmp_path / "model")
    failures = []
    for name in names_to_try():
        if fault := judge(name, lambda text: ask_in_file(tmp_path, text, capsys), ["questions.jsonl', line 2"]):
            failures.append((name, fault))
    check_count(failures, len(names_to_try()), record_property)


@pytest.mark.row("S14")
def test_text_on_space_page_is_accepted_or_refused(ground, tmp_path, record_property):
    """Split a text into expressions by line, cut long ones and omit blank ones, as the page does."""
    pytest.importorskip("gradio", reason="the page needs gradio: pip install gradio")
    from tests.helpers.space_app import import_app

    ground.model.save_pretrained(tmp_path / "model")
    ground.processor.save_pretrained(tmp_path / "model")
    save_image(tmp_path / "1.png")
    space = import_app()
    answerer, failures = space.Answerer(str(tmp_path / "model")), []

    def ask(text):
        expressions, _ = space.read_expressions(text)
        answers = answerer.answer(str(tmp_path / "1.png"), expressions)[1]
        # the label and its alias have 512 characters each, of up to 12 in JSON
        assert len(json.dumps(answers)) < 2 * 12 * 512 + 1000

    failures = [
        (name, fault)
        for name in names_to_try()
        if (fault := judge(name, ask, (), {name for name in REFUSED if name.startswith("10 MB")}))
    ]
    check_count(failures, len(names_to_try()), record_property)


METRICS = {
    "boxes": ("referring_expression_comprehension", lambda text: text),
    "box": ("referring_expression_comprehension", lambda text: [text]),
    "side": ("referring_expression_comprehension", lambda text: [[0, 0, 1, text]]),
    "masks": ("referring_segmentation", lambda text: text),
    "mask": ("referring_segmentation", lambda text: [text]),
    "counts": ("referring_segmentation", lambda text: [{"size": [2, 2], "counts": text}]),
    "size": ("referring_segmentation", lambda text: [{"size": text, "counts": "13"}]),
    "answers": ("generalized_referring_comprehension", lambda text: text),
    "scores": ("generalized_referring_comprehension", lambda text: [{"boxes": [[0, 0, 1, 1]], "scores": text}]),
    "presences": ("grounding_presence", lambda text: text),
    "presence": ("grounding_presence", lambda text: [text]),
}


@pytest.mark.row("S14")
def test_text_in_metrics_is_refused(record_property, tmp_path):
    """Refuse every text as box or mask; an empty text is an empty list."""
    failures, names = [], names_to_try()
    for door, (metric, values) in METRICS.items():
        metric = evaluate.load(str(ROOT / "metrics" / metric), cache_dir=str(tmp_path))
        for name in names:

            def ask(text, metric=metric, values=values):
                metric.compute(predictions=values(text), references=values(text))

            if fault := judge(name, ask, (), {"empty", *ACCEPTED, "true", "number"}):
                failures.append((name, door, fault))
    check_count(failures, len(names) * len(METRICS), record_property)


@pytest.mark.row("S14")
def test_text_in_recipe_or_argv_is_accepted_or_refused(tmp_path, record_property):
    """Accept any text that can be a file name, because many settings name files."""
    other = {*ACCEPTED, *(name for name in REFUSED if name not in SPELLED)}
    failures = []
    for name in names_to_try():

        def ask(text):
            (tmp_path / "recipe.yaml").write_text(f"dataset: shapes\ntokenizer: {to_json(text)}\n")
            parse_arguments([str(tmp_path / "recipe.yaml")])

        def pass_as_argument(text):
            if not isinstance(text, str):
                raise CannotHold
            (tmp_path / "other.yaml").write_text("dataset: shapes\n")
            parse_arguments([str(tmp_path / "other.yaml"), "--tokenizer", text])

        for door, take, mention in (("recipe", ask, "recipe.yaml"), ("command line", pass_as_argument, "--tokenizer")):
            if fault := judge(name, take, [mention] if name in SPELLED else [], other):
                failures.append((name, door, fault))
    check_count(failures, 2 * len(names_to_try()), record_property)


SPELLED = {name for name, text in REFUSED.items() if isinstance(text, str) and text.strip() and name != "invisible"}


def check_result(function, text) -> str | None:
    try:
        return None if function(text, "text") is text else "changed"
    except ValueError as error:
        return str(error)


def test_both_packages_accept_same_texts():
    """Compare the copies: modeling_reftr is uploaded to the Hub without data_scripts, so they share no code."""
    assert reading.MAX_CHARACTERS == text_reftr.MAX_CHARACTERS
    rng = random.Random(0)
    letters = "a \0\x01\n\x7f\x80\x85\xa0\u0301\u200b\u2028\u202e\ud7ff\ue000\ufeff\ufffd\uffff\U00010000"
    letters += "\ud800\udbff\udc00\udfff"
    texts = [*ACCEPTED.values(), *REFUSED.values(), *map(chr, range(0x3000)), *map(chr, range(0xD700, 0x10100))]
    texts += ["".join(rng.choices(letters, k=rng.randint(0, 12))) for _ in range(3000)]
    texts += ["".join(rng.choices(letters[:1] + letters[4:6], k=100_000 + more)) for more in (-1, 0, 1)]
    refused = 0
    for text in texts:
        first, second = check_result(reading.check_text, text), check_result(text_reftr.check_text, text)
        assert (first is None) == (second is None), repr(text)[:100]
        if first is None:
            assert reading.has_words(text) == (not text_reftr.is_blank(text)), repr(text)[:100]
        else:
            refused += 1
            assert second.startswith(first.rstrip(".")), repr(text)[:100]
    assert 2000 < refused < len(texts) - 2000
