"""Where rows come from. A table has named columns, reads one without touching the others, decodes nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from diffalign.errors import UserError, suggestion

JSONL_NAMES = ("pairs.jsonl", "metadata.jsonl")


class Table(Protocol):
    """Rows and named columns; image cells are as :func:`diffalign.data.images.load` takes them."""

    name: str  # how messages call the source
    root: Path  # where relative image paths start
    columns: list[str]
    broken: frozenset[int]  # rows that could not be parsed at all

    def __len__(self) -> int: ...

    def column(self, name: str) -> list[Any]:
        """All cells of one column, None where a row lacks it."""

    def cell(self, row: int, name: str) -> Any:
        """One cell."""

    def row_name(self, row: int) -> str:
        """What a row is called if it has no id of its own."""


class ListTable:
    """Columns held in memory."""

    def __init__(
        self,
        name: str,
        columns: Mapping[str, Sequence[Any]],
        *,
        root: Path = Path(),
        row_names: Sequence[str] | None = None,
        broken: frozenset[int] = frozenset(),
    ) -> None:
        self.name, self.root, self.broken = name, root, broken
        self.columns, self._columns = list(columns), columns
        self._row_names = row_names

    def __len__(self) -> int:
        return len(next(iter(self._columns.values()), ()))

    def column(self, name: str) -> list[Any]:
        return list(self._columns[name])

    def cell(self, row: int, name: str) -> Any:
        return self._columns[name][row]

    def row_name(self, row: int) -> str:
        return self._row_names[row] if self._row_names else f"row-{row}"


class HFTable:
    """A map-style ``datasets.Dataset``: columnar on disk, random access, images left encoded."""

    def __init__(self, name: str, dataset: Any) -> None:
        import datasets

        dataset = dataset.with_format(None)
        for column, feature in dataset.features.items():
            if isinstance(feature, datasets.Image):
                dataset = dataset.cast_column(column, datasets.Image(decode=False))
        self.name, self.root, self.broken = name, Path(), frozenset[int]()
        self.columns = list(dataset.column_names)
        self._dataset = dataset
        self._single = {column: dataset.select_columns([column]) for column in self.columns}

    def __len__(self) -> int:
        return len(self._dataset)

    def column(self, name: str) -> list[Any]:
        return self._single[name][:][name]

    def cell(self, row: int, name: str) -> Any:
        return self._single[name][row][name]

    def row_name(self, row: int) -> str:
        return f"row-{row}"


def open_table(source: Any, split: str | None) -> Table:
    """Find out what `source` is and open it.

    Raises:
        UserError: nothing there, nothing readable in it, or a split that it does not have.
    """
    if isinstance(source, str) and source.startswith("hf://"):
        return _from_hub(source.removeprefix("hf://").removeprefix("datasets/"), split)
    if isinstance(source, str | Path):
        return _from_path(Path(source).expanduser(), split)
    return _from_datasets("the data set", source, split)


def _from_path(path: Path, split: str | None) -> Table:
    if not path.exists():
        near = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(
            f"no pairs at {path}: there is no such file or folder{suggestion(path.name, near)} "
            "(for a data set on the Hub write hf://owner/name)"
        )
    if path.is_file():
        if split is not None:
            raise UserError(f"{path} is one file and has no splits; leave split={split!r} out")
        if path.suffix in (".jsonl", ".ndjson"):
            return _from_jsonl(path)
        if path.suffix in FILES:
            return FILES[path.suffix](path, [path])
        raise UserError(f"{path} is neither .jsonl nor {' nor '.join(FILES)}; give one of those or a folder")
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        import datasets

        return _from_datasets(str(path), datasets.load_from_disk(str(path)), split)
    folder = path / split if split is not None and (path / split).is_dir() else path
    for name in JSONL_NAMES:
        if (folder / name).is_file():
            if split is not None and folder == path:
                raise UserError(f"{path} has no split {split!r}: no folder {path / split}")
            return _from_jsonl(folder / name)
    return _from_shards(folder, None if folder != path else split)


def _from_shards(folder: Path, split: str | None) -> Table:
    for suffix in SHARDS:
        files = sorted([*folder.glob(f"*{suffix}"), *folder.glob(f"data/*{suffix}")])
        if files:
            break
    else:
        raise UserError(
            f"{folder} holds no pairs: expected {' or '.join(JSONL_NAMES)}, parquet files, tar shards, "
            "or a data set that datasets saved to disk"
        )
    splits = sorted({file.stem.split("-")[0] for file in files})  # train-00000-of-00012.parquet
    if split is None and len(splits) > 1 and "train" in splits:
        split = "train"
    if split is not None:
        if split not in splits:
            near = suggestion(split, splits)
            raise UserError(f"{folder} has no split {split!r}{near} (found: {', '.join(splits)})")
        files = [file for file in files if file.stem.split("-")[0] == split]
    return FILES[suffix](folder, files)


def _from_parquet(path: Path, files: list[Path]) -> Table:
    import datasets

    try:
        return HFTable(str(path), datasets.Dataset.from_parquet([str(file) for file in files]))
    except Exception as error:  # pyarrow and datasets wrap one another's errors; the first line says it
        reason = str(error.__cause__ or error).splitlines()[0]
        raise UserError(f"can't read the parquet of {path}: {reason}") from error


def _from_tar(path: Path, files: list[Path]) -> Table:
    from diffalign.data.tar import TarTable

    return TarTable(str(path), files)


def _from_json(path: Path, files: list[Path]) -> Table:
    """A file that holds one list of objects, as HPDv2 has it; images lie beside it, or in a folder of its
    name."""
    try:
        rows = json.loads(files[0].read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}); one object a line goes into a .jsonl file") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path} must hold a list of objects, one for each row")
    beside = path.with_suffix("")
    return _from_rows(str(path), rows, root=beside if beside.is_dir() else path.parent)


SHARDS = (".parquet", ".tar")
FILES = {".parquet": _from_parquet, ".tar": _from_tar, ".json": _from_json}


def _from_datasets(name: str, dataset: Any, split: str | None) -> Table:
    import datasets

    if isinstance(dataset, datasets.IterableDatasetDict | datasets.IterableDataset):
        raise UserError(f"{name} is streamed, pairs need random access: load it without streaming=True")
    if isinstance(dataset, datasets.DatasetDict):
        splits = list(dataset)
        chosen = split or ("train" if "train" in splits else splits[0] if len(splits) == 1 else None)
        if chosen not in splits:
            wanted = (
                f"has no split {chosen!r}{suggestion(chosen, splits)}" if chosen else "has several splits"
            )
            raise UserError(f"{name} {wanted}; choose one of {', '.join(splits)}")
        dataset, split = dataset[chosen], None
    if not isinstance(dataset, datasets.Dataset):
        raise UserError(
            f"pairs can't come from a {type(dataset).__name__}: give a path, a datasets.Dataset, "
            "or lists to PairDataset.from_lists"
        )
    if split is not None:
        raise UserError(f"{name} is a single data set without splits; leave split={split!r} out")
    return HFTable(name, dataset)


def _from_hub(name: str, split: str | None) -> Table:
    import datasets

    try:
        dataset = datasets.load_dataset(name, split=split)
    except Exception as error:  # network, access, unknown name: the library's first line says which
        raise UserError(f"can't load {name} from the Hub: {str(error).splitlines()[0]}") from error
    return _from_datasets(f"hf://{name}", dataset, None)


def _from_jsonl(path: Path) -> Table:
    """One JSON object a line. Lines that are none become empty rows in `broken`, so that they get counted."""
    rows: list[dict[str, Any]] = []
    row_names, broken = [], set()
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError:
                    row = None
                if not isinstance(row, dict):
                    broken.add(len(rows))
                    row = {}
                rows.append(row)
                row_names.append(f"line-{number}")
    return _from_rows(str(path), rows, root=path.parent, row_names=row_names, broken=frozenset(broken))


def _from_rows(name: str, rows: list[dict[str, Any]], **rest: Any) -> Table:
    names = list(dict.fromkeys(column for row in rows for column in row))
    return ListTable(name, {column: [row.get(column) for row in rows] for column in names}, **rest)
