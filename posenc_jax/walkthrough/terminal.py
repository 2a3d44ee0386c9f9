"""The walkthrough as plain text, for the terminal."""

import io

import rich.box
import rich.console
import rich.padding
import rich.table
import rich.text

from posenc_jax.walkthrough.story import LANGUAGES, Picture, Section, Shapes, Slip, Table, Text


def plain(title: str, sections: tuple[Section, ...], language: str, width: int = 80) -> str:
    """The walkthrough in lines of this width. Wide characters count as two. Pictures are shown as file names."""
    words = LANGUAGES[language]
    console = rich.console.Console(file=io.StringIO(), width=width, color_system=None, highlight=False)
    with console.capture() as printed:
        _print(console, title)
        for section in sections:
            if section.title:
                _print(console, f"\n{section.title}\n{'-' * rich.text.Text(section.title).cell_len}")
            for part in section.parts:
                console.print()
                match part:
                    case Text(text):
                        _print(console, text)
                    case Shapes(text):
                        _print(console, text, indent=4)
                    case Slip(told, truth):
                        _print(console, f"{words['slip.heading']}: {told}", mark="! ")
                        _print(console, f"{words['slip.truth']}: {truth}", mark="  ")
                    case Picture(file, caption):
                        _print(console, f"[{file}] {caption}", indent=2)
                    case Table():
                        console.print(rich.padding.Padding(_table(part), (0, 0, 0, 2)))
    return "".join(f"{line.rstrip()}\n" for line in printed.get().splitlines())


def _print(console: rich.console.Console, text: str, indent: int = 0, mark: str = "") -> None:
    """Print a text after a mark. All of its lines are indented by the width of the mark and by `indent`."""
    parts = [part for part in (mark, text) if part]
    lines = rich.table.Table.grid()
    for _ in parts:
        lines.add_column(overflow="fold")
    lines.add_row(*map(rich.text.Text, parts))
    console.print(rich.padding.Padding(lines, (0, 0, 0, indent)))


def _table(part: Table) -> rich.table.Table:
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for name in part.header:
        table.add_column(rich.text.Text(name), justify="right", overflow="fold")
    for row in part.rows:
        table.add_row(*map(rich.text.Text, row))
    return table
