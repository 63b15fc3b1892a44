"""The closed table of tasks and of the data sources that each takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, cast, get_args

from builder.pricing.cost import COSTS
from searchspace.arch import ArchSpec
from searchspace.errors import SpecError, one_of, show
from searchspace.nodes import HeadNode
from searchspace.plain import dataclass_decoder, expect_mapping, join_path
from searchspace.plugins import HINT, names, provided
from searchspace.tables import TableError, complete, table
from studies.data.corpus import Corpus, look_at_text, prepare_corpus
from studies.data.dataset import (
    ADDED_METRICS,
    AddedMetric,
    DataFacts,
    Dataset,
    Examination,
    Metric,
    added_metrics,
    read_facts,
)
from studies.data.settings import DataConfig, TextData, TextKind
from studies.tasks import nested_logic, prefix_sums, rated, synthetic
from studies.tasks.chess_puzzles import Chess, ChessData
from studies.tasks.custom import CustomData, CustomDataset, facts_of_custom, prepare_custom
from studies.tasks.nested_logic import NestedLogic, NestedLogicData, prepare_nested_logic
from studies.tasks.prefix_sums import PrefixSums, PrefixSumsData, prepare_prefix_sums
from studies.tasks.reach import Mazes, ReachData, examine, facts_of, prepare_mazes
from studies.tasks.sudoku import Sudoku, SudokuData
from studies.tasks.synthetic import Synthetic, SyntheticData, prepare_synthetic


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
    examine: Callable[[Any, Any, int, Mapping[int, Any]], Examination] | None
    """(model, settings, most tokens, the model by numbers of iterations) -> how it does on examples made anew; None:
    somebody must give some."""
    look: Callable[..., DataFacts]
    """(settings, base, prepare=) -> what its data are, with nothing left behind."""

    def __post_init__(self) -> None:
        kind = next(field.default for field in fields(self.config) if field.name == "kind")
        if kind not in self.kinds:
            raise TableError(f"Task '{self.name}': {self.config.__name__} is of kind {kind!r}, none of {self.kinds}")

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """The first is the headline; a plugin's come last."""
        return {**self.dataset.metrics, **{row.name: row for row in added_metrics(self.name)}}

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
            "prefix_sums",
            "says of every prefix of a row of bits whether its sum is odd",
            causal=None,
            kinds=("prefix_sums",),
            config=PrefixSumsData,
            dataset=PrefixSums,
            prepare=prepare_prefix_sums,
            examine=prefix_sums.examine,
            look=lambda config, base, prepare: prefix_sums.facts_of(config),
        ),
        Task(
            "nested_logic",
            "tells the value of a nested expression",
            causal=None,
            kinds=("nested_logic",),
            config=NestedLogicData,
            dataset=NestedLogic,
            prepare=prepare_nested_logic,
            examine=nested_logic.examine,
            look=lambda config, base, prepare: nested_logic.facts_of(config),
        ),
        Task(
            "sudoku",
            "fills a sudoku board",
            causal=False,
            kinds=("sudoku",),
            config=SudokuData,
            dataset=Sudoku,
            prepare=partial(rated.prepare_rated, Sudoku),
            examine=partial(rated.examine, Sudoku),
            look=lambda config, base, prepare: rated.facts_of(config, base),
        ),
        Task(
            "chess",
            "finds the move that solves a chess puzzle",
            causal=False,
            kinds=("chess",),
            config=ChessData,
            dataset=Chess,
            prepare=partial(rated.prepare_rated, Chess),
            examine=partial(rated.examine, Chess),
            look=lambda config, base, prepare: rated.facts_of(config, base),
        ),
        Task(
            "synthetic",
            "answers in rows of a synthetic task",
            causal=True,
            kinds=("synthetic",),
            config=SyntheticData,
            dataset=Synthetic,
            prepare=prepare_synthetic,
            examine=synthetic.examine,
            look=lambda config, base, prepare: synthetic.facts_of(config),
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
    places=lambda task: [f"task:{kind}" for kind in dict.fromkeys((task.name, *task.kinds))],
)


def _kind_taken(task: Task) -> str:
    taken = [kind for kind in task.kinds if kind in sources()]
    return f"data of the kind '{taken[0]}' are the task {sources()[taken[0]].name}'s" if taken else ""


def _metric_taken(metric: AddedMetric) -> str:
    task = TASKS.get(metric.task)
    taken = metric.name in COSTS or metric.name == "loss" or (task is not None and metric.name in task.dataset.metrics)
    return f"a metric '{metric.name}' is built in" if taken else ""


TASKS.refuses = _kind_taken
ADDED_METRICS.refuses = _metric_taken


def task_named(name: object) -> Task | None:
    """A task, a plugin's too."""
    return TASKS[name] if isinstance(name, str) and (name in TASKS or provided("task", name)) else None


def sources() -> dict[str, Task]:
    """The task of each kind of data."""
    return {kind: task for task in TASKS.values() for kind in task.kinds}


def decode_data(data: object, path: str) -> DataConfig:
    """The ``data:`` of a study: its ``kind`` tells which settings it takes. Raises `SpecError`."""
    mapping = expect_mapping(data, path, "a mapping such as {kind: text, path: FILE}")
    kind = mapping.get("kind", "python_source")
    task = sources().get(kind) if isinstance(kind, str) else None
    if task is None and provided("task", kind):
        task = sources().get(cast(str, kind))
    if task is None:
        known = dict.fromkeys((*sources(), *names("task")))
        raise SpecError(join_path(path, "kind"), f"unknown value {show(kind)}", one_of(known, kind) + HINT)
    config: DataConfig = dataclass_decoder(cast(Any, task.config))(mapping, path)
    return config


def task_of(data: DataConfig) -> Task:
    """What is learned of these data."""
    return sources()[data.kind]


def open_data(folder: str | Path) -> Dataset:
    """The prepared data of a folder. Raises `SpecError`."""
    facts = read_facts(Path(folder))
    if (task := task_named(facts.task)) is None:
        raise SpecError("task", f"unknown value {show(facts.task)}", one_of(TASKS, facts.task) + HINT, file=str(folder))
    return task.dataset(folder)


def prepare_data(data: DataConfig, folder: Path, base: Path = Path()) -> Dataset:
    """Write the data of these settings under ``folder``, once; from then on they are the data."""
    return task_of(data).prepare(data, folder, base)


def tell(task: object, metrics: Mapping[str, object]) -> str:
    """Metrics of a task in words; empty if they are none."""
    known = found.metrics if (found := task_named(task)) is not None else {}
    told = [(m.words, metrics.get(name)) for name, m in known.items()]
    return "; ".join(f"{words}: {value:.4f}" for words, value in told if isinstance(value, int | float))


def _answers_once(node: object) -> bool:
    return isinstance(node, HeadNode) and node.head == "sequence"


def check_fit(arch: ArchSpec, facts: DataFacts) -> None:
    """Raise `SpecError` unless ``arch`` can be trained on data with these facts."""
    task = task_named(facts.task)
    if task is None:
        raise SpecError("data", f"is of the task {show(facts.task)}", one_of(TASKS, facts.task))
    if task.causal and not arch.causal:
        raise SpecError("causal", "a model that sees its whole input sees what it is to predict", "set causal: true")
    if task.causal is False and arch.causal:
        what = f"a model that {task.words} must see its whole input"
        raise SpecError("causal", what, "set causal: false")
    if task.causal is False and (name := next((n for n, node in arch.graph.items() if _answers_once(node)), "")):
        what = f"answers once for all positions, and a model that {task.words} answers at each"
        raise SpecError(f"graph.{name}.head", what, "set head: lm")
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
