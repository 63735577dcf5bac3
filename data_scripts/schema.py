"""The schema that all datasets share: a row is an image with its objects and the sentences about it."""

import datasets


FEATURES = datasets.Features(
    {
        "image_id": datasets.Value("string"),
        "image": datasets.Image(),
        "width": datasets.Value("int32"),
        "height": datasets.Value("int32"),
        "objects": [
            {
                "object_id": datasets.Value("string"),
                # xyxy in pixels, right and bottom exclusive; the answer to a phrase that names the object.
                # A box without extent, or a mask without a pixel, cannot be learned or found, but the published
                # evaluation counts it as a miss: datasets built with `integer_boxes` keep it
                "box": [datasets.Value("float32")],
                # all boxes of the object if it has several: parts of one answer, whose `box` is their union
                "boxes": [[datasets.Value("float32")]],
                "category": datasets.Value("string"),
                # COCO run-length encoding at the image's size, or null
                "segmentation": {"size": [datasets.Value("int32")], "counts": datasets.Value("string")},
            }
        ],
        "sentences": [
            {
                "sentence_id": datasets.Value("string"),
                "text": datasets.Value("string"),
                # text[start:end] names the objects; a referring expression has one phrase, the entire text
                "phrases": [
                    {
                        "start": datasets.Value("int32"),
                        "end": datasets.Value("int32"),
                        # each is an answer; none if the annotations say that nothing in the image is meant
                        "objects": [datasets.Value("int32")],
                        "types": [datasets.Value("string")],
                    }
                ],
            }
        ],
        # each sentence's number in the annotations of its split, from 0, where rows are ordered otherwise; null: rows
        # and sentences are in the order of the annotations
        "positions": [datasets.Value("int32")],
    }
)
# columns that exports of earlier versions lack
OPTIONAL = ("positions",)
