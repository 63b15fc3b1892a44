"""The closed table of tasks and of the data sources that each takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast, get_args

from searchspace.arch import ArchSpec
from searchspace.errors import SpecError, one_of, show
from searchspace.plain import dataclass_decoder, expect_mapping, join_path
from searchspace.tables import TableError, complete, table
from studies.data.corpus import Corpus, look_at_text, prepare_corpus
from studies.data.dataset import DataFacts, Dataset, Examination, Metric, read_facts
from studies.data.settings import DataConfig, TextData, TextKind
from studies.tasks.custom import CustomData, CustomDataset, facts_of_custom, prepare_custom
from studies.tasks.reach import Mazes, ReachData, examine, facts_of, prepare_mazes


@complete
@dataclass(frozen=True, slots=True)
class Task:
    """What is learned, and of which data."""

    name: str
    words: str
    """What a model learns to do."""
    causal: bool | None
    """Whether a model may see only the past, else it sees its whole input; None: either."""
    kinds: tuple[str, ...]
    """Of sources."""
    config: type[DataConfig]
    """Settings of its sources."""
    dataset: type[Dataset]
    prepare: Callable[[Any, Path, Path], Dataset]
    """(settings, folder, base) -> its data, written once under the folder."""
    examine: Callable[[Any, Any, int], Examination] | None
    """(model, settings, most tokens) -> how it does on examples made anew; None: somebody must give some."""
    look: Callable[..., DataFacts]
    """(settings, base, prepare=) -> what its data are, with nothing left behind."""

    def __post_init__(self) -> None:
        kind = next(field.default for field in fields(self.config) if field.name == "kind")
        if kind not in self.kinds:
            raise TableError(f"Task '{self.name}': {self.config.__name__} is of kind {kind!r}, none of {self.kinds}")

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """The first is the headline."""
        return self.dataset.metrics

    @property
    def headline(self) -> Metric:
        return next(iter(self.metrics.values()))


TASKS = table(
    "a task",
    (
        Task(
            "text_lm",
            "predicts the next token of a text",
            causal=True,
            kinds=get_args(TextKind),
            config=TextData,
            dataset=Corpus,
            prepare=prepare_corpus,
            examine=None,
            look=look_at_text,
        ),
        Task(
            "reach",
            "says which cells of a maze a way leads to",
            causal=False,
            kinds=("reach",),
            config=ReachData,
            dataset=Mazes,
            prepare=prepare_mazes,
            examine=examine,
            look=lambda config, base, prepare: facts_of(config),
        ),
        Task(
            "custom",
            "learns what an object handed over from Python asks for",
            causal=None,
            kinds=("custom",),
            config=CustomData,
            dataset=CustomDataset,
            prepare=prepare_custom,
            examine=None,
            look=lambda config, base, prepare: facts_of_custom(config),
        ),
    ),
)
SOURCES: dict[str, Task] = {kind: task for task in TASKS.values() for kind in task.kinds}


def decode_data(data: object, path: str) -> DataConfig:
    """The ``data:`` of a study: its ``kind`` tells which settings it takes. Raises `SpecError`."""
    mapping = expect_mapping(data, path, "a mapping such as {kind: text, path: FILE}")
    kind = mapping.get("kind", "python_source")
    if not isinstance(kind, str) or kind not in SOURCES:
        raise SpecError(join_path(path, "kind"), f"unknown value {show(kind)}", one_of(SOURCES, kind))
    config: DataConfig = dataclass_decoder(cast(Any, SOURCES[kind].config))(mapping, path)
    return config


def task_of(data: DataConfig) -> Task:
    """What is learned of these data."""
    return SOURCES[data.kind]


def open_data(folder: str | Path) -> Dataset:
    """The prepared data of a folder. Raises `SpecError`."""
    facts = read_facts(Path(folder))
    if facts.task not in TASKS:
        raise SpecError("task", f"unknown value {show(facts.task)}", one_of(TASKS, facts.task), file=str(folder))
    return TASKS[facts.task].dataset(folder)


def prepare_data(data: DataConfig, folder: Path, base: Path = Path()) -> Dataset:
    """Write the data of these settings under ``folder``, once; from then on they are the data."""
    return task_of(data).prepare(data, folder, base)


def tell(task: object, metrics: Mapping[str, object]) -> str:
    """Metrics of a task in words; empty if they are none."""
    known = TASKS[task].metrics if isinstance(task, str) and task in TASKS else {}
    told = [(m.words, metrics.get(name)) for name, m in known.items()]
    return "; ".join(f"{words}: {value:.4f}" for words, value in told if isinstance(value, int | float))


def check_fit(arch: ArchSpec, facts: DataFacts) -> None:
    """Raise `SpecError` unless ``arch`` can be trained on data with these facts."""
    task = TASKS.get(facts.task)
    if task is None:
        raise SpecError("data", f"is of the task {show(facts.task)}", one_of(TASKS, facts.task))
    if task.causal and not arch.causal:
        raise SpecError("causal", "a model that sees its whole input sees what it is to predict", "set causal: true")
    if task.causal is False and arch.causal:
        what = f"a model that {task.words} must see its whole input"
        raise SpecError("causal", what, "set causal: false")
    if facts.vocab_size > arch.vocab_size:
        raise SpecError(
            "vocab_size",
            f"{arch.vocab_size} is too small for data with {facts.vocab_size} tokens",
            f"use {facts.vocab_size} or more",
        )
    if facts.positions and facts.positions != arch.seq_len:
        what = f"{arch.seq_len} is not the length of an example, {facts.positions}"
        raise SpecError("seq_len", what, f"use {facts.positions}")
    if task.name != "custom" and min(facts.train_tokens, facts.val_tokens) <= arch.seq_len:
        raise SpecError(
            "data",
            f"has {facts.train_tokens} training and {facts.val_tokens} held-out tokens, less than one sequence",
            "give more text, or lower seq_len",
        )
