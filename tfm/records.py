"""The JSON files of a run as pydantic reads them: every content is taken as it is or refused in one line."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from tfm.config import AS_WRITTEN, LARGEST_COUNT, Recipe, TransformerConfig, shortened
from tfm.errors import UserError, extra

with extra("translate"):
    from pydantic import AfterValidator, BaseModel, Field, TypeAdapter, ValidationError
    from pydantic_core import from_json

T = TypeVar("T")
Count = Annotated[int, Field(ge=0, le=LARGEST_COUNT)]
LARGEST_LOSS = 1e39
Threads = Annotated[int, Field(ge=1, le=1024)]


@dataclass(frozen=True)
class ConfigFile:
    """config.json."""

    model: TransformerConfig
    recipe: Recipe
    training: dict[str, Any]


@dataclass(frozen=True)
class Started:
    """The way `tfm train` started a run: `training` in config.json.

    The paths are in older runs only; paths.json has them since, which need not be shared with the model.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = AS_WRITTEN | {"extra": "ignore"}

    preset: str
    options: dict[str, Any]
    text_sha256: str
    device: Literal["auto", "cpu", "cuda"] | None = None
    threads: Threads | None = None
    source: str | None = None
    target: str | None = None
    valid_source: str | None = None
    valid_target: str | None = None


@dataclass(frozen=True)
class Place:
    """The place of training in its data: the metadata of state.safetensors."""

    __pydantic_config__: ClassVar[dict[str, Any]] = AS_WRITTEN

    step: Annotated[int, Field(ge=1, le=LARGEST_COUNT)]
    epoch: Count
    batch: Count
    loss_steps: Count

    def __post_init__(self) -> None:
        for name in ("epoch", "batch", "loss_steps"):
            if getattr(self, name) > self.step:
                raise UserError(f"{name}: expected at most the {self.step} updates, got {getattr(self, name)}")


class Logged(BaseModel, strict=True):
    """The fields that every record of the log has; there may be more."""

    event: str
    step: Count


def _is_drawable(loss: float) -> float:
    """Accepts a loss that is not finite, which leaves a gap in the picture, but not one that no fp32 can be."""
    if math.isfinite(loss) and abs(loss) > LARGEST_LOSS:
        raise ValueError("expected a loss")
    return loss


Loss = Annotated[float, AfterValidator(_is_drawable)]


class Trained(Logged):
    loss: Loss


class Validated(Logged):
    loss: Loss
    # sacrebleu's 100 may come out a rounding error higher.
    bleu: Annotated[float, Field(ge=0, le=101)]


KINDS: dict[str, type[Logged]] = {"train": Trained, "validation": Validated}


def parse(kind: type[T], data: bytes | str, place: object) -> T:
    """Returns a value of `kind` from JSON; `place` says where it stands.

    Raises:
        UserError: it is no JSON, a field is missing, unknown or of the wrong type, or its value is senseless.
    """
    with _told(place):
        return TypeAdapter(kind).validate_json(data, strict=True)


def parse_config(data: bytes, place: object) -> ConfigFile:
    """Returns a config.json whose model and recipe are whole: a default in a field's place would be another model's.

    Raises:
        UserError: as `parse`.
    """
    config = parse(ConfigFile, data, place)
    written = from_json(data)
    for part, value in (("model", config.model), ("recipe", config.recipe)):
        for field in fields(value):
            if field.name not in written[part]:
                raise UserError(f"{place}: {part}.{field.name}: missing")
    return config


def check(kind: type[T], values: object, place: object) -> T:
    """Returns the same from values that were JSON: pydantic takes a list for a tuple there alone."""
    return parse(kind, json.dumps(values), place)


def parse_object(data: bytes | str, place: object) -> dict[str, Any]:
    """Returns a JSON object with any content."""
    return parse(dict[str, Any], data, place)


def parse_log(data: bytes, place: object) -> list[dict[str, Any]]:
    """Returns the records of a log, without what a crash tore off at its end.

    Raises:
        UserError: a line is not a record, or is damaged though whole ones follow.
    """
    lines = list(_values(data))
    while lines and isinstance(lines[-1], ValueError):
        lines.pop()
    read: list[dict[str, Any]] = []
    for number, value in enumerate(lines, start=1):
        with _told(f"{place}:{number}"):
            if isinstance(value, ValueError):
                raise UserError(f"not JSON ({value})")
            kind = KINDS.get(Logged.model_validate(value).event, Logged)
            read.append(value | kind.model_validate(value).model_dump())
    return read


def _values(data: bytes) -> Iterator[Any]:
    """Yields what stands in each line, or why it is no JSON; a line without its end is torn."""
    for line in data.splitlines(keepends=True):
        try:
            yield from_json(line if line.endswith(b"\n") else b"")
        except ValueError as error:
            yield error


@contextmanager
def _told(place: object) -> Iterator[None]:
    """Turns what pydantic or a class's own checks find into one line about `place`."""
    try:
        yield
    except ValidationError as error:
        raise UserError(f"{place}: {_first(error)}") from None
    except UserError as error:
        raise UserError(f"{place}: {error}") from None


def _first(error: ValidationError) -> str:
    """Returns the first thing that is wrong, in this project's words."""
    found = error.errors(include_url=False)[0]
    name = ".".join(part if part.isprintable() else shortened(part) for part in map(str, found["loc"]))
    field = f"{name}: " if name else ""
    if found["type"] == "json_invalid":
        return f"damaged ({found['msg'].removeprefix('Invalid JSON: ')})"
    if found["type"] == "missing":
        return f"{field}missing"
    if found["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{field}unknown"
    expected = found["msg"].replace("Input should be ", "expected ").removeprefix("Value error, ")
    return f"{field}{expected}, got {shortened(found['input'])}"
