"""What the options of `engram-train` mean: texts and choices to the configuration of a run."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import fields, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from engram import amounts
from engram_trainer import datasets, methods
from engram_trainer.configuration import (
    MEMORY_KINDS,
    MemoryConfig,
    MemoryKind,
    PrepareConfig,
    RunConfig,
    RuntimeConfig,
)
from engram_trainer.recipes import Recipe
from engram_trainer.stream import StreamConfig


def of_recipe(found: Recipe, given: Mapping[str, Any], named: Set[str]) -> RunConfig:
    """A recipe's configuration for these data, with what was given beside it.

    Raises:
        ValueError: the data are not those of the recipe.
        EngramError: they cannot be read.
    """
    dataset = datasets.load(given["data"], resize=found.config.resize)
    found.check(dataset)
    memory = found.config.memory
    budget = amounts.parse(given["budget"]) if "budget" in named else found.budget(dataset)
    quality = parse_quality(given["quality"]) if "quality" in named else memory.quality
    kind = given["memory"] if "memory" in named else memory.kind
    return replace(
        found.config,
        data=given["data"],
        stream=replace(found.config.stream, seed=given["seed"]),
        memory=replace(
            memory,
            kind=kind,
            budget_bytes=budget,
            quality=quality,
            url=given["url"],
            buffer=given["buffer"],
            replay=given["replay"],
            patience_s=given["patience"],
        ),
        seed=given["seed"],
        runtime=_runtime(given),
    )


def _runtime(given: Mapping[str, Any]) -> RuntimeConfig:
    return RuntimeConfig(
        given["device"], given["precision"], given["processes"], given["workers"], checkpoint_s=given["checkpoint"]
    )


def configuration(given: Mapping[str, Any]) -> RunConfig:
    """What the options of `train` mean where they are not about a recipe.

    Raises:
        ValueError: they contradict each other or themselves.
    """
    return RunConfig(
        data=given["data"],
        resize=given["resize"],
        prepare=PrepareConfig(given["crop"], given["normalise"]),
        stream=StreamConfig(
            scenario=given["scenario"],
            tasks=given["tasks"],
            base_classes=given["base_classes"],
            seed=given["seed"],
            train_per_class=given["train_per_class"],
            train_per_task=given["train_per_task"],
            test_per_class=given["test_per_class"],
            validation_ratio=given["validation"],
            visits=parse_visits(given["visits"]),
        ),
        method=given["method"],
        options=parse_options(given["method"], given["settings"] or [], given["epochs"]),
        network=given["network"],
        memory=MemoryConfig(
            kind=given["memory"],
            budget_bytes=amounts.parse(given["budget"]),
            per=given["per"],
            share_by=given["share_by"],
            quality=parse_quality(given["quality"]),
            subsampling=given["subsampling"],
            ranking=given["ranking"],
            definition=given["definition"],
            rule=given["rule"],
            epsilon=given["epsilon"],
            block=given["block"],
            url=given["url"],
            buffer=given["buffer"],
            replay=given["replay"],
            patience_s=given["patience"],
        ),
        seed=given["seed"],
        runtime=_runtime(given),
    )


def parse_options(method: str, settings: list[str], epochs: int | None) -> dict[str, Any]:
    """The method's options from `NAME=VALUE` texts, each value of the type of the method's field.

    Raises:
        ValueError: not NAME=VALUE, no such setting, or a value of another type.
    """
    config = methods.config_class(method)
    types = get_type_hints(config)
    known = {field.name: types[field.name] for field in fields(config)}
    options: dict[str, Any] = {} if epochs is None else {"epochs": epochs}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"--set takes NAME=VALUE, not {setting!r}")
        if name not in known:
            raise ValueError(f"method {method} has no setting {name!r}; it has {', '.join(sorted(known))}")
        options[name] = _value(name, text, known[name])
    return options


def _value(name: str, text: str, kind: Any) -> Any:
    choices = [choice for choice in get_args(kind) if choice is not type(None)]
    if get_origin(kind) is tuple:
        return tuple(_value(name, part, choices[0]) for part in text.split(",") if part)
    if get_origin(kind) is Literal:
        if text not in choices:
            raise ValueError(f"{name} is one of {', '.join(choices)}, not {text!r}")
        return text
    if len(choices) < len(get_args(kind)):
        if text.lower() == "none":
            return None
        kind = choices[0]
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{name} is true or false, not {text!r}")
        return text.lower() == "true"
    try:
        return kind(text)
    except ValueError as error:
        raise ValueError(f"{name} must be of type {kind.__name__}, got {text!r}") from error


def parse_visits(text: str | None) -> tuple[int, ...] | None:
    """The tasks that `0,1,0` names.

    Raises:
        ValueError: one is no number.
    """
    if text is None:
        return None
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError as error:
        raise ValueError(f"visits are numbers of tasks, as in 0,1,0, not {text!r}") from error


def parse_quality(text: str) -> int | None:
    """None for `auto`.

    Raises:
        ValueError: neither `auto` nor a whole number.
    """
    if text == "auto":
        return None
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"quality is 'auto' or a number from 1 to 100, not {text!r}") from error


def memory_kind(word: str) -> MemoryKind:
    """The kind of memory that a word names.

    Raises:
        ValueError: none.
    """
    if word not in MEMORY_KINDS:
        raise ValueError(f"memory kind {word!r} is not one of {', '.join(MEMORY_KINDS)}")
    return word


def seed(word: str) -> int:
    """A number.

    Raises:
        ValueError: it is none.
    """
    try:
        return int(word)
    except ValueError as error:
        raise ValueError(f"a seed is a whole number, not {word!r}") from error
