"""Reads prompts: text files with one in each line, rows with metadata (.jsonl, .json, .csv, .tsv), and datasets."""

import csv
import io
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from alignprop.settings.errors import ConfigError

COLUMNS = ("prompt", "prompts", "text", "caption")  # the allowed names of the column with the prompts, in any case
WEIGHT = "weight"  # the name of the column that says how often a prompt is drawn
NEGATIVE = "negative_prompt"  # the name of the column with negative prompts
TARGET = "target"  # the name of the column with paths of pictures, for rewards that compare with them
Rows = list[tuple[str, dict[str, Any]]]
"""Prompts with their metadata."""


def read_prompt_file(path: Path) -> Rows:
    """Reads the prompts of a file, with their metadata.

    The prompt of a row is in the first of COLUMNS that the row has. Its metadata are the other columns. If the column
    "metadata" holds an object, the entries of this object are metadata as well. A "target" that is the path of a file,
    seen from the folder of the prompts, becomes that file's path from anywhere.

    Raises:
        ConfigError: the file cannot be read, is not UTF-8, holds no prompt, or has a line or an entry without a prompt.
    """
    suffix = path.suffix.lower()
    if suffix in UNREAD:
        raise ConfigError(f"{path}: {suffix} files are not read; {', '.join(READERS)} and text files are")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise ConfigError(f"cannot read {path} ({error.strerror})") from None
    try:
        rows = READERS.get(suffix, _text)(text)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not rows:
        raise ConfigError(f"{path} holds no prompt; write one per line")
    for _, metadata in rows:
        target = metadata.get(TARGET)
        if isinstance(target, str) and target and (path.parent / target).is_file():
            metadata[TARGET] = str((path.parent / target).absolute())
    return rows


def read_dataset(name: str) -> Rows:
    """Reads the columns of text and numbers of a dataset, by the package ``datasets``; name is "NAME" or "NAME:SPLIT".

    Raises:
        ConfigError: the package is not installed, there is no such dataset, or a row has no prompt.
    """
    try:
        import datasets
    except ModuleNotFoundError:
        raise ConfigError("this needs the package datasets: pip install datasets") from None
    path, _, split = name.partition(":")
    if not path.strip():
        raise ConfigError("the name of the dataset is missing")
    path = os.path.expanduser(path)
    try:
        options = datasets.DownloadConfig(local_files_only=os.path.isdir(path) or not _is_on_hub(path))
        table = datasets.load_dataset(path, split=split or "train", download_config=options)
    except Exception as error:  # of the package, of the hub's client or of its HTTP library
        raise ConfigError(f"it cannot be loaded ({type(error).__name__}: {' '.join(str(error).split())})") from None
    plain = [column for column, kind in table.features.items() if isinstance(kind, datasets.Value)]
    return read_rows(table.select_columns(plain), "row")


def _is_on_hub(name: str) -> bool:
    """Says whether the hub answers and has this dataset. It is asked once, because the package would try for long."""
    from huggingface_hub import HfApi

    try:
        HfApi().dataset_info(name, timeout=10)
    except Exception:  # the hub's client also lets the exceptions of its HTTP library through
        return False
    return True


def read_rows(entries: Iterable[Any], place: str) -> Rows:
    """Returns the prompts and metadata of entries, of which each is a text or a mapping with a prompt.

    Raises:
        ConfigError: there is no entry, or one has no prompt. The message counts entries from 1, as `place` number.
    """
    try:
        rows = [_row(entry, f"{place} {number}") for number, entry in enumerate(entries, start=1)]
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if not rows:
        raise ConfigError(f"it has no {place}")
    return rows


def read_weights(prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> tuple[float, ...] | None:
    """Returns the numbers of the column "weight", 1 for rows that have none; None if no row has one.

    Raises:
        ConfigError: a weight, or their sum, is not a finite number of at least 0, or all are 0.
    """
    if not any(WEIGHT in row for row in metadata):
        return None
    weights = []
    for prompt, row in zip(prompts, metadata, strict=True):
        given = row.get(WEIGHT)
        try:
            weights.append(1.0 if given is None else float(given))
        except (TypeError, ValueError, OverflowError):
            weights.append(math.nan)
        if not 0 <= weights[-1] < math.inf:
            raise ConfigError(f"{WEIGHT} = {row[WEIGHT]!r} of {prompt!r} must be a finite number of at least 0")
    if not any(weights):
        raise ConfigError(f"all prompts have {WEIGHT} = 0, so none can be drawn")
    if sum(weights) == math.inf:
        raise ConfigError(f"the sum of the column {WEIGHT} must be a finite number")
    return tuple(weights)


# The readers below raise a ValueError that names the place of the mistake.


def _text(text: str) -> Rows:
    """Reads one prompt in each line. Blank lines are skipped, and `#` has no special meaning."""
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    for number, line in lines:
        if "\t" in line:
            raise ValueError(f"line {number} holds a tab, as tables do; a table is read from a .tsv file")
        if line[0] == "{" and _is_json(line):
            raise ValueError(f"line {number} is a JSON object; JSON lines are read from a .jsonl file")
    return [(line, {}) for _, line in lines]


def _json_lines(text: str) -> Rows:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} is not JSON ({error.msg})") from None
            rows.append(_row(entry, f"line {number}"))
    return rows


def _json(text: str) -> Rows:
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno} is not JSON ({error.msg})") from None
    if not isinstance(entries, list):
        raise ValueError(f"it holds one {type(entries).__name__}, not a list of prompts")
    return [_row(entry, f"entry {number}") for number, entry in enumerate(entries, start=1)]


def _table(delimiter: str, text: str) -> Rows:
    """Reads a table with a header. A cell in quotes may hold the delimiter and line breaks."""
    lines = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True)
    rows: Rows = []
    header: list[str] = []
    try:
        for cells in lines:
            place = f"line {lines.line_num}"
            if not any(cell.strip() for cell in cells):
                continue
            if not header:
                header = _columns([cell.strip() for cell in cells])
                if double := [name for name in header if name and header.count(name) > 1]:
                    raise ValueError(f"{place} is the header and names the column {double[0]!r} twice")
                if _prompt_column(header) is None:
                    raise ValueError(
                        f"{place} is the header and has none of the columns {', '.join(COLUMNS)}; it has {header}"
                    )
                continue
            if len(cells) != len(header):
                raise ValueError(f"{place} has {len(cells)} columns, the header {len(header)}")
            entry = dict(zip(header, cells, strict=True))
            for name in (WEIGHT, NEGATIVE):  # an empty cell says nothing
                if not entry.get(name, "x").strip():
                    del entry[name]
            rows.append(_row(entry, place))
    except csv.Error as error:
        raise ValueError(f"line {lines.line_num}: {error}") from None
    return rows


def _row(entry: Any, place: str) -> tuple[str, dict[str, Any]]:
    if isinstance(entry, str):
        entry = {"prompt": entry}
    if not isinstance(entry, dict):
        raise ValueError(f"{place} is a {type(entry).__name__}, not an object with a prompt, nor a text")
    entry = dict(zip(_columns(entry), entry.values(), strict=True))
    name = _prompt_column(entry)
    if name is None:
        raise ValueError(f"{place} has no {' or '.join(COLUMNS)}, but {', '.join(entry) or 'nothing'}")
    if not isinstance(entry[name], str) or not entry[name].strip():
        raise ValueError(f"{place}: {name} = {entry[name]!r} is not a text with something in it")
    nested = entry.get("metadata")
    metadata = {key: value for key, value in entry.items() if key != name}
    if isinstance(nested, dict):
        del metadata["metadata"]
        metadata |= nested
    return entry[name].strip(), metadata


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except json.JSONDecodeError:
        return False
    return True


READERS: dict[str, Callable[[str], Rows]] = {
    ".jsonl": _json_lines, ".json": _json, ".csv": partial(_table, ","), ".tsv": partial(_table, "\t"),
}  # fmt: skip
UNREAD = (".yaml", ".yml", ".toml", ".xml", ".parquet", ".arrow", ".xlsx")


def _columns(names: Iterable[str]) -> list[str]:
    """Returns the names, with those of WEIGHT and NEGATIVE in lower case, unless there are several of these."""
    names = list(names)
    lower = [name.lower() for name in names]
    return [
        own if own in (WEIGHT, NEGATIVE) and lower.count(own) == 1 else name
        for name, own in zip(names, lower, strict=True)
    ]


def _prompt_column(names: Iterable[str]) -> str | None:
    """Returns the name of the column with the prompts as it is written, or None if there is none."""
    written = {name.lower(): name for name in reversed(list(names))}  # of two that differ in case, the first counts
    return next((written[name] for name in COLUMNS if name in written), None)
