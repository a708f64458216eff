"""What every section of the settings is made of: its base class, and the types that several sections use."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _named(path: Path) -> Path:
    if not path.name or "\0" in str(path):
        raise ValueError(f"{str(path)!r} names no file or folder")
    return path


PathSetting = Annotated[Path, Field(strict=False), AfterValidator(_named)]
Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


AnySection = TypeVar("AnySection", bound="Section")


class Section(BaseModel):
    """A section of the configuration: frozen, strict about types, closed to unknown settings."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def refuse(section: AnySection, problems: list[str]) -> AnySection:
    """Raises ValueError with a line for each problem: "setting: problem; remedy"."""
    if problems:
        raise ValueError("\n".join(problems))
    return section
