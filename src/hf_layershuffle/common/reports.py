# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""What all reports do: save and load themselves, and show themselves as a line, a table or pictures."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import ClassVar, TypeVar

from .files import write_text
from .tables import html_table, render
from .yaml_files import read_json


_Report = TypeVar("_Report", bound="Report")


class Report:
    """Base of a report, which has `model`, `dataset`, `num_images`, `table()`, `to_dict()`, `from_dict()` and `_summary()`, one
    sentence."""

    file_name: ClassVar[str]  # in the folder that it is saved into
    kind: ClassVar[str]  # for messages, such as "a robustness report"
    indent: ClassVar[int | None] = 1  # of the JSON
    # Give the modules that draw and publish reports, which stand above those that make them; set by the package
    drawing: ClassVar[Callable[[], ModuleType] | None] = None
    publishing: ClassVar[Callable[[], ModuleType] | None] = None

    def save(self, folder) -> Path:
        """Writes the report's JSON file into `folder`, which is made if missing; returns the file's path."""
        return write_text(Path(folder) / self.file_name, json.dumps(self.to_dict(), indent=self.indent) + "\n")

    @classmethod
    def load(cls: type[_Report], path) -> _Report:
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

    def plot(self, **kwargs):
        """Its pictures by name, which a notebook shows. `report.plot().save(folder)` writes them."""
        return self.drawing().pictures_of(self, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs):
        """Pushes the report, its pictures and the card that shows them to a model's repository, in one commit.

        Args:
            kwargs: `private`, `revision`, `token` and `commit_message`, as in [`publish`].
        """
        return self.publishing().push_report(self, repo_id, **kwargs)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.model} on {self.dataset}, {self.num_images:,} images: {self._summary()})"

    def __str__(self) -> str:
        return render(self.table())

    def _repr_html_(self) -> str:
        return f"{html_table(self.table())}\n{self.plot()._repr_html_()}"
