"""A call does not change objects shared by threads: 16 threads get the answers of one thread, bit by bit."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image

from modeling_reftr import RefTRProcessor, VisualGroundingPipeline
from modeling_reftr.modeling_reftr import RefTRModel
from tests.helpers.tiny import trials
from tests.modeling_reftr.test_inference import TIMM, shake
from training_reftr.evaluation import evaluate
from training_reftr.settings import TrainingSettings
from training_reftr.visualization import draw_samples


NUM_THREADS = 16
SHORT = ["the star", "the red circle", "a square left of the star"]
# over 40 tokens and under 64, and over 64
LONG = ["the red star is left of the large blue circle and " * 5 + "it", "the large blue square above the star " * 12]
CAPTION = "the red circle and the green star are left of the large blue square that is above the small square"
PHRASES = ["the red circle", "the green star", "the large blue square", "the small square"]


@pytest.fixture
def model(make_model):
    return shake(make_model(backbone_config=TIMM, predict_masks=True))


@pytest.fixture
def images():
    pixels = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    return [Image.fromarray(pixels), Image.fromarray(pixels.transpose(1, 0, 2))]


def same(found, expected) -> bool:
    """Return whether two results are equal bit by bit, whatever their type."""
    if type(found) is not type(expected):
        return False
    if isinstance(found, torch.Tensor):
        return found.dtype == expected.dtype and torch.equal(found, expected)
    if isinstance(found, Image.Image):
        return found.size == expected.size and found.tobytes() == expected.tobytes()
    if hasattr(found, "items"):
        return list(found) == list(expected) and all(same(found[name], expected[name]) for name in found)
    if isinstance(found, (list, tuple)):
        return len(found) == len(expected) and all(map(same, found, expected))
    return found == expected


def make_questions(model, processor, ground, images) -> list:
    """Return calls of processor, model and pipeline with texts of every length, some with phrases."""
    first, second = images

    def forward(**arguments):
        with torch.no_grad():
            outputs = model(**processor(first, **arguments))
        return dict(outputs), processor.post_process_referring_segmentation(outputs, [first.size[::-1]])

    questions = [lambda text=text: processor(text=text) for text in (*SHORT, *LONG)]
    questions += [lambda text=text: processor(second, [text, *SHORT], padding="max_length") for text in LONG]
    questions += [lambda text=text: processor(first, [text, CAPTION], phrases=[None, PHRASES]) for text in LONG]
    questions += [lambda: processor(first, LONG[1], phrases=["the large blue square", "above the star"])]
    questions += [lambda text=text: forward(text=text) for text in (SHORT[0], LONG[0], [*SHORT, LONG[1]])]
    questions += [lambda: forward(text=CAPTION, phrases=PHRASES)]
    questions += [lambda text=text: ground(first, text=text) for text in (SHORT[0], [*SHORT, LONG[1]])]
    questions += [lambda: ground(first, text=[CAPTION] * 2, phrases=[PHRASES, PHRASES[:2]])]
    questions += [lambda: ground([first, second], text=[SHORT[0], LONG[0]], batch_size=2)]
    return questions


@pytest.mark.row("T1")
def test_concurrent_calls_give_same_answers_as_single_thread(model, tokenizer, processor, images, record_property):
    # some tokenizer files have a truncation limit of their own
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.enable_truncation(max_length=7)
    processor = RefTRProcessor(processor.image_processor, tokenizer)
    model = model.fused_copy()
    ground = VisualGroundingPipeline(model, processor=processor, device="cpu")
    questions = make_questions(model, processor, ground, images)
    expected = [ask() for ask in questions]
    assert all(same(ask(), answer) for ask, answer in zip(questions, expected, strict=True))
    assert not same(expected[0], expected[1])  # the comparison can fail
    calls = trials(20_000, short=320)

    def run(number: int) -> bool:
        index = number * 7 % len(questions)
        return same(questions[index](), expected[index])

    with ThreadPoolExecutor(NUM_THREADS) as threads:
        results = list(threads.map(run, calls))
    record_property("counted", (sum(results), len(results)))
    assert sum(results) == len(results) == len(calls)
    assert tokenizer.backend_tokenizer.truncation is None


def answer_during(work, answer, times: int = 30):
    """Return repeated results of `answer` while another thread repeats `work`."""
    is_over, failures = threading.Event(), []

    def run():
        while not is_over.is_set():
            try:
                work()
            except Exception as error:
                failures.append(error)
                return

    thread = threading.Thread(target=run)
    thread.start()
    try:
        return [answer() for _ in range(times)]
    finally:
        is_over.set()
        thread.join()
        assert not failures, failures


@pytest.mark.parametrize("kind", ["state_dict", "save", "copy", "fused_copy"])
def test_model_gives_same_answer_during_save_or_copy(model, processor, images, tmp_path, kind):
    inputs = processor(images[0], SHORT)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    work = {
        "state_dict": model.state_dict,
        "save": lambda: model.save_pretrained(tmp_path),
        "copy": lambda: copy.deepcopy(model),
        "fused_copy": model.fused_copy,
    }[kind]
    with torch.no_grad():
        expected = dict(model(**inputs))
        answers = answer_during(work, lambda: dict(model(**inputs)))
    assert all(same(answer, expected) for answer in answers)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_cache_text_is_local_to_thread(model, processor, images):
    inputs = processor(images[0], SHORT)
    with torch.no_grad():
        expected = dict(model(**inputs))

        def with_cache():
            with torch.no_grad(), model.cache_text(max_tokens=9):
                for texts in (SHORT, SHORT[::-1], LONG):
                    model(**processor(images[0], texts))

        answers = answer_during(with_cache, lambda: dict(model(**inputs)))
        assert all(same(answer, expected) for answer in answers)  # bit by bit, so not from the other thread's cache
        with model.cache_text() as cache:
            model(**inputs)
            assert model.model._text_cache is cache
            with ThreadPoolExecutor(1) as thread:
                assert thread.submit(lambda: model.model._text_cache).result() is None
                assert copy.deepcopy(model).model._text_cache is None  # a copy is another model
            with model.cache_text() as inner:
                assert model.model._text_cache is inner
            assert model.model._text_cache is cache
        assert model.model._text_cache is None


def test_text_cache_can_be_shared_by_threads(model, processor):
    """The cache is small, so that threads evict each other's texts."""
    texts = [processor(text=text) for text in (*SHORT, *LONG, SHORT)]
    texts = [(inputs["input_ids"], inputs["attention_mask"]) for inputs in texts]
    with torch.no_grad(), model.cache_text(max_tokens=12) as cache:
        expected = [cache.encode(*inputs) for inputs in texts]

        @torch.no_grad()
        def ask(number):
            found = cache(*texts[number % len(texts)])
            torch.testing.assert_close(
                found.pooler_output, expected[number % len(texts)].pooler_output, rtol=0, atol=1e-5
            )

        with ThreadPoolExecutor(NUM_THREADS) as threads:
            list(threads.map(ask, range(300)))
    assert cache.num_tokens == sum(map(len, cache.texts)) <= 12


@pytest.fixture(params=["no", "bf16"])
def accelerator(request):
    """Yield an accelerator, which wraps the forward of a model in mixed precision."""
    AcceleratorState._reset_state(reset_partial_state=True)  # of an earlier test in this process
    yield Accelerator(cpu=True, mixed_precision=request.param)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_evaluation_leaves_training_model_unchanged(make_model, processor, shapes, tmp_path, accelerator):
    """Evaluation and attention images run on a copy: the training model is never called or changed."""
    model = accelerator.prepare(shake(make_model(backbone_config=TIMM)).train())
    own = {id(module) for module in model.modules()}
    calls = []
    model.model.text_backbone.register_forward_pre_hook(lambda module, inputs: calls.append(id(module) in own))
    before = {name: (id(value), value.clone()) for name, value in model.named_parameters()}
    states = []

    def record_state() -> bool:
        states.append((model.training, model.model.backbone.training, model.config._attn_implementation))
        return False

    rows = shapes["test"].select(range(3))
    args = TrainingSettings.from_flat(num_workers=0, evaluation_batch_size=1, output_dir=str(tmp_path))
    attention = model.config._attn_implementation
    assert attention != "eager"
    records = evaluate(model, processor, rows, args, accelerator, "test", record_state)
    draw_samples(model, processor, rows, records, 1, tmp_path, accelerator)
    assert calls
    assert not any(calls)
    assert not record_state()
    assert set(states) == {(True, True, attention)}
    assert len(states) == 4
    assert all(
        (id(value), True) == (before[name][0], torch.equal(value, before[name][1]))
        for name, value in model.named_parameters()
    )
    assert isinstance(model.model, RefTRModel)
