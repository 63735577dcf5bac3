"""
Hash training data, to detect that it changed between two runs. Nothing here is a collective.

The hash covers the annotations (ids, sizes, objects, sentences) in the order of the rows, and not the paths of images
or caches: the same data, built again on another machine, has the same fingerprint. Pixels are not read.
"""

import hashlib
import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_scripts import FEATURES


COLUMNS = ("image_id", "width", "height", "objects", "sentences")
BATCH_ROWS = 10_000
LENGTH = 16  # hexadecimal digits


class Fingerprint:
    """
    Hash and count rows, in any number of parts.

    Example:

    ```python
    >>> import pyarrow as pa
    >>> from training_reftr.fingerprint import Fingerprint

    >>> rows = [{"image_id": name, "width": 4, "height": 3, "objects": [], "sentences": []} for name in "ab"]
    >>> together, apart = Fingerprint(), Fingerprint()
    >>> together.add(pa.Table.from_pylist(rows))
    >>> apart.add(pa.Table.from_pylist(rows[:1]))
    >>> together.hexdigest() == apart.hexdigest()
    False
    >>> apart.add(pa.Table.from_pylist(rows[1:]))
    >>> together.hexdigest() == apart.hexdigest(), apart.num_rows
    (True, 2)

    ```"""

    def __init__(self) -> None:
        self.num_rows = 0
        self._digests = defaultdict(hashlib.blake2b)  # by column, nested columns included

    def add(self, table: pa.Table) -> None:
        """Add the rows of a table that has `COLUMNS`."""
        self.num_rows += len(table)
        for name in COLUMNS:
            for chunk in table[name].chunks:
                self._add_values(name, chunk)

    def _add_values(self, name: str, array: pa.Array) -> None:
        """Add an array by its values: its buffers may be larger, and hold anything where it is null."""
        self._add_numbers(f"{name} is null", array.is_null())
        if pa.types.is_struct(array.type):
            for field, values in zip(array.type, array.flatten(), strict=True):
                self._add_values(f"{name}.{field.name}", values)
        elif pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
            self._add_numbers(f"{name} length", pc.list_value_length(array).fill_null(0).cast(pa.int64()))
            self._add_values(f"{name}[]", array.flatten())
        elif pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
            array = array.fill_null("").cast(pa.large_string())
            self._add_numbers(f"{name} length", pc.binary_length(array))
            if len(array):
                _, offsets, text = array.buffers()
                offsets = np.frombuffer(offsets, np.int64)[array.offset :]
                self._digests[name].update(memoryview(text)[offsets[0] : offsets[len(array)]] if text else b"")
        elif not pa.types.is_null(array.type):
            self._add_numbers(f"{name} {array.type}", array.fill_null(pa.scalar(0).cast(array.type)))

    def _add_numbers(self, name: str, array: pa.Array) -> None:
        """Add an array of numbers, none of them null."""
        self._digests[name].update(np.ascontiguousarray(array.to_numpy(zero_copy_only=False)))

    def hexdigest(self) -> str:
        """Return the hash of all rows."""
        parts = "".join(f"{name} {digest.hexdigest()}\n" for name, digest in sorted(self._digests.items()))
        return hashlib.blake2b(parts.encode()).hexdigest()[:LENGTH]


def tables_of(rows: Iterable[dict], features: datasets.Features = FEATURES) -> Iterator[pa.Table]:
    """Yield the annotations of streamed rows as tables of `BATCH_ROWS`."""
    # without a schema, types would depend on which values are absent
    schema = datasets.Features({name: features[name] for name in COLUMNS}).arrow_schema
    examples = iter(rows)
    while batch := list(itertools.islice(examples, BATCH_ROWS)):
        yield pa.Table.from_pylist(batch, schema=schema)


def fingerprint_of(rows: datasets.Dataset | datasets.IterableDataset) -> Fingerprint:
    """Return the fingerprint of all rows of a dataset; no image is read."""
    columns = rows.select_columns([*COLUMNS])
    if isinstance(rows, datasets.Dataset):
        tables = columns.with_format("arrow").iter(BATCH_ROWS)
    else:
        tables = tables_of(columns, rows.features or FEATURES)
    fingerprint = Fingerprint()
    for table in tables:
        fingerprint.add(table)
    return fingerprint
