"""`reftr data import`: every format in its documented layout, each trap of it, and what cannot be carried over."""

import json
import re

import numpy as np
import pytest
from PIL import Image, ImageOps
from pycocotools.coco import COCO

import data_scripts
from data_scripts.formats import FORMATS, IMPORTED, reader_of
from data_scripts.importing import import_files
from data_scripts.masks import decode_segmentation
from data_scripts.records import SAME_WORDS
from tests.helpers.layout_line_formats import make_line_formats


SQUARE = [1, 2, 11, 2, 11, 12, 1, 12]


@pytest.fixture
def folder(tmp_path):
    for name, size in {"a": (40, 30), "b": (40, 30), "large": (1600, 1400)}.items():
        Image.new("RGB", size, "gray").save(tmp_path / f"{name}.png")
    return tmp_path


@pytest.fixture
def convert(folder):
    """Return a function that imports the content of a file, and returns its lines and the report."""

    def import_content(name, content, file="file.json", **options):
        if not isinstance(content, str):
            content = json.dumps(content)
        (folder / file).write_text(content)
        report = import_files(name, {"train": [folder / file]}, folder, overwrite=True, **options)
        return [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()], report

    return import_content


@pytest.fixture
def load(folder, tmp_path):
    """Return a function that loads the imported lines."""

    def load_rows(split="train", **flags):
        settings = {"data_dir": str(folder), "cache_dir": str(tmp_path / "cache"), "path": f"{split}.jsonl", **flags}
        return data_scripts.load("jsonl", "train", **settings)

    return load_rows


def expressions_of(rows):
    """Return {text: boxes of its objects, rounded} of all rows; each object has one box."""
    found = {}
    for row in rows:
        for sentence in row["sentences"]:
            (phrase,) = sentence["phrases"]
            boxes = [box for index in phrase["objects"] for box in row["objects"][index]["boxes"]]
            assert len(boxes) == len(phrase["objects"])
            found[sentence["text"]] = np.round(boxes, 3).tolist()
    return found


# the formats


def coco(**changes):
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 40, "height": 30}, {"id": 2, "file_name": "b.png"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 3, "bbox": [1, 2, 10, 10], "segmentation": [SQUARE], "iscrowd": 0},
            {"id": 2, "image_id": 1, "category_id": 4, "bbox": [20, 2, 5, 5]},
            {"id": 3, "image_id": 1, "category_id": 4, "bbox": [30, 2, 5, 5], "caption": "the dog on the right"},
            {"id": 4, "image_id": 2, "category_id": 4, "bbox": [3, 2, 5, 5], "attributes": {"description": "a puppy"}},
            {"id": 5, "image_id": 2, "category_id": 4, "caption": "no box"},
            {"id": 6, "image_id": 9, "category_id": 4, "bbox": [3, 2, 5, 5]},
        ],
        "categories": [{"id": 3, "name": "traffic_light"}, {"id": 4, "name": "dog"}],
    }
    return {**content, **changes}


def test_coco_takes_own_words_else_categories_that_occur_once(convert, load, folder):
    lines, report = convert("coco", coco())
    assert [line["image"] for line in lines] == ["a.png", "b.png"]
    rows = load()
    assert expressions_of(rows) == {
        "traffic light": [[1, 2, 11, 12]],
        "the dog on the right": [[30, 2, 35, 7]],
        "a puppy": [[3, 2, 8, 7]],
    }
    assert [item["category"] for item in rows[0]["objects"]] == ["traffic_light", "dog"]
    assert report.build["train"]["left_out"] == {
        "annotations of images that the file lacks": 1,
        "annotations without a box or mask": 1,
        "objects whose category is that of another object of their image": 1,
    }
    api = COCO(str(folder / "file.json"))
    mask = decode_segmentation(rows[0]["objects"][0]["segmentation"])
    assert (mask == api.annToMask(api.loadAnns(1)[0])).all()
    assert mask.sum() == 100


def test_coco_takes_words_from_named_attribute(convert, load):
    annotations = [{**item, "attributes": {"color": "red one"}} for item in coco()["annotations"][:1]]
    convert("coco", coco(annotations=annotations), text_field="color")
    assert list(expressions_of(load())) == ["red one"]


def test_coco_gives_words_of_several_annotations_all_of_them(convert, load):
    first, second, third = (
        {**item, "image_id": 1, "caption": captions}
        for item, captions in zip(coco()["annotations"], (["lights", "it"], ["lights"], ["it "]), strict=False)
    )
    _, report = convert("coco", coco(annotations=[first, second, third]))
    assert expressions_of(load()) == {
        "lights": [[1, 2, 11, 12], [20, 2, 25, 7]],
        "it": [[1, 2, 11, 12], [30, 2, 35, 7]],
    }
    assert report.build["train"]["changed"] == {SAME_WORDS: 4}


def test_coco_leaves_out_groups_without_words(convert, load):
    group = {**coco()["annotations"][0], "iscrowd": 1}
    _, report = convert("coco", coco(annotations=[group, {**group, "id": 8, "caption": "the row of lights"}]))
    assert list(expressions_of(load())) == ["the row of lights"]
    assert report.build["train"]["left_out"] == {"groups of objects of one category": 1}


def test_coco_scales_annotations_to_image_of_another_size(convert, load):
    images = [{"id": 1, "file_name": "a.png", "width": 80, "height": 30}]
    lines, report = convert("coco", coco(images=images))
    assert (lines[0]["width"], lines[0]["height"]) == (40, 30)
    row = load()[0]
    assert row["objects"][0]["box"] == [0.5, 2, 5.5, 12]
    assert decode_segmentation(row["objects"][0]["segmentation"]).sum() in (50, 60)
    assert report.build["train"]["changed"] == {
        "images have another size than annotated, boxes and masks are scaled to it": 2
    }


def test_label_studio_reads_percent_and_words_of_regions(convert, load):
    def region(name, kind="rectanglelabels", label="car", **value):
        value = {"x": 10, "y": 20, "width": 50, "height": 40, "rotation": 0, kind: [label], **value}
        sizes = {"original_width": 40, "original_height": 30, "image_rotation": 0}
        return {"id": name, "type": kind, "from_name": "label", "to_name": "image", "value": value, **sizes}

    points = {"points": [[0, 0], [50, 0], [50, 100], [0, 100]]}
    results = [
        region("r1"),
        {"id": "r1", "type": "textarea", "value": {"text": ["the red car", "a car"]}},
        region("r2", x=0, y=0, label="car"),
        region("r3", kind="polygonlabels", label="wall", **points),
        {**region("r4", x=50), "meta": {"text": ["noted"]}},
        {"id": "r5", "type": "keypointlabels", "value": {"x": 1}},
        {"id": "r9", "type": "textarea", "value": {"text": "about nothing"}},
    ]
    tasks = [
        {"id": 1, "data": {"image": "/data/upload/1/0a1b2c3d-a.png"}, "annotations": [{"result": results}]},
        {"id": 2, "data": {"image": "/data/local-files/?d=some/folder/b.png"}, "annotations": []},
        {"id": 3, "data": {"img": "http://127.0.0.1:1/b.png"}, "annotations": [{"result": [region("r6")]}]},
        {"id": 4, "data": {"image": "b.png"}, "annotations": [{"was_cancelled": True, "result": []}]},
    ]
    lines, report = convert("label_studio", tasks)
    assert [line["image"] for line in lines] == ["a.png", "b.png"]
    rows = load()
    assert expressions_of([rows[0]]) == {
        "the red car": [[4, 6, 24, 18]],
        "a car": [[4, 6, 24, 18]],
        "wall": [[0, 0, 20, 30]],
        "noted": [[20, 6, 40, 18]],
    }
    assert expressions_of([rows[1]]) == {"car": [[4, 6, 24, 18]]}
    assert decode_segmentation(rows[0]["objects"][1]["segmentation"]).sum() == 600
    assert report.build["train"]["left_out"] == {
        "annotations that were skipped": 1,
        "objects whose category is that of another object of their image": 1,
        "results of type 'keypointlabels'": 1,
        "tasks without an annotation": 2,
        "texts without a region": 1,
    }
    assert report.build["train"]["changed"] == {"images are found by the end of their path": 4}
    # a rotated rectangle is named, and counted by its reason if it is to be left out
    results[0]["value"]["rotation"] = 30
    with pytest.raises(ValueError, match=r"(?s)^1 bad annotations .*entry 1, region 'r1': value\.rotation is 30"):
        convert("label_studio", tasks)
    _, report = convert("label_studio", tasks, drop_bad_lines=True)
    assert report.build["train"]["left_out"]["regions that are rotated"] == 1


def test_cvat_reads_boxes_polygons_and_masks(convert, load):
    shapes = """
        <box label="car" xtl="1.0" ytl="2.0" xbr="11.0" ybr="12.0" rotation="0.0">
          <attribute name="description">the red car</attribute></box>
        <box label="car" xtl="3" ytl="2" xbr="11" ybr="12"/>
        <polygon label="tree" points="1.0,2.0;11.0,2.0;11.0,12.0;1.0,12.0"/>
        <mask label="dog" rle="1, 2, 2, 1" left="4" top="5" width="3" height="2"/>
        <polyline label="line" points="1,2;3,4"/>"""
    xml = '<annotations><version>1.1</version><track id="0"/><image id="0" name="a.png" width="40" height="30">'
    _, report = convert("cvat", f"{xml}{shapes}</image></annotations>", file="annotations.xml")
    row = load()[0]
    found = {"the red car": [[1, 2, 11, 12]], "tree": [[1, 2, 11, 12]], "dog": [[5, 5, 7, 7]]}
    assert expressions_of([row]) == found
    mask = decode_segmentation(row["objects"][2]["segmentation"])
    assert np.argwhere(mask).tolist() == [[5, 5], [5, 6], [6, 6]]
    assert report.build["train"]["left_out"] == {
        "objects whose category is that of another object of their image": 1,
        "shapes of type 'polyline'": 1,
        "tracks of videos": 1,
    }
    turned = f"{xml}{shapes}</image></annotations>".replace('"0.0"', '"30.5"')
    with pytest.raises(ValueError, match=r"(?s)^1 bad annotations .*shape 0: rotation is '30\.5'"):
        convert("cvat", turned, file="annotations.xml")
    for bad in ("<annotation/>", "<annotations>", "<!DOCTYPE a><annotations/>"):
        with pytest.raises(ValueError, match=r"annotations\.xml' "):
            convert("cvat", bad, file="annotations.xml")


def test_image_text_bbox_reads_arrays_and_lines(convert, load):
    records = [
        {"image": "data/coco/train2014/a.png", "sent": "the cup", "bbox": [1, 2, 11, 12], "width": 40, "height": 30},
        {"img": "a.png", "text": ["it", "that"], "box": [[1, 2, 5, 6], [7, 8, 9, 10]]},
        {"image": "a.png", "text": "no cup", "bboxes": []},
        {"image": "a.png", "text": " ", "bbox": [1, 2, 3, 4]},
    ]
    expected = {
        "the cup": [[1, 2, 11, 12]],
        "it": [[1, 2, 5, 6], [7, 8, 9, 10]],
        "that": [[1, 2, 5, 6], [7, 8, 9, 10]],
        "no cup": [],
    }
    for content in (records, "\n".join(map(json.dumps, records))):
        _, report = convert("image_text_bbox", content)
        rows = load()
        assert len(rows) == 1
        assert expressions_of(rows) == expected
        assert report.build["train"]["left_out"] == {"objects without words": 1}
    convert("image_text_bbox", records[:1], box_format="xywh")
    assert expressions_of(load()) == {"the cup": [[1, 2, 12, 14]]}


def test_image_folder_reads_lists_of_objects(convert, load):
    lines = [
        {"file_name": "a.png", "objects": {"bbox": [[1, 2, 10, 10], [3, 4, 5, 5]], "categories": ["car", "dog"]}},
        {"file_name": "b.png", "text": "the cup", "bbox": [1, 2, 10, 10]},
        {"file_name": "b.png", "objects": {"bbox": [[1, 2, 10, 10]], "categories": [7]}},
    ]
    content = "\n".join(map(json.dumps, lines))
    _, report = convert("imagefolder", content, file="metadata.jsonl")
    assert expressions_of(load()) == {"car": [[1, 2, 11, 12]], "dog": [[3, 4, 8, 9]], "the cup": [[1, 2, 11, 12]]}
    assert report.build["train"]["left_out"] == {"objects without words": 1}
    bad = {"file_name": "a.png", "objects": {"bbox": [[1, 2, 3, 4]], "categories": []}}
    with pytest.raises(ValueError, match="of equal length"):
        convert("imagefolder", json.dumps(bad), file="metadata.jsonl")


def chat(image, question, answer, **fields):
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"image": image, "conversations": turns, **fields}


def answer(*boxes):
    return json.dumps([{"bbox_2d": box, "label": label} if label else {"bbox_2d": box} for box, label in boxes])


QUESTION = "Locate the red car in this image and output the bbox coordinates in JSON format."


def test_qwen_reads_labels_questions_and_marks(convert, load):
    marks = "<|object_ref_start|>the cup<|object_ref_end|><|box_start|>(500,100),(750,900)<|box_end|>"
    records = [
        chat("a.png", QUESTION, answer(([1, 2, 11, 12], None))),
        chat("a.png", "What is there?", f"```json\n{answer(([3, 4, 9, 9], 'a dog'), ([1, 1, 5, 5], 'a cat'))}\n```"),
        chat("a.png", "Find it.", answer(([1, 1, 5, 5], None))),
        chat("a.png", "And?", "Nothing."),
        chat("b.png", QUESTION.replace("car", "bus"), "```json\n[]\n```"),
        chat("b.png", QUESTION.replace("red car", "cars"), answer(([1, 2, 3, 4], None), ([5, 6, 7, 8], None))),
        chat("b.png", "What else?", "[]"),
        {
            "images": ["b.png"],
            "messages": [
                {"role": "system", "content": "You help."},
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where?"}]},
                {"role": "assistant", "content": marks},
            ],
        },
    ]
    _, report = convert("qwen", records, box_format="xyxy")
    assert expressions_of(load()) == {
        "the red car": [[1, 2, 11, 12]],
        "a dog": [[3, 4, 9, 9]],
        "a cat": [[1, 1, 5, 5]],
        "the red bus": [],
        "the cars": [[1, 2, 3, 4], [5, 6, 7, 8]],
        "the cup": [[20, 3, 30, 27]],
    }
    assert report.build["train"]["left_out"] == {"answers without a box": 2, "objects without words": 1}
    convert("qwen", [chat("a.png", QUESTION, " [ ] ")])  # without a box there is no convention to recognize
    assert expressions_of(load()) == {"the red car": []}
    convert("qwen", records[2:3], box_format="xyxy", prompt="Find {}.")
    assert expressions_of(load()) == {"it": [[1, 1, 5, 5]]}
    with pytest.raises(ValueError, match=r"prompt is 'Find it'; expected \{\}"):
        convert("qwen", records, prompt="Find it")


def test_qwen_recognizes_pixels_and_thousandths_by_all_boxes(convert, load):
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 0.6, (40, 2))
    fractions = np.concatenate((corners, corners + rng.uniform(0.05, 0.4, (40, 2))), axis=1)
    fractions[0] = (0, 0, 1, 1)
    expected = None
    for scale, name in (((1000,) * 4, "xyxy_thousand"), ((40, 30, 40, 30), "xyxy")):
        boxes = [(box * scale).round(3).tolist() for box in fractions]
        records = [chat("a.png", QUESTION, answer((box, f"car {index}"))) for index, box in enumerate(boxes)]
        _, report = convert("qwen", records)
        assert report.box_format == name
        found = expressions_of(load())
        assert len(found) == 40
        for text, box in (expected or found).items():
            np.testing.assert_allclose(found[text], box, atol=0.05)
        expected = found
    with pytest.raises(ValueError, match=r"may be in pixels or in 0\.\.1000: say --box_format"):
        convert("qwen", [chat("large.png", QUESTION, answer(([10, 20, 300, 400], "a car")))])


def test_loc_tokens_read_both_orders_and_bins(convert, load):
    records = [
        {"image": "a.png", "prefix": "detect car ; dog", "suffix": "<loc0256><loc0512><loc0768><loc1023> car ; "
         "<loc0000><loc0000><loc0512><loc0512><seg001><seg002> dog"},
        {"image": "b.png", "prefix": "<OD>", "suffix": "cup<loc_0><loc_249><loc_499><loc_999>"},
        {"image": "b.png", "prefix": "detect cat ; fire_truck", "suffix": "<loc0000><loc0000><loc0512><loc0512> cat ; "
         "<loc0000><loc0000><loc0256><loc0512> cat"},
        {"image": "b.png", "prefix": "segment bus", "suffix": ""},
        {"image": "b.png", "prefix": "<OD>", "suffix": ""},
    ]  # fmt: skip
    content = "\n".join(map(json.dumps, records))
    _, report = convert("loc_tokens", content, file="_annotations.train.jsonl")
    found = expressions_of(load())
    # y before x, in 1024ths
    np.testing.assert_allclose(found["car"], [[20, 7.5, 40, 22.5]], atol=0.05)
    np.testing.assert_allclose(found["dog"], [[0, 0, 20, 15]], atol=0.05)
    # x before y, the middles of thousandths
    np.testing.assert_allclose(found["cup"], [[0.02, 7.485, 19.98, 29.985]], atol=0.002)
    # names that were asked for, with two answers and with none
    np.testing.assert_allclose(found["cat"], [[0, 0, 20, 15], [0, 0, 20, 7.5]], atol=0.05)
    assert found["fire truck"] == found["bus"] == []
    assert report.build["train"]["changed"] == {"masks of <seg> tokens are left out": 1, SAME_WORDS: 2}
    assert report.build["train"]["left_out"] == {"answers without a box": 1}
    with pytest.raises(ValueError, match="expected four <loc> tokens per box"):
        convert("loc_tokens", json.dumps({"image": "a.png", "suffix": "<loc0000><loc0001> car"}))


@pytest.mark.parametrize("name", ["mdetr_json", "odvg", "phrasecut"])
def test_import_gives_rows_of_builder(tmp_path, name):
    make_line_formats(tmp_path / "files", name)
    cache = str(tmp_path / "cache")
    expected = data_scripts.load(name, data_dir=str(tmp_path / "files"), cache_dir=cache)
    builder = data_scripts.SOURCES[name].builder(config_name=name, data_dir=str(tmp_path / "files"), cache_dir=cache)
    import_files(name, builder.split_files, tmp_path / "out", image_dir=tmp_path / "files")
    settings = {"data_dir": str(tmp_path / "out"), "image_dir": str(tmp_path / "files"), "cache_dir": cache}
    rows = data_scripts.load("jsonl", **settings)
    for split, part in expected.items():
        for column in ("width", "height"):
            assert rows[split][column] == part[column]
        for row, other in zip(rows[split], part, strict=True):
            for objects in (row["objects"], other["objects"]):
                for item in objects:
                    del item["object_id"]
            assert row["objects"] == other["objects"]
            assert [{**item, "sentence_id": ""} for item in row["sentences"]] == [
                {**item, "sentence_id": ""} for item in other["sentences"]
            ]


def test_awkward_record_is_carried_through_every_format_with_masks(convert, load, folder):
    """An image turned by EXIF, annotated upright at another size, with a polygon and a text in Unicode."""
    upright = Image.new("RGB", (30, 40))
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(folder / "turned.jpg", exif=exif)
    assert ImageOps.exif_transpose(Image.open(folder / "turned.jpg")).size == (30, 40)
    text, square = "die “rote” Tür ☕", [6, 8, 30, 8, 30, 40, 6, 40]  # annotated at 60 x 80
    points = [[x / 60 * 100, y / 80 * 100] for x, y in zip(square[::2], square[1::2], strict=True)]
    size = {"original_width": 60, "original_height": 80}
    contents = {
        "coco": {
            "images": [{"id": 1, "file_name": "turned.jpg", "width": 60, "height": 80}],
            "annotations": [{"image_id": 1, "bbox": [6, 8, 24, 32], "segmentation": [square], "caption": text}],
        },
        "label_studio": [
            {
                "data": {"image": "turned.jpg"},
                "annotations": [
                    {
                        "result": [
                            {"id": "r", "type": "polygon", "value": {"points": points}, **size},
                            {"id": "r", "type": "textarea", "value": {"text": [text]}},
                        ]
                    }
                ],
            }
        ],
        "cvat": '<annotations><image name="turned.jpg" width="60" height="80"><polygon label="x" points="'
        + ";".join(f"{x},{y}" for x, y in zip(square[::2], square[1::2], strict=True))
        + f'"><attribute name="caption">{text}</attribute></polygon></image></annotations>',
    }
    for name, content in contents.items():
        convert(name, content)
        (row,) = load()
        assert (row["width"], row["height"]) == row["image"].size == (30, 40), name
        assert expressions_of([row]) == {text: [[3, 4, 15, 20]]}, name
        mask = decode_segmentation(row["objects"][0]["segmentation"])
        assert mask.sum() == mask[4:20, 3:15].sum() == 192, name


# the command


def test_import_writes_splits_that_check_accepts(run, folder):
    (folder / "one.json").write_text(json.dumps(coco()))
    (folder / "two.json").write_text(json.dumps(coco(images=coco()["images"][:1])))
    files = (f"train={folder / 'one.json'}", f"validation={folder / 'two.json'}")
    result = run("-m", "reftr_cli", "data", "import", "coco", *files, "--output", folder / "out")
    table = [line.split() for line in result.stdout.splitlines()[:3]]
    assert table == [
        ["split", "images", "expressions", "boxes"],
        ["train", "2", "3", "3"],
        ["validation", "1", "2", "2"],
    ]
    assert (
        "- train: left out 1 annotations of images that the file lacks, 1 annotations without a box" in result.stdout
    )
    assert f"--data_dir {folder / 'out'} --image_dir {folder}" in result.stdout
    settings = ("--data_dir", folder / "out", "--image_dir", folder, "--cache_dir", folder / "cache")
    assert "jsonl: 0 errors" in run("-m", "reftr_cli", "data", "check", "jsonl", *settings).stdout


def test_import_names_wrong_arguments(run, folder):
    (folder / "one.json").write_text(json.dumps(coco()))
    command = ("-m", "reftr_cli", "data", "import")

    def refused(*argv, output=folder / "out"):
        result = run(*command, *argv, "--output", output, check=False)
        assert result.returncode == 1
        assert "Traceback" not in result.stderr
        assert not (folder / "out").exists()
        return result.stderr

    file = folder / "one.json"
    assert "'voc' is not a format to import; use one of mdetr_json" in refused("voc", file)
    assert "--prompt is not an option of the format 'coco', which has --box_format" in refused(
        "coco", file, "--prompt", ""
    )
    assert "There is no file" in refused("coco", folder / "none.json")
    table = folder / "metadata.csv"
    table.write_text("file_name,text\na.png,the cup\n")
    assert "is a csv file; expected metadata.jsonl" in refused("imagefolder", table)
    assert "'a-b' is not a valid name of a split" in refused("coco", f"a-b={file}")
    assert "look like 'xyxy_fraction'" in refused("image_text_bbox", make_fractions(folder))
    (folder / "train.jsonl").write_text("kept")
    assert "train.jsonl' exists. Choose another --output" in refused("coco", file, output=folder)
    assert (folder / "train.jsonl").read_text() == "kept"


def make_fractions(folder):
    records = [{"image": "a.png", "text": f"cup {number}", "bbox": [0.1, 0.2, 0.5, 0.9]} for number in range(4)]
    (folder / "fractions.json").write_text(json.dumps(records))
    return folder / "fractions.json"


def test_import_without_images_warns_and_keeps_what_it_can_check(convert, folder):
    records = [
        {"image": "gone.png", "text": "the cup", "bbox": [1, 2, 11, 12], "width": 40, "height": 30},
        {"image": "lost.png", "text": "the cup", "bbox": [1, 2, 11, 12]},
    ]
    lines, report = convert("image_text_bbox", records)
    assert report.missing == ["gone.png", "lost.png"]
    assert lines[1] == {"image": "lost.png", "expressions": [{"text": "the cup", "box": [1, 2, 11, 12]}]}
    records[0]["bbox"] = [100, 2, 111, 12]
    with pytest.raises(ValueError, match="expected boxes in the image of 40 x 30"):
        convert("image_text_bbox", records)


def test_import_writes_names_as_files_are_spelled(convert):
    records = [{"image": name, "text": "the cup", "bbox": [1, 2, 11, 12]} for name in ("A.PNG", "a.png", "x\\a.png")]
    (line,), report = convert("image_text_bbox", records)
    assert line["image"] == "a.png"
    changed = {
        "files are found under another spelling of their name": 1,
        "images are found by the end of their path": 1,
    }
    assert report.build["train"]["changed"] == changed


def test_import_refuses_two_images_of_one_file(convert):
    records = [{"image": f"{name}/a.png", "text": "the cup", "bbox": [1, 2, 11, 12]} for name in ("one", "two")]
    with pytest.raises(ValueError, match=r"image is 'two/a\.png'; expected another end of its path than 'one/a\.png'"):
        convert("image_text_bbox", records)


def test_formats_have_readers():
    assert {name for name, item in FORMATS.items() if item.is_dataset} <= set(data_scripts.SOURCES)
    for name in IMPORTED:
        assert re.match("read_", reader_of(name, {}).__name__)
