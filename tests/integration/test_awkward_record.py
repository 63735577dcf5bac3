"""
One awkward record through every format, out and in, and through loader, model and back: an image turned by its EXIF
orientation, annotated at twice the size of its file, a caption in Unicode with two phrases, masks, an expression of
both objects, and one that refers to nothing.
"""

import json

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

import data_scripts
from data_scripts.annotation_export import export_annotations, line_of_row
from data_scripts.exporting import export_dataset
from data_scripts.findings import Findings
from data_scripts.formats import EXPORTED, FORMATS, IMPORTED, PARQUET, PREDICTED, suffix_of, writer_of
from data_scripts.importing import import_files
from data_scripts.masks import box_of, decode_segmentation
from data_scripts.records import NO_TARGET, Written, objects_of
from data_scripts.schema import FEATURES
from tests.helpers.layout_grit import make_sample, write_tar
from tests.helpers.layout_orientation import UPRIGHT_BOX, UPRIGHT_SIZE, find_red, save_jpeg
from training_reftr.data import GroundingCollator


IMAGE = "7.jpg"
WIDTH, HEIGHT = UPRIGHT_SIZE
BOXES = {"Die “rote” Tu\u0308r ☕": list(UPRIGHT_BOX), "der Wand": [48, 8, 80, 64]}
TEXT = " neben ".join(BOXES)
SPANS = [(TEXT.index(words), TEXT.index(words) + len(words)) for words in BOXES]
BOTH = "alle beide"
NOTHING = "kein Einhorn"
TARGETS = {**{words: [box] for words, box in BOXES.items()}, BOTH: list(BOXES.values()), NOTHING: []}
ANNOTATED = (2 * WIDTH, 2 * HEIGHT)
# what formats carry in addition to words and boxes
CAPTIONS = ("parquet", "jsonl", "mdetr_json", "odvg", "grit")
MASKS = ("parquet", "jsonl", "coco", "cvat", "phrasecut", "refer", "grefcoco")
TOLERANCE = {"loc_tokens": 0.1}


# the files, as other tools write them


def corners_of(box, scale=2):
    x0, y0, x1, y1 = (scale * side for side in box)
    return [x0, y0, x1, y0, x1, y1, x0, y1]


def xyxy(box, scale=2):
    return [scale * side for side in box]


def xywh(box, scale=2):
    x0, y0, x1, y1 = xyxy(box, scale)
    return [x0, y0, x1 - x0, y1 - y0]


def in_unit(box, unit):
    return [round(side / size * unit) for side, size in zip(box, [WIDTH, HEIGHT] * 2, strict=True)]


SIZE = {"width": ANNOTATED[0], "height": ANNOTATED[1]}


def write_mdetr():
    spans = zip(BOXES.values(), SPANS, strict=True)
    annotations = [{"image_id": 3, "bbox": xywh(box), "tokens_positive": [list(span)]} for box, span in spans]
    captions = {3: TEXT, 4: NOTHING, 5: BOTH, 6: "nicht annotiert"}
    images = [
        {"id": number, "file_name": IMAGE, **SIZE, "caption": caption, "dataset_name": "mixed"}
        for number, caption in captions.items()
    ]
    annotations.append({"image_id": 4, "bbox": [0, 0, 0, 0], "empty": True, "tokens_positive": [[0, len(NOTHING)]]})
    annotations += [{"image_id": 5, "bbox": xywh(box), "tokens_positive": [[0, len(BOTH)]]} for box in BOXES.values()]
    return {"images": images, "annotations": annotations}


def write_odvg():
    regions = [{"bbox": xyxy(box), "phrase": words} for words, box in BOXES.items()]
    captions = {TEXT: regions, BOTH: [{**region, "phrase": BOTH} for region in regions], NOTHING: []}
    return [
        {"filename": IMAGE, **SIZE, "grounding": {"caption": caption, "regions": found}}
        for caption, found in captions.items()
    ]


def write_phrasecut():
    return [
        {
            "image_id": 7,
            "phrase": words,
            "instance_boxes": [xywh(box) for box in boxes],
            "Polygons": [[np.reshape(corners_of(box), (4, 2)).tolist()] for box in boxes],
        }
        for words, boxes in TARGETS.items()
        if boxes
    ]


def write_coco():
    annotations = [
        {"image_id": 1, "bbox": xywh(box), "segmentation": [corners_of(box)], "caption": [words, BOTH]}
        for words, box in BOXES.items()
    ]
    return {"images": [{"id": 1, "file_name": IMAGE, **SIZE}], "annotations": annotations}


def write_label_studio():
    results = []
    for number, (words, box) in enumerate(BOXES.items()):
        value = dict(zip(("x", "y", "width", "height"), xywh(np.array(in_unit(box, 1000)) / 10, 1), strict=True))
        size = {"original_width": ANNOTATED[0], "original_height": ANNOTATED[1]}
        results.append({"id": str(number), "type": "rectanglelabels", "value": value, **size})
        results.append({"id": str(number), "type": "textarea", "value": {"text": [words, BOTH]}})
    return [{"data": {"image": f"/data/upload/1/0a1b2c3d-{IMAGE}"}, "annotations": [{"result": results}]}]


def write_cvat():
    shapes = ""
    for words, box in [*BOXES.items(), *((BOTH, box) for box in BOXES.values())]:
        points = ";".join(f"{x},{y}" for x, y in np.reshape(corners_of(box), (4, 2)).tolist())
        attribute = f'<attribute name="caption">{words}</attribute>'
        shapes += f'<polygon label="thing" points="{points}">{attribute}</polygon>'
    size = f'width="{ANNOTATED[0]}" height="{ANNOTATED[1]}"'
    return f'<annotations><image name="{IMAGE}" {size}>{shapes}</image></annotations>'


def write_image_folder():  # no sizes: annotated at that of the image
    objects = {"bbox": [xywh(box, 1) for box in BOXES.values()], "text": [[words, BOTH] for words in BOXES]}
    return [{"file_name": IMAGE, "objects": objects}]


def write_image_text_bbox():
    boxes = {words: list(map(xyxy, boxes)) for words, boxes in TARGETS.items()}
    return [{"image": IMAGE, "text": words, "bbox": boxes[words], **SIZE} for words in TARGETS]


def write_qwen():
    found = [(words, box) for words, boxes in TARGETS.items() for box in boxes]
    answer = json.dumps([{"bbox_2d": in_unit(box, 1000), "label": words} for words, box in found])
    turns = [{"from": "human", "value": "<image>\nWas ist da?"}, {"from": "gpt", "value": answer}]
    turns += [{"from": "human", "value": f"Locate {NOTHING} in this image."}, {"from": "gpt", "value": "[]"}]
    return [{"image": IMAGE, "conversations": turns}]


def write_loc_tokens():
    parts = []
    for words, box in [(words, box) for words, boxes in TARGETS.items() for box in boxes]:
        x0, y0, x1, y1 = (min(number, 1023) for number in in_unit(box, 1024))
        parts.append("".join(f"<loc{number:04d}>" for number in (y0, x0, y1, x1)) + f" {words}")
    return [{"image": IMAGE, "prefix": f"detect {BOTH} ; {NOTHING}", "suffix": " ; ".join(parts)}]


FILES = {
    "mdetr_json": write_mdetr,
    "odvg": write_odvg,
    "phrasecut": write_phrasecut,
    "coco": write_coco,
    "label_studio": write_label_studio,
    "cvat": write_cvat,
    "imagefolder": write_image_folder,
    "image_text_bbox": write_image_text_bbox,
    "qwen": write_qwen,
    "loc_tokens": write_loc_tokens,
}


def write_references(folder, name, image):
    """Write the record in the refer API's layout."""
    (folder / "images").mkdir(parents=True)
    save_jpeg(folder / "images" / image, 6)
    annotations = [
        {"id": number, "image_id": 1, "category_id": 1, "bbox": xywh(box), "segmentation": [corners_of(box)]}
        for number, box in enumerate(BOXES.values(), start=1)
    ]
    instances = {"images": [{"id": 1, "file_name": image, **SIZE}], "annotations": annotations}
    (folder / "instances.json").write_text(json.dumps({**instances, "categories": [{"id": 1, "name": "thing"}]}))
    refs = [
        {"ref_id": number, "ann_id": target, "image_id": 1, "category_id": 1, "split": "train"}
        | {"sentences": [{"sent_id": number, "sent": words, "raw": words, "tokens": words.split()}]}
        for number, (words, target) in enumerate(zip(TARGETS, ([1], [2], [1, 2], [-1]), strict=True))
    ]
    (folder / name).write_text(json.dumps(refs))
    return folder


def write_refer(folder):
    return write_references(folder, "refs(x).json", IMAGE)


def write_grefcoco(folder):
    folder = write_references(folder / "grefcoco", "grefs(unc).json", "COCO_train2014_000000000001.jpg")
    (folder.parent / "images").mkdir()
    (folder / "images").rename(folder.parent / "images" / "train2014")
    return folder.parent


def write_grit(folder):
    folder.mkdir()
    save_jpeg(folder / IMAGE, 6)
    boxes = np.array(list(BOXES.values())) / ([WIDTH, HEIGHT] * 2)
    spans = [*SPANS, *[(0, len(TEXT))] * 2]  # both boxes are those of the caption
    chunks = [[*span, *box, 1.0] for span, box in zip(spans, boxes.tolist() * 2, strict=True)]
    size = {"width": WIDTH, "height": HEIGHT, "original_width": ANNOTATED[0], "original_height": ANNOTATED[1]}
    sample = make_sample(0, TEXT, chunks, [], **size, image=(folder / IMAGE).read_bytes())
    write_tar(folder / "00000.tar", [sample, make_sample(1, NOTHING, [], [])])
    return folder


FOLDERS = {"refer": write_refer, "grefcoco": write_grefcoco, "grit": write_grit}
OPTIONS = {"qwen": {"box_format": "xyxy_thousand"}}


def test_record_is_in_every_format():
    assert set(FILES) == set(IMPORTED)
    assert {*IMPORTED, *EXPORTED, *PREDICTED, *FOLDERS} == set(FORMATS)


# in and out


def assert_carries_record(row, name):
    """Assert that a row has the image upright, and what a format carries of the record."""
    assert (row["width"], row["height"]) == row["image"].size == UPRIGHT_SIZE
    np.testing.assert_allclose(find_red(row["image"].convert("RGB")), UPRIGHT_BOX, atol=1)
    phrases = [
        (sentence["text"], (phrase["start"], phrase["end"]), [row["objects"][index] for index in phrase["objects"]])
        for sentence in row["sentences"]
        for phrase in sentence["phrases"]
    ]
    expected = {words: boxes for words, boxes in TARGETS.items() if boxes or FORMATS[name].has_no_target}
    if name == "grit":
        expected[TEXT] = expected.pop(BOTH)
    found = {words[slice(*span)]: items for words, span, items in phrases}
    assert len(phrases) == len(found)
    assert set(found) == set(expected)
    if name in CAPTIONS:
        assert [(words, span) for words, span, _ in phrases][:2] == [(TEXT, span) for span in SPANS]
    for words, boxes in expected.items():
        for item, box in zip(found[words], boxes, strict=True):
            np.testing.assert_allclose(item["boxes"], [box], atol=TOLERANCE.get(name, 1e-4))
            if name in MASKS:
                assert box_of(item["segmentation"]) == box
                x0, y0, x1, y1 = box
                assert decode_segmentation(item["segmentation"]).sum() == (x1 - x0) * (y1 - y0)
            else:
                assert item["segmentation"] is None


def load_lines(folder, tmp_path, **flags):
    return data_scripts.load("jsonl", "train", data_dir=str(folder), cache_dir=str(tmp_path / "cache"), **flags)


@pytest.mark.parametrize("name", IMPORTED)
def test_record_is_read_from_files_of_other_tools(tmp_path, name):
    save_jpeg(tmp_path / IMAGE, 6)
    content = FILES[name]()
    (tmp_path / "file").write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    if name == "phrasecut":
        (tmp_path / "image_data_split.json").write_text(json.dumps([{"image_id": 7, **SIZE, "coco_id": None}]))
    import_files(name, {"train": [tmp_path / "file"]}, tmp_path / "out", tmp_path, **OPTIONS.get(name, {}))
    (row,) = load_lines(tmp_path / "out", tmp_path, image_dir=str(tmp_path))
    assert_carries_record(row, name)


@pytest.mark.parametrize("name", FOLDERS)
def test_record_is_read_from_folder_of_a_dataset(tmp_path, name):
    data_dir = FOLDERS[name](tmp_path / "data")
    (row,) = data_scripts.load(name, "train", data_dir=str(data_dir), cache_dir=str(tmp_path / "cache"))
    assert_carries_record(row, name)


@pytest.fixture
def rows(tmp_path):
    """The record as rows of the schema, and a sentence without phrases, which asks for nothing."""
    folder = tmp_path / "images of the record"
    folder.mkdir()
    save_jpeg(folder / IMAGE, 6)
    phrases = [
        {"start": start, "end": end, "box": box, "polygon": [corners_of(box, 1)]}
        for (start, end), box in zip(SPANS, BOXES.values(), strict=True)
    ]
    both = [{"box": phrase["box"], "polygon": phrase["polygon"]} for phrase in phrases]
    expressions = [{"text": TEXT, "phrases": phrases}, {"text": BOTH, "objects": both}, {"text": NOTHING, "boxes": []}]
    (folder / "train.jsonl").write_text(json.dumps({"image": IMAGE, "expressions": expressions}))
    (row,) = load_lines(folder, tmp_path, path="train.jsonl").cast_column("image", datasets.Image(decode=False))
    assert len(row["objects"]) == 2
    row["sentences"].append({"sentence_id": "silent", "text": "ohne Frage", "phrases": []})
    return datasets.Dataset.from_list([row], features=FEATURES)


@pytest.mark.parametrize("name", EXPORTED)
def test_record_is_written_and_read_back(rows, tmp_path, name):
    source, output = data_scripts.SOURCES["jsonl"], tmp_path / "out"
    if name == PARQUET:
        export_dataset(source, {"train": rows}, output)
        (row,) = data_scripts.load(str(output), "train", cache_dir=str(tmp_path / "cache"))
        assert row["sentences"] == rows[0]["sentences"]
        assert row["objects"] == rows[0]["objects"]
    else:
        report = export_annotations(name, source, {"train": rows}, output)
        left_out = report.build["train"]["left_out"]
        assert left_out["sentences without a phrase"] == 1
        assert left_out.get(NO_TARGET, 0) == (not FORMATS[name].has_no_target)
        assert report.counts["train"] == {"images": 1, "expressions": 2 + FORMATS[name].has_no_target, "boxes": 4}
        assert (output / "images" / IMAGE).read_bytes() == (tmp_path / "images of the record" / IMAGE).read_bytes()
        if name in IMPORTED:
            import_files(name, {"train": [output / f"train{suffix_of(name)}"]}, tmp_path / "in", output)
            (row,) = load_lines(tmp_path / "in", tmp_path, image_dir=str(output))
        else:
            (row,) = load_lines(output, tmp_path)
    assert_carries_record(row, name)


@pytest.mark.parametrize("name", PREDICTED)
def test_record_is_written_as_answers_and_read_back(rows, tmp_path, name):
    (row,) = rows.cast_column("image", datasets.Image(decode=False))
    line = {"image": row["image"]["path"], **line_of_row(row, Findings())}
    line["result"] = {"image_id": 7, "category_id": 1}
    for expression in line["expressions"]:
        for phrase in expression["phrases"]:
            for item in objects_of(phrase):
                item["score"] = 1.0
    path, findings = tmp_path / f"answers{suffix_of(name)}", Findings()
    path.write_text("".join(writer_of(name, PREDICTED)([line], findings, Written("model"))), encoding="utf-8")
    if name == "coco_results":
        truth = {"images": [{"id": 7, "width": WIDTH, "height": HEIGHT}], "annotations": [], "categories": [{"id": 1}]}
        (tmp_path / "truth.json").write_text(json.dumps(truth))
        api = COCO(str(tmp_path / "truth.json")).loadRes(str(path))
        found = api.loadAnns(api.getAnnIds())
        expected = [(words, xywh(box, 1)) for words, boxes in TARGETS.items() for box in boxes]
        assert [(item["label"], item["bbox"]) for item in found] == expected
        assert [api.annToMask(item).sum() for item in found] == [24 * 40, 32 * 56] * 2
        return
    assert findings.left_out[NO_TARGET] == (not FORMATS[name].has_no_target)
    if name == "label_studio":  # as exported when the predictions were accepted
        tasks = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps([{"data": task["data"], "annotations": task["predictions"]} for task in tasks]))
    if name == "jsonl":
        flags = {"path": str(path), "image_dir": "/", "allow_outside_paths": True}
        (read,) = data_scripts.load(name, "train", cache_dir=str(tmp_path / "cache"), **flags)
    else:
        import_files(name, {"train": [path]}, tmp_path / "in", image_dir=tmp_path / "images of the record")
        (read,) = load_lines(tmp_path / "in", tmp_path, image_dir=str(tmp_path / "images of the record"))
    assert_carries_record(read, name)


# through loader, model and back


def test_record_goes_through_loader_and_model_and_back(rows, processor, make_model):
    row = {**rows[0], "sentences": [rows[0]["sentences"][index] for index in (0, -1)]}
    batch = GroundingCollator(processor, with_masks=True)([row])
    caption, nothing = batch["labels"]
    assert len(nothing["boxes"]) == 0
    assert caption["masks"].shape[0] == 2
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "targets")}
    model = make_model(predict_masks=True)
    with torch.no_grad():
        outputs = model(**inputs)
    sizes = [(HEIGHT, WIDTH)]
    own, without = processor.post_process_referring_segmentation(outputs, sizes)
    assert own["masks"].shape == (2, HEIGHT, WIDTH)
    assert without["boxes"].shape == (0, 4)
    # answers equal to the labels are the annotations in pixels of the upright image
    outputs.pred_boxes[0, :2] = caption["boxes"]
    outputs.pred_masks = torch.full((*outputs.pred_masks.shape[:2], *caption["masks"].shape[1:]), -10.0)
    outputs.pred_masks[0, :2][caption["masks"]] = 10.0
    answer, _ = processor.post_process_referring_segmentation(outputs, sizes)
    np.testing.assert_allclose(answer["boxes"].numpy(), list(BOXES.values()), atol=1e-3)
    for mask, item in zip(answer["masks"].numpy(), rows[0]["objects"], strict=True):
        truth = decode_segmentation(item["segmentation"]) > 0
        # the default resampling of the smaller masks rounds coordinates down
        assert (mask & truth).sum() / (mask | truth).sum() > 0.85
    # and they lie on the pixels that the model saw
    red = find_red(np.asarray(Image.open(rows.cast_column("image", datasets.Image(decode=False))[0]["image"]["path"])))
    assert red != list(UPRIGHT_BOX)  # the file is turned
    np.testing.assert_allclose(find_red(np.asarray(rows[0]["image"])), answer["boxes"][0].numpy(), atol=1)


def test_record_trains_with_all_its_targets(rows, processor, make_model):
    batch = GroundingCollator(processor, with_masks=True)([rows[0]])
    named = [[phrase["objects"] for phrase in sentence["phrases"]] for sentence in rows[0]["sentences"]]
    for label, targets, objects in zip(batch["labels"], batch["targets"], named, strict=True):
        counts = [len(of_phrase) for of_phrase in objects]
        slots = label.get("target_slots", torch.arange(len(label["boxes"])))
        assert slots.tolist() == [slot for slot, count in enumerate(counts) for _ in range(count)]
        assert len(label.get("masks", slots)) == sum(counts)
        found = [len(target["targets"]) if "targets" in target else 1 for target in targets]
        assert found == counts
    assert {len(objects) for sentence in named for objects in sentence} == {0, 1, 2}
    model = make_model(predict_masks=True, predict_presence=True, num_queries_per_phrase=2).train()
    inputs = {name: value for name, value in batch.items() if name != "targets"}
    losses = model(**inputs).loss_dict
    assert all(value.isfinite() and value > 0 for value in losses.values())
