"""Reading the objects of a file one after another, whichever of the usual kinds it is."""

import codecs
import csv
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from akl_lightning.errors import UsageError, first_line

Found = tuple[dict[str, Any], int, str]
"""An object, its line (of a column file its row, from 0), and its place in words."""

_BLANK = re.compile(r"[ \t\r\n]*")
_CHUNK = 2**20


def json_lines(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """The objects of a JSON Lines file, each with its place in words.

    Raises:
        UsageError: a line is no JSON object.
    """
    for record, _, where in read_json(path):
        yield record, where


def read_file(path: Path, columns: set[str], otherwise: str | None = None) -> Iterator[Found]:
    """The objects of a file: JSON Lines, a JSON array, both perhaps packed by gzip, Parquet, CSV, or Arrow.

    Of column files only ``columns`` are read, a few rows at a time, and what is null there is left out at any depth.

    Args:
        path: the file; the end of its name says what it is.
        columns: fields that anybody will look at.
        otherwise: what a file of another ending is.

    Raises:
        UsageError: it is something else, is empty, or damaged.
    """
    read = READERS.get(ending(path) or otherwise or "")
    if read is None:
        raise UsageError(f"{path} is of no kind that can be read: give files that end with {', '.join(READERS)}.")
    try:
        if not path.stat().st_size:
            raise UsageError(f"{path} is empty: write records into it, or leave it out.")
        bar = tqdm(desc=f"Reading {path.name}", unit="record", leave=False)
        with bar:
            for found in read(path, columns):
                yield found
                bar.update()
    except (OSError, pa.ArrowException) as error:
        raise UsageError(f"cannot read {path}: {first_line(error)}.") from error


def ending(path: Path) -> str | None:
    """Which of the kinds a file's name says it is."""
    return next((kind for kind in READERS if path.name.lower().endswith(kind)), None)


# --------------------------------------------------------------------------------------------------------------------
# JSON


def holds_records(file: Path) -> bool:
    """Whether a file that lies in a folder is one of records."""
    beside = ("dataset_info.json", "state.json", "dataset_dict.json")  # as save_to_disk writes them
    return file.is_file() and not file.name.startswith(".") and file.name not in beside and bool(ending(file))


def split_of(file: Path) -> str:
    """The split that the name of a file, or of a folder that it lies in, says."""
    words = "".join(letter if letter.isalpha() else " " for letter in str(file).lower()).split()
    for split, names in {"validation": {"validation", "valid", "val", "dev"}, "test": {"test", "testing"}}.items():
        if names & set(words):
            return split
    return "train"


def read_json(path: Path, columns: set[str] | None = None) -> Iterator[Found]:
    """Objects on lines of their own, or in one array where the file's name ends with ``.json``."""
    line = 1
    try:
        with _opened(path) as file:
            array_begins = _begins_with_an_array(path, file)
            if array_begins and ending(path) in (".json", ".json.gz"):
                for value, line in _elements(path, file):
                    yield _object(value, line, path)
                return
            for line, written in enumerate(file, 1):
                if not written.strip():
                    continue
                try:
                    value = json.loads(written.decode())
                except (ValueError, RecursionError) as error:
                    raise UsageError(
                        f"{path}, line {line} is no JSON in UTF-8 ({error}): mend or remove the line; each is an "
                        f"object of its own{', or the file ends with .json and is one array' if array_begins else ''}."
                    ) from error
                yield _object(value, line, path)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UsageError(
            f"{path}, after line {line}: the packed file is damaged or ends early ({first_line(error)}); fetch or "
            "write it again."
        ) from error


def _opened(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb")  # type: ignore[return-value]


def _begins_with_an_array(path: Path, file: IO[bytes]) -> bool:
    """Look at the first bytes, and stand behind the byte order mark, if there is one."""
    begins = file.read(64)
    if begins.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in begins[:4]:
        raise UsageError(
            f"{path}, line 1 is no JSON in UTF-8 but UTF-16 or UTF-32: write the file anew, for example by iconv -f "
            "UTF-16 -t UTF-8."
        )
    mark = len(codecs.BOM_UTF8) if begins.startswith(codecs.BOM_UTF8) else 0
    file.seek(mark)
    return begins[mark:].lstrip().startswith(b"[")


def _object(value: Any, line: int, path: Path) -> Found:
    where = f"{path}, line {line}"
    if not isinstance(value, dict):
        array = isinstance(value, list) and line == 1
        way_out = "; a file that is one array ends with .json" if array else ""
        raise UsageError(f"{where} is no JSON object but {str(value)[:40]!r}: mend or remove the line{way_out}.")
    return value, line, where


def _elements(path: Path, file: IO[bytes]) -> Iterator[tuple[Any, int]]:
    """The elements of an array and the lines that they begin on, with no more of it in memory than one needs."""
    decoder, reader = json.JSONDecoder(), codecs.getreader("utf-8")(file)
    buffer, at, line, ended = "", 0, 1, False

    def more() -> None:
        nonlocal buffer, at, ended
        # As much again as there is, so that one long element is not looked at many times over.
        read = reader.read(max(_CHUNK, len(buffer) - at))
        buffer, at, ended = buffer[at:] + read, 0, not read

    def behind_blanks() -> str:
        """The character that stands there, empty at the end of the file."""
        nonlocal at, line
        while True:
            begins = _BLANK.match(buffer, at).end()  # type: ignore[union-attr]  # it matches nothing, too
            line += buffer.count("\n", at, begins)
            at = begins
            if at < len(buffer) or ended:
                return buffer[at : at + 1]
            more()

    def element() -> tuple[Any, int]:
        while True:
            try:
                return decoder.raw_decode(buffer, at)
            except json.JSONDecodeError as error:
                # An element that goes on behind the buffer fails at its end, or where its last string begins.
                if ended or not (error.msg.startswith("Unterminated") or error.pos > len(buffer) - 16):
                    raise refuse(error.msg) from error
                more()
            except ValueError as error:  # a number of thousands of digits
                raise refuse(error) from error

    def refuse(reason: object) -> UsageError:
        return UsageError(f"{path}, line {line} is no JSON in UTF-8 ({reason}): mend the array.")

    try:
        behind_blanks()
        at += 1  # the bracket that it begins with
        while (found := behind_blanks()) != "]":
            if not found:
                raise refuse("it ends early")
            value, end = element()
            yield value, line
            line += buffer.count("\n", at, end)
            at = end
            if (found := behind_blanks()) not in (",", "]", ""):
                raise refuse(f"{found!r} stands where , should")
            at += found == ","
        at += 1
        if found := behind_blanks():
            raise refuse(f"{found!r} stands behind the array")
    except (UnicodeDecodeError, RecursionError) as error:
        raise refuse(error) from error


# --------------------------------------------------------------------------------------------------------------------
# Columns


def _read_csv(path: Path, columns: set[str]) -> Iterator[Found]:
    csv.field_size_limit(2**31 - 1)  # a conversation may be longer than the 128 KiB that it begins with
    line = 1
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, strict=True)
            names = rows.fieldnames or []
            twice = [name for name in names if names.count(name) > 1]
            if twice:
                raise UsageError(f"{path}, line 1 has the field {twice[0]!r} twice: give it two names.")
            for row in rows:
                begins, line = line + 1, rows.line_num
                where = f"{path}, line {begins}"
                if None in row or None in row.values():
                    raise UsageError(f"{where} has more or fewer fields than the heading: mend or remove the line.")
                yield {name: text for name, text in row.items() if text}, begins, where
    except (csv.Error, UnicodeDecodeError) as error:
        raise UsageError(f"{path}, after line {line}: it is no CSV in UTF-8 ({error}); mend it.") from error


def _read_parquet(path: Path, columns: set[str]) -> Iterator[Found]:
    with pq.ParquetFile(path) as file:
        known = known_columns(path, file.schema_arrow.names, columns)
        batches = file.iter_batches(1000, columns=known)
        yield from records_of(path, (row for batch in batches for row in batch.to_pylist()))


def _read_arrow(path: Path, columns: set[str]) -> Iterator[Found]:
    with pa.memory_map(str(path)) as mapped:
        try:
            file = pa.ipc.open_file(mapped)
            batches = (file.get_batch(index) for index in range(file.num_record_batches))
        except pa.ArrowInvalid:
            mapped.seek(0)
            batches = file = pa.ipc.open_stream(mapped)
        known = known_columns(path, file.schema.names, columns)
        parts = (batch.slice(start, 1000) for batch in batches for start in range(0, batch.num_rows, 1000))
        yield from records_of(path, (row for part in parts for row in part.select(known).to_pylist()))


def known_columns(where: Path | str, names: list[str], columns: set[str]) -> list[str]:
    """Those of some columns that anybody will look at.

    Raises:
        UsageError: there is none.
    """
    known = [name for name in names if name in columns]
    if not known:
        raise UsageError(f"{where} fits no form, its columns are {', '.join(names)}: name them in the source.")
    return known


def records_of(where: Path | str, rows: Iterable[dict[str, Any]]) -> Iterator[Found]:
    """The rows of columns, without what is null at any depth: it is there only because a column has one type."""
    for row, values in enumerate(rows):
        yield _without_nulls(values), row, f"{where}, row {row}"


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(one) for name, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


READERS: dict[str, Callable[[Path, set[str]], Iterator[Found]]] = {
    **dict.fromkeys((".jsonl", ".json", ".jsonl.gz", ".json.gz"), read_json),
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".arrow": _read_arrow,
}
