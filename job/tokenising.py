"""Rendering many rows, in several processes where there are many: the one part of a check that takes long.

The workers know transformers' tokenizers and never torch: that would be seconds and hundreds of megabytes for each.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

from job.contract.errors import ModelInvalid
from job.dataset.bounds import bounds_of
from job.dataset.control import read_object, stop_tokens
from job.dataset.reader import Row
from job.dataset.refused import RowRefused
from job.dataset.render import RenderedRow, Renderer
from job.dataset.workers import cores, worker_pool

ALONE_BYTES: Final = 4_000_000
"""Of a file that one process renders sooner than others have started: a start takes a second or two, and one process
renders some megabytes in that time."""
MOST_PROCESSES: Final = 8
"""Each takes some 150 MB."""
ROWS_AT_ONCE: Final = 64

T = TypeVar("T")


class Refusal(NamedTuple):
    """Why a row cannot be trained."""

    line: int
    code: str
    message: str
    hint: str


class Measured(NamedTuple):
    """A rendered row without its tokens.

    Args:
        whole, kept: tokens before and after cutting.
        trained: of those that are kept.
        digest: of all of them, and of their labels.
        warnings: code, message and hint of each.
    """

    line: int
    whole: int
    kept: int
    trained: int
    digest: bytes
    warnings: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Rendering:
    """How rows are rendered; every process opens its own.

    Args:
        folder: of the base model's configuration and tokenizer.
    """

    folder: Path
    max_length: int

    def open(self) -> Renderer:
        """Raises ModelInvalid: model or tokenizer cannot be loaded, or the template cannot be trained with."""
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # the library raises whatever a strange file leads it to
            said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise ModelInvalid(
                f"the base model's tokenizer cannot be loaded: {said}", hint="check its tokenizer.json"
            ) from error
        _refuse_other_models(self.folder)
        stops = stop_tokens(self.folder, tokenizer)
        return Renderer(tokenizer, max_length=self.max_length, stops=stops, bounds=bounds_of(self.folder))


def _refuse_other_models(folder: Path) -> None:
    """Raises ModelInvalid: AutoModelForCausalLM does not know this type, and would say so when its weights are here."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = read_object(folder / "config.json").get("model_type")
    if isinstance(kind, str) and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ModelInvalid(
            f"the base model is of the type {kind!r}, and transformers has no language model of that type",
            hint="name a model for text alone; those that bring code of their own are not loaded",
        )


def without_torch() -> None:
    """Let transformers believe that torch is not installed, in this process, if it is not loaded already."""
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]  # what the import system documents for "not there"
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # which would say so for each process
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def processes_for(size: int) -> int:
    """How many processes should render a file of so many bytes."""
    if size < ALONE_BYTES:
        return 1
    return min(cores(), MOST_PROCESSES)


def render_rows(rows: Iterable[Row], rendering: Rendering, *, processes: int) -> Iterator[RenderedRow | Refusal]:
    """Each row with its tokens, or why it has none; in the order of the rows.

    Raises:
        ModelInvalid: none can be rendered.
    """
    return _each(rows, _rendered, rendering, processes)


def measure_rows(rows: Iterable[Row], rendering: Rendering, *, processes: int) -> Iterator[Measured | Refusal]:
    """The same without the tokens: a hundred bytes a row.

    Raises:
        ModelInvalid: none can be rendered.
    """
    return _each(rows, _measured, rendering, processes)


Chunk = Callable[[Rendering, list[Row]], list[T]]


def _each(rows: Iterable[Row], work: Chunk[T], rendering: Rendering, processes: int) -> Iterator[T]:
    rows = iter(rows)
    chunks = iter(lambda: list(islice(rows, ROWS_AT_ONCE)), [])
    if processes == 1:
        for chunk in chunks:
            yield from work(rendering, chunk)
        return
    pool = worker_pool(processes, without_torch)
    try:
        waiting: deque[Future[list[T]]] = deque()
        for chunk in chunks:
            waiting.append(pool.submit(work, rendering, chunk))
            if len(waiting) > 4 * processes:  # so that a file is never held whole
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


@cache
def _opened(rendering: Rendering) -> Renderer:
    return rendering.open()


def _rendered(rendering: Rendering, rows: list[Row]) -> list[RenderedRow | Refusal]:
    renderer = _opened(rendering)
    return [_render(renderer, row) for row in rows]


def _measured(rendering: Rendering, rows: list[Row]) -> list[Measured | Refusal]:
    renderer = _opened(rendering)
    found = (_render(renderer, row) for row in rows)
    return [each if isinstance(each, Refusal) else _measure(renderer, each) for each in found]


def _render(renderer: Renderer, row: Row) -> RenderedRow | Refusal:
    try:
        return renderer.render(row)
    except RowRefused as error:
        return Refusal(row.line, error.code, error.message, error.hint)
    except Exception as error:  # of a library: without the line nobody would find out why
        raise RuntimeError(f"line {row.line} cannot be rendered: {type(error).__name__}: {error}") from error


def _measure(renderer: Renderer, row: RenderedRow) -> Measured:
    warnings = tuple(renderer.warnings_of(row))
    return Measured(row.line, row.whole, len(row.ids), row.trained_tokens, row.digest, warnings)
