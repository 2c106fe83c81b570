"""Image files of any usual kind as arrays: how training and prediction read them."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Shaped, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm", ".pnm"),
    *(".avif", ".heic", ".heif"),  # which not every Pillow reads
)
"""How names of pictures end, in small letters."""
_ORIENTATION = 0x0112  # EXIF tag; from 5 on, height and width are swapped


def picture_size(path: Path) -> tuple[int, int]:
    """Height and width of an image file, upright as its EXIF tag says; only its head is read.

    Raises:
        ValueError: it is not an image, or damaged.
        OSError: there is no such file.
    """
    with _opened(path) as file:
        width, height = file.size
        return (width, height) if file.getexif().get(_ORIENTATION, 1) >= 5 else (height, width)


def read_picture(path: Path, shape: tuple[int, int, int]) -> UInt8[np.ndarray, "height width channels"]:
    """An image file, upright as its EXIF tag says, stretched to a height and width, with 1 channel (gray) or 3 (RGB).

    What is transparent is taken as white.

    Raises:
        ValueError: it is not an image, damaged, too large to be one, or of pixels in no usual range.
        OSError: there is no such file.
    """
    height, width, channels = shape
    with _opened(path) as file:
        image: Image.Image = ImageOps.exif_transpose(file)
        if image.mode.startswith(("I", "F")):  # 16 and 32 bits
            image = Image.fromarray(in_8_bits(np.asarray(image)))
        elif image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        scaled = image.convert("RGB" if channels == 3 else "L").resize((width, height))
    return np.asarray(scaled).reshape(shape)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as file:
            yield file
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is not an image file; expected PNG, JPEG or the like") from error
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever the decoders raise of a damaged file
        raise ValueError(f"{path} cannot be read as an image ({error}); expected PNG, JPEG or the like") from error


def in_8_bits(pixels: Shaped[np.ndarray, "height width"]) -> UInt8[np.ndarray, "height width"]:
    """Grey pixels of 16 or 32 bits, or floats, from 0 to 255.

    No file says what white is: it is the least of 1, 255 and 65535 that no pixel exceeds, but for a tenth, which
    interpolation may have added.

    Raises:
        ValueError: pixels are not finite, negative or larger.
    """
    least, largest = float(pixels.min()), float(pixels.max())
    white = next((white for white in (1, 255, 65535) if largest <= 1.1 * white), None)
    if white is None or not least >= -0.1 * white:
        raise ValueError(f"its pixels go from {least:g} to {largest:g}; expected from 0 to 1, 255 or 65535")
    scaled: UInt8[np.ndarray, "height width"] = np.rint(pixels.clip(0, white) / white * 255).astype(np.uint8)
    return scaled
