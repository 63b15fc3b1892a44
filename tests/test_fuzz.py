"""Whatever stands in a file, an override or a budget: a valid object or one `SpecError`, soon and without effects.

`make fuzz` looks at 10,000 examples, the default tests at a few hundred (the profiles in conftest.py).
"""

import copy
from functools import reduce
from operator import getitem

import pytest
from bounded import bounded
from helpers import ARCHITECTURES, ROOT, SPACES, STUDIES, TOPOLOGIES, tiny_arch, tiny_data
from hypothesis import given
from hypothesis import strategies as st

from builder.graph.compiler import compile_arch
from builder.pricing.budget import BudgetSpec
from builder.pricing.cost import COSTS, estimate
from searchspace import SpecError, load_arch, load_space
from searchspace.files import arch_from_data, merge, parse_overrides, parse_yaml, read_data
from searchspace.plain import decode
from searchspace.space import SpaceSpec
from studies.config import StudyConfig, load_study, study_from_data

pytestmark = pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisWarning")  # that an example is long


def check(load, *args):
    """Load, count and draw; then write out, read again, compile and price."""
    thing = bounded(load, *args)
    if isinstance(thing, StudyConfig):
        assert repr(parse_yaml(thing.to_yaml())) == repr(thing.plain)  # repr: NaN equals itself
    if isinstance(thing, StudyConfig | SpaceSpec):
        space = thing.space if isinstance(thing, StudyConfig) else thing
        bounded(lambda: str(space.count()))
        candidate = bounded(space.sample, 0)
        thing = candidate and candidate.arch
    if thing is not None:
        assert arch_from_data(parse_yaml(thing.to_yaml())) == thing
        bounded(lambda: estimate(compile_arch(thing)))


def places(value, at=()):
    """The path of every value inside."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in items:
        yield (*at, name)
        yield from places(inner, (*at, name))


def of(*options):
    return st.sampled_from(options)


def keys(required, **optional):
    return st.fixed_dictionaries(required, optional=optional)


# fmt: off
FILES = [*ARCHITECTURES, *SPACES, *STUDIES, *(ROOT / "benchmarks/tabular").glob("*.yaml")]
DATA = {file: read_data(file) for file in FILES}
LOADERS = {file: load_arch if file in ARCHITECTURES else load_study if "space" in DATA[file] else load_space for file in FILES}
ARCH_DATA, SPACE_DATA = ([DATA[file] for file in FILES if LOADERS[file] is load] for load in (load_arch, load_space))
STUDY_DATA = [load_study(file).plain for file in FILES if LOADERS[file] is load_study]
COST = estimate(compile_arch(tiny_arch()))
with pytest.raises(SpecError):
    parse_yaml("a: ${")  # imports what OmegaConf imports for errors alone

WORDS = of(*sorted({word for file in FILES for word in file.read_text().replace(",", " ").split() if word.isidentifier()}))
NUMBERS = st.integers(-5, 500) | st.floats(-1e3, 1e3) | of(
    0, 1, 2, 3, 4, 7, 8, 63, 64, 65535, 65536, 2**20, 2**24, 2**31, 2**63, 10**18, 10**19, 10**400, -1, -64, 0.0, -0.0, 0.5,
    1.0, 1e-323, 1e-12, 0.12345678901234567, 1e3, 1e17, 1e308, float("inf"), float("-inf"), float("nan"),
)
TEXTS = of(
    "", " ", "auto", "none", "null", "yes", "on", "1e3", "1_000", "0x1F", "017", "12:30:45", "2024-01-01", "a" * 10_000,
    "../../etc", "/etc/passwd", "a/b", "a.b", "é", "名前", "²", "\u202e", "\n", "\0", "'", "%", "#", "os.system", "__class__",
    "${vars.width}", "${d_model}", "${levels}", "${graph.h}", "${nope}", "${a", "${oc.env:HOME}", "${${d_model}}", "$${a}",
    "100% of baseline", "1e400% of baseline", "0.0001% of baseline", "16KiB", "6M", "1e29T", "-1K", "é" * 200, "a" * 300 + "/b",
)
LITERALS = (
    "1e3", "1_000", "017", "0o17", "12:30:45", "yes", "on", ".nan", "-.inf", "1e400", "9" * 5000, "0x" + "f" * 5000, "2024-01-01",
    "2024-13-45", "!!binary aGk=", "!!set {a}", "!!omap [a]", "!!pairs [a: b]", "!!int ''", "!!int x", "!!float ''", "!!bool x",
    "!!timestamp x", "!!null x", "!!str {}", "!!python/object/apply:os.system [id]", "!x y", "&a [*a]", "*a", "&a 1", "{<<: *a}",
    "{<<: 1}", "{1: 2}", "{null: 2}", "{.5: 2}", "{true: 2}", "{[a]: b}", "{? {a: b} : c}", "{a: 1, a: 2}", "???", "=", "<<", "~", "",
    "{", "[", "]", "'", '"', "|", ">", "- a", "a: b", "\t1", "\0", "\ufeff", "\x85", "\u2028", '"\\ud800"', '"\\0"', "%YAML 9.9", "---",
    "...", "@", "`", "[" * 500, "[" * 500 + "]" * 500, "{a: " * 40 + "}" * 40, "${a}", "${d_model}", "${oc.env:HOME}", "${" * 50,
    "${oc.decode:'${a}'}", "${a:${b:${c}}}", "${..a}", "${a[0]}", "\\" * 9 + "${a}", "plain_4", "nowhere.yaml", "é" * 200, "../" * 400,
    "é" * 300 + "/a", "a" * 10_000, "{choice: []}", "{int: [1, 2]}", "{choice: [1, 2]}", "{sequence: {of: [a, b], length: 2}}",
    "{float: [0, 1.0e+17], step: 1.0e-300}", "{choice: [1, 2], prior: 1, confidence: [high]}",
)
OPERANDS = of(
    "d_model", "levels", "graph", "levels.word.chunk", "blocks.core.layers", "vars.width", "iterations('h')", "first('h')", "exists('²')",
    "count('h', 1)", "len(levels)", "abs(name)", "min(1, 'x')", "sum([1, d_model])", "64", "0", "1e30", "-9.9", "'x'", "[]", "__class__",
)
SIGNS = of(*"+-*/%<()[],.:", "//", "**", "==", "!=", ">=", "in", "and", "or", "not in", "if 1 else", "lambda:")
EXPRESSIONS = st.text(max_size=9) | st.lists(st.tuples(OPERANDS, SIGNS).map(" ".join), max_size=4).flatmap(
    lambda rows: OPERANDS.map(lambda last: " ".join([*rows, last])))
SCALARS = st.none() | st.booleans() | NUMBERS | TEXTS | WORDS | st.text(max_size=20)
KEYS = WORDS | TEXTS
VALUES = st.recursive(SCALARS, lambda item: st.lists(item, max_size=4) | st.dictionaries(KEYS, item, max_size=4), max_leaves=8)
# fmt: on


def opened(value):
    """An open choice, more often than not one that `value` is among."""
    prior, sure = {"prior": st.just(value) | SCALARS}, {"confidence": of("low", "medium", "high") | VALUES}
    choice = st.lists(VALUES, max_size=3).map(lambda more: [value, *more])
    pair = NUMBERS.map(lambda high: [value, high]) | st.lists(NUMBERS, min_size=2, max_size=2)
    whole, real = (st.tuples(each, each).map(sorted) for each in (st.integers(1, 99), st.floats(1e-9, 9.0)))
    numeric = {"log": st.booleans(), "step": NUMBERS, **prior, **sure}
    entries, order = st.lists(of("token", "word") | VALUES), of("any", "coarse_to_fine", "fine_to_coarse") | VALUES
    return (
        keys({"choice": choice | VALUES}, **prior, **sure)
        | (keys({"int": whole | pair}, **numeric) | keys({"float": real | pair | VALUES}, **numeric))
        | keys({"sequence": keys({"of": entries, "length": st.integers(1, 64) | whole | pair}, order=order)})
    )


@st.composite
def mutated(draw, originals):
    """A shipped file's data with a few things changed, removed, renamed, doubled, copied elsewhere or opened."""
    root = copy.deepcopy(draw(of(*originals)))
    for _ in range(draw(st.integers(1, 3))):
        paths = list(places(root)) or [("name",)]
        *parents, last = draw(of(*paths))
        holder = reduce(getitem, parents, root)
        how = draw(of("value", "open", "open", "copy", "copy", "scalar", "word", "delete", "rename", "constraint"))
        if how == "constraint" or paths == [("name",)]:
            root["constraints"] = [*draw(st.lists(EXPRESSIONS, max_size=2)), draw(EXPRESSIONS | SCALARS)]
        elif how == "delete":
            del holder[last]
        elif how == "rename" and isinstance(holder, dict):
            value = holder[last] if draw(st.booleans()) else holder.pop(last)
            holder[draw(KEYS | of(*holder, last) | st.just(str(last)[:-1]))] = value
        elif how == "copy":
            holder[last] = copy.deepcopy(reduce(getitem, draw(of(*paths)), root))
        else:
            holder[last] = draw({"open": opened(holder[last]), "scalar": SCALARS, "word": WORDS}.get(how, VALUES))
    return root


# fmt: off
@st.composite
def wired(draw):
    """A graph of up to a dozen nodes wired at random, most of its references right."""
    graph, names, few, core, weights = {"x": {"embed": "tokens"}}, ["x"], st.integers(0, 9), st.just("core"), of("a", "b")
    level, norm, recall = of("token", "word", "phrase", "pair"), of("rms", "layer"), of("add", "linear", "concat")
    use = level | keys({"level": level}, offset=few, delay=few, upscale=of("learned", "uniform"))
    for i in range(draw(st.integers(1, 12))):
        one = of(*names[-3:], "x")
        two, many = st.lists(one, min_size=2, max_size=2), st.lists(one, min_size=1, max_size=4)
        graph[f"n{i}"] = draw(st.one_of(
            keys({"loop": core, "in": one, "schedule": st.lists(use, min_size=1, max_size=4)},
                 topology=of(*TOPOLOGIES), recall=recall, norm=norm, step=of("add", "scale"), embedding=one),
            keys({"block": core, "in": one}), keys({"memory": few, "in": one}), keys({"read": one, "in": one}),
            keys({"pool": use, "in": one}), keys({"upscale": use, "in": one}, reads=of("closed", "own_chunk"), delay=few),
            keys({"join": of("base", "sum", "weighted", "mixture"), "in": many}, factors=st.lists(NUMBERS, max_size=4)),
            keys({"norm": norm, "in": one}, weights=weights), keys({"recall": recall, "in": two}, weights=weights),
            keys({"write": one, "in": two}),
        ))
        names.append(f"n{i}")
    graph["logits"], needed = {"head": "lm", "in": names[-1]}, ["logits"]
    for name in needed:  # grows on the way: a node that the head does not need would be refused at once
        needed += [n for n in graph if f"'{n}'" in repr(graph[name]) and n not in needed]
    levels = {"word": {"offset": draw(st.integers(0, 3))}, "pair": {"chunk": draw(st.integers(1, 6)), "pool": "mean"}}
    data = tiny_data({"causal": draw(st.booleans()), "levels": levels})
    return {**data, "graph": {name: node for name, node in graph.items() if name in needed}}
# fmt: on


@st.composite
def broken(draw):
    """A shipped file's text with literals for values, or with lines and bytes inserted, removed or flipped."""
    file = draw(of(*FILES))
    text = file.read_bytes()
    for _ in range(draw(st.integers(1, 3))):
        lines, literal = text.split(b"\n"), draw(of(*LITERALS)).encode()
        i, at = draw(st.integers(0, len(lines) - 1)), draw(st.integers(0, len(text)))
        value = lines[i].partition(b":")[0] + b": " + literal
        ways = [[*lines[:i], value, *lines[i + 1 :]], [*lines[:i], literal, *lines[i:]], [*lines, lines[i]]]
        inserted = [literal, draw(st.binary(max_size=4)), bytes(byte ^ 4 for byte in text[at : at + 1]), b""]
        cut = draw(of(0, 1, 9, 99))
        text = draw(of(*map(b"\n".join, ways), *(text[:at] + new + text[at + cut :] for new in inserted)))
    return LOADERS[file], text


@st.composite
def overridden(draw):
    """A shipped file, and overrides of what stands in it and of what does not."""
    file = draw(of(*FILES))
    path = of(*places(DATA[file])).map(lambda at: ".".join(map(str, at))) | st.lists(KEYS, max_size=3).map(".".join)
    value = NUMBERS.map(str) | WORDS | of(*LITERALS) | VALUES.map(repr)
    return file, draw(st.lists(st.tuples(path, value).map("=".join) | st.text(max_size=9), min_size=1, max_size=2))


OBJECTS = st.dictionaries(KEYS, VALUES | SCALARS.flatmap(opened), max_size=5)
AMOUNTS = st.from_regex(r"[0-9]{1,3}(\.[0-9]+)?(e[+-]?[0-9]{1,3})?(|K|GiB|T| KiB|%| ?% of baseline)", fullmatch=True)
LIMITS = NUMBERS | TEXTS | AMOUNTS
BANDS = LIMITS | VALUES | keys({}, min=LIMITS, max=LIMITS | VALUES) | keys({"min": LIMITS, "mix": LIMITS})
BUDGETS = st.dictionaries(of(*COSTS, "parms"), BANDS, max_size=2)


@given(mutated(ARCH_DATA) | wired() | OBJECTS)
def test_any_architecture_is_compiled_or_refused(data):
    check(arch_from_data, data)


@given(mutated(SPACE_DATA) | mutated(ARCH_DATA) | OBJECTS)
def test_any_space_is_sampled_or_refused(data):
    check(SpaceSpec, data)


@given(mutated(STUDY_DATA) | OBJECTS)
def test_any_study_is_loaded_or_refused(data):
    check(study_from_data, data)


@given(broken())
def test_any_file_is_read_or_refused(tmp_path_factory, case):
    file = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    file.write_bytes(case[1])
    check(case[0], file)


@given(overridden())
def test_any_override_is_laid_over_or_refused(case):
    file, texts = case
    if over := bounded(parse_overrides, texts):
        bounded(merge, DATA[file], over)
    check(LOADERS[file], file, texts)


@given(BUDGETS | VALUES)
def test_any_budget_is_resolved_or_refused(data):
    spec = bounded(decode, BudgetSpec, data, "budget")
    budget = bounded(spec.resolve, COST) if spec else None
    assert budget is None or budget.allows(COST) in (True, False)


def _nodes(nodes, levels=""):
    """An architecture of these nodes, the last called h."""
    head = (
        f"vocab_size: 16\nseq_len: 16777216\nd_model: 16\nlevels: {{token: {{chunk: 1}}, word: {{chunk: 4}}{levels}}}\n"
    )
    rows = ["x: {embed: tokens}", *nodes, "logits: {head: lm, in: h}"]
    return f"{head}blocks: {{core: {{layers: 1, heads: 2}}}}\ngraph:\n" + "".join(f"  {row}\n" for row in rows)


def _chain(length, node):
    """An architecture of so many nodes, each reading the one before."""
    return _nodes([f"h{i or ''}: {{{node}, in: {f'h{i + 1}' if i < length - 1 else 'x'}}}" for i in range(length)])


def _levels(chunks, between):
    """An architecture that pools to a level of each chunk and back, by way of another level."""
    nodes = ["d: {norm: rms, in: x}"]
    for i in range(len(chunks)):
        nodes += [f"a{i}: {{pool: {between}, in: d{i - 1 if i else ''}}}", f"b{i}: {{pool: l{i}, in: a{i}}}"]
        nodes += [f"c{i}: {{upscale: {between}, in: b{i}}}", f"d{i}: {{upscale: token, in: c{i}}}"]
    levels = "".join(f", l{i}: {{chunk: {chunk}}}" for i, chunk in enumerate(chunks))
    return _nodes([*nodes, f"h: {{norm: rms, in: d{len(chunks) - 1}}}"], levels)


def _vars(length, row):
    """An architecture with a chain of references behind its name."""
    rows = [f"name: ${{vars.a{length}}}", "vars:", "  a0: x", *(f"  a{i + 1}: {row.format(i)}" for i in range(length))]
    return PLAIN + "\n".join(rows)


PLAIN = _nodes(["h: {block: core, in: x}"])
PRIMES = [n for n in range(2, 400) if all(n % k for k in range(2, n))]
# fmt: off
OPEN = PLAIN.replace("_size: 16", "_size: {int: [2, 20000]}")
LONG = ["".join(chr(300 + (i * i + k * i) % 997) for i in range(20_000)) for k in (0, 3)]
HARD = {  # what would explode, were it not refused, or priced without being walked
    "many keys": "".join(f"k{i}: 1\n" for i in range(20_000)),
    "many nodes, then a mistake": "vars: {a: [" + "1," * 9_900 + "]}\nd_model: x\nvocab_size: 8\nseq_len: 8\ngraph: {}",
    "256 KiB of text": "a: |\n" + " x\n" * 80_000,
    "unclosed references": "name: '" + "${" * 10_000 + "'",
    "escaped references": 'name: "' + r"\x24{" * 10_000 + '"',
    "many references": PLAIN + "vars: {a: '" + "${d_model}" * 20_000 + "'}",
    "a text of doubled references": _vars(40, "'${{vars.a{0}}}${{vars.a{0}}}'"),
    "a list of doubled references": _vars(40, "['${{vars.a{0}}}', '${{vars.a{0}}}']"),
    "a chain of references": _vars(3000, "${{vars.a{0}}}"),
    "lists of lists by reference": PLAIN + "vars: {" + ", ".join(f"{a}: [{n * 150}'${{{to}}}']" for a, n, to in (("a", "x, " * 20, "d_model"), ("b", "'${vars.a}', ", "vars.a"), ("c", "'${vars.b}', ", "vars.b"))) + "}",
    "two coprime levels": _levels([65521, 65519], "token"),
    "many coprime levels": _levels(PRIMES[:23], "token"),
    "more levels": _levels(PRIMES, "token"),
    "automatic offsets": _levels([65536] * 22, "word"),
    "loops that share a schedule": _chain(600, "loop: core, schedule: '${vars.s}'") + f"vars: {{s: [{'word, token, ' * 128}]}}",
    "30 loops of 256": _chain(30, f"loop: core, topology: mesh, schedule: [{'word, token, ' * 128}]"),
    "a long chain": _chain(1400, "norm: rms"),
    "10^6 iterations": _chain(1, "loop: core, schedule: {sequence: {of: [token], length: 1000000}}"),
    "10^4 blocks": PLAIN.replace("layers: 1", "layers: 10000"),
    "2^20 x 2^20": PLAIN.replace("_model: 16", "_model: 1048576").replace("_size: 16", "_size: 1048576"),
    "10^12 grid": OPEN.replace("20000", "1000000").replace("16777216", "{int: [2, 1000000]}"),
    "more ways than a float holds": PLAIN + "name: '${vars.a}${vars.b}${vars.c}'\nvars: {" + "".join(f"{a}: {{sequence: {{of: [{', '.join(f'n{i}' for i in range(900))}], length: 60}}}}, " for a in "ab") + "c: {float: [0, 1]}}",
    "no draw holds": OPEN + "constraints: [vocab_size > 99999]",
    "no draw of a long chain holds": _chain(1400, "norm: rms").replace("_size: 16", "_size: {int: [2, 20000]}") + "constraints: [vocab_size > 99999]",
    "ways to count, with many references": OPEN + "vars: {a: [" + "'${d_model}', " * 4000 + "]}\nconstraints: [vocab_size > 2]",
    "many constraints": OPEN + f"constraints: [{'1 < 2, ' * 9_000} vocab_size > 99999]",
    "long constraints": OPEN + f"constraints: [{('1 < 2 and ' * 45 + '1 < 2, ') * 450} vocab_size > 99999]",
    "a thousand options": PLAIN.replace("_model: 16", f"_model: {{choice: [{', '.join(map(str, range(16, 2016, 2)))}]}}"),
    "long names alike": PLAIN + f"? {'ab' * 30_000}c\n: 1\nname: ${{{'ba' * 30_000}d}}",
    "long options alike": PLAIN + f"name: {{choice: [{LONG[0]}], prior: {LONG[1]}}}",
}
PLACES = {
    "root": "%s\n", "value": f"{PLAIN}name: %s", "key": f"{PLAIN}%s: 1", "extends": "extends: %s", "override": "%s",
    "space": "space: %s\ntraining: {flops: 1}", "training": "space: quickstart\ntraining: %s", "budget": "space: quickstart\ntraining: {flops: 1}\nbudget: {params: %s}",
}
# fmt: on


@pytest.mark.parametrize("text", HARD.values(), ids=HARD)
def test_what_could_explode_is_used_or_refused(text, tmp_path):
    (tmp_path / "hard.yaml").write_text(text)
    check(load_space, tmp_path / "hard.yaml")


@pytest.mark.parametrize("place", PLACES)
def test_any_literal_is_read_or_refused_at(place, tmp_path):
    file = tmp_path / "literal.yaml"
    for literal in LITERALS:
        file.write_text(PLAIN if place == "override" else PLACES[place].replace("%s", literal), encoding="utf-8")
        overrides = [f"levels.token.chunk={literal}"] if place == "override" else []
        check(load_study if place in ("space", "training", "budget") else load_arch, file, overrides)
