"""Images into patches, and the files in which Hugging Face keeps tokenizer and image settings.

The arithmetic is that of transformers' `Qwen2VLImageProcessorPil`, bit for bit, without torch: a
bicubic resize by PIL to a multiple of 28 pixels a side within [min_pixels, max_pixels], then scale,
normalisation and the cut into patches. A table of 256 values a channel does scale and
normalisation, since a decoded pixel is one of 256 bytes.

Deviations, numbered:
 1. Encoded images are turned upright by their EXIF orientation, as transformers' `load_image`
    does and the release does not. Of a moving image the first frame is read, as there.
 2. Grey images of 16 bits are scaled to 8. transformers cuts them off at 255, which leaves white.
    Grey images of 32 bits have no known range and are refused; there they turn black or white.
 3. Images become RGB before the first of two resizes (`first_resize`); the release converts between
    them, and so resizes an image with a palette to the nearest pixels.
"""

import dataclasses
import json
import math
import numbers
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike
from PIL import Image
from transformers import PreTrainedTokenizerBase

from emor3_jax.files import is_file, read_json
from emor3_jax.models.errors import ImageError, ProcessorError, refuse_code
from emor3_jax.models.images import MAX_DECODED_PIXELS, decode
from emor3_jax.models.layout import Encoded, ImageLayout
from emor3_jax.models.tokenizer import PROCESSOR_FILE, read_tokenizer, save_tokenizer
from emor3_jax.types import Array

PREPROCESSOR_FILE = "preprocessor_config.json"
_MAX_ASPECT_RATIO = 200


@dataclasses.dataclass(frozen=True)
class ImageSettings:
    """Settings that turn an image into patches.

    Attributes:
      min_pixels, max_pixels: images are scaled to have between so many pixels.
      patch_size: side of a patch in pixels.
      temporal_patch_size: frames of a patch; a still image is repeated.
      merge_size: merge_size * merge_size patches become one token.
      mean, std: of each channel, after scaling to [0, 1].
      scale: factor on a byte.
      first_resize: least and most pixels (0 for no limit) that an image is brought to by a bicubic
        resize of its own, before that of this class, as in the release; None for one resize.
      max_decoded_pixels: an image of more is refused before it is decoded.
    """

    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    scale: float = 1 / 255
    first_resize: tuple[int, int] | None = None
    max_decoded_pixels: int = MAX_DECODED_PIXELS

    def __post_init__(self) -> None:
        for name in ("min_pixels", "max_pixels", "patch_size", "temporal_patch_size", "merge_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
                raise ProcessorError(f"{name}={value!r} must be a whole number over 0")
        if self.min_pixels > self.max_pixels:
            raise ProcessorError(
                f"min_pixels={self.min_pixels} must be over 0 and at most "
                f"max_pixels={self.max_pixels}"
            )
        for name in ("mean", "std"):
            if len(getattr(self, name)) != 3 or not all(map(_is_finite, getattr(self, name))):
                raise ProcessorError(f"image_{name}={getattr(self, name)!r} must be three numbers")
        if not all(self.std) or not _is_finite(self.scale):
            raise ProcessorError(
                f"image_std={self.std!r} and rescale_factor={self.scale!r} must be finite numbers, "
                "the first not 0"
            )

    @classmethod
    def from_hf(
        cls, data: dict[str, Any], where: str | Path = PREPROCESSOR_FILE
    ) -> "ImageSettings":
        """Reads the contents of a `preprocessor_config.json`.

        Args:
          data: the parsed file; a missing field, or null, has transformers' default.
          where: the file, for errors.

        Raises:
          ProcessorError: if a field asks for something that is not implemented.
        """
        for name in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
            if data.get(name) not in (None, True):
                value = json.dumps(data[name])
                raise ProcessorError(f"{where}: {name}={value} is not implemented, only true")
        if data.get("resample") not in (None, Image.BICUBIC):
            raise ProcessorError(
                f"{where}: resample={data['resample']!r} is not implemented, only "
                f"{int(Image.BICUBIC)} (bicubic)"
            )
        refuse_code(data, str(where), ProcessorError)
        colours = {name: data.get(f"image_{name}") for name in ("mean", "std")}
        for name, value in colours.items():
            if value is not None and not isinstance(value, list):
                raise ProcessorError(f"{where}: image_{name}={value!r} must be a list")
        given = {
            "min_pixels": _pixels(data, "min_pixels", "shortest_edge", where),
            "max_pixels": _pixels(data, "max_pixels", "longest_edge", where),
            "patch_size": data.get("patch_size"),
            "temporal_patch_size": data.get("temporal_patch_size"),
            "merge_size": data.get("merge_size"),
            "mean": colours["mean"] and tuple(colours["mean"]),
            "std": colours["std"] and tuple(colours["std"]),
            "scale": data.get("rescale_factor"),
        }
        try:
            return cls(**{name: value for name, value in given.items() if value is not None})
        except ProcessorError as error:
            raise ProcessorError(f"{where}: {error}") from error

    def to_hf(self) -> dict[str, Any]:
        """Returns the contents of a `preprocessor_config.json`, without the processor's class."""
        return {
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": list(self.mean),
            "image_processor_type": "Qwen2VLImageProcessor",
            "image_std": list(self.std),
            "max_pixels": self.max_pixels,
            "merge_size": self.merge_size,
            "min_pixels": self.min_pixels,
            "patch_size": self.patch_size,
            "resample": int(Image.BICUBIC),
            "rescale_factor": self.scale,
            "size": {"longest_edge": self.max_pixels, "shortest_edge": self.min_pixels},
            "temporal_patch_size": self.temporal_patch_size,
        }

    def first_size(self, height: int, width: int) -> tuple[int, int]:
        """Returns the size in pixels, (height, width), after `first_resize`, if there is one.

        Args:
          height, width: of the image in pixels.
        """
        least, most = self.first_resize or (0, 0)
        for wanted, over in ((most, True), (least, False)):
            pixels = height * width
            if wanted and (pixels > wanted if over else pixels < wanted):
                factor = math.sqrt(wanted / pixels)
                # A side of 0 is left to `smart_resize`, which refuses images as thin as that.
                height, width = (max(1, int(side * factor)) for side in (height, width))
        return height, width

    def smart_resize(self, height: int, width: int) -> tuple[int, int]:
        """Returns the size in pixels, (height, width), to which an image is scaled.

        Both are multiples of `patch_size * merge_size`, their product lies between `min_pixels` and
        `max_pixels` where that can be, and the aspect ratio is kept as well as possible. As
        transformers' `smart_resize`.

        Args:
          height, width: of the image in pixels.

        Raises:
          ImageError: if one side is over 200 times the other.
        """
        if max(height, width) > _MAX_ASPECT_RATIO * min(height, width):
            raise ImageError(
                f"an image of {width} x {height} pixels is too thin: one side may be at most "
                f"{_MAX_ASPECT_RATIO} times the other"
            )
        factor = self.patch_size * self.merge_size
        down, across = (round(side / factor) * factor for side in (height, width))
        if down * across > self.max_pixels:
            shrink = math.sqrt(height * width / self.max_pixels)
            down, across = (
                max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width)
            )
        elif down * across < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (height * width))
            down, across = (math.ceil(side * grow / factor) * factor for side in (height, width))
        return down, across

    def cut(self, pixels: Array, frames: int | None = None) -> Array:
        """Returns the patches of images, frames repeated, in the order of the policy.

        Args:
          pixels: [..., H, W, 3], both sides multiples of `patch_size * merge_size`; of NumPy or
            JAX.
          frames: so many of them in a patch; None is `temporal_patch_size`.

        Returns:
          [..., N, 3 * frames * patch_size**2], the merge_size**2 patches of a token side by side.
        """
        patch, merge = self.patch_size, self.merge_size
        *batch, down, across, _ = pixels.shape
        rows, columns = down // (patch * merge), across // (patch * merge)
        cut = pixels.reshape(*batch, rows, merge, patch, columns, merge, patch, 3)
        n = len(batch)
        # [..., rows, columns, m, m, 3, patch, patch]
        cut = cut.transpose(*range(n), *(n + axis for axis in (0, 3, 1, 4, 6, 2, 5)))
        cut = cut.reshape(*batch, -1, 3, 1, patch, patch)
        cut = cut.repeat(frames or self.temporal_patch_size, axis=n + 2)
        return cut.reshape(*batch, rows * columns * merge**2, -1)


def _pixels(data: dict[str, Any], name: str, edge: str, where: str | Path) -> Any:
    """Returns a bound of the pixels of an image, which `size` may hold too, under either name."""
    size = data.get("size")
    named = isinstance(size, dict) and (size.get(edge) or size.get(name))
    if size is None or (data.get(name) is not None and isinstance(size, dict)):
        return data.get(name)
    if not named:
        raise ProcessorError(
            f"{where}: size={size!r} must hold shortest_edge and longest_edge, in pixels"
        )
    return named


def _read_settings(folder: Path) -> tuple[dict[str, Any], Path]:
    """Returns the settings of images of a folder, and the file that they are from.

    As transformers does: what is inside of the whole processor's file goes first.
    """
    path = folder / PROCESSOR_FILE
    whole = is_file(path)
    if whole:
        data = read_json(path, ProcessorError, dict)
        refuse_code(data, str(path), ProcessorError)
        images = data.get("image_processor")
        if not isinstance(images, dict | None):
            raise ProcessorError(
                f"{path}: image_processor={str(images)[:80]!r} must be an object, the settings of "
                "images"
            )
        if images is not None:
            return images, path
    path = folder / PREPROCESSOR_FILE
    if not is_file(path):
        there = f", and {PROCESSOR_FILE} has no image_processor" if whole else ""
        raise FileNotFoundError(
            f"{path} does not exist{there}; download the settings of images of the policy too"
        )
    return read_json(path, ProcessorError, dict), path


class Processor:
    """Reads text and images for a policy.

    Attributes:
      tokenizer: a byte-level BPE tokenizer with a chat template.
      images: settings of the image processor.
      layout: of images and positions.
      dtype: of still patches.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        images: ImageSettings,
        layout: ImageLayout,
        dtype: DTypeLike = np.float32,
    ) -> None:
        """Joins a tokenizer, image settings, a layout and the type of still patches."""
        self.tokenizer, self.images, self.layout = tokenizer, images, layout
        self.dtype = np.dtype(dtype)
        values = (np.arange(256, dtype=np.float64) * self.images.scale).astype(np.float32)
        mean, std = (np.asarray(x, np.float32) for x in (self.images.mean, self.images.std))
        # float32[channel, byte]
        self._table = (values - mean[:, None]) / std[:, None]

    def with_pixels(self, least: int, most: int) -> "Processor":
        """Returns a processor that scales images to have between so many pixels."""
        images = dataclasses.replace(self.images, min_pixels=least, max_pixels=most)
        return Processor(self.tokenizer, images, self.layout, self.dtype)

    def with_first_resize(self, least: int, most: int) -> "Processor":
        """Returns a processor that first brings images to between so many pixels; 0 is no limit."""
        images = dataclasses.replace(self.images, first_resize=(least, most))
        return Processor(self.tokenizer, images, self.layout, self.dtype)

    def with_decode_limit(self, most: int) -> "Processor":
        """Returns a processor that refuses images of more pixels than this, unread."""
        images = dataclasses.replace(self.images, max_decoded_pixels=most)
        return Processor(self.tokenizer, images, self.layout, self.dtype)

    def with_dtype(self, dtype: DTypeLike) -> "Processor":
        """Returns a processor of still patches of a type, that of the policy's arithmetic."""
        return Processor(self.tokenizer, self.images, self.layout, dtype)

    def encode(self, image: bytes | Image.Image) -> Encoded:
        """Returns an image with all frames of its patches; raises ImageError."""
        return self.layout.arrange(*self.patches(image))

    def read_sizes(self, height: int, width: int) -> tuple[tuple[int, int], int, int]:
        """Returns the scaled (height, width), the image tokens and the bucket of an image.

        Args:
          height, width: of the image in pixels.

        Raises:
          ImageError: if it is too thin.
        """
        size = self.images.smart_resize(*self.images.first_size(height, width))
        rows, columns = (side // self.images.patch_size for side in size)
        tokens = rows * columns // self.images.merge_size**2
        return size, tokens, self.layout.bucket((1, rows, columns))

    @classmethod
    def from_folder(cls, folder: str | Path, layout: ImageLayout) -> "Processor":
        """Reads tokenizer and image settings from a folder in Hugging Face's format.

        Args:
          folder: with tokenizer files and `preprocessor_config.json`.
          layout: of the policy's images.

        Raises:
          FileNotFoundError: if the image settings are missing.
          ProcessorError: if a file is damaged, asks for something that is not implemented, or
            differs from `config.json`, or the tokenizer has no chat template.
        """
        folder = Path(folder)
        tokenizer = read_tokenizer(folder)
        data, where = _read_settings(folder)
        images = ImageSettings.from_hf(data, where)
        vision = layout.shapes.vision
        for name, here, there in (
            ("patch_size", images.patch_size, vision.patch_size),
            ("temporal_patch_size", images.temporal_patch_size, vision.temporal_patch_size),
            ("merge_size", images.merge_size, vision.spatial_merge_size),
        ):
            if here != there:
                raise ProcessorError(
                    f"{where}: {name}={here} differs from the {there} of config.json; both must be "
                    "of the same policy"
                )
        return cls(tokenizer, images, layout)

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer files and `preprocessor_config.json`, which transformers reads."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_tokenizer(self.tokenizer, folder)
        data = self.images.to_hf() | {"processor_class": self.layout.processor_class}
        text = json.dumps(data, indent=2) + "\n"
        (folder / PREPROCESSOR_FILE).write_text(text)

    def patches(self, image: bytes | Image.Image) -> tuple[np.ndarray, tuple[int, int, int]]:
        """Returns the patches of an image and their grid.

        Args:
          image: an encoded image (JPEG, PNG, ...), or a decoded one, which is not turned.

        Returns:
          float32[N, 3 * temporal_patch_size * patch_size**2], the merge_size**2 patches of a token
          side by side; (1, rows, columns) in patches, N = rows * columns.

        Raises:
          ImageError: if the image cannot be decoded, is too large for PIL, too thin, or grey of
            32 bits.
        """
        return self._cut(self.pixels(image), self._table, self.images.temporal_patch_size)

    def still_patches(self, image: bytes | Image.Image) -> tuple[np.ndarray, tuple[int, int, int]]:
        """Returns one frame of the patches of an image, in `dtype`, and their grid.

        The other frames are equal, so the policy repeats this one on the device. A quarter of the
        bytes of `patches` is read, kept and sent where `dtype` is bfloat16; the values are those
        that the first product of a policy in that type would round them to.

        Args:
          image: as of `patches`, which says what is raised.

        Returns:
          `dtype`[N, 3 * patch_size**2]; (1, rows, columns) in patches, N = rows * columns.
        """
        return self._cut(self.pixels(image), self._table.astype(self.dtype), 1)

    def _cut(
        self, pixels: np.ndarray, table: np.ndarray, frames: int
    ) -> tuple[np.ndarray, tuple[int, int, int]]:
        down, across, _ = pixels.shape
        values = np.stack([table[c][pixels[..., c]] for c in range(3)], axis=-1)
        patch = self.images.patch_size
        return self.images.cut(values, frames), (1, down // patch, across // patch)

    def pixels(self, image: bytes | Image.Image) -> np.ndarray:
        """Returns an image uint8[H, W, 3], scaled to the size that the policy sees.

        Args:
          image: as of `patches`, which says what is raised.
        """
        image = _to_rgb(
            decode(image, self.images.max_decoded_pixels) if isinstance(image, bytes) else image
        )
        first = self.images.first_size(image.height, image.width)
        if first != (image.height, image.width):
            image = image.resize(first[::-1], Image.BICUBIC)
        down, across = self.images.smart_resize(*first)
        return np.asarray(image.resize((across, down), Image.BICUBIC))


def _is_finite(value: object) -> bool:
    return isinstance(value, numbers.Real) and math.isfinite(value)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Drops transparency onto white, as transformers 5 does; scales 16 bits to 8."""
    if image.mode.startswith("I;16"):
        wide = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((wide + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ImageError(
            f"a grey image of 32 bits (mode {image.mode}) has no known range of brightness; "
            "save it with 8 or 16 bits"
        )
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")
