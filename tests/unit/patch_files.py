"""Small images, written the ways that data sets write them, and configs that name them."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

from pistoseg import storage
from pistoseg.classes import TissueClass, TissueClasses
from pistoseg.config import load_config

CLASSES = TissueClasses(
    (
        TissueClass("tumor", (0, 64, 128)),
        TissueClass("stroma", (64, 128, 0)),
        TissueClass("normal", (243, 152, 0)),
    ),
    background_id=3,
)


def tissue(seed=0, height=32, width=40):
    return np.random.default_rng(seed).integers(60, 200, (height, width, 3)).astype(np.uint8)


def encoded(pixels, kind="PNG", mode=None, **options):
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    (image.convert(mode) if mode else image).save(buffer, kind, **options)
    return buffer.getvalue()


def put(root, name, data=None, seed=0):
    uri = storage.join(str(root), name)
    storage.write_bytes(uri, encoded(tissue(seed)) if data is None else data)
    return uri


def config_of(uri, **data):
    return load_config("glas", overrides=[f"data.uri={uri}", *(f"data.{key}={value}" for key, value in data.items())])


def mask_png(height=32, width=40, value=0):
    return encoded(np.full((height, width), value, np.uint8))


def png_file(width, height, bits, color_type, rows):
    """A PNG of given raw bytes: each row with its filter's byte in front."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
