"""Records on their way into an Arrow file, a batch at a time, where later runs find them."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets.fingerprint import get_temporary_cache_files_directory
from datasets.table import MemoryMappedTable
from filelock import FileLock

from akl_lightning.cached import cache_folder, key_of
from akl_lightning.checkpoint import atomic_file, check_writable
from akl_lightning.data import files, forms, records
from akl_lightning.data.records import Row, row_digest, row_digests
from akl_lightning.errors import UsageError, first_line
from akl_lightning.rank_zero import rank_zero_info

RECORD_FEATURES = datasets.Features(
    {
        "messages": datasets.Value("string"),  # JSON of a list of messages, "" for a document
        "tools": datasets.Value("string"),  # JSON of a list, "" for none
        "text": datasets.Value("string"),  # a document, else ""
        "references": datasets.List(datasets.Value("string")),  # every acceptable response, where there are several
        "cut": datasets.Value("bool"),  # whether the last response was cut off, so that no end is to be learnt
        "form": datasets.Value("string"),
        "file": datasets.Value("string"),
        "line": datasets.Value("int64"),  # from 1; of a column file the row, from 0
        "name": datasets.Value("string"),
        "key": datasets.Value("uint64"),  # decides the split
    }
)
"""The one schema of all sources. A conversation whose last message is not the assistant's is a prompt alone."""

_ROWS, _CHARACTERS = 1000, 2**26
"""A batch ends at either: it lies in memory, and a column of it may not pass 2 GiB."""


def store(
    where: str, depends_on: Any, rows: Callable[[Counter], Iterator[Row | None]], code: Sequence[ModuleType] = ()
) -> datasets.Dataset:
    """Records as a memory-mapped data set: written once, and found again by a name of all that they depend on.

    Args:
        where: what they are read from, in words.
        depends_on: for JSON; with the code that reads it decides whether they are found. None for never.
        rows: reads them, and counts what is to be said of them; None for a record that is dropped.
        code: what else reads them.

    Raises:
        UsageError: none is left, or the cache cannot be written.
    """
    folder = None if depends_on is None else cache_folder("records")
    if folder is None:
        folder, key = Path(get_temporary_cache_files_directory()), None
        path = folder / f"records-{len(list(folder.iterdir()))}.arrow"
        check_writable(folder)
    else:
        key = key_of(depends_on, (files, forms, records, *code))
        path = folder / f"{key}.arrow"
    said = path.with_suffix(".json")
    # One process reads; others that start with it find what it has written.
    with FileLock(path.with_suffix(".lock")):
        if not (path.exists() and said.exists()):
            notes: Counter = Counter(all=0)
            try:
                with atomic_file(path) as file:
                    _write(file, rows(notes), notes)
                    said.write_text(json.dumps(notes))
            except OSError as error:  # of the disk: what is wrong with the files is a UsageError already
                raise UsageError(
                    f"cannot write the records of {where} to {folder}: {first_line(error)}; make room, or set "
                    "HF_DATASETS_CACHE to another folder."
                ) from error
    notes = Counter(json.loads(said.read_text()))
    total = notes.pop("all")
    for note, count in sorted(notes.items()):
        rank_zero_info(f"{where}: {count:,} of {total:,} records {note}")
    # Its own fingerprint would depend on when the file was written.
    data = datasets.Dataset(MemoryMappedTable.from_file(str(path)), fingerprint=key)
    if not len(data):
        raise UsageError(
            f"{where} has no usable record left among {total}: each needs a prompt and a response, or a text."
        )
    return data


def _write(path: Path, rows: Iterator[Row | None], notes: Counter) -> None:
    schema, batch, characters = RECORD_FEATURES.arrow_schema, [], 0
    digests = bytearray()
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as stream:
        for row in rows:
            notes["all"] += 1
            if row is None:
                continue
            batch.append(row)
            digests += row_digest(row)
            characters += len(row["messages"]) + len(row["text"])
            if len(batch) == _ROWS or characters > _CHARACTERS:
                stream.write_batch(pa.RecordBatch.from_pylist(batch, schema))
                batch, characters = [], 0
        stream.write_batch(pa.RecordBatch.from_pylist(batch, schema))
    first = _firsts(digests)
    if not first.all():
        notes["dropped, there twice"] = int((~first).sum())
        _keep(path, first)


def firsts(data: datasets.Dataset) -> np.ndarray:
    """``[records]`` bool: whether no record before says the same."""
    return _firsts(b"".join(row_digests(data)))


def _firsts(digests: bytes | bytearray) -> np.ndarray:
    every = np.frombuffer(digests, "S16")
    first = np.zeros(len(every), bool)
    first[np.unique(every, return_index=True)[1]] = True
    return first


def _keep(path: Path, mask: np.ndarray) -> None:
    kept = path.with_name(path.name + ".kept")
    with pa.OSFile(str(path)) as written, pa.OSFile(str(kept), "wb") as file:
        batches = pa.ipc.open_stream(written)
        with pa.ipc.new_stream(file, batches.schema) as stream:
            for batch in batches:
                here, mask = mask[: batch.num_rows], mask[batch.num_rows :]
                stream.write_batch(batch.filter(pa.array(here)))
    kept.replace(path)
