# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""What all reports do: save and load themselves, and show themselves as a line, a table or pictures."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from .files import write_text
from .tables import html_table, render
from .yaml_files import read_json


if TYPE_CHECKING:
    from rich.table import Table


_Report = TypeVar("_Report", bound="Report")


class Report:
    """Base of a report. What raises `NotImplementedError` here, each report has of its own."""

    file_name: ClassVar[str]  # in the folder that it is saved into
    kind: ClassVar[str]  # for messages, such as "a robustness report"
    indent: ClassVar[int | None] = 1  # of the JSON
    # The modules that draw and publish reports. They stand above the rooms that make reports, so the package sets them
    drawing: ClassVar[Callable[[], ModuleType]]
    publishing: ClassVar[Callable[[], ModuleType]]

    if TYPE_CHECKING:  # at run time, a property here would be the default of a dataclass's field

        @property
        def model(self) -> str: ...

        @property
        def dataset(self) -> str: ...

        @property
        def num_images(self) -> int: ...

    def table(self) -> "Table":
        raise NotImplementedError

    def to_dict(self) -> dict:
        raise NotImplementedError

    @classmethod
    def from_dict(cls: type[_Report], values: dict) -> _Report:
        raise NotImplementedError

    def _summary(self) -> str:
        """What was found, in a line."""
        raise NotImplementedError

    @property
    def noun(self) -> str:
        """What is counted: "images", "texts", "clips" or "videos"."""
        return str(getattr(self, "config", {}).get("inputs", "images"))

    def save(self, folder: str | os.PathLike) -> Path:
        """Writes the report's JSON file into `folder`, which is made if missing; returns the file's path."""
        return write_text(Path(folder) / self.file_name, json.dumps(self.to_dict(), indent=self.indent) + "\n")

    @classmethod
    def load(cls: type[_Report], path: str | os.PathLike) -> _Report:
        """Reads a report from its file or from the folder that holds it.

        Raises:
            `OSError`: if there is none.
            `ValueError`: if the file is not such a report.
        """
        path = Path(path)
        path = path / cls.file_name if path.is_dir() else path
        try:
            return cls.from_dict(read_json(path, dict))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            said = error if isinstance(error, ValueError) else repr(error)
            raise ValueError(f"'{path}' is not {cls.kind}: {said}") from error

    def plot(self, **kwargs: Any) -> Any:
        """The report's pictures by name, which a notebook shows. `report.plot().save(folder)` writes them."""
        return type(self).drawing().pictures_of(self, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Pushes the report, its pictures and the card that shows them to a model's repository, in one commit.

        Args:
            kwargs: `private`, `revision`, `token` and `commit_message`, as in [`publish`].
        """
        return type(self).publishing().push_report(self, repo_id, **kwargs)

    def __repr__(self) -> str:
        data = f"{self.dataset}, {self.num_images:,} {self.noun}"
        return f"{type(self).__name__}({self.model} on {data}: {self._summary()})"

    def __str__(self) -> str:
        return render(self.table())

    def _repr_html_(self) -> str:
        return f"{html_table(self.table())}\n{self.plot()._repr_html_()}"
