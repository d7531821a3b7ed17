"""Where the service keeps its packs: a folder of folders, so that none holds more files than a file system likes.

    packs/ab/abcd...ef          one pack, named by the SHA-256 of its bytes, under its first two hex digits
    packs/ab/abcd...ef.index    where its exemplars lie
    packs/ab/.abcd...tmp        a file being written; left behind only by a crash

How they are written and read is in `engram.packs`.
"""

from __future__ import annotations

from engram.packs import PackFolder


class PackStore(PackFolder):
    """Packs in a local folder. Every method is safe to call from any thread and any process."""

    pattern = "??/*"

    def place(self, digest: str) -> str:
        """Where the pack is, whether or not it exists.

        Raises:
            NotFound: `digest` is not 64 hex digits, so that a name from the network never becomes a path.
        """
        return f"{super().place(digest)[:-64]}{digest[:2]}/{digest}"
