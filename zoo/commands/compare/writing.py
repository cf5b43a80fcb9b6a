"""compare.json, compare.md and the tables on the terminal, beside the page."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table as TerminalTable

from zoo.commands.common import ARROWS
from zoo.commands.compare.page import page
from zoo.commands.compare.report import Section, Table, absent, headline, sections, shown_as
from zoo.files import write_json, writing

COLUMNS = 5
"""Of a table on the terminal, beside the names."""
IN_FILES_ONLY = ("Use of codebooks", "Speed and memory")


def write(report: dict, folder: Path, console: Console) -> None:
    found = sections(report)
    write_json(folder / "compare.json", report, allow_nan=False)
    for name, text in (("compare.md", markdown(report, found)), ("compare.html", page(report, found, folder))):
        with writing(folder / name) as file:
            file.write(text.encode())
    for section in found:
        for table in (table for table in section.tables if table.title not in IN_FILES_ONLY):
            for part in on_terminal(section, table):
                console.print(part)
            for note in table.notes:
                console.print(note, soft_wrap=True, markup=False)
    failed = [entry["name"] for entry in report["tokenizers"] if entry["failed"]]
    count = len(report["tokenizers"]) - len(failed)
    console.print(f"{count} measured, {len(failed)} failed" + (f": {', '.join(failed)}" if failed else ""))
    if report["absent"]:
        console.print(absent(report), soft_wrap=True, markup=False)
    console.print(f"compare.html, compare.md and compare.json are in {folder}", soft_wrap=True)


def on_terminal(section: Section, table: Table) -> Iterator[TerminalTable]:
    """The table in parts of COLUMNS columns beside the first."""
    best = table.best()
    for begin in range(1, len(table.columns), COLUMNS):
        places = [0, *range(begin, min(begin + COLUMNS, len(table.columns)))]
        shown = TerminalTable(title=f"{section.title}: {table.title}" if begin == 1 else None)
        for j in places:
            column = table.columns[j]
            title = (f"{column.group}: " if column.group else "") + column.title + ARROWS[column.better]
            shown.add_column(escape(title), justify="right" if j else "left", no_wrap=not j)
        for i, row in enumerate(table.rows):
            texts = {j: escape(shown_as(row[j], table.columns[j])) for j in places}
            shown.add_row(*(f"[bold]{text}[/]" if (i, j) in best else text for j, text in texts.items()))
        for row in table.baselines:
            shown.add_row(*(shown_as(row[j], table.columns[j]) for j in places), style="dim")
        for name, _ in table.failures:
            shown.add_row(name, "failed", style="red")
        yield shown


def markdown(report: dict, found: list[Section]) -> str:
    """The tables, with the best values bold."""
    lines = ["# Tokenizers compared", "", f"{headline(report)}. `{report['run']['command']}`", ""]
    for section in found:
        lines += [f"## {section.title}", ""]
        for table in section.tables:
            best = table.best()
            titles = [
                (f"{c.group}: " if c.group else "") + c.title + (ARROWS[c.better] if not c.group else "")
                for c in table.columns
            ]
            lines += [f"### {table.title}", "", cells(titles), cells(["---"] + ["---:"] * (len(titles) - 1))]
            for i, row in enumerate([*table.rows, *table.baselines]):
                texts = [shown_as(cell, column) for cell, column in zip(row, table.columns, strict=True)]
                lines.append(cells(f"**{text}**" if (i, j) in best else text for j, text in enumerate(texts)))
            lines += [cells([name, f"failed: {reason}", *[""] * (len(titles) - 2)]) for name, reason in table.failures]
            lines += ["", *(line for note in table.notes for line in (note, ""))]
    if report["absent"]:
        lines += [absent(report), ""]
    return "\n".join(lines)


def cells(texts: Iterable[str]) -> str:
    return f"| {' | '.join(text.replace('|', chr(92) + '|') for text in texts)} |"
