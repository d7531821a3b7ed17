"""Reads and writes the upload format: a tar stream of images with classes and fields, as WebDataset writes it.

    KEY.ppm         the image: .ppm .pgm .png .jpg .jpeg .webp, any case
    KEY.cls         its class: an integer as ASCII text, or a name as UTF-8 (all of a stream one or the other)
    KEY.NAME.npy    its field NAME, if the buffer declares one: an array as `numpy.save` writes it (no pickles),
    KEY.NAME.json   or a number, a text or nested lists of numbers,
    KEY.NAME.txt    or a text field's text as it is, another field's as JSON
    ...             the next group; the members of a group are neighbours, in any order
    two blocks of zeros

KEY is the name of image and class id up to the last dot, unique in the stream. It is a label and never a path; a text
field `key` that a group does not bring is filled with it. Directories and other files are passed over, also a KEY.json
or KEY.txt; links, devices and sparse files are refused. ustar, GNU and PAX headers are understood (`tar c`, Python's
tarfile, WebDataset, bsdtar write one of these). `tar c` packs a folder in the order of the disk: `tar c --sort=name`
keeps groups together.

Images are uint8 `[H, W, C]`, RGB or grey (C is 3 or 1); `engram.images` decodes them.
"""

from __future__ import annotations

from engram.images import IMAGE_EXTENSIONS as IMAGE_EXTENSIONS

from .blocks import BLOCK as BLOCK
from .blocks import END as END
from .places import Place as Place
from .places import places as places
from .reading import Member as Member
from .reading import read as read
from .writing import entry as entry
from .writing import field_member as field_member
from .writing import write as write
from .writing import write_encoded as write_encoded
from .writing import write_parts as write_parts
