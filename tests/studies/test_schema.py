"""The JSON Schemas accept what the program accepts, and reject what a schema can reject."""

import importlib.util
import json

import jsonschema
import pytest
from helpers import ARCHITECTURES, ROOT, SPACES, STUDIES, TINY, run_cli, tiny_data

from searchspace.files import read_data, read_file
from studies.config import load_study
from studies.show.schema import LANGUAGES, json_schema

spec = importlib.util.spec_from_file_location("tables", ROOT / "tests/searchspace/test_errors.py")
tables = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tables)

VALIDATORS = {name: jsonschema.Draft202012Validator(json_schema(name)) for name in LANGUAGES}


def errors(language, data):
    return [f"{error.json_path}: {error.message[:100]}" for error in VALIDATORS[language].iter_errors(data)]


@pytest.mark.parametrize("language", LANGUAGES)
def test_they_are_schemas_and_up_to_date(language):
    jsonschema.Draft202012Validator.check_schema(json_schema(language))
    assert json.loads((ROOT / "docs/schema" / f"{language}.json").read_text()) == json_schema(language)
    assert json.loads(run_cli("schema", language)) == json_schema(language)


@pytest.mark.parametrize("file", ARCHITECTURES, ids=lambda p: p.stem)
def test_architectures_are_accepted(file):
    assert errors("architecture", read_file(file)) == errors("space", read_file(file)) == []
    assert errors("architecture", read_data(file)) == []


@pytest.mark.parametrize("file", [*SPACES, ROOT / "benchmarks/tabular/space.yaml"], ids=lambda p: p.stem)
def test_spaces_are_accepted(file):
    assert errors("space", read_file(file)) == []
    assert errors("architecture", read_data(file))  # its choices are open


@pytest.mark.parametrize("file", [*STUDIES, ROOT / "benchmarks/tabular/study.yaml"], ids=lambda p: p.stem)
def test_studies_are_accepted_as_written_and_as_kept(file):
    assert errors("study", read_file(file)) == []
    assert errors("study", load_study(file).plain) == []


# What needs more than one value to be seen as wrong.
MEANING = {
    "offset beyond chunk", "heads don't divide", "kv heads don't divide", "odd rotation", "missing layers", "dangling input",
    "unknown block", "unknown level", "unknown level in a schedule", "empty schedule", "join of one", "cycle", "two heads", "no head",
    "no embed", "10 kB name", "nan", "infinite option", "min over max", "log from zero", "log and step", "infinite bound",
    "unused var", "sequence length", "misspelt level in a sequence", "impossible constraints", "space not there", "both budgets",
    "no budget", "bad option inside", "no operation", "baseline not there", "no trials", "two sizes", "size of no width", "sizes out of order", "horizons out of order", "step below twelve digits", "step of no size",
}  # fmt: skip


@pytest.mark.parametrize(
    ("what", "over"), [row[:2] for row in tables.VALUES], ids=lambda v: v if isinstance(v, str) else ""
)
def test_broken_architectures_are_rejected(what, over):
    assert bool(errors("architecture", tiny_data(over))) == (what not in MEANING)


@pytest.mark.parametrize(
    ("what", "over"), [row[:2] for row in tables.SPACES], ids=lambda v: v if isinstance(v, str) else ""
)
def test_broken_spaces_are_rejected(what, over):
    seen = bool(errors("space", tiny_data(over)))
    assert seen == (what not in MEANING and not (what.startswith("constraint ") and what != "constraint not a list"))


@pytest.mark.parametrize(
    ("what", "study"), [row[:2] for row in tables.STUDIES], ids=lambda v: v if isinstance(v, str) else ""
)
def test_broken_studies_are_rejected(what, study):
    if what in MEANING:
        pytest.skip("a schema can't see it")
    assert errors("study", study), what


def test_the_plain_tiny_architecture_is_accepted():
    assert errors("architecture", TINY) == []
