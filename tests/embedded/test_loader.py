"""Batches of QA examples: text and labels belong to the image."""

import numpy as np
from support.tiny_faces import labels_of

from emor3_jax.embedded.faces import tasks
from emor3_jax.embedded.faces.captions import CaptionLoader


def test_examples_are_about_the_images_that_they_come_with(captions: CaptionLoader) -> None:
    loader = captions.rows
    tokenizer, settings = loader.processor.tokenizer, loader.processor.images
    for batch in (next(loader.batches(8, seed=0)), next(loader.held_out_batches(8, seed=0))):
        assert batch.images.patches.shape[0] == 8
        for row in range(8):
            # The reply of the first question describes the face.
            tokens, start = batch.questions.tokens[row, 0], batch.questions.starts[row, 0]
            reply = tokenizer.decode(tokens[start : batch.questions.lengths[row, 0]])
            label = tasks.described(reply)
            assert labels_of(captions)[int(batch.labels[row])] == label
            # Each label has its own brightness, 0 to 19 over 30 times its index.
            patch = np.asarray(batch.images.patches[row]).reshape(-1, 3, 2 * 16)[:, 0]
            grey = (patch.mean() * settings.std[0] + settings.mean[0]) / settings.scale
            assert tasks.LABELS[int(grey // 30)] == label
