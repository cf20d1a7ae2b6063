"""What an evaluation or a cost estimate gives back: tables for people, the numbers for programs."""

import copy
import dataclasses
import html
import io
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from megatransformer_jax.config.option import UserError

# Dots per inch of figures on a screen.
_DPI = 100
# Wide enough for every table; a file or a notebook has no width of its own.
_WIDTH = 140


class ShownFigure(Figure):
    """A matplotlib figure that belongs to no window and shows itself in a notebook."""

    def _repr_png_(self) -> bytes:
        stream = io.BytesIO()
        self.savefig(stream, format="png", dpi=_DPI)
        return stream.getvalue()


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, sizes in inches. The object interface: pyplot would keep global state."""
    figure = ShownFigure(figsize=(width, height), layout="constrained", dpi=_DPI)
    FigureCanvasAgg(figure)
    return figure


@dataclasses.dataclass(frozen=True, repr=False)
class Report:
    """Tables with the numbers behind them. Prints itself, in a notebook too.

    Attributes:
      rows: plain values, one dictionary per row of the main table.
      tables: for people.
      write: puts the numbers and plots into a folder that exists; returns the paths.
      draw: makes the plot; None if there is nothing to plot.

    Examples:
      >>> from rich.table import Table
      >>> table = Table("depth", "loss")
      >>> table.add_row("1", "2.5")
      >>> report = Report([{"depth": 1, "loss": 2.5}], [table], lambda folder: [])
      >>> report.rows[0]["loss"]
      2.5
      >>> "2.5" in str(report)
      True
    """

    rows: Sequence[dict[str, Any]]
    tables: Sequence[Table]
    write: Callable[[pathlib.Path], Sequence[pathlib.Path]]
    draw: Callable[[], Figure] | None = None

    def figure(self) -> Figure:
        """The plot, a matplotlib figure that belongs to no window.

        Raises:
          UserError: if the report has none.
        """
        if self.draw is None:
            raise UserError("this report has no plot; its numbers are in .rows")
        return self.draw()

    def __str__(self) -> str:
        return tables_as_text(self.tables)

    __repr__ = __str__  # A session shows the tables.

    def _repr_html_(self) -> str:
        return tables_as_html(self.tables)


def tables_as_text(tables: Sequence[Table]) -> str:
    """The tables in ASCII characters, as a file or a pipe shows them."""
    stream = io.StringIO()
    console = Console(file=stream, width=_WIDTH, color_system=None)
    for table in tables:
        plain = copy.copy(table)
        plain.box = box.ASCII
        console.print(plain)
    return stream.getvalue().rstrip("\n")


def tables_as_html(tables: Sequence[Table]) -> str:
    """The tables as HTML."""
    return "\n".join(map(_as_html, tables))


def _as_html(table: Table) -> str:
    def cells(tag: str, values: Sequence[object]) -> str:
        return "".join(f"<{tag}>{html.escape(str(value))}</{tag}>" for value in values)

    heads = cells("th", [column.header for column in table.columns])
    rows = zip(*(list(column.cells) for column in table.columns), strict=True)
    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    title = f"<caption>{html.escape(str(table.title))}</caption>" if table.title else ""
    note = f"<p>{html.escape(str(table.caption))}</p>" if table.caption else ""
    return f"<table>{title}<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>{note}"
