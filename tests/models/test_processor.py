import io
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support import tiny
from transformers import Qwen2VLImageProcessorPil
from transformers.image_utils import load_image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from emor3_jax.embedded.tokenizer import train_tokenizer
from emor3_jax.models.errors import ImageError, ProcessorError
from emor3_jax.models.processor import ImageSettings, Processor

LAYOUT = tiny.make_policy().layout
SETTINGS = ImageSettings(patch_size=4)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a picture of the rain"], 300)


def draw(mode: str, height: int, width: int) -> Image.Image:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(rng.integers(0, 256, (height, width), dtype=np.uint8)))
    return image


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA", "P", "1", "CMYK"])
@pytest.mark.parametrize(("height", "width"), [(48, 48), (112, 112), (131, 57), (20, 900), (3, 5)])
@pytest.mark.parametrize("pixels", [(12544, 12544), (3136, 50176)])
def test_patches_are_those_of_transformers(tokenizer, mode, height, width, pixels):
    least, most = pixels
    image = draw(mode, height, width)
    processor = Processor(tokenizer, ImageSettings(min_pixels=least, max_pixels=most), LAYOUT)
    patches, grid = processor.patches(image)
    reader = Qwen2VLImageProcessorPil(min_pixels=least, max_pixels=most)
    theirs = reader(image, return_tensors="np")
    assert theirs["image_grid_thw"].tolist() == [list(grid)]
    assert patches.dtype == np.float32
    np.testing.assert_allclose(patches, theirs["pixel_values"], atol=1e-6, rtol=0)


def test_patches_by_hand(tokenizer):
    # Patches of one pixel: value, then (value - mean) / std, for red, green, blue, two frames each.
    settings = ImageSettings(
        min_pixels=1, max_pixels=16, patch_size=1, mean=(0.0, 0.5, 1.0), std=(1.0, 0.5, 2.0)
    )
    pixels = np.zeros((2, 4, 3), np.uint8)
    pixels[0, 1] = (255, 0, 51)
    pixels[1, 2] = (51, 255, 255)
    patches, grid = Processor(tokenizer, settings, LAYOUT).patches(Image.fromarray(pixels))
    assert grid == (1, 2, 4)
    background = [0, 0, -1, -1, -0.5, -0.5]
    expected = np.array([background] * 8)
    # The four patches of a token are neighbours: (0, 1) is patch 1, (1, 2) is patch 4 + 2.
    expected[1] = [1, 1, -1, -1, -0.4, -0.4]
    expected[6] = [0.2, 0.2, 1, 1, 0, 0]
    np.testing.assert_allclose(patches, expected, atol=1e-6)


@given(
    height=st.integers(1, 5000),
    width=st.integers(1, 5000),
    least=st.integers(1, 10**6),
    factor=st.integers(1, 20),
)
def test_sizes_are_those_of_transformers(height, width, least, factor):
    settings = ImageSettings(min_pixels=least, max_pixels=factor * least)
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(ImageError, match="200 times"):
            settings.smart_resize(height, width)
    else:
        assert settings.smart_resize(height, width) == smart_resize(
            height, width, min_pixels=least, max_pixels=factor * least
        )


def test_small_images_grow_to_min_pixels(tokenizer):
    processor = Processor(
        tokenizer, ImageSettings(min_pixels=112 * 112, max_pixels=112 * 112), LAYOUT
    )
    patches, grid = processor.patches(encode(draw("L", 48, 48)))
    assert grid == (1, 8, 8) and patches.shape == (64, 1176)


@pytest.mark.parametrize(
    ("limits", "size", "first"),
    [
        # Half as wide and high; twice; √(2/3) = 0.8165 of 30 x 50 is 24.49 x 40.82, cut off.
        ((0, 10_000), (100, 400), (50, 200)),
        ((160_000, 0), (100, 400), (200, 800)),
        ((500, 1000), (30, 50), (24, 40)),
        ((500, 1500), (30, 50), (30, 50)),
    ],
)
def test_the_first_resize_brings_an_image_into_its_limits(limits, size, first):
    settings = ImageSettings(first_resize=limits)
    assert settings.first_size(*size) == first
    assert ImageSettings().first_size(*size) == size


def test_two_resizes_are_those_of_pil_and_of_transformers(tokenizer):
    processor = Processor(tokenizer, ImageSettings(min_pixels=3136, max_pixels=50_176), LAYOUT)
    twice = processor.with_first_resize(0, 12_544)
    image = draw("RGB", 300, 200)
    patches, grid = twice.patches(image)
    # √(12,544 / 60,000) = 0.457 of 300 x 200; 137 x 91 rounds to 5 x 3 times 28.
    by_pil = image.resize((91, 137), Image.BICUBIC)
    assert grid == (1, 10, 6) and twice.read_sizes(300, 200)[0] == (140, 84)
    reader = Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=50_176)
    theirs = reader(by_pil, return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(patches, theirs, atol=1e-6, rtol=0)
    assert not np.array_equal(patches, processor.with_pixels(3136, 12_544).patches(image)[0])
    with pytest.raises(ImageError, match="too thin"):
        twice.patches(draw("RGB", 1, 90_000))


def test_encoded_images_are_turned_upright(tokenizer):
    image = draw("RGB", 56, 84)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    processor = Processor(tokenizer, ImageSettings(), LAYOUT)
    encoded = encode(image, exif=exif)
    turned, grid = processor.patches(encoded)
    assert grid == (1, 6, 4)
    np.testing.assert_array_equal(turned, processor.patches(image.rotate(-90, expand=True))[0])


FILES = {
    "grey jpeg": lambda: encode(draw("L", 60, 90), "JPEG"),
    "cmyk jpeg": lambda: encode(draw("CMYK", 60, 90), "JPEG"),
    "palette png": lambda: encode(draw("P", 60, 90)),
    "palette png with a transparent colour": lambda: encode(draw("P", 60, 90), transparency=3),
    "rgb png with a transparent colour": lambda: encode(
        draw("RGB", 60, 90), transparency=(9, 9, 9)
    ),
    "grey png with alpha": lambda: encode(draw("LA", 60, 90)),
    "webp with alpha": lambda: encode(draw("RGBA", 60, 90), "WEBP", lossless=True),
    "black and white tiff": lambda: encode(draw("1", 60, 90), "TIFF"),
    "cmyk tiff": lambda: encode(draw("CMYK", 60, 90), "TIFF"),
    "moving gif": lambda: encode(
        draw("P", 60, 90),
        "GIF",
        save_all=True,
        append_images=[draw("L", 60, 90).convert("P")],
    ),
    "moving webp": lambda: encode(
        draw("RGB", 60, 90), "WEBP", save_all=True, append_images=[draw("L", 60, 90)]
    ),
}


@pytest.mark.parametrize("file", FILES)
def test_files_are_read_as_transformers_does(tokenizer, file):
    encoded = FILES[file]()
    patches, grid = Processor(tokenizer, ImageSettings(), LAYOUT).patches(encoded)
    theirs = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=28 * 28 * 1280)(
        Image.open(io.BytesIO(encoded)), return_tensors="np"
    )
    assert theirs["image_grid_thw"].tolist() == [list(grid)]
    np.testing.assert_allclose(patches, theirs["pixel_values"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_files_are_turned_as_load_image_does(tokenizer, tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.png"
    draw("RGB", 56, 84).save(path, exif=exif)
    patches, grid = Processor(tokenizer, ImageSettings(), LAYOUT).patches(path.read_bytes())
    upright = load_image(str(path))
    assert grid == (1, upright.height // 14, upright.width // 14)
    np.testing.assert_array_equal(
        patches, Processor(tokenizer, ImageSettings(), LAYOUT).patches(upright)[0]
    )


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_to_eight(tokenizer, kind):
    grey = np.random.default_rng(0).integers(0, 256, (56, 84), dtype=np.uint8)
    narrow = Processor(tokenizer, ImageSettings(), LAYOUT).patches(Image.fromarray(grey))[0]
    # 257 times a byte is the same brightness in 16 bits; a little more or less rounds to it.
    noise = np.random.default_rng(1).integers(-128, 128, grey.shape)
    wide = np.clip(grey.astype(np.int64) * 257 + noise, 0, 65535).astype(np.uint16)
    encoded = encode(Image.fromarray(wide), kind)
    np.testing.assert_array_equal(
        Processor(tokenizer, ImageSettings(), LAYOUT).patches(encoded)[0], narrow
    )


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_grey_of_unknown_range_is_refused(tokenizer, kind):
    encoded = encode(Image.fromarray(np.ones((56, 56), kind)), "TIFF")
    with pytest.raises(ImageError, match=r"32 bits .* save it with 8 or 16 bits"):
        Processor(tokenizer, ImageSettings(), LAYOUT).patches(encoded)


@pytest.mark.parametrize(
    "encoded",
    [b"", b"no image", encode(draw("RGB", 64, 64))[:-500], b"\x89PNG\r\n\x1a\n"],
    ids=["empty", "text", "cut", "header"],
)
def test_damaged_images_are_one_kind_of_error(tokenizer, encoded):
    with pytest.raises(ImageError, match=f"cannot decode an image of {len(encoded)} bytes"):
        Processor(tokenizer, ImageSettings(), LAYOUT).patches(encoded)


def test_thin_images_are_refused(tokenizer):
    with pytest.raises(ImageError, match="402 x 2 pixels is too thin"):
        Processor(tokenizer, ImageSettings(), LAYOUT).patches(draw("RGB", 2, 402))


def test_folder_round_trip_in_the_files_of_the_hub(tokenizer, tmp_path):
    settings = ImageSettings(12544, 25088, patch_size=4, mean=(0.1, 0.2, 0.3))
    Processor(tokenizer, settings, LAYOUT).save(tmp_path)
    again = Processor.from_folder(tmp_path, LAYOUT)
    assert again.images == settings
    assert again.tokenizer.chat_template == tokenizer.chat_template
    assert again.tokenizer.get_vocab() == tokenizer.get_vocab()
    data = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert data["min_pixels"] == 12544 and data["image_processor_type"] == "Qwen2VLImageProcessor"
    reader = Qwen2VLImageProcessorPil.from_pretrained(tmp_path)
    assert (reader.size["shortest_edge"], reader.size["longest_edge"]) == (12544, 25088)


def test_settings_in_the_ways_that_the_hub_and_transformers_write_them():
    hub = {"min_pixels": 3136, "max_pixels": 12845056, "image_mean": [0.5] * 3}
    assert ImageSettings.from_hf(hub) == ImageSettings(3136, 12845056, mean=(0.5, 0.5, 0.5))
    newer = {"size": {"shortest_edge": 3136, "longest_edge": 12845056}}
    assert ImageSettings.from_hf(newer) == ImageSettings(3136, 12845056)
    oldest = {"size": {"min_pixels": 3136, "max_pixels": 12845056}}
    assert ImageSettings.from_hf(oldest) == ImageSettings(3136, 12845056)
    assert ImageSettings.from_hf({}) == ImageSettings()


def test_settings_inside_a_processor_file(tokenizer, tmp_path):
    Processor(tokenizer, SETTINGS, LAYOUT).save(tmp_path)
    data = (tmp_path / "preprocessor_config.json").read_text()
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"preprocessor_config\.json"):
        Processor.from_folder(tmp_path, LAYOUT)
    (tmp_path / "processor_config.json").write_text(f'{{"image_processor": {data}}}')
    assert Processor.from_folder(tmp_path, LAYOUT).images == SETTINGS
    # transformers reads that file first.
    Processor(tokenizer, ImageSettings(9, 99, patch_size=4), LAYOUT).save(tmp_path)
    assert Processor.from_folder(tmp_path, LAYOUT).images == SETTINGS


def test_errors_name_the_file_that_the_settings_are_from(tokenizer, tmp_path):
    Processor(tokenizer, SETTINGS, LAYOUT).save(tmp_path)
    data = json.loads((tmp_path / "preprocessor_config.json").read_text())
    changes = ({"patch_size": 14}, {"resample": 2}, {"image_mean": 0.5}, {"size": {"height": 3}})
    for change in changes:
        # Outer bounds would go before those of `size`.
        found = {**data, "min_pixels": None, "max_pixels": None, **change}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(found))
        with pytest.raises(ProcessorError, match=rf"{tmp_path}/preprocessor_config\.json: "):
            Processor.from_folder(tmp_path, LAYOUT)
        whole = tmp_path / "processor_config.json"
        whole.write_text(json.dumps({"image_processor": found}))
        with pytest.raises(ProcessorError, match=rf"{whole}: "):
            Processor.from_folder(tmp_path, LAYOUT)
        whole.write_text(json.dumps({"processor_class": "Qwen3VLProcessor"}))
        (tmp_path / "preprocessor_config.json").unlink()
        with pytest.raises(FileNotFoundError, match=r"and processor_config\.json has no image_pro"):
            Processor.from_folder(tmp_path, LAYOUT)
        whole.unlink()


def test_chat_template_in_the_file_of_older_folders(tokenizer, tmp_path):
    Processor(tokenizer, SETTINGS, LAYOUT).save(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ProcessorError, match="no chat template"):
        Processor.from_folder(tmp_path, LAYOUT)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "{{ 1 }}"}))
    assert Processor.from_folder(tmp_path, LAYOUT).tokenizer.chat_template == "{{ 1 }}"
    # That of a whole processor goes first, as in transformers; null says nothing.
    for name, template in (("processor_config.json", "{{ 2 }}"), ("chat_template.json", None)):
        (tmp_path / name).write_text(json.dumps({"chat_template": template}))
        assert Processor.from_folder(tmp_path, LAYOUT).tokenizer.chat_template == "{{ 2 }}"


def test_of_several_chat_templates_the_way_out_is_named(tokenizer, tmp_path):
    Processor(tokenizer, SETTINGS, LAYOUT).save(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    data = json.loads((tmp_path / "tokenizer_config.json").read_text())
    data["chat_template"] = [{"name": name, "template": "x"} for name in ("default", "tool_use")]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(data))
    with pytest.raises(ProcessorError, match=r"not one text; keep .*, in chat_template\.jinja"):
        Processor.from_folder(tmp_path, LAYOUT)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"do_resize": False}, "do_resize=false"),
        ({"do_convert_rgb": False}, "do_convert_rgb=false"),
        ({"do_rescale": 0}, "do_rescale=0 is not implemented"),
        ({"resample": 2}, "resample=2"),
        ({"min_pixels": 9, "max_pixels": 8}, "min_pixels=9"),
        ({"size": 224}, "size=224 must hold shortest_edge and longest_edge"),
        ({"size": {"height": 224, "width": 224}}, "must hold shortest_edge"),
        ({"size": {"shortest_edge": 224}}, "must hold shortest_edge and longest_edge"),
    ],
)
def test_settings_that_are_not_implemented_are_refused(data, message):
    with pytest.raises(ProcessorError, match=message):
        ImageSettings.from_hf(data)


def test_settings_of_another_policy_are_named(tokenizer, tmp_path):
    Processor(tokenizer, SETTINGS, LAYOUT).save(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    whole = json.loads(file.read_text())
    for name, value in (("patch_size", 14), ("merge_size", 3), ("temporal_patch_size", 1)):
        file.write_text(json.dumps(whole | {name: value}))
        with pytest.raises(ProcessorError, match=f"{name}={value} differs from the .* config.json"):
            Processor.from_folder(tmp_path, LAYOUT)
