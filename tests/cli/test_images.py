"""Photographs of every kind: upright, in RGB, sixteen bits by their scale."""

import sys
from pathlib import Path

import numpy as np
import pytest

from vertebra._cli._images import open_image

Image = pytest.importorskip("PIL.Image")


@pytest.fixture
def rgb() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def saved(image, path: Path, **options) -> np.ndarray:
    image.save(path, **options)
    opened = open_image(path)
    assert opened.mode == "RGB"
    return np.asarray(opened)


def test_rgb_is_left_alone(rgb, tmp_path) -> None:
    assert np.array_equal(saved(Image.fromarray(rgb), tmp_path / "x.png"), rgb)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_it_stands_upright(orientation: int, rgb, tmp_path) -> None:
    """Undo by hand what each orientation of EXIF says that the camera did."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = saved(Image.fromarray(rgb), tmp_path / "x.png", exif=exif)
    swaps, flips_rows, flips_columns = {
        1: (False, False, False),
        2: (False, False, True),
        3: (False, True, True),
        4: (False, True, False),
        5: (True, False, False),
        6: (True, False, True),
        7: (True, True, True),
        8: (True, True, False),
    }[orientation]
    expected = rgb.swapaxes(0, 1) if swaps else rgb
    expected = expected[::-1] if flips_rows else expected
    assert np.array_equal(found, expected[:, ::-1] if flips_columns else expected)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA"])
def test_modes_are_pillows(mode: str, rgb, tmp_path) -> None:
    image = Image.fromarray(rgb).convert(mode)
    expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(saved(image, tmp_path / "x.png"), expected)


def test_what_is_transparent_keeps_its_colour(rgb, tmp_path) -> None:
    image = Image.fromarray(np.dstack([rgb, np.zeros((5, 7), np.uint8)]))
    assert np.array_equal(saved(image, tmp_path / "x.png"), rgb)
    palette = Image.fromarray(rgb).quantize(16)
    plain = np.asarray(palette.convert("RGB"))
    found = saved(palette, tmp_path / "y.png", transparency=bytes(range(16)))  # Pillow would warn
    assert np.array_equal(found, plain)


def test_cmyk(rgb, tmp_path) -> None:
    image = Image.fromarray(rgb).convert("CMYK")
    found = saved(image, tmp_path / "x.tif")
    assert np.array_equal(found, np.asarray(image.convert("RGB")))


@pytest.mark.parametrize(
    ("dtype", "suffix"), [(np.uint16, "png"), (np.uint16, "tif"), (np.int32, "tif")]
)
def test_sixteen_bits_are_scaled(dtype, suffix: str, tmp_path) -> None:
    values = np.array([[0, 128, 129, 257, 25700, 65407, 65535]], dtype)
    found = saved(Image.fromarray(values), tmp_path / f"x.{suffix}")
    assert found[0, :, 0].tolist() == [0, 0, 1, 1, 100, 255, 255]
    assert np.array_equal(found[..., 0], found[..., 2])


def test_an_animation_shows_its_first_frame(rgb, tmp_path) -> None:
    frames = [Image.fromarray(rgb), Image.fromarray(255 - rgb)]
    frames[0].save(tmp_path / "x.png", save_all=True, append_images=frames[1:])
    assert np.array_equal(np.asarray(open_image(tmp_path / "x.png")), rgb)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.full((2, 2), 70000, np.int32), "more than 16 bits"),
        (np.full((2, 2), -1, np.int32), "more than 16 bits"),
        (np.full((2, 2), 0.5, np.float32), "of no known range"),
    ],
)
def test_grays_of_no_known_range_are_refused(values, said: str, tmp_path) -> None:
    path = tmp_path / "x.tif"
    Image.fromarray(values).save(path)
    with pytest.raises(ValueError, match=said):
        open_image(path)


def test_what_is_no_image(rgb, tmp_path, monkeypatch) -> None:
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(ValueError, match=r"text.png is not an image that Pillow can read"):
        open_image(tmp_path / "text.png")
    Image.fromarray(np.tile(rgb, (40, 40, 1))).save(tmp_path / "x.png")
    whole = (tmp_path / "x.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"half.png cannot be read: .*truncated"):
        open_image(tmp_path / "half.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ValueError, match=r"x.png cannot be read: .*exceeds limit"):
        open_image(tmp_path / "x.png")


def test_without_pillow(monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match="pip install pillow"):
        open_image(tmp_path / "x.png")
