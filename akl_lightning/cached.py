"""What is worked out once, and found by later runs in the cache of ``datasets``, by a name of all it depends on."""

import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from akl_lightning.checkpoint import check_writable

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa


def key_of(depends_on: Any, code: Iterable[Any]) -> str:
    """The name of what is made.

    Args:
        depends_on: whatever it depends on, for JSON.
        code: modules, classes and functions that make it.
    """
    return hashlib.sha256(json.dumps([depends_on, [inspect.getsource(part) for part in code]]).encode()).hexdigest()


def cache_folder(below: str = "") -> Path | None:
    """Where it lies, which can be written to; None where ``datasets`` is to cache nothing.

    Raises:
        UsageError: the folder cannot be written to.
    """
    import datasets

    if not datasets.is_caching_enabled():
        return None
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "akl_lightning" / below
    check_writable(folder)
    return folder


def map_tables(
    rows: "datasets.Dataset",
    function: "Callable[..., pa.Table]",
    settings: dict[str, Any],
    key: str,
    features: "datasets.Features",
    num_proc: int,
    desc: str,
    batch_size: int = 1000,
    found_again: bool = True,
) -> "datasets.Dataset":
    """Other rows made of rows, some at a time, in other processes where there are many.

    Args:
        rows: what they are made of.
        function: makes a table of ``features`` of a table.
        settings: what it takes besides.
        key: of :func:`key_of`.
        features: of the rows that are made.
        num_proc: processes at most; each wants a batch of its own.
        desc: what the progress bar says.
        batch_size: how many rows at a time.
        found_again: whether the key tells all that they depend on.
    """
    folder = cache_folder() if found_again else None
    return (
        rows.with_format("arrow")
        .map(
            function,
            batched=True,
            batch_size=batch_size,
            fn_kwargs=settings,
            num_proc=min(num_proc, len(rows) // 1000) or None,
            cache_file_name=None if folder is None else str(folder / f"{key}.arrow"),
            new_fingerprint=key[:32],
            features=features,
            desc=desc,
        )
        .with_format(None)
    )


def content_of(records: "datasets.Dataset", columns: Sequence[str]) -> tuple[str, int]:
    """A digest of what some columns hold, and how many bytes that is; no more than some rows of it lie in memory."""
    digest, size = hashlib.sha256(), 0
    for table in records.select_columns(list(columns)).with_format("arrow").iter(256):
        for batch in table.replace_schema_metadata(None).combine_chunks().to_batches():
            written = batch.serialize()
            digest.update(written)
            size += written.size
    return digest.hexdigest(), size
