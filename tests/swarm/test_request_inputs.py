"""What strangers send, as a model's inputs."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from support.images import image_dataset, processor
from support.texts import save_with_tokenizer, text_classifier, tokenizer_of
from transformers import ViTConfig, WhisperConfig

import hf_layershuffle as ls
from hf_layershuffle.swarm.request_inputs import Limits, RefusedInputError, RequestInputs, excerpt, thumbnail


FOLDER = Path(ls.example_model())
DIGIT = (FOLDER / "examples" / "3.png").read_bytes()


@pytest.fixture(scope="module")
def inputs():
    return RequestInputs.from_pretrained(str(FOLDER))


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


MODES = {
    "grey": lambda image: encoded(image.convert("L")),
    "palette": lambda image: encoded(image.convert("P")),
    "palette with transparency": lambda image: encoded(image.convert("P"), "GIF", transparency=0),
    "alpha": lambda image: encoded(image.convert("RGBA")),
    "grey with alpha": lambda image: encoded(image.convert("LA")),
    "16 bits": lambda image: encoded(Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)),
    "black and white": lambda image: encoded(image.convert("1", dither=Image.Dither.NONE)),
    "CMYK": lambda image: encoded(image.convert("CMYK"), "TIFF"),
    "bitmap": lambda image: encoded(image, "BMP"),
    "animated": lambda image: encoded(image, "GIF", save_all=True, append_images=[Image.new("RGB", image.size)] * 3),
    "turned by EXIF": lambda image: encoded(image.rotate(90), exif=_turned(6)),
}


def _turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("mode", MODES)
def test_any_mode_of_an_image_is_that_image(inputs, mode):
    image = Image.open(io.BytesIO(DIGIT)).convert("RGB")
    read = inputs.read_image(MODES[mode](image))
    assert read.mode == "RGB" and read.size == image.size
    exact = 255 if mode == "black and white" else 64 if "palette" in mode or mode == "animated" else 1
    assert np.abs(np.asarray(read).astype(int) - np.asarray(image)).max() <= exact
    if exact == 255:
        assert np.array_equal(np.asarray(read)[..., 0] > 127, np.asarray(image.convert("L")) > 127)


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_numbers_of_unknown_range_are_refused(inputs, dtype):
    data = encoded(Image.fromarray(np.full((8, 8), 1000, dtype)), "TIFF")
    with pytest.raises(RefusedInputError, match=r"The image cannot be decoded: it holds .* from 1000 to 1000"):
        inputs.read_image(data)


def test_a_grey_model_gets_one_channel():
    config = ViTConfig(num_channels=1, image_size=8, patch_size=4, num_labels=3)
    grey = RequestInputs(config, processor(8, channels=1))
    image = grey.read_image(DIGIT)
    assert image.mode == "L" and grey.of_image(image)["pixel_values"].shape == (1, 1, 8, 8)


def test_texts_are_cut_off_and_never_empty(tmp_path):
    folder = save_with_tokenizer(text_classifier(), tmp_path)
    texts = RequestInputs.from_pretrained(str(folder))
    texts.max_length = 8
    made = texts.of_text("the cat and the dog " * 20)
    assert made["input_ids"].shape == made["attention_mask"].shape == (1, 8)
    alone = tokenizer_of()("a cat", return_tensors="pt")
    assert torch.equal(texts.of_text("a cat")["input_ids"], alone["input_ids"])
    assert texts.of_text("a cat", "a dog")["input_ids"].shape[1] > alone["input_ids"].shape[1]
    for text in ("", "  ", None, 3, ["a"]):
        with pytest.raises(RefusedInputError, match=r"`text` is .*; it must be a text that is not empty"):
            texts.of_text(text)
    with pytest.raises(RefusedInputError, match="`text_pair` is '1'"):
        texts.of_text("a", 1)


def test_labelled_texts_are_cut_off_where_the_model_ends(tmp_path):
    model = text_classifier()
    texts = RequestInputs.from_pretrained(str(save_with_tokenizer(model, tmp_path)))
    texts.cut_texts_for(model)
    data = Dataset.from_dict({"text": ["cat and dog " * 20, "a cat"], "label": [0, 1]})
    sizes = [item.inputs["input_ids"].shape[1] for item in texts.labelled(data)]
    assert max(sizes) == 16 > min(sizes)


def test_a_model_of_something_else_is_refused():
    with pytest.raises(ValueError, match="type 'whisper', whose inputs are audio; the service takes images and texts"):
        RequestInputs(WhisperConfig(), processor())


def test_labelled_inputs_have_their_pictures_and_the_names_of_their_classes():
    config = ViTConfig(image_size=8, patch_size=4, id2label={0: "cat", 1: "dog"})
    made = RequestInputs(config, processor()).labelled(image_dataset(10), max_samples=4)
    assert len(made) == 4 and {each.label for each in made} <= {"cat", "dog"}
    assert made[0].inputs["pixel_values"].shape == (1, 3, 8, 8)
    assert made[0].shown["image"].startswith("data:image/png;base64,")


def test_what_a_page_shows_is_small():
    shown = thumbnail(Image.new("CMYK", (4000, 2000)))["image"]
    assert shown.startswith("data:image/png;base64,") and len(shown) < 500
    assert excerpt("a  b\n c") == {"text": "a b c"}
    assert len(excerpt("word " * 100)["text"]) == 60


@pytest.mark.parametrize("name", ["max_body_bytes", "max_pixels", "max_in_flight"])
def test_limits_are_integers_above_0(name):
    for value in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match=f"`{name}` is {value}; it must be an integer of at least 1"):
            Limits(**{name: value})


def test_the_seconds_for_a_request_are_above_0():
    with pytest.raises(ValueError, match="`body_timeout` is 0; it must be a number of seconds above 0"):
        Limits(body_timeout=0)
