"""Pictures are what the student saw: normalisation undone, padding cut off."""

from __future__ import annotations

import struct

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from kd_det.bench.workbench import PixelInput
from kd_det.visualize.run import read_picture
from kd_det.visualize.watch import seen_pictures

RGB = PixelInput("RGB", (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), scale=1, divisor=32)
BGR = PixelInput("BGR", (103.53, 116.28, 123.675), (57.375, 57.12, 58.395), scale=255, divisor=32)


@pytest.mark.parametrize("pixels", [RGB, BGR], ids=lambda pixels: pixels.order)
def test_normalisation_and_padding_are_undone(pixels, generator):
    sizes = [(20, 30), (32, 17)]
    images = [torch.randint(0, 256, (3, *size), generator=generator) for size in sizes]
    batch = torch.zeros(2, 3, 32, 32)
    for row, image in zip(batch, images, strict=True):
        ordered = image.flip(0) if pixels.order == "BGR" else image
        for c in range(3):
            values = ordered[c] / 255 * pixels.scale
            values = (values - pixels.mean[c]) / pixels.std[c]
            row[c] = F.pad(values, (0, 32 - image.shape[2], 0, 32 - image.shape[1]))
    seen = seen_pictures(batch, pixels, most=5)
    assert seen.size == (32, 32)
    assert all(x.dtype == torch.uint8 for x in seen.images)
    assert all(torch.equal(x, y) for x, y in zip(seen.images, images, strict=True))


def test_only_the_first_images_are_taken():
    assert len(seen_pictures(torch.ones(5, 3, 4, 4), RGB, most=2)) == 2


def test_an_image_of_the_mean_colour_is_kept_whole():
    assert seen_pictures(torch.zeros(1, 3, 8, 6), RGB, most=1).images[0].shape == (3, 8, 6)


def test_files_become_rgb_bytes(tmp_path):
    Image.new("L", (5, 4), 7).save(tmp_path / "grey.png")
    Image.new("RGBA", (3, 2), (1, 2, 3, 255)).save(tmp_path / "alpha.png")
    grey, alpha = (read_picture(tmp_path / f"{name}.png") for name in ("grey", "alpha"))
    assert torch.equal(grey, torch.full((3, 4, 5), 7, dtype=torch.uint8))
    assert alpha[:, 0, 0].tolist() == [1, 2, 3]
    assert alpha.shape == (3, 2, 3)


@pytest.mark.parametrize("kind", ["missing", "text", "truncated", "folder", "exif"])
def test_an_image_that_cannot_be_decoded_is_named(tmp_path, refuses, kind):
    path = tmp_path / "picture.png"
    if kind == "text":
        path.write_text("no picture")
    if kind == "folder":
        path.mkdir()
    if kind == "truncated":
        Image.effect_noise((64, 64), 50).save(path)
        path.write_bytes(path.read_bytes()[:500])
    if kind == "exif":  # an image to turn, whose resolution is a text
        entries = [(0x0112, 3, 1, struct.pack("<HH", 6, 0)), (0x011A, 2, 1, b"?")]
        packed = b"".join(struct.pack("<HHI4s", *entry) for entry in entries)
        broken = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + packed + bytes(4)
        Image.new("RGB", (4, 4)).save(path, "JPEG", exif=broken)
    with refuses("decode", str(path)):
        read_picture(path)
