"""What images must share to lie in one strip, their form, and the JPEG headers that follow from it.

A form is five numbers: height, width, channels, chroma subsampling, quality; and the fields that every image has
beside it, usually none, which no header depends on. Quantisation tables are those of T.81
Annex K scaled to the quality by the formula of the Independent JPEG Group, as libjpeg has them; Huffman tables are
always those of Annex K. So nothing of a header is data: a reader computes the only one that the form allows.

Headers come in two kinds. That of a strip leaves the Huffman tables out, which decoders assume when none are given (as
motion JPEG has it). That of a picture has them, for decoders that do not (Go's), and a JFIF segment: for one image it
is byte for byte what libjpeg-turbo writes.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property

from engram.fields import NO_FIELDS, Schema
from engram.schemas import Subsampling

# A JPEG may declare 65,535 rows, but libjpeg refuses more than 65,500.
MAX_SIDE = 65_500
# A strip decodes in one call into one array, so its pixels are bounded: 64 Mi pixels are 192 MiB of RGB.
MAX_STRIP_PIXELS = 2**26
# What the 16 bits of a DRI segment hold.
_MAX_RESTART_INTERVAL = 65_535

_JFIF = b"\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00"
# T.81 Annex K, tables K.1 and K.2: luminance and chrominance, in zigzag order.
_QUANTISATION = tuple(
    bytes.fromhex(table)
    for table in (
        "100b0c0e0c0a100e0d0e1211101318281a181616183123251d283a333d3c3933"
        "383740485c4e404457453738506d51575f626768673e4d71797064785c656763",
        "1112121815182f1a1a2f63423842636363636363636363636363636363636363"
        "6363636363636363636363636363636363636363636363636363636363636363",
    )
)
# T.81 Annex K, tables K.3 to K.6, each as a DHT segment has it: class and number, codes of each length, symbols.
_HUFFMAN = tuple(
    bytes.fromhex(table)
    for table in (
        "0000010501010101010100000000000000000102030405060708090a0b",
        "100002010303020403050504040000017d"
        "01020300041105122131410613516107227114328191a1082342b1c11552d1f02433627282090a161718191a25262728"
        "292a3435363738393a434445464748494a535455565758595a636465666768696a737475767778797a83848586878889"
        "8a92939495969798999aa2a3a4a5a6a7a8a9aab2b3b4b5b6b7b8b9bac2c3c4c5c6c7c8c9cad2d3d4d5d6d7d8d9dae1e2"
        "e3e4e5e6e7e8e9eaf1f2f3f4f5f6f7f8f9fa",
        "0100030101010101010101010000000000000102030405060708090a0b",
        "1100020102040403040705040400010277"
        "000102031104052131061241510761711322328108144291a1b1c109233352f0156272d10a162434e125f11718191a26"
        "2728292a35363738393a434445464748494a535455565758595a636465666768696a737475767778797a828384858687"
        "88898a92939495969798999aa2a3a4a5a6a7a8a9aab2b3b4b5b6b7b8b9bac2c3c4c5c6c7c8c9cad2d3d4d5d6d7d8d9da"
        "e2e3e4e5e6e7e8e9eaf2f3f4f5f6f7f8f9fa",
    )
)


@dataclass(frozen=True)
class Form:
    """What all images of a strip share. Two sets of exemplars can be mixed in one strip if their forms are equal.

    Grey images, of one channel, have no chroma: their subsampling is always 4:4:4.
    """

    height: int
    width: int
    channels: int
    subsampling: Subsampling
    quality: int
    schema: Schema = NO_FIELDS

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of one image."""
        return self.height, self.width, self.channels

    @cached_property
    def mcu_side(self) -> int:
        """Pixels along one side of a minimum coded unit."""
        return 16 if self.subsampling == "4:2:0" else 8

    @cached_property
    def padded_height(self) -> int:
        """Rows that one image takes in a strip."""
        return -(-self.height // self.mcu_side) * self.mcu_side

    @cached_property
    def image_bytes(self) -> int:
        """Bytes of one image's pixels as a strip decodes to them, with the rows of padding."""
        return self.padded_height * self.width * self.channels

    @cached_property
    def mcus(self) -> int:
        """Minimum coded units of one image, the restart interval."""
        return (self.padded_height // self.mcu_side) * -(-self.width // self.mcu_side)

    @cached_property
    def min_segment_bytes(self) -> int:
        """What no segment can be shorter than: a block takes two bits at least, a DC symbol and an end of block."""
        blocks = 1 if self.channels == 1 else 6 if self.subsampling == "4:2:0" else 3
        return -(-2 * blocks * self.mcus // 8)

    @cached_property
    def max_images(self) -> int:
        """How many images one strip can hold."""
        if self.mcus > _MAX_RESTART_INTERVAL:
            return 1
        by_rows = (MAX_SIDE - self.height) // self.padded_height + 1
        return max(1, min(by_rows, MAX_STRIP_PIXELS // (self.padded_height * self.width)))

    def head(self, count: int) -> bytes:
        """Everything between APP15 and the segments of a strip of `count` images."""
        before, after = self._strip_head
        return before + self._rows(count) + after

    def picture_head(self, count: int) -> bytes:
        """Everything before the segments of a picture of `count` images."""
        before, after = self._picture_head
        return before + self._rows(count) + after + (self._restart if count > 1 else b"") + self._scan_start

    @cached_property
    def _strip_head(self) -> tuple[bytes, bytes]:
        """The header of a strip around the two bytes that say how many rows it has."""
        tables = _segment(0xDB, b"".join(self._quantisation)) + self._restart
        return tables + self._before_rows, self._after_rows + self._scan_start

    @cached_property
    def _picture_head(self) -> tuple[bytes, bytes]:
        """The header of a picture before and after the rows, up to the restart interval."""
        tables = [_segment(0xDB, table) for table in self._quantisation]
        codes = [_segment(0xC4, table) for table in _HUFFMAN[: 2 * len(tables)]]
        return b"".join([b"\xff\xd8", _JFIF, *tables, self._before_rows]), b"".join([self._after_rows, *codes])

    def _rows(self, count: int) -> bytes:
        return ((count - 1) * self.padded_height + self.height).to_bytes(2, "big")

    @property
    def _quantisation(self) -> list[bytes]:
        scale = 5000 // self.quality if self.quality < 50 else 200 - 2 * self.quality
        return [
            bytes([number, *(min(max((value * scale + 50) // 100, 1), 255) for value in table)])
            for number, table in enumerate(_QUANTISATION[: 2 if self.channels == 3 else 1])
        ]

    @property
    def _restart(self) -> bytes:
        return _segment(0xDD, struct.pack(">H", self.mcus)) if self.mcus <= _MAX_RESTART_INTERVAL else b""

    @property
    def _before_rows(self) -> bytes:
        """SOF0 up to the rows."""
        return b"\xff\xc0" + struct.pack(">HB", 8 + 3 * self.channels, 8)

    @property
    def _after_rows(self) -> bytes:
        """SOF0 after the rows."""
        luma = bytes([1, 0x22 if self.subsampling == "4:2:0" else 0x11, 0])
        chroma = b"\x02\x11\x01\x03\x11\x01" if self.channels == 3 else b""
        return struct.pack(">HB", self.width, self.channels) + luma + chroma

    @property
    def _scan_start(self) -> bytes:
        coding = b"\x03\x01\x00\x02\x11\x03\x11" if self.channels == 3 else b"\x01\x01\x00"
        return _segment(0xDA, coding + b"\x00\x3f\x00")


def _segment(marker: int, payload: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, 2 + len(payload)) + payload
