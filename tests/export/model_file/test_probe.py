import numpy as np
import pytest

from common.refusal import Refusal
from export.model_file.probe import refuse_batch_dependence


def test_an_answer_may_depend_on_its_batch_by_a_twentieth_and_no_more(tmp_path):
    def answer(images, share):
        """Three pixels as logits; among others, each is larger by a share of the largest."""
        logits = images.reshape(len(images), -1)[:, :3].astype(np.float64)
        return logits + share * logits.max() * (len(images) > 1)

    assert refuse_batch_dependence(tmp_path, lambda images: answer(images, 0.04), (4, 5, 3)).shape == (4, 3)
    with pytest.raises(Refusal, match="answers an image differently alone and among others, by 6% of its largest"):
        refuse_batch_dependence(tmp_path, lambda images: answer(images, 0.06), (4, 5, 3))


def test_a_net_that_normalizes_with_its_batch_is_noticed_since_the_images_differ_in_contrast(tmp_path):
    def answer(images):
        return images.reshape(len(images), -1)[:, :3] / images.std()

    with pytest.raises(Refusal, match="it uses its batch, as batch norm in training mode does"):
        refuse_batch_dependence(tmp_path, answer, (16, 16, 3))
