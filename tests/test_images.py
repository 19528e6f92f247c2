import io

import numpy as np
import pytest
from PIL import Image

from moextend_jax.config import MoextendError
from moextend_jax.faults import Fault
from moextend_jax.media.image import MEAN_c, STD_c, decode_image, prepare_image


def noise(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [(28, 28), (31, 50), (50, 31), (200, 29), (17, 20)])
def test_crop_equals_the_clip_image_processor(size):
    clip = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    processor = clip.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=28)
    wanted = processor(noise(*size), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    np.testing.assert_allclose(prepare_image(noise(*size), size=28, preparation="crop"), wanted, atol=1e-5)


def test_pad_keeps_the_whole_picture_in_the_middle_of_mean_colour():
    red = Image.new("RGB", (40, 20), (255, 0, 0))
    got = prepare_image(red, size=40, preparation="pad")
    assert got.shape == (40, 40, 3) and got.dtype == np.float32
    colour = got * STD_c + MEAN_c
    np.testing.assert_allclose(colour[10:30], np.broadcast_to([1.0, 0, 0], (20, 40, 3)), atol=1e-5)
    assert np.abs(got[:10]).max() < 0.02 and np.abs(got[30:]).max() < 0.02  # the mean, rounded to whole levels


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1"])
def test_every_mode_becomes_rgb(mode):
    file = io.BytesIO()
    noise(9, 7).convert(mode).save(file, "PNG")
    image = decode_image(file.getvalue())
    assert image.mode == "RGB" and image.size == (9, 7)


@pytest.mark.parametrize(
    ("levels", "kind"), [(np.arange(0, 60000, 600), np.int32), (np.arange(0, 60000, 600), np.uint16)]
)
def test_levels_of_16_bits_are_scaled(levels: np.ndarray, kind: type):
    file = io.BytesIO()
    Image.fromarray(levels.reshape(10, 10).astype(kind)).save(file, "TIFF")
    got = np.asarray(decode_image(file.getvalue()))
    np.testing.assert_array_equal(got[..., 0].reshape(-1), levels >> 8)


@pytest.mark.parametrize("levels", [np.linspace(0, 1, 100), np.linspace(0, 1e6, 100), np.linspace(-5, 90, 100)])
def test_levels_that_do_not_say_what_is_white_are_refused(levels: np.ndarray):
    file = io.BytesIO()
    Image.fromarray(levels.reshape(10, 10).astype(np.float32)).save(file, "TIFF")
    with pytest.raises(MoextendError, match="make them levels of 8 or 16 bits"):
        decode_image(file.getvalue())


def test_a_tiff_that_pillow_does_not_read_is_not_called_cut_off():
    plain, packed = io.BytesIO(), io.BytesIO()
    noise(9, 7).convert("YCbCr").save(plain, "TIFF")
    noise(9, 7).convert("YCbCr").save(packed, "TIFF", compression="tiff_lzw")
    assert decode_image(packed.getvalue()).size == (9, 7)
    with pytest.raises(Fault, match="YCbCr without compression is not read; save it as RGB") as error:
        decode_image(plain.getvalue())
    assert error.value.kind == "unreadable"


@pytest.mark.parametrize("encoded", [b"", b"not an image", b"\x89PNG\r\n\x1a\nbroken"])
def test_a_broken_file_is_named(encoded):
    with pytest.raises(MoextendError, match="cannot read cat.png as an image"):
        decode_image(encoded, name="cat.png")
