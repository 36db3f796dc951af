"""Random numbers and smooth random fields that depend on a seed, a name and a position only.

So any window of an endless plane can be drawn by itself and fits its neighbours.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

BANK_SIZE = 1024
_SPLINE_GAIN = 2.09  # a cubic B-spline keeps 0.479 of the lattice's variance per axis; this restores 1


@dataclass(frozen=True)
class Window:
    """Pixels (y + i * step, x + j * step) of a plane, i < height, j < width; y and x may be negative."""

    y: int
    x: int
    height: int
    width: int
    step: int = 1

    def rows(self) -> NDArray[np.int64]:
        """Row coordinates, (height,)."""
        return self.y + self.step * np.arange(self.height, dtype=np.int64)

    def columns(self) -> NDArray[np.int64]:
        """Column coordinates, (width,)."""
        return self.x + self.step * np.arange(self.width, dtype=np.int64)


def stream(seed: int, name: str) -> int:
    """A 64-bit key for one random quantity of a seed."""
    return (seed * 0x9E3779B97F4A7C15 + zlib.crc32(name.encode()) * 0xD1B54A32D192ED03) % 2**64


def uniform(key: int, y: NDArray[np.int64], x: NDArray[np.int64]) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1), one per lattice point (y, x), which broadcast."""
    value = y.astype(np.uint64) * np.uint64(0xA24BAED4963EE407) + x.astype(np.uint64) * np.uint64(0x9FB21C651E98DF25)
    value = value + np.uint64(key)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 0xBF58476D1CE4E5B9)):
        value = (value ^ (value >> np.uint64(shift))) * np.uint64(factor)
    return (value >> np.uint64(11)).astype(np.float64) / 2.0**53


def scalar(seed: int, name: str, low: float = 0.0, high: float = 1.0) -> float:
    """One uniform number of a seed."""
    zero = np.zeros(1, np.int64)
    return low + (high - low) * float(uniform(stream(seed, name), zero, zero)[0])


def noise(seed: int, name: str, window: Window, scale: float) -> NDArray[np.float32]:
    """A smooth random field of zero mean and unit variance.

    Args:
        seed: of the image.
        name: of the field.
        window: where to evaluate it.
        scale: px between independent values; features are about 1.5 times as large.
    Returns:
        (height, width) float32.
    """
    y, x = window.rows(), window.columns()
    lattice_y, lattice_x = (np.arange(at[0] // scale - 1, at[-1] // scale + 4).astype(np.int64) for at in (y, x))
    lattice = (uniform(stream(seed, name), lattice_y[:, None], lattice_x[None, :]) - 0.5) * (12**0.5 * _SPLINE_GAIN)
    along_y = _spline(lattice.astype(np.float32), y, int(lattice_y[0]), scale)
    return np.ascontiguousarray(_spline(np.ascontiguousarray(along_y.T), x, int(lattice_x[0]), scale).T)


def _spline(lattice: NDArray[np.float32], at: NDArray[np.int64], first: int, scale: float) -> NDArray[np.float32]:
    """Cubic B-spline along axis 0; four taps, not a matrix product, whose threads cost more than they give here."""
    position = (at + 0.5) / scale
    cell = np.floor(position).astype(np.int64)
    t = (position - cell).astype(np.float32)[:, None]
    taps = ((1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3)
    cell -= first + 1
    result = lattice.take(cell, 0) * (taps[0] / 6)
    for offset in (1, 2, 3):
        result += lattice.take(cell + offset, 0) * (taps[offset] / 6)
    return result


@lru_cache(maxsize=8)
def _bank(sigma: float) -> NDArray[np.float32]:
    white = np.random.default_rng(20240611).standard_normal((BANK_SIZE, BANK_SIZE))
    frequency = np.fft.fftfreq(BANK_SIZE)
    blur = np.exp(-2 * (np.pi * sigma) ** 2 * (frequency[:, None] ** 2 + frequency[None, :] ** 2))
    smooth = np.fft.ifft2(np.fft.fft2(white) * blur).real
    return np.asarray(smooth / smooth.std(), np.float32)


def warped(v: NDArray[np.float64], u: NDArray[np.float64]) -> NDArray[np.float32]:
    """Noise with features of about 3 units at any coordinates (v, u); zero mean, unit variance, period 1024."""
    y, x = ((at - BANK_SIZE * np.floor(at * (1 / BANK_SIZE))).astype(np.float32) for at in (v, u))
    return np.asarray(cv2.remap(_bank(1.2), x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP))


def grain(seed: int, name: str, window: Window, size: float) -> NDArray[np.float32]:
    """Fine noise, much cheaper than `noise` at a few px.

    Args:
        seed: of the image.
        name: of the field.
        window: of step 1.
        size: standard deviation of its Gaussian kernel, px; 0 for independent pixels.
    Returns:
        (height, width) float32 of zero mean and unit variance, period 1024 px.
    """
    shift_y, shift_x = (int(scalar(seed, f"{name}/{axis}", 0, BANK_SIZE)) for axis in "yx")
    bank = _bank(round(size, 2))
    return bank.take((window.rows() + shift_y) % BANK_SIZE, 0).take((window.columns() + shift_x) % BANK_SIZE, 1)


def sites(seed: int, name: str, window: Window, pitch: float) -> tuple[NDArray[np.float64], ...]:
    """Points of a jittered hexagonal lattice in a window.

    Args:
        seed: of the image.
        name: of the points.
        window: of step 1.
        pitch: px between neighbours.
    Returns:
        y and x, relative to the window, and five independent uniform numbers per point; (n,) float64 each.
    """
    row_pitch = pitch * 0.87
    rows = np.arange(int(window.y / row_pitch) - 2, int((window.y + window.height) / row_pitch) + 3, dtype=np.int64)
    columns = np.arange(int(window.x / pitch) - 2, int((window.x + window.width) / pitch) + 3, dtype=np.int64)
    jitter_y, jitter_x, *extra = (
        uniform(stream(seed, f"{name}/{number}"), rows[:, None], columns[None, :]) for number in range(7)
    )
    y = (rows[:, None] + 0.5 + 0.55 * (jitter_y - 0.5)) * row_pitch - window.y
    x = (columns[None, :] + 0.5 * (rows[:, None] % 2) + 0.55 * (jitter_x - 0.5)) * pitch - window.x
    inside = (y >= 0) & (y < window.height) & (x >= 0) & (x < window.width)
    return tuple(field[inside] for field in (y, x, *extra))
