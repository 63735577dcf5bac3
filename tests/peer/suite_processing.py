"""Run transformers' own tests of image processors and processors on RefTR's, by `make test-peer`."""

import unittest

from PIL import Image
from transformers_tests.test_image_processing_common import ImageProcessingTester, ImageProcessingTestMixin
from transformers_tests.test_processing_common import ProcessorTesterMixin

from modeling_reftr import RefTRImageProcessor, RefTRProcessor
from modeling_reftr.image_processing_reftr import resized_size
from training_reftr.tokenizer_training import train_tokenizer


SIZE = {"shortest_edge": 42, "longest_edge": 42}


class RefTRImageProcessingTester(ImageProcessingTester):
    def __init__(self, parent):
        super().__init__(parent, size=SIZE, do_pad=True)

    def _get_image_processing_classes(self):
        return {"torchvision": RefTRImageProcessor}

    def expected_output_image_shape(self, images):
        sizes = []
        for image in images:
            if isinstance(image, Image.Image):
                height, width = image.height, image.width
            else:
                height, width = image.shape[:2] if image.shape[-1] in (1, 3, 4) else image.shape[-2:]
            sizes.append(resized_size(height, width, **SIZE))
        return self.num_channels, max(height for height, _ in sizes), max(width for _, width in sizes)


class RefTRImageProcessingTest(ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = RefTRImageProcessingTester


class RefTRProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = RefTRProcessor

    @classmethod
    def _setup_image_processor(cls):
        return RefTRImageProcessor(size=SIZE)

    @classmethod
    def _setup_tokenizer(cls):
        return train_tokenizer(["lower newer", "upper older longer string"], max_length=200)

    @unittest.skip("a text without an image has nothing to be grounded in, and is refused")
    def test_processor_text_has_no_visual(self):
        pass
