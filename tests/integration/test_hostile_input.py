"""Hostile input: the processor refuses it with a message, the model stays finite and masks the phrase."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_reftr import RefTRForVisualGrounding, RefTRProcessor
from modeling_reftr.decoding_reftr import MAX_PIXELS
from modeling_reftr.loss_reftr import grounding_loss


IMAGE = Image.new("RGB", (64, 48), "gray")
TEXT = "the star is left of the circle"
BOX = [8, 8, 24, 24]


def png(width, height):
    """Return a PNG of one bit per pixel, which compresses to a few bytes."""
    content = io.BytesIO()
    Image.new("1", (width, height)).save(content, "PNG")
    return content.getvalue()


@pytest.fixture
def two_phrases(processor):
    return dict(processor(IMAGE, TEXT, phrases=["the star", "the circle"], boxes=[BOX, BOX]))


def check_finite(outputs, model):
    """Assert that outputs, losses and gradients are finite."""
    assert outputs.pred_boxes.isfinite().all()
    assert all(value.isfinite() for value in outputs.loss_dict.values())
    model.zero_grad()
    outputs.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("text", ["x" * 10_000, "the star " * 1_100, "😀😀 the star 😀", "ﷺ", "a", "?!"])
@pytest.mark.row("R4")
def test_strange_text_gives_finite_outputs(processor, make_model, text, attn_implementation):
    model = make_model()
    model.set_attn_implementation(attn_implementation)
    for phrases in (None, [text[:9]]):
        inputs = processor(IMAGE, text, phrases=phrases, boxes=BOX if phrases is None else [BOX])
        check_finite(model(**inputs), model)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.row("R4")
def test_fully_masked_text_or_image_gives_finite_outputs(two_phrases, make_model, attn_implementation):
    """Make masks that the processor never returns: no real token, only special tokens, only padding."""
    model = make_model()
    model.set_attn_implementation(attn_implementation)
    for name in ("attention_mask", "phrase_attention_mask", "pixel_mask"):
        outputs = model(**two_phrases | {name: torch.zeros_like(two_phrases[name])})
        check_finite(outputs, model)
        assert outputs.phrase_mask.any() == (name == "pixel_mask")
    single = {name: value for name, value in two_phrases.items() if not name.startswith("phrase")}
    single["labels"] = [{"boxes": single["labels"][0]["boxes"][:1]}]
    for num_tokens in (0, 1, 2):
        mask = torch.zeros_like(single["attention_mask"])
        mask[:, :num_tokens] = 1
        outputs = model(**single | {"attention_mask": mask})
        check_finite(outputs, model)
        assert not outputs.phrase_mask.any()
    for name in ("attention_mask", "phrase_attention_mask", "pixel_mask"):
        two_phrases[name] = torch.zeros_like(two_phrases[name])
    check_finite(model(**two_phrases), model)


@pytest.mark.parametrize("image_index", [[0, 5], [0, -1], [0, 2**40]])
def test_unknown_image_index_masks_its_sentence(processor, make_model, image_index):
    model = make_model()
    inputs = dict(processor(IMAGE, ["the star", "the circle"], boxes=[BOX, BOX]))
    right = model(**inputs)
    outputs = model(**inputs | {"image_index": torch.tensor(image_index)})
    check_finite(outputs, model)
    assert outputs.phrase_mask.tolist() == [[True], [False]]
    torch.testing.assert_close(outputs.pred_boxes[0], right.pred_boxes[0])


@pytest.mark.parametrize("span", [(5, 50), (50, 60), (4, 2), (3, 3), (-2, 3), (0, 2**40)])
def test_span_outside_sentence_masks_its_phrase(two_phrases, make_model, span):
    model = make_model()
    two_phrases["phrase_spans"] = torch.tensor([[[1, 3], span]])
    outputs = model(**two_phrases)
    check_finite(outputs, model)
    assert outputs.phrase_mask.tolist() == [[True, False]]


@pytest.mark.parametrize("phrase_index", [[[0, 0], [0, 9]], [[0, 0], [7, 1]], [[0, 0], [0, -1]], [[0, 0]]])
def test_invalid_phrase_index_masks_its_phrase(two_phrases, make_model, phrase_index):
    model = make_model()
    right = model(**two_phrases | {"phrase_attention_mask": two_phrases["phrase_attention_mask"] * 1})
    outputs = model(**two_phrases | {"phrase_index": torch.tensor(phrase_index)})
    check_finite(outputs, model)
    assert right.phrase_mask.tolist() == [[True, True]]
    assert outputs.phrase_mask.tolist() == [[True, False]]


def test_invalid_phrase_index_adds_no_gradient(two_phrases, make_model):
    """Do not clamp an invalid index to a valid phrase, whose gradient would count twice."""
    model = make_model()
    gradients = []
    for phrase_index in ([[0, 0]], [[0, 0], [0, 9], [3, 0], [0, -1]]):
        model.zero_grad()
        model(**two_phrases | {"phrase_index": torch.tensor(phrase_index)}).loss.backward()
        gradients.append(model.model.phrase_projection.linear1.weight.grad.clone())
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("token", [None, 10**6, -1, -100])
def test_token_outside_vocabulary_masks_its_phrases(two_phrases, make_model, token):
    model = make_model()
    token = model.config.text_config.vocab_size if token is None else token
    for name, expected in (("phrase_input_ids", [[True, False]]), ("input_ids", [[False, False]])):
        ids = two_phrases[name].clone()
        ids[..., -1, 1] = token
        outputs = model(**two_phrases | {name: ids})
        check_finite(outputs, model)
        assert outputs.phrase_mask.tolist() == expected
    padding = two_phrases["attention_mask"].clone()
    padding[:, -2:] = 0
    ids = two_phrases["input_ids"].clone()
    ids[:, -1] = token
    spans = torch.tensor([[[1, 3], [3, 5]]])
    outputs = model(**two_phrases | {"attention_mask": padding, "input_ids": ids, "phrase_spans": spans})
    assert outputs.phrase_mask.all()  # tokens in padding do not matter


@pytest.mark.parametrize(
    "box_cxcywh",
    [
        [float("nan")] * 4,
        [0.5, 0.5, float("inf"), 0.2],
        [0.5, 0.5, -0.2, 0.2],
        [0.5, 0.5, 0.0, 0.2],
        [0.9, 0.9, 0.5, 0.5],
        [300.0, 200.0, 50.0, 40.0],
    ],
)
def test_invalid_box_label_is_excluded_from_loss(two_phrases, make_model, box_cxcywh):
    model = make_model()
    good = two_phrases["labels"][0]["boxes"][:1]
    one = model(**two_phrases | {"labels": [{"boxes": good}]})
    outputs = model(**two_phrases | {"labels": [{"boxes": torch.cat((good, torch.tensor([box_cxcywh])))}]})
    check_finite(outputs, model)
    torch.testing.assert_close(outputs.loss, one.loss)


@pytest.mark.row("R6")
def test_loss_is_finite_on_random_boxes(make_model):
    """Draw 10,000 boxes: valid ones and boxes without extent, inverted, not finite or outside the image."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randn(10_000, 1, 4, generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.1] = 0
    labels[torch.rand(labels.shape, generator=generator) < 0.05] = torch.nan
    labels[torch.rand(labels.shape, generator=generator) < 0.05] = torch.inf
    logits = torch.randn(10_000, 1, 4, generator=generator).mul(30).requires_grad_()
    mask = torch.ones(10_000, 1, dtype=torch.bool)
    loss, parts = grounding_loss(
        logits.sigmoid(), mask, [{"boxes": boxes} for boxes in labels], make_model().config, num_items_in_batch=1
    )
    loss.backward()
    assert loss > 0
    assert all(part.isfinite() for part in parts.values())
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("logit", [1e4, -1e4])
@pytest.mark.row("R8")
def test_extreme_logits_give_finite_loss(two_phrases, make_model, logit, dtype):
    model = make_model()
    torch.nn.init.constant_(model.box_head.layers[-1].bias, logit)
    model = model.to(dtype)
    check_finite(model(**two_phrases), model)


def test_labels_without_boxes_are_refused(two_phrases, make_model):
    with pytest.raises(ValueError, match=r"labels\[0\] has \['box'\], but no boxes"):
        make_model()(**two_phrases | {"labels": [{"box": torch.ones(2, 4)}]})


def test_phrase_longer_than_text_encoder_limit_is_refused(two_phrases, make_model):
    long = torch.ones(1, 2, 65, dtype=torch.long)
    with pytest.raises(ValueError, match="has 65 tokens per phrase, more than max_text_positions=64"):
        make_model()(**two_phrases | {"phrase_input_ids": long, "phrase_attention_mask": long})


@pytest.mark.parametrize("size", [(1, 1), (1, 1300), (1300, 1), (2, 3)])
def test_image_of_one_pixel_or_line_gives_finite_outputs(processor, make_model, size):
    model = make_model()
    box = [0, 0, *size]
    inputs = processor(Image.new("RGB", size, "red"), "the star", boxes=box)
    check_finite(model(**inputs), model)
    (answer,) = processor.post_process_grounding(model(**inputs), [size[::-1]])
    assert answer["boxes"].isfinite().all()


def test_missing_or_unreadable_image_file_is_refused(processor, tmp_path):
    with pytest.raises(OSError, match=r"There is no image at '.*nothing\.jpg'"):
        processor(tmp_path / "nothing.jpg", "the star")
    complete = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(complete, "JPEG")
    contents = {
        "empty.jpg": b"",
        "text.jpg": b"not an image",
        "cut.jpg": complete.getvalue()[:700],
        "cut.png": png(640, 640)[:60],
        "header.png": png(64, 64)[:20],
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(OSError, match=f"{name}' cannot be read as an image"):
            processor(str(tmp_path / name), "the star")
    with pytest.raises(OSError, match="cannot be read as an image"):
        processor(str(tmp_path), "the star")
    with pytest.raises(OSError, match="'data:image/png;base64,%%%' cannot be read as an image"):
        processor("data:image/png;base64,%%%", "the star")


def test_processor_accepts_image_as_data_url(processor):
    content = base64.b64encode(png(64, 48)).decode()
    assert processor(f"data:image/png;base64,{content}", "the star")["pixel_values"].shape == (1, 3, 48, 64)


def test_non_finite_or_empty_image_array_is_refused(processor):
    for bad in (float("nan"), float("inf")):
        image = np.zeros((48, 64, 3), dtype=np.float32)
        image[3, 3] = bad
        for kind in (image, torch.from_numpy(image).permute(2, 0, 1)):
            with pytest.raises(ValueError, match="of 64 x 48 pixels has values that are not finite"):
                processor(kind, "the star")
    for empty in (np.zeros((0, 64, 3), dtype=np.uint8), Image.new("RGB", (0, 7))):
        with pytest.raises(ValueError, match="expected 1 to 50,000,000"):
            processor(empty, "the star")


BOMBS = """
import base64, pathlib, resource, sys, time
from PIL import Image
from modeling_reftr import RefTRProcessor

processor = RefTRProcessor.from_pretrained(sys.argv[1])
processor(Image.new("RGB", (640, 640)), "the star")
used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[2:]:
    images = [path, "data:image/png;base64," + base64.b64encode(pathlib.Path(path).read_bytes()).decode()]
    if not path.endswith("unopened.png"):
        images.append(Image.open(path))
    for image in images:
        begin = time.monotonic()
        try:
            processor(image, "the star")
        except ValueError as error:
            extra = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used
            print(path, "50,000,000" in str(error), time.monotonic() - begin, extra)
"""


@pytest.mark.row("S5")
def test_image_bombs_are_refused_before_decoding(processor, tmp_path, run):
    """Give images by path, by content and opened, in a separate process whose peak memory shows decoding."""
    processor.save_pretrained(tmp_path)
    sizes = {"just": (7072, 7072), "line": (50_000_001, 1), "warned": (12_000, 12_000), "unopened": (30_000, 30_000)}
    paths = [tmp_path / f"{name}.png" for name in sizes]
    for path, size in zip(paths, sizes.values(), strict=True):
        path.write_bytes(png(*size))
    lines = run("-c", BOMBS, tmp_path, *paths).stdout.splitlines()
    assert len(lines) == 3 * 3 + 2  # PIL itself refuses to open the last one
    for line in lines:
        _, is_named, seconds, kilobytes = line.split()
        assert is_named == "True"
        assert float(seconds) < 1
        assert int(kilobytes) < 200_000


def test_largest_allowed_image_is_accepted(processor):
    assert MAX_PIXELS == 50_000_000
    assert processor(Image.new("1", (50_000, 1_000)), "the star")["pixel_values"].shape[-1] <= 64


def test_folder_without_processor_or_model_is_named(make_model, tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    with pytest.raises((OSError, ValueError), match="model"):
        RefTRProcessor.from_pretrained(tmp_path / "model")
    with pytest.raises((OSError, ValueError), match="nothing"):
        RefTRForVisualGrounding.from_pretrained(tmp_path / "nothing")
