"""Bytes to pixels and back: strict about what an image and a mask may be, with a reason for every refusal.

Everything that is not an 8-bit image of one page is refused rather than converted: a 16-bit, CMYK or float image has no
one right conversion to the RGB that the networks are trained on.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable

import cv2
import numpy as np
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile

from pistoseg import storage
from pistoseg.classes import IGNORE_ID, TissueClasses
from pistoseg.errors import PistoSegError, RefusedError, UnavailableError, out_of_memory

_SAVE_AS = "save it as an 8-bit RGB PNG, JPEG or TIFF"
_ALPHA_MODES = {"LA", "La", "PA", "RGBA", "RGBa"}
_COLOR_MODES = {"1", "L", "P", "RGB", "RGBX", "YCbCr"} | _ALPHA_MODES
_BLACK = (0, 0, 0)
_BITS_PER_SAMPLE, _SAMPLE_FORMAT = 258, 339  # TIFF tags


def read_file(uri: str, name: str | None = None) -> bytes:
    """The whole file.

    Raises:
        UnavailableError: it is not given: the disk or its rights forbid it, or the storage is away.
        PistoSegError: under the given name: it is missing, a folder, or a link to itself.
    """
    try:
        return storage.read_bytes(uri)
    except RefusedError as error:
        raise UnavailableError(error.reason, file=error.file, remedy=error.remedy) from error
    except OSError as error:
        reason = f"cannot be read ({error.strerror or str(error) or type(error).__name__})"
        if storage.is_no_file(error):
            remedy = "check that it is there and readable"
            raise PistoSegError(reason, file=name or uri, field="file", remedy=remedy) from error
        # Rights can be given and disks come back without any change to the file, by which bad ones are known.
        remedy = "mend its rights or the disk, or remove it; the same command goes on where this one stopped"
        raise UnavailableError(reason, file=uri, remedy=remedy) from error


def read_rgb(uri: str, name: str | None = None, max_pixels: int = 50_000_000, min_size: int = 1) -> np.ndarray:
    """`decode_rgb` of a file: (H, W, 3) uint8; every problem with it is a `PistoSegError` under the given name."""
    return decode_rgb(read_file(uri, name), name or uri, max_pixels, min_size)


def decode_rgb(data: bytes, name: str, max_pixels: int = 50_000_000, min_size: int = 1) -> np.ndarray:
    """Decode a PNG, JPEG or TIFF, upright (EXIF orientation), alpha composited over white.

    Args:
        data: the whole file.
        name: what errors call it.
        max_pixels: more than this is refused from the header, before anything is decoded.
        min_size: smallest height and width in px.
    Returns:
        (H, W, 3) uint8 RGB.
    Raises:
        PistoSegError: unreadable, truncated, too small or too large, more than 8 bits, CMYK, float, several pages, or
            another format.
    """
    image = _open(data, name)
    _check_size(image, name, max_pixels, min_size)
    _check_pixels(image, data, name, _COLOR_MODES)
    image = _load(image, name)
    try:
        return np.array(_on_white(image).convert("RGB"))
    except Exception as error:  # a colour mode that Pillow reads and does not convert
        raise _unreadable(name, error) from error


def decode_mask(
    data: bytes,
    name: str,
    classes: TissueClasses,
    expected_size: tuple[int, int] | None = None,
    max_pixels: int = 50_000_000,
) -> np.ndarray:
    """Decode a ground-truth mask: class ids in a palette or grey image, or the classes' colours in an RGB one.

    A palette of the classes' colours in another order than that of their ids is read by its colours, too.

    Args:
        data: the whole PNG or TIFF.
        name: what errors call it.
        classes: their ids, colours and background.
        expected_size: (height, width) of the image that it belongs to, in px.
        max_pixels: more than this is refused from the header.
    Returns:
        (H, W) uint8: 0..L-1, background_id, or 255 where the truth is unknown.
    Raises:
        PistoSegError: unreadable, lossy (JPEG), of another size, or with values that are no class.
    """
    image = _open(data, name)
    _check_size(image, name, max_pixels, 1)
    if isinstance(image, JpegImageFile):
        raise PistoSegError(
            "a mask cannot be a JPEG, whose compression changes values", file=name, remedy="save the mask as PNG"
        )
    _check_pixels(image, data, name, {"1", "L", "P", "RGB", "RGBA"})
    step = _grey_step(image, data)
    image = _load(image, name)
    _check_expected(image, name, expected_size)
    if image.mode == "RGBA" and image.getchannel("A").getextrema() != (255, 255):
        raise PistoSegError("the mask has transparent pixels", file=name, remedy="save it without an alpha channel")
    if image.mode in ("RGB", "RGBA"):
        return _ids_of_colors(np.array(image.convert("RGB")), name, classes)
    ids = np.array(image, dtype=np.uint8) // step
    if image.mode == "P":
        ids = _by_palette(ids, image.getpalette("RGB") or [], classes)
    allowed = {*range(len(classes)), classes.background_id, IGNORE_ID}
    foreign = sorted({int(v) for v in np.flatnonzero(np.bincount(ids.ravel(), minlength=256))} - allowed)
    if foreign:
        raise PistoSegError(
            f"has the values {_some(foreign)}, which are no class",
            file=name,
            field="values",
            remedy=f"classes are 0 to {len(classes) - 1}, background {classes.background_id}, unknown {IGNORE_ID}",
        )
    return ids


def decode_background(
    data: bytes, name: str, expected_size: tuple[int, int] | None = None, max_pixels: int = 50_000_000
) -> np.ndarray:
    """Decode a background mask as WSSS4LUAD publishes them: (H, W) bool, true where the file is not zero.

    Arguments and errors are those of `decode_mask`.
    """
    image = _open(data, name)
    _check_size(image, name, max_pixels, 1)
    _check_pixels(image, data, name, {"1", "L", "P"})
    image = _load(image, name)
    _check_expected(image, name, expected_size)
    return np.array(image, dtype=np.uint8) > 0


def decode_png(data: bytes | memoryview) -> np.ndarray:
    """Decode an RGB PNG that encode_png wrote: (H, W, 3) uint8; faster than decode_rgb, and it trusts its input."""
    image = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), cv2.IMREAD_COLOR)
    if image is None:
        raise PistoSegError(
            "a stored image does not decode", field="png", remedy="delete the artifact and run the stage again"
        )
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def decode_ids(data: bytes | memoryview) -> np.ndarray:
    """Decode a mask that encode_png or encode_mask wrote: (H, W) uint8 class ids; it trusts its input."""
    return np.array(Image.open(io.BytesIO(data)), dtype=np.uint8)


def encode_png(array: np.ndarray) -> bytes:
    """Encode (H, W, 3) RGB or (H, W) grey uint8 as PNG; the same pixels give the same bytes."""
    pixels = cv2.cvtColor(array, cv2.COLOR_RGB2BGR) if array.ndim == 3 else array
    # OpenCV's default takes 12 ms to write and 7 ms to read 775x522 px of H&E. Run-length coding saves 8 % of the
    # bytes and takes 20 and 10 ms; images are read far more often than written.
    done, buffer = cv2.imencode(".png", pixels)
    assert done, array.shape
    return buffer.tobytes()


def encode_mask(mask: np.ndarray, classes: TissueClasses) -> bytes:
    """Encode (H, W) uint8 class ids as a palette PNG in the classes' colours."""
    image = Image.fromarray(np.ascontiguousarray(mask, dtype=np.uint8), mode="L")
    image.putpalette(np.asarray(classes.palette(), dtype=np.uint8).tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


def pixel_hash(image: np.ndarray) -> str:
    """SHA-256 of shape and pixels: equal for the same picture in different files."""
    digest = hashlib.sha256(repr(image.shape).encode())
    digest.update(np.ascontiguousarray(image).data)
    return digest.hexdigest()


def _open(data: bytes, name: str) -> Image.Image:
    """Read the header. The plugins are called directly: Image.open has its own, global limit on pixels."""
    if not data:
        raise PistoSegError("the file is empty (0 bytes)", file=name, remedy="copy it again from its source")
    plugin: Callable[..., Image.Image]
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        plugin = PngImageFile
    elif data.startswith(b"\xff\xd8"):
        plugin = JpegImageFile
    elif data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        plugin = TiffImageFile
    else:
        raise PistoSegError(
            f"is not a PNG, JPEG or TIFF (it starts with {_shown(data[:8])})", file=name, remedy=_SAVE_AS
        )
    try:
        return plugin(io.BytesIO(data))
    except Exception as error:  # decoders of untrusted bytes raise anything
        raise _unreadable(name, error) from error


def _shown(start: bytes) -> str:
    """The first bytes of a file as text, in hexadecimal where they are none."""
    line = start.splitlines()[0].decode("ascii", "backslashreplace")
    return f"the text {line!r}" if line and line.isprintable() and start.isascii() else start.hex(" ")


def _load(image: Image.Image, name: str) -> Image.Image:
    """Decode the pixels and turn them upright."""
    try:
        image.load()
        return ImageOps.exif_transpose(image)
    except Exception as error:  # decoders of untrusted bytes raise anything
        raise _unreadable(name, error) from error


def _on_white(image: Image.Image) -> Image.Image:
    """The image over white where it has an alpha channel or a transparent colour, else as it is."""
    if image.mode not in _ALPHA_MODES and "transparency" not in image.info:
        return image
    if image.mode == "La":  # associated alpha, which Pillow converts to no other mode
        image = image.convert("LA")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba)


def _unreadable(name: str, error: Exception) -> PistoSegError:
    if isinstance(error, MemoryError):
        return out_of_memory(name)
    detail = str(error).strip().rstrip(".") or type(error).__name__
    return PistoSegError(
        f"is truncated, damaged or of an unknown kind ({detail})",
        file=name,
        remedy=f"copy it again from its source, or {_SAVE_AS}",
    )


def _check_size(image: Image.Image, name: str, max_pixels: int, min_size: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise PistoSegError(
            f"is {width}x{height} px, more than the {max_pixels:,} px allowed",
            file=name,
            field="size",
            remedy="cut it into smaller images, or raise data.max_pixels (of `pistoseg evaluate`: --max-pixels)",
        )
    if min(width, height) < min_size:
        raise PistoSegError(
            f"is {width}x{height} px, smaller than {min_size} px",
            file=name,
            field="size",
            remedy="remove it, or lower data.min_size",
        )


def _check_pixels(image: Image.Image, data: bytes, name: str, modes: set[str]) -> None:
    """Refuse several pages and anything but 8-bit samples, which Pillow would partly convert without a word."""
    try:
        pages = int(getattr(image, "n_frames", 1))
        bits, formats = _samples(image, data)
    except Exception as error:  # a damaged directory of pages
        raise _unreadable(name, error) from error
    if pages > 1:
        raise PistoSegError(
            f"has {pages} pages or frames, and it is unclear which one is meant",
            file=name,
            field="pages",
            remedy="save the one that matters as its own file; slides go to `pistoseg segment`",
        )
    if any(b > 8 for b in bits) or any(f != 1 for f in formats):
        kind = "floating-point" if 3 in formats else "signed" if 2 in formats else f"{max(bits)}-bit"
        raise PistoSegError(f"has {kind} samples, and 8-bit ones are needed", file=name, field="depth", remedy=_SAVE_AS)
    if image.mode not in modes:
        raise PistoSegError(f"has the colour mode {image.mode}", file=name, field="mode", remedy=_SAVE_AS)


def _samples(image: Image.Image, data: bytes) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Bits and formats (1 unsigned, 2 signed, 3 float) of the samples as the file has them."""
    if isinstance(image, PngImageFile):
        return (data[24],), (1,)  # bit depth in the IHDR chunk, which is always first
    if isinstance(image, TiffImageFile):
        bits = image.tag_v2.get(_BITS_PER_SAMPLE, (1,))
        formats = image.tag_v2.get(_SAMPLE_FORMAT, (1,))
        return tuple(np.atleast_1d(bits).tolist()), tuple(np.atleast_1d(formats).tolist())
    return (8,), (1,)


def _grey_step(image: Image.Image, data: bytes) -> int:
    """Between the values of a grey image: 85 or 17 of 2 or 4 bits, which Pillow spreads over 0 to 255; else 1."""
    bits, _ = _samples(image, data)
    return 255 // (2 ** bits[0] - 1) if image.mode == "L" else 1


def _check_expected(image: Image.Image, name: str, expected_size: tuple[int, int] | None) -> None:
    if expected_size is not None and (image.height, image.width) != tuple(expected_size):
        height, width = expected_size
        raise PistoSegError(
            f"is {image.width}x{image.height} px, and its image is {width}x{height} px",
            file=name,
            field="size",
            remedy="use the mask that was drawn on this image, at its full size",
        )


def _by_palette(values: np.ndarray, palette: list[int], classes: TissueClasses) -> np.ndarray:
    """The ids that a palette's colours mean, where all of them are those of the classes and background; else `values`.

    `Image.quantize`, for one, orders a palette anew for every image. Others (grey, or that of Pascal VOC) mean nothing:
    even where the pixels of one mask happen to have only colours of classes, entries of other ids do not. Nor does one
    that has one colour for several values in use, or black alone, with which grey, empty and Pascal VOC's palettes
    begin. What follows the last value in use is filled up with black by some writers. 255 is no entry: it stays what is
    unknown.
    """
    colors = [tuple(palette[start : start + 3]) for start in range(0, len(palette), 3)][:IGNORE_ID]
    known: dict[tuple[int, ...], int] = {tissue.color: index for index, tissue in enumerate(classes.classes)}
    known[classes.background_color] = classes.background_id
    found = np.flatnonzero(np.bincount(values.ravel(), minlength=256)[:IGNORE_ID]).tolist()
    used = found[-1] + 1 if found else 0
    last = max(used, len(classes), classes.background_id + 1)
    meant = colors[:used] + [color for color in colors[used:last] if color != _BLACK]
    if used > len(colors) or any(color not in known for color in meant):
        return values
    distinct = len({colors[value] for value in found}) == len(found)
    # One black entry may be all that a tool left of such a palette, or a quantized mask of background alone, on black;
    # the ids are what the whole palette would have meant.
    if not distinct or set(meant) == {_BLACK}:
        return values
    lookup = np.arange(256, dtype=np.uint8)
    lookup[:used] = [known[color] for color in colors[:used]]
    return lookup[values]


def _ids_of_colors(rgb: np.ndarray, name: str, classes: TissueClasses) -> np.ndarray:
    """Map (H, W, 3) exact colours to (H, W) ids."""
    packed = rgb[..., 0].astype(np.uint32) << 16 | rgb[..., 1].astype(np.uint32) << 8 | rgb[..., 2]
    ids = np.full(packed.shape, IGNORE_ID, dtype=np.uint8)
    known = np.zeros(packed.shape, dtype=bool)
    colors = [(c.color, i) for i, c in enumerate(classes.classes)]
    for (red, green, blue), index in [(classes.background_color, classes.background_id), *colors]:
        same = packed == (red << 16 | green << 8 | blue)
        ids[same] = index
        known |= same
    if not known.all():
        foreign = [f"#{value:06x}" for value in np.unique(packed[~known])]
        expected = ", ".join(f"#{bytes(c.color).hex()} {c.name}" for c in classes.classes)
        raise PistoSegError(
            f"has the colours {_some(foreign)}, which are no class",
            file=name,
            field="values",
            remedy=f"use class ids in a grey or palette PNG, or the colours {expected}",
        )
    return ids


def _some(values: list) -> str:
    shown = ", ".join(str(v) for v in values[:8])
    return shown + (f" and {len(values) - 8} more" if len(values) > 8 else "")
