"""The JSON of the HTTP API as pydantic models, shared by service and client.

Vocabulary: a buffer is the bounded memory of one learner; a task is one step of its stream; an exemplar is one stored
image with its class id; a pack is one immutable object named by its SHA-256; a generation is the buffer's counter.
All sizes are bytes, all times are UTC or seconds as the name says.
"""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from engram.names import MAX_CLASS_ID as MAX_CLASS_ID
from engram.names import class_name

Per = Literal["buffer", "class"]
ShareBy = Literal["class", "task", "none"]
Subsampling = Literal["4:2:0", "4:4:4"]
Ranking = Literal["herding", "greedy_dpp", "reservoir", "ring", "random"]
Definition = Literal["raw", "per_sample", "log_ratio"]
Rule = Literal["all_higher", "any"]
State = Literal["received", "selecting", "encoding", "committed", "failed", "cancelled"]
QualityState = Literal["fixed", "provisional", "decided"]
Strategy = Literal["uniform", "class_balanced", "task_balanced", "per_task", "epoch"]

API_NUMBER = 2
"""Of the HTTP API, which the service states on every answer. It is raised when a client of the old number would
misunderstand a service of the new one or the other way round, not when something is added."""

API_HEADER = "Engram-API"

CANDIDATE_QUALITIES = (10, 25, 50, 75, 90)
"""The candidates of MRDC (Wang et al., ICLR 2022)."""

STRIPS_MEDIA_TYPE = "application/vnd.engram.strips"
"""Packs and draws: strips back to back."""

TAR_MEDIA_TYPE = "application/x-tar"
"""WebDataset: pairs of KEY.jpg (or another image) and KEY.cls."""

MAX_TASK = 2**31 - 1

MAX_BUDGET_BYTES = 2**53 - 1
"""The largest integer that every JSON parser reads exactly."""


def _number(value: Any) -> Any:
    """`true` and "77" are no numbers, though Python would make some of them; 1e6 is one, as JSON Schema has it."""
    if isinstance(value, bool | str | bytes):
        raise PydanticCustomError("int_type", "Input should be a valid integer")
    return value


def _decimal(value: Any) -> Any:
    """Members of JSON objects are named by text: an integer there is written as such, and in one way only."""
    if isinstance(value, str) and not re.fullmatch(_DECIMAL, value, re.ASCII):
        raise PydanticCustomError("int_parsing", "Input should be a valid integer")
    return value


_DECIMAL = "0|[1-9][0-9]{0,9}"
Number = BeforeValidator(_number)

FieldName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")]
ClassId = Annotated[int, Field(ge=0, le=MAX_CLASS_ID)]
ClassName = Annotated[str, AfterValidator(class_name), Field(json_schema_extra={"minLength": 1})]
BUFFER_NAME = re.compile(r"^[a-z0-9][a-z0-9._-]{0,62}$")
BufferName = Annotated[str, Field(pattern=BUFFER_NAME.pattern)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Quality = Annotated[int, Field(ge=1, le=100)]
BudgetBytes = Annotated[int, Field(ge=1, le=MAX_BUDGET_BYTES), Number]


def _named(schema: dict[str, Any]) -> None:
    """An object whose members all match the pattern: `patternProperties` alone would let others pass."""
    ((pattern, value),) = schema.pop("patternProperties").items()
    schema |= {"propertyNames": {"pattern": pattern}, "additionalProperties": value}


class Model(BaseModel):
    """Unknown members are refused, so that a misspelt option is an error and not a default."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Answer(Model):
    """What the service says. Unknown members are ignored, so that a newer service can say more."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class BufferCreate(Model):
    """What a new buffer is.

    `budget_bytes` is the total when `per` is "buffer" (shares shrink as classes arrive) and the bytes of each class
    when `per` is "class" (the total grows). `share_by` says what is given an equal share: each class (LUCIR, iCaRL)
    or each task (GEM); with "none" what is stored stays until it is removed, and an upload keeps what there is room for
    (for a reservoir, which is kept by removing exemplars). `quality` fixes the JPEG quality of every exemplar; None
    leaves it to selection. `fields` declares the columns that every exemplar has beside its image, by name:
    "float16 [100]", "float32 [any, 5]", "utf8".
    """

    name: BufferName
    budget_bytes: BudgetBytes
    per: Per = "buffer"
    share_by: ShareBy = "class"
    subsampling: Subsampling = "4:2:0"
    quality: Annotated[Quality, Number] | None = None
    fields: Annotated[dict[FieldName, str], Field(json_schema_extra=_named)] = {}


class BufferChange(Model):
    """A new budget, new names of classes by their ids, or both.

    A smaller budget drops the tails of every class, losslessly. An id that is not mentioned keeps its name; a name that
    another id has is refused.
    """

    budget_bytes: BudgetBytes | None = None
    class_names: Annotated[
        dict[Annotated[ClassId, BeforeValidator(_decimal)], ClassName],
        Field(json_schema_extra={"propertyNames": {"pattern": f"^({_DECIMAL})$"}}),
    ] = {}

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.budget_bytes is None and not self.class_names:
            raise ValueError("nothing to change: give budget_bytes, class_names or both")
        return self


class ForkCreate(Model):
    """A new buffer that begins with the content of another one, whose packs it shares.

    `generation` is the one that the source must be at: only the newest can be forked, because what herding goes toward
    and what was seen of each class are known of that one alone. Freeze a fork of it to come back to it later.
    `budget_bytes` None is the source's. A fork that is `frozen` is a snapshot: it takes no change.
    """

    name: BufferName
    generation: Annotated[int, Field(ge=0, lt=2**31), Number] | None = None
    budget_bytes: BudgetBytes | None = None
    frozen: StrictBool = False


def _or_text(value: Any, read: ValidatorFunctionWrapHandler) -> Any:
    try:
        return read(value)
    except ValidationError:
        if isinstance(value, str):
            return value
        raise


_Word = TypeVar("_Word", bound=str)
Word = Annotated[_Word, WrapValidator(_or_text)]
"""One of the words that this version knows, or another one from a newer service."""


class Buffer(Answer):
    """A buffer as it stands. `budget_bytes` is as given; `limit_bytes` is the total that `used_bytes` obeys.

    `quality` is that of every exemplar, None before the first. It was `fixed` when the buffer was made, or `decided` by
    selection for good; while it is `provisional`, a later upload may revise it. `class_names` names the class ids that
    came with a name. A buffer that `is_frozen` takes no change. `forked_from` names the buffer that this one began as a
    fork of, at its `forked_generation`; that one may be gone, or another may have its name by now.
    """

    name: str
    budget_bytes: int
    limit_bytes: int
    per: Word[Per]
    share_by: Word[ShareBy]
    subsampling: Word[Subsampling]
    quality: int | None
    quality_is: Word[QualityState]
    generation: int
    used_bytes: int
    exemplars: int
    tasks: list[int]
    classes: list[int]
    image_shape: tuple[int, int, int] | None
    fields: dict[str, str] = {}
    class_names: dict[int, str] = {}
    is_frozen: bool = False
    forked_from: str | None = None
    forked_generation: int | None = None
    created_at: datetime


class Candidate(Answer):
    """One candidate quality of a decision: how many of the upload's exemplars fit and what their volume says.

    `classes` counts those that keep something. `ratio` holds R under each definition, None where no class had a block.
    Where an extractor was used that is R under it, and `pixel_ratio` is R under the built-in embedding, which is what
    decides: `passes` says whether it is near 1, `gaps` is its mean log-volume gap of each class, and a class in
    `singular_classes` had a block whose Gram matrix was numerically singular.
    """

    quality: int
    exemplars: int
    classes: int
    bytes: int
    ratio: dict[Word[Definition], float | None]
    pixel_ratio: dict[Word[Definition], float | None] | None = None
    passes: bool
    gaps: dict[int, float]
    singular_classes: list[int]


class Decision(Answer):
    """What an upload to a task said about every candidate quality, and why the buffer has the quality it has then.

    `block` is how many exemplars each volume spans; `pixel_block` likewise for `Candidate.pixel_ratio`. `blocks` counts
    those compared of each class, under the built-in embedding. A task keeps what was measured on most blocks, the
    latest of equals. `ranking` and `mean` are the last upload's; `mean` says what `herding` went toward: the mean of
    all images seen, or one that was once started again from those kept, because the extractor was another than before.
    """

    quality: int
    reason: str
    definition: Word[Definition]
    rule: Word[Rule]
    epsilon: float
    block: int
    pixel_block: int | None = None
    blocks: dict[int, int]
    delta: float
    ranking: Word[Ranking]
    mean: Word[Literal["seen", "kept"]] | None = None
    embedder: str
    images: int
    seconds: float = 0.0
    candidates: list[Candidate]


class BufferList(Answer):
    """All buffers by name."""

    buffers: list[Buffer]


class IngestOptions(Model):
    """How an upload is ranked and measured: query parameters of the ingest route, same names.

    The quality is the buffer's; if it was not fixed there, it is chosen among `candidates`. `extractor` names a
    registered ONNX model; None uses the built-in embedding. `block` is the number of exemplars whose volume is compared
    at once; None takes the one that suits the embedding (32 for the built-in one, 16 for an extractor), and a decision
    states it.
    """

    candidates: Annotated[tuple[Quality, ...], Field(min_length=1)] = CANDIDATE_QUALITIES
    ranking: Ranking = "herding"
    extractor: Digest | None = None
    definition: Definition = "raw"
    rule: Rule = "any"
    epsilon: Annotated[float, Field(gt=0, le=100)] = 0.3
    block: Annotated[int, Field(ge=2, le=512)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0


class Ingest(Answer):
    """The work of turning one upload into exemplars. `problem` is a problem+json document once it has failed.

    One that failed or was cancelled `can_retry` while its upload is kept; `failures` are the problems of the tries
    before the current one, the oldest first. `who` uploaded it, or had it tried again last.
    """

    id: str
    buffer: str
    task: int
    state: Word[State]
    images_total: int
    images_done: int
    attempts: int
    body_bytes: int
    body_sha256: str
    options: IngestOptions
    problem: dict[str, Any] | None
    failures: list[dict[str, Any]] = []
    can_retry: bool = False
    who: str | None = None
    generation: int | None
    created_at: datetime
    updated_at: datetime

    @field_validator("options", mode="before")
    @classmethod
    def _known(cls, options: Any) -> Any:
        """Options are strict where they are given; where they are reported, a newer service may have more."""
        if isinstance(options, dict):
            return {name: value for name, value in options.items() if name in IngestOptions.model_fields}
        return options


class IngestPage(Answer):
    """A page of ingests, the newest first; pass `next` as `cursor` for the following one, None at the end."""

    ingests: list[Ingest]
    next: str | None


class ClassSummary(Answer):
    """One class within one task. `seen` counts every image ever uploaded, `exemplars` those stored."""

    class_id: int
    name: str | None = None
    seen: int
    exemplars: int
    bytes: int
    share_bytes: int


class Task(Answer):
    """One task of a buffer as it is stored."""

    buffer: str
    task: int
    quality: int
    bytes: int
    exemplars: int
    classes: list[ClassSummary]
    decision: Decision | None


class PackEntry(Answer):
    """One pack of a generation. `runs` gives the rows in order: [class id, count] for each class, ascending ids."""

    digest: Digest
    task: int
    bytes: int
    exemplars: int
    quality: int
    runs: list[tuple[int, int]]


class Manifest(Answer):
    """The exact content of one generation, packs in ascending order of task. `created_at` is the buffer's."""

    buffer: str
    generation: int
    created_at: datetime | None = None
    used_bytes: int
    limit_bytes: int
    image_shape: tuple[int, int, int] | None
    fields: dict[str, str] = {}
    class_names: dict[int, str] = {}
    packs: list[PackEntry]


class Exemplar(Answer):
    """One stored image. `rank` counts from 0 within its class and task: lower ranks are kept longer.

    `key` is the value of the field of that name, if the buffer declares one as `utf8`. `bytes` counts the fields.
    """

    pack: str
    row: int
    task: int
    class_id: int
    rank: int
    bytes: int
    quality: int
    key: str | None = None


class Relabel(Model):
    """The class that exemplars belong to."""

    class_id: Annotated[ClassId, Number]


class ExemplarPage(Answer):
    """A page of exemplars; pass `next` as `cursor` for the following one, None at the end."""

    exemplars: list[Exemplar]
    next: str | None


class Extractor(Answer):
    """A registered ONNX model that embeds images for selection."""

    sha256: str
    bytes: int
    input_shape: tuple[int | None, int | None, int | None, int | None]
    dimensions: int
    created_at: datetime


class ExtractorList(Answer):
    """Every registered extractor, the oldest first."""

    extractors: list[Extractor]


class Health(Answer):
    """Whether the service can work. `damaged_packs` lists packs whose bytes do not match their name."""

    status: Word[Literal["ok", "degraded"]]
    version: str
    damaged_packs: list[str]
    problems: list[str]


def first_fault(error: ValidationError) -> str:
    """Where the first fault of malformed values is, and what it is."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
