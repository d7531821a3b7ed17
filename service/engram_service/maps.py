"""Lays a task's exemplars out in two dimensions by what they look like, with the originals that were kept beside them.

Images are compared by the built-in embedding, the one that quality selection compares pixels by, so that an original
and its coded copy lie near each other as far as coding keeps what selection looks at.

pca is the two directions in which the points differ most: exact, and the same each time (an axis points to where its
largest component is positive). tsne and umap keep neighbours together and mean nothing else; they are there if their
libraries are, and have a fixed seed. A map is made once for a generation and then kept with it.

Letters: N points, D dimensions of the embedding.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt

from engram import packs
from engram.errors import InvalidRequest, NotFound, Unavailable
from engram.oversight import MapMethod, MapPoint, TaskMap
from engram.packs import LoadedPack
from engram.selection.embedding import BuiltinEmbedder, FloatArray

from . import samples
from .database import Database
from .replay import Replay, View
from .samples import Sample, SampleFolder
from .turns import Turn

IntArray = npt.NDArray[np.int64]
Points = npt.NDArray[np.float64]

MAX_POINTS = 2000
"""Exemplars on a map; of more, as many are drawn."""

MAX_VALUES = 2**27
"""Pixels times channels that a map decodes: 2,000 images of 148 x 148, fewer of larger ones."""

_LIBRARIES: dict[MapMethod, str] = {"tsne": "sklearn", "umap": "umap"}
_SEED = 0x656E6772616D
_CHUNK_VALUES = 2**23
_PERPLEXITY = 30.0
# A megabyte or so each.
_REMEMBERED = 8
_NEIGHBOURS = 15

# One at a time: the slow methods take seconds of a core, and whoever waits for the same map finds it made.
_TURN = Turn("maps are being made")


def methods() -> list[MapMethod]:
    """Those that can be used here."""
    return ["pca", *(method for method, library in _LIBRARIES.items() if find_spec(library) is not None)]


def of_task(
    database: Database, replay: Replay, folder: SampleFolder, buffer: str, task: int, method: MapMethod
) -> TaskMap:
    """The map of a task in the current generation of a buffer, with the originals that are kept of it.

    Raises:
        NotFound: no such buffer, or the task holds no exemplar.
        InvalidRequest: the method's library is not installed.
        Unavailable: the disk does not answer, or too many wait for other maps.
    """
    view = replay.view(buffer, None)
    with database.reading() as session:
        digest = samples.of_task(session, buffer, task)
    if method not in methods():
        raise InvalidRequest(
            f"a map by {method} needs a library that this service does not have: pip install 'engram[maps]'",
            methods=methods(),
        )
    key = "map", task, method, digest
    known = view.remembered.get(key)
    if isinstance(known, TaskMap):
        return known
    with _TURN.taken():
        known = view.remembered.get(key)
        if isinstance(known, TaskMap):
            return known
        found = _made(replay, view, task, method, None if digest is None else folder.get(digest))
        view.remember(key, found, _REMEMBERED)
        return found


def _made(replay: Replay, view: View, task: int, method: MapMethod, sample: Sample | None) -> TaskMap:
    begins, counts = view.layout.stretches(task, None)
    total = int(counts.sum())
    if not total:
        raise NotFound(f"task {task} of buffer {view.buffer!r} holds no exemplars", buffer=view.buffer, task=task)
    chosen = np.concatenate([np.arange(b, b + n) for b, n in zip(begins.tolist(), counts.tolist(), strict=True)])
    features: list[FloatArray] = []
    points: list[dict[str, Any]] = []
    shape = _shape(replay, view, int(chosen[0]))
    most = max(1, min(MAX_POINTS, MAX_VALUES // int(np.prod(shape))))
    embedder = BuiltinEmbedder(shape)
    if total > most:
        rng = np.random.Generator(np.random.Philox(key=_SEED))
        chosen = np.sort(rng.choice(chosen, most, replace=False))
    for rows, class_ids, digest, pixels in _decoded(replay, view, chosen, int(np.prod(shape))):
        features.append(embedder.embed(pixels))
        points += [
            {"pack": digest, "row": row, "class_id": c}
            for row, c in zip(rows.tolist(), class_ids.tolist(), strict=True)
        ]
    if not features:
        raise Unavailable(f"no exemplar of task {task} of buffer {view.buffer!r} is intact on disk")
    kept = [] if sample is None else sample.class_ids.tolist()
    if sample is not None:
        features.append(embedder.embed(sample.pixels()))
    places, explained = _laid_out(np.concatenate(features), method)
    scaled = places.round(4).tolist()
    stored = [MapPoint(x=x, y=y, **of) for (x, y), of in zip(scaled, points, strict=False)]
    beside = [
        MapPoint(x=x, y=y, class_id=class_id, original=number)
        for number, ((x, y), class_id) in enumerate(zip(scaled[len(points) :], kept, strict=True))
    ]
    return TaskMap(
        buffer=view.buffer,
        generation=view.generation,
        task=task,
        method=method,
        methods=methods(),
        explained_ratio=explained,
        exemplars=total,
        points=stored,
        originals=beside,
    )


def _shape(replay: Replay, view: View, row: int) -> tuple[int, int, int]:
    place = int(view.layout.locate(np.array([row])).packs[0])
    form = replay.cache.get(view.digests[place], view.counts[place]).exemplars
    if form is None:
        raise Unavailable(f"no exemplar of pack {view.digests[place]} is intact on disk", digest=view.digests[place])
    return form.form.shape


def _decoded(
    replay: Replay, view: View, rows: IntArray, values: int
) -> Iterator[tuple[IntArray, IntArray, str, npt.NDArray[np.uint8]]]:
    """Rows of packs, their class ids, the pack, and their pixels, some at a time; damaged ones are left out."""
    step = max(1, _CHUNK_VALUES // values)
    for at in range(0, len(rows), step):
        located = view.layout.locate(rows[at : at + step])
        for place in np.unique(located.packs).tolist():
            own = located.rows[located.packs == place]

            def decode(loaded: list[LoadedPack], own: IntArray = own) -> tuple[IntArray, IntArray, Any]:
                exemplars, places = loaded[0].exemplars, loaded[0].places(own)
                is_intact = places >= 0
                if exemplars is None or not is_intact.any():
                    return own[:0], own[:0], None
                found = packs.pick(exemplars, places[is_intact])
                return own[is_intact], found.class_ids, found.decode()

            found, class_ids, pixels = replay.cache.read([(view.digests[place], view.counts[place])], decode)
            if pixels is not None:
                yield found, class_ids, view.digests[place], pixels


def _laid_out(features_ND: FloatArray, method: MapMethod) -> tuple[Points, float | None]:
    """Where each point lies, each axis from -1 to 1 around the middle, and how much of the variance two axes show."""
    n = len(features_ND)
    if method == "pca" or n < 4:
        points_N2, explained = principal_axes(features_ND)
        return _scaled(points_N2), explained
    if method == "tsne":
        perplexity = min(_PERPLEXITY, (n - 1) / 3)
        tool = import_module("sklearn.manifold").TSNE(2, perplexity=perplexity, init="pca", random_state=0)
    else:
        tool = import_module("umap").UMAP(n_neighbors=min(_NEIGHBOURS, n - 1), random_state=0, n_jobs=1)
    return _scaled(np.asarray(tool.fit_transform(features_ND), np.float64)), None


def principal_axes(features_ND: FloatArray) -> tuple[Points, float]:
    """The points on the two axes of largest variance, and which part of all variance that is."""
    centred_ND = features_ND.astype(np.float64)
    centred_ND -= centred_ND.mean(axis=0)
    variances, axes = np.linalg.eigh(centred_ND.T @ centred_ND)
    first = axes[:, ::-1][:, :2]
    # An eigenvector is one up to its sign.
    first = first * np.where(first[np.abs(first).argmax(axis=0), [0, 1]] < 0, -1.0, 1.0)
    total = float(variances.sum())
    return centred_ND @ first, float(variances[-2:].sum()) / total if total > 0 else 1.0


def _scaled(points_N2: Points) -> Points:
    low, high = points_N2.min(axis=0), points_N2.max(axis=0)
    span = float((high - low).max())
    scaled: Points = (points_N2 - (low + high) / 2) * (2 / span if span > 0 else 0.0)
    return scaled
