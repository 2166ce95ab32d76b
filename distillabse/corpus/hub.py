"""Datasets of the Hugging Face hub, or local folders laid out like one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from distillabse.config import HubSource
from distillabse.corpus.records import Record, Rejected
from distillabse.corpus.rows import require_columns, to_record
from distillabse.errors import InputError


def read_hub(source: HubSource) -> Iterator[Record | Rejected]:
    """Read one split of one configuration of a dataset.

    Raises:
        InputError: the dataset, configuration, split or column does not exist, or the hub cannot be reached.
    """
    name = _name(source)
    wanted = [source.text, *([source.translation] if source.translation else [])]
    for number, row in enumerate(_rows(source, wanted), start=1):
        translation = (row[source.translation], source.translation_language) if source.translation else None
        yield to_record(name, number, row[source.text], source.language, translation)


def _name(source: HubSource) -> str:
    return f"{source.dataset}/{source.configuration}" if source.configuration else source.dataset


def _rows(source: HubSource, wanted: list[str]) -> Iterator[Mapping[str, object]]:
    """The rows as dicts; whatever goes wrong inside the `datasets` library becomes an InputError."""
    import datasets

    try:
        dataset = datasets.load_dataset(
            source.dataset,
            source.configuration,
            split=source.split,
            streaming=source.streaming,
            revision=source.revision,
        )
        if dataset.column_names:  # Unknown until the first row in some streamed formats.
            require_columns(_name(source), dataset.column_names, wanted)
            dataset = dataset.select_columns(wanted)
        for index, row in enumerate(dataset):
            if index == 0:
                require_columns(_name(source), row, wanted)
            yield row
    except InputError:
        raise
    except Exception as error:
        raise InputError(_explanation(source, error)) from error


def _explanation(source: HubSource, error: Exception) -> str:
    """What went wrong and what to do about it."""
    problem = f"The dataset {_name(source)!r} cannot be read ({type(error).__name__}: {error})."
    if "scripts are no longer supported" in str(error):
        return (
            f"{problem} It needs a loading script, and the `datasets` library no longer runs those. Set "
            "`revision: refs/convert/parquet` if the hub has converted it, or download it and use a local file source."
        )
    if isinstance(error, ValueError):
        configurations = _configurations(source)
        if configurations and source.configuration not in configurations:
            return (
                f"The dataset {source.dataset!r} has no configuration {source.configuration!r}. "
                f"Set one of: {', '.join(configurations)}."
            )
    return (
        f"{problem} Check the name, the split, the revision and the network. Without a network, use a local file "
        "source (kind: files), or set HF_HOME to a cache that holds the dataset and HF_HUB_OFFLINE=1."
    )


def _configurations(source: HubSource) -> list[str]:
    import datasets

    try:
        return sorted(datasets.get_dataset_config_names(source.dataset, revision=source.revision))
    except Exception:  # The explanation of another error must not fail itself.
        return []
