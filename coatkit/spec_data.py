"""What a spec says of its data: sources, filters, mixtures, the feature store. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, model_validator


def _no_nul(value: str) -> str:
    if "\0" in value:
        raise ValueError("holds a NUL character")
    return value


Text = Annotated[str, Field(min_length=1), AfterValidator(_no_nul)]


class Strict(BaseModel):
    """A model that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def unit(name: str) -> dict[str, JsonValue]:
    """What a field's number counts or measures, for `coatkit explain` and the schema."""
    return {"unit": name}


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str | int | float | bool) else value


def _as_values(value: Any) -> Any:
    return [None] if value is None else _as_list(value)


_Value = str | int | float | bool | None


class FilterSpec(Strict):
    """Which rows are taken; a row must satisfy all of it."""

    min_seconds: float | None = Field(
        None,
        ge=0,
        description="least seconds of sound in a row, all sounds together",
        json_schema_extra=unit("seconds"),
    )
    max_seconds: float | None = Field(
        None, gt=0, description="most seconds of sound in a row, all sounds together", json_schema_extra=unit("seconds")
    )
    language: Annotated[list[Text], BeforeValidator(_as_list, json_schema_input_type=list[Text] | Text)] | None = Field(
        None, description="values the row's `language` may have"
    )
    where: dict[
        Text,
        Annotated[
            list[_Value],
            Field(min_length=1),
            BeforeValidator(_as_values, json_schema_input_type=Annotated[list[_Value], Field(min_length=1)] | _Value),
        ],
    ] = Field({}, description="key of a row to the value, or values, it may have; null: it may be absent")

    @model_validator(mode="after")
    def _ordered(self) -> FilterSpec:
        if self.min_seconds is not None and self.max_seconds is not None and self.min_seconds > self.max_seconds:
            raise ValueError(f"min_seconds: {self.min_seconds:g} is more than max_seconds: {self.max_seconds:g}")
        return self


class SourceSpec(Strict):
    """Rows in a file or folder. A bare path means a source with this path."""

    path: Text = Field(description="file or folder, relative to the spec")
    format: Text = Field("auto", description="what it is written in; found out when left at auto (docs/data.md)")
    question: Text | None = Field(None, description="what to ask about a row that holds a transcript or label alone")
    columns: dict[Text, Text] = Field({}, description="for tables: audio, question, answer, ... to the column it is in")
    filter: FilterSpec = Field(FilterSpec(), description="rows to take")


def _source(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


Source = Annotated[SourceSpec, BeforeValidator(_source, json_schema_input_type=SourceSpec | Text)]


class CategorySpec(Strict):
    """A part of a mixture: its share of the rows, and where they are drawn from."""

    share: float = Field(gt=0, allow_inf_nan=False, description="share of the rows, relative to the other categories'")
    sources: list[Source] = Field(min_length=1, description="where its rows are drawn from")
    draw: Literal["rows", "sources"] | None = Field(
        None, description="from all its rows alike, or the same number from each source; the mixture's when left out"
    )
    max_epochs: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="most rows of it, as passes over its pool; the mixture's when left out",
        json_schema_extra=unit("passes"),
    )
    filter: FilterSpec = Field(
        FilterSpec(), description="rows to take from each source, beside the source's own filter"
    )

    @model_validator(mode="after")
    def _once(self) -> CategorySpec:
        # Twice the same pool would pass its cap unseen.
        for i, source in enumerate(self.sources):
            if source in self.sources[:i]:
                raise ValueError(f"sources: {source.path} is named twice with the same filter")
        return self


class MixtureSpec(Strict):
    """Rows drawn from many sources by category, then shuffled (paper Appendix A)."""

    rows: int = Field(
        ge=1,
        le=10**9,
        description="rows in all (paper: 1,600,000 in each stage)",
        json_schema_extra=unit("rows"),
    )
    seed: int | None = Field(
        None, ge=0, lt=2**31, description="which rows are drawn, and their order; the spec's seed when left out"
    )
    draw: Literal["rows", "sources"] = Field(
        "rows", description="from all rows of a category alike (paper), or the same number from each source"
    )
    max_epochs: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="most rows of a category (or of a source), as passes over its pool",
        json_schema_extra=unit("passes"),
    )
    overflow: Literal["redistribute", "shrink", "refuse"] = Field(
        "redistribute", description="rows a cap leaves over go to the other categories, are left out, or are an error"
    )
    filter: FilterSpec = Field(FilterSpec(), description="rows to take from every source")
    categories: dict[Text, CategorySpec] = Field(min_length=1, description="name to share and sources")


class CacheSpec(Strict):
    """The feature store: what is computed once, kept, and read in training. A bare list means these names."""

    names: list[Text] = Field([], description="experts, or `tower` for the backbone's frozen audio tower")
    dtype: Literal["float32", "float16", "int8"] = Field(
        "float16", description="how values are kept; int8 has one scale for each frame"
    )
    folder: Text | None = Field(None, description="where, relative to the spec; coatkit's cache when left out")


def _cache(value: Any) -> Any:
    return {"names": value} if isinstance(value, list) else value


Cache = Annotated[CacheSpec, BeforeValidator(_cache, json_schema_input_type=CacheSpec | list[Text])]


class DataSpec(Strict):
    """Where rows come from and what to do with bad ones. Paths are relative to the spec."""

    train: Source | None = Field(None, description="training rows: a path, or a source with its format")
    mixture: MixtureSpec | None = Field(None, description="training rows drawn from many sources; in place of `train`")
    heldout: Source | None = Field(None, description="rows kept out of training, for `ask` and comparisons")
    learn: Literal["all", "last"] = Field("all", description="which answers of a conversation are learnt")
    max_seconds: float = Field(
        120, gt=0, description="longest sound in seconds (paper: 120)", json_schema_extra=unit("seconds")
    )
    on_bad_row: Literal["refuse", "quarantine"] = Field("refuse", description="stop at a bad row, or set it aside")
    max_bad_rows: int = Field(
        100, ge=0, description="with quarantine: stop when more rows than this are bad", json_schema_extra=unit("rows")
    )
    workers: int = Field(
        0,
        ge=0,
        le=64,
        description="processes that prepare batches; 0 prepares in the trainer",
        json_schema_extra=unit("processes"),
    )

    @model_validator(mode="after")
    def _one_of(self) -> DataSpec:
        if (self.train is None) == (self.mixture is None):
            raise ValueError("give either train or mixture")
        return self
