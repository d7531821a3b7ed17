"""Names of classes: what counts as one, and which class id it stands for in a memory.

An upload says either integers, which are class ids, or names. A name that the memory knows gets the id that it has
there; new ones get ids above every id that the memory has ever seen or named, in the order of their characters, so that
neither the order of the images nor that of a folder matters. An id has at most one name and a name one id.

Names are compared as NFC (Unicode's composed form): what macOS makes of a folder's name is the name that was typed.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping

from engram.errors import Conflict, InvalidRequest

MAX_NAME_CHARACTERS = 200
MAX_CLASS_ID = 2**31 - 1

# "-1", "1.5", "1 2" and "1e5" are slips where an integer was meant, not names.
_NUMBER = re.compile(r"[\d\s.,+-]+(?:[eE][\d+-]+)?")


def class_name(text: str) -> str:
    """The name that this text is: composed, without the spaces around it.

    Raises:
        ValueError: empty, longer than 200 characters, not printable, or a number.
    """
    name = unicodedata.normalize("NFC", text).strip()
    if not 1 <= len(name) <= MAX_NAME_CHARACTERS:
        raise ValueError(f"the name of a class has 1 to {MAX_NAME_CHARACTERS} characters, got {len(name)}")
    if not name.isprintable():
        raise ValueError(f"the name of a class is printable text, got {name!r}")
    if _NUMBER.fullmatch(name):
        raise ValueError(f"{name!r} is a number; a class has an integer as its id or a name that is none")
    return name


def identify(known: Mapping[int, str], wanted: Iterable[str], next_class_id: int) -> dict[str, int]:
    """The class id of every wanted name; new ones count on from `next_class_id`.

    Raises:
        InvalidRequest: there is no class id left for a new name.
    """
    by_name = {name: class_id for class_id, name in known.items()}
    ids = {name: by_name[name] for name in wanted if name in by_name}
    new = sorted({*wanted} - ids.keys())
    if next_class_id + len(new) - 1 > MAX_CLASS_ID:
        raise InvalidRequest(
            f"{len(new)} new class names need ids above {next_class_id - 1}, the largest that the buffer has seen, and "
            f"no id is above {MAX_CLASS_ID}; name the ids that you use and upload integers",
            next_class_id=next_class_id,
        )
    return ids | {name: next_class_id + place for place, name in enumerate(new)}


def renamed(known: Mapping[int, str], given: Mapping[int, str]) -> dict[int, str]:
    """The names after these ids were given these names, by id. Two names may be exchanged at once.

    Raises:
        Conflict: a name belongs to another id.
        InvalidRequest: what is given is no name, or is given to no class id.
    """
    outside = [class_id for class_id in given if not 0 <= class_id <= MAX_CLASS_ID]
    if outside:
        raise InvalidRequest(f"class ids lie in 0..{MAX_CLASS_ID}, {outside[0]} does not")
    try:
        after = {**known, **{class_id: class_name(name) for class_id, name in given.items()}}
    except ValueError as error:
        raise InvalidRequest(str(error)) from error
    holder: dict[str, int] = {}
    # The ids that keep their names come first, so that the message names the one that was there before.
    for class_id in sorted(after, key=lambda class_id: (class_id in given, class_id)):
        other = holder.setdefault(after[class_id], class_id)
        if other != class_id:
            raise Conflict(
                f"class {class_id} cannot be named {after[class_id]!r}: that is the name of class {other}; classes are "
                "not merged by their names, give one of the two another name",
                class_ids=[other, class_id],
                class_name=after[class_id],
            )
    return dict(sorted(after.items()))
