"""Read a csv file that gives the group, such as the patient, of every image."""

import csv
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from utils.errors import UserError
from utils.text import listed

FILE_COLUMNS = ("file", "filename", "path", "image")  # columns that name the files; else it is the first one


def table_of(how: str) -> tuple[Path, str] | None:
    """The file and the column of `<file>.csv:<column>`; None for text of another form. UserError without a column."""
    found = re.fullmatch(r"(.+?\.csv)(?::(.*))?", how, re.IGNORECASE | re.DOTALL)
    if found is None:
        return None
    path, column = Path(found[1]), (found[2] or "").strip()
    if not column:
        raise UserError(
            f"--groups: {how} names no column; give {path}:<column>, with the column of the groups"
        )
    return path, column


def read_groups_table(path: Path, column: str) -> dict[str, str]:
    """File name, as the csv file gives it -> group. UserError with the line of anything that is not clear."""
    (_, columns), *rows = _rows(path)
    names, groups = _columns(path, columns, column)
    table: dict[str, str] = {}
    for line, cells in rows:
        if any(cells[len(columns) :]):
            raise UserError(
                f"--groups: {path}, line {line}: {len(cells)} values for {len(columns)} columns; put a value that "
                f"contains a comma into double quotes"
            )
        for place in (names, groups):
            if place >= len(cells) or not cells[place]:
                raise UserError(
                    f"--groups: {path}, line {line}: no value for '{columns[place]}'; every image needs one"
                )
        file, group = _form(cells[names]), cells[groups]
        if table.setdefault(file, group) != group:
            raise UserError(f"--groups: {path} has two groups for {file}: {table[file]} and {group}")
    return table


def groups_in_table(table: dict[str, str], names: Sequence[str], path: Path) -> list[str | None]:
    """The group of every image, found by its path in the source or else by its file name; None if the table lacks it.
    UserError if one line names several images."""
    formed = [_form(name) for name in names]
    by_file_name = Counter(PurePosixPath(name).name for name in formed if name not in table)
    unclear = sorted(name for name, count in by_file_name.items() if count > 1 and name in table)
    if unclear:
        one, other, *_ = (name for name in formed if PurePosixPath(name).name == unclear[0])
        raise UserError(
            f"--groups: {path} names {unclear[0]}, which may be {one} or {other}; give paths below the source"
        )
    return [table.get(name, table.get(PurePosixPath(name).name)) for name in formed]


def _rows(path: Path) -> list[tuple[int, list[str]]]:
    """The lines that are not empty, each with its number; the first is the header."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            rows = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader]
    except OSError as error:
        raise UserError(f"--groups: {path}: {error.strerror or 'cannot be read'}; give a csv file") from error
    except UnicodeError as error:
        raise UserError(f"--groups: {path} is not UTF-8; save it as 'CSV UTF-8'") from error
    except csv.Error as error:
        raise UserError(
            f"--groups: {path}, line {reader.line_num}: not readable as csv; check its quotation marks"
        ) from error
    rows = [(line, cells) for line, cells in rows if any(cells)]
    if not rows:
        raise UserError(
            f"--groups: {path} is empty; it must have a line of column names and a line per image"
        )
    return rows


def _columns(path: Path, header: list[str], column: str) -> tuple[int, int]:
    """The positions of the columns that name the files and the groups."""
    names = next((place for place, name in enumerate(header) if name.casefold() in FILE_COLUMNS), 0)
    if column not in header:
        separators = len(header) == 1 and re.search(r"[;\t|]", header[0])
        hint = "; columns must be separated by commas" if separators else ""
        raise UserError(f"--groups: {path} has no column '{column}'; it has {listed(header, 10)}{hint}")
    groups = header.index(column)
    if groups == names:
        raise UserError(
            f"--groups: column '{column}' of {path} names the files; give the column of the groups"
        )
    if header.count(column) > 1:
        raise UserError(f"--groups: {path} has {header.count(column)} columns '{column}'; rename all but one")
    return names, groups


def _form(name: str) -> str:
    """A path with forward slashes, without './', in Unicode's composed form: programs write equal names differently."""
    return unicodedata.normalize("NFC", name).replace("\\", "/").removeprefix("./")
