"""Files of other codecs: what of them is counted, and that what is kept is what they give back."""

from __future__ import annotations

import io

import lossy
import numpy as np
import pytest
from PIL import Image

from engram_trainer.examples import Examples
from engram_trainer.local_memory import LocalConfig
from engram_trainer.memory import Learned
from tests.photos import photos

IMAGES = photos(12, (32, 32, 3), noise=4)


@pytest.mark.parametrize("codec", lossy.CODECS)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_better_file_is_nearer_and_counts_more(codec: lossy.Codec, channels: int) -> None:
    image = IMAGES[0][..., :channels]
    found = [lossy.coded(image, codec, quality) for quality in (24, 32)]
    errors = [np.abs(back.astype(int) - image).mean() for back, _ in found]
    assert errors[0] > errors[1] > 0
    assert found[0][1] < found[1][1]


def test_of_a_webp_file_all_but_its_container_is_counted() -> None:
    out = io.BytesIO()
    Image.fromarray(IMAGES[0]).save(out, "WEBP", quality=30, method=6)
    file = out.getvalue()
    assert (file[:4], file[8:16]) == (b"RIFF", b"WEBPVP8 ")
    back, count = lossy.coded(IMAGES[0], "webp", 30)
    # The payload's length stands before it; one byte fills up to an even length.
    assert count - int.from_bytes(file[16:20], "little") in (0, 1)
    assert count == len(file) - lossy.WEBP_CONTAINER_BYTES
    np.testing.assert_array_equal(back, np.asarray(Image.open(out)))


@pytest.mark.parametrize("codec", lossy.CODECS)
def test_a_share_holds_as_many_files_as_fit(codec: lossy.Codec) -> None:
    share = 1_500
    memory = lossy.LossyMemory(
        LocalConfig(kind="files", budget_bytes=share, per="class", ranking="random", quality=30), codec
    )
    memory.add(Learned(0, Examples.of_arrays(IMAGES, np.repeat([0, 1], 6))))
    sizes = {image.tobytes(): count for image, count in (lossy.coded(each, codec, 30) for each in IMAGES)}
    [batch] = memory.walk(1_000)
    spent = [sizes[image.tobytes()] + 2 for image in batch.images]
    assert memory.used_bytes == sum(spent)
    for class_id in (0, 1):
        assert sum(count for count, own in zip(spent, batch.class_ids, strict=True) if own == class_id) <= share
        assert 0 < memory.counts()[0][class_id] < 6
    assert memory.is_lossy
