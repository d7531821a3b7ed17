"""Why a buffer holds what it holds, and what it would hold otherwise: nothing here changes anything."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import urlencode

from engram import paths
from engram.http import Http
from engram.oversight import Forecast, Histogram, MapMethod, Qualities, TaskMap, WhatIf
from engram.schemas import Definition, Rule


class Inspection:
    """The methods of `Client` that explain a buffer."""

    _http: Http

    def forecast(self, buffer: str, *, budget_bytes: int | None = None, new_classes: int = 0) -> Forecast:
        """What another budget, or so many classes more, would leave of each class.

        Args:
            buffer: a buffer's name.
            budget_bytes: the budget then; None is the one of now.
            new_classes: how many classes more have come then.

        Raises:
            NotFound: no such buffer.
            InvalidRequest: a number out of range.
        """
        query = _query(budget_bytes=budget_bytes, new_classes=new_classes)
        return self._http.fetch(Forecast, "GET", f"{paths.of_buffer(buffer)}/forecast{query}")

    def decision(
        self,
        buffer: str,
        task: int,
        *,
        definition: Definition | None = None,
        rule: Rule | None = None,
        epsilon: float | None = None,
        budget_bytes: int | None = None,
    ) -> WhatIf:
        """What selection would choose for a task under other settings, from what it measured.

        What is None is as it was. The decision that was made is in `task`.

        Raises:
            NotFound: no such buffer or task.
            InvalidRequest: a number out of range.
        """
        query = _query(definition=definition, rule=rule, epsilon=epsilon, budget_bytes=budget_bytes)
        return self._http.fetch(WhatIf, "GET", f"{paths.of_task(buffer, task)}/decision{query}")

    def histogram(
        self,
        buffer: str,
        of: str = "class",
        *,
        task: int | None = None,
        class_id: int | None = None,
        min_bytes: int | None = None,
        max_bytes: int | None = None,
        where: Sequence[str] = (),
    ) -> Histogram:
        """How the exemplars that pass these filters are spread.

        Args:
            buffer: a buffer's name.
            of: over what: "class", "task", "bytes", or the name of a field.
            task: as in `exemplars`, and so all that follow.
            class_id: of this class.
            min_bytes: at least of this size.
            max_bytes: at most of this size.
            where: conditions on fields.

        Raises:
            NotFound: no such buffer.
            InvalidRequest: a field that is not there, or cannot be counted or filtered by.
        """
        query = _query(
            of=of, task=task, class_id=class_id, min_bytes=min_bytes, max_bytes=max_bytes, where=list(where) or None
        )
        return self._http.fetch(Histogram, "GET", f"{paths.of_buffer(buffer)}/histogram{query}")

    def qualities(self, buffer: str, pack: str, row: int) -> Qualities:
        """What one exemplar takes as it is stored, and at each lower candidate quality.

        Raises:
            NotFound: no such pack or row in the buffer.
        """
        return self._http.fetch(Qualities, "GET", f"{paths.of_exemplar(buffer, pack, row)}/qualities")

    def map(self, buffer: str, task: int, *, method: MapMethod = "pca") -> TaskMap:
        """A task's exemplars, at most 2,000, and the originals kept beside them, laid out in two dimensions.

        Raises:
            NotFound: no such buffer or task.
            InvalidRequest: the service has not what the method needs.
        """
        return self._http.fetch(TaskMap, "GET", f"{paths.of_task(buffer, task)}/map{_query(method=method)}")


def _query(**given: object) -> str:
    """What is given as the query of a URL."""
    asked = urlencode({name: value for name, value in given.items() if value is not None}, doseq=True)
    return f"?{asked}" if asked else ""
