"""The headers of a form are those of libjpeg, and decoders that know no standard tables find them in pictures."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from engram import strip
from engram.form import Form
from engram.schemas import Subsampling
from tests.contents import pictures

KINDS: list[tuple[int, Subsampling]] = [(3, "4:2:0"), (3, "4:4:4"), (1, "4:4:4")]

# Reads a JPEG from its input and writes the pixels, 3 bytes each; Go smooths no chroma.
GO = """package main

import (
	"bufio"
	"fmt"
	"image/jpeg"
	"os"
)

func main() {
	picture, err := jpeg.Decode(bufio.NewReader(os.Stdin))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	out := bufio.NewWriter(os.Stdout)
	defer out.Flush()
	for y := 0; y < picture.Bounds().Dy(); y++ {
		for x := 0; x < picture.Bounds().Dx(); x++ {
			r, g, b, _ := picture.At(x, y).RGBA()
			out.Write([]byte{byte(r >> 8), byte(g >> 8), byte(b >> 8)})
		}
	}
}
"""


@pytest.mark.parametrize(("channels", "subsampling"), KINDS)
def test_the_tables_of_every_quality_are_those_of_libjpeg(channels: int, subsampling: Subsampling) -> None:
    image = pictures(0, 1, (13, 21, channels))[0]
    for quality in range(1, 101):
        form = Form(13, 21, channels, subsampling, quality)
        chroma = subsampling.replace(":", "") if channels == 3 else "Gray"
        turbo = simplejpeg.encode_jpeg(image, quality, "RGB" if channels == 3 else "GRAY", chroma)
        file = io.BytesIO()
        Image.fromarray(image.squeeze()).save(
            file, "JPEG", quality=quality, subsampling=2 if subsampling == "4:2:0" else 0
        )
        for written in (turbo, file.getvalue()):
            assert written.startswith(form.picture_head(1))
        assert _tables(form.head(1)) == _tables(form.picture_head(1)[2:])


def _tables(head: bytes) -> bytes:
    """The payloads of the DQT segments."""
    found, at = b"", 0
    while at < len(head):
        length = int.from_bytes(head[at + 2 : at + 4], "big")
        found += head[at + 4 : at + 2 + length] if head[at + 1] == 0xDB else b""
        at += 2 + length
    return found


@pytest.mark.parametrize(
    ("form", "most"), [((32, 32, 3), 2046), ((28, 28, 1), 2047), ((1, 1, 1), 8188), ((65_500, 1, 1), 1)]
)
def test_a_strip_holds_as_many_images_as_jpeg_has_rows(form: tuple[int, int, int], most: int) -> None:
    assert Form(*form, "4:2:0" if form[2] == 3 else "4:4:4", 50).max_images == most


@pytest.fixture(scope="module")
def go_decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program that decodes with Go's image/jpeg, which knows no tables but those in the file."""
    if shutil.which("go") is None:
        pytest.skip("no `go` command: install golang-go to decode with a decoder that needs Huffman tables")
    folder = tmp_path_factory.mktemp("go")
    (folder / "main.go").write_text(GO)
    environment = os.environ | {"GOCACHE": str(folder / "cache"), "GO111MODULE": "off", "CGO_ENABLED": "0"}
    subprocess.run(["go", "build", "-o", "decode", "main.go"], cwd=folder, env=environment, check=True, timeout=300)
    return folder / "decode"


@pytest.mark.parametrize(("channels", "subsampling"), KINDS)
def test_go_decodes_pictures_and_files_and_refuses_a_strip_without_tables(
    go_decoder: Path, channels: int, subsampling: Subsampling
) -> None:
    exemplars = strip.encode(pictures(5, 4, (19, 23, channels)), [0, 1, 2, 3], quality=60, subsampling=subsampling)
    pixels = exemplars.decode().astype(int)
    files = [exemplars.jpeg(2), exemplars.loose().picture()]
    shown = [subprocess.run([go_decoder], input=file, capture_output=True, check=True).stdout for file in files]
    alone = np.frombuffer(shown[0], np.uint8).reshape(19, 23, 3)[..., :channels]
    stacked = np.frombuffer(shown[1], np.uint8).reshape(-1, 23, 3)[..., :channels]
    assert np.abs(alone - pixels[2]).max() <= 4
    for row in range(4):
        top = row * exemplars.form.padded_height
        assert np.abs(stacked[top : top + 19] - pixels[row]).max() <= 4
    refused = subprocess.run([go_decoder], input=exemplars.to_strips()[0], capture_output=True, check=False)
    assert refused.returncode == 1
    assert b"Huffman" in refused.stderr
