"""The HTML report: whole, offline, and drawn by a real browser."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from helpers import end_all, make_driver, run_cli, tiny_study

from studies.data.corpus import Corpus
from studies.predict import explain
from studies.predict.explain import schedule_of
from studies.records.folder import PREDICTED
from studies.records.trial import Report, Rung
from studies.report.finalists import finals, promotions
from studies.report.page import write_html
from studies.report.ranking import notes

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ORDER_ANY = {
    "space": {"graph": {"h": {"schedule": {"sequence": {"of": ["phrase", "word", "token"], "length": [1, 4]}}}}}
}


def made_up(record):
    """Fine levels early are bad; there is something to be learned."""
    worth = {"phrase": 0.0, "word": 0.1, "token": 0.3}
    return 2.0 + sum(worth[level] / (i + 1) for i, level in enumerate(schedule_of(record.arch_spec())))


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """Sixty trials with made-up losses, some of which failed."""
    folder = tmp_path_factory.mktemp("report")
    driver = make_driver(folder, ORDER_ANY, "search.num_trials=60", "search.stopper=none")
    for number in range(3):
        spec = driver.next_trial()
        if number:
            failed = Report(kind="failed", attempt=1, reason="diverged", error="a loss is not finite <b>")
            driver.report(spec.number, failed)
        else:
            rung = Rung(flops=4e8, tokens=1, score=2.5)
            driver.report(spec.number, Report(kind="done", attempt=1, rungs=(rung,)))
    return end_all(driver, made_up)


@pytest.fixture(scope="module")
def page(driver):
    from studies.data.corpus import Corpus

    return write_html(driver.records, driver.study, Corpus(driver.corpus), driver.folder / "report.html")


def figures(page):
    return json.loads(re.search(r"const FIGURES = (.*);\n", page.read_text())[1])


def test_the_report_says_what_the_journal_says(driver, page):
    text, drawn = page.read_text(), figures(page)
    assert set(drawn) == {"front", "learning", "schedules", "importance", "effects", "predicted", "history", "parallel"}
    lines = [trace["x"].count(None) for trace in drawn["learning"]["data"]]
    assert sum(lines) == sum(bool(record.rungs) for record in driver.records)
    assert text.count("data:image/svg+xml;base64,") == 5
    assert "diverged" in text
    assert "a loss is not finite &lt;b&gt;" in text
    for record in driver.records:
        if record.rungs:
            assert f"<td>{record.number}</td>" in text
    front = next(trace for trace in drawn["front"]["data"] if trace["name"] == "front")
    assert front["x"] == sorted(front["x"])


def test_it_asks_nobody_for_anything(page):
    text = re.sub(r"<script>.*?</script>", "", page.read_text(), flags=re.S)
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)[^"']*""", text)
    assert "http-equiv" not in text


def test_a_study_without_results_has_a_report_too(tmp_path):
    from studies.data.corpus import Corpus

    driver = make_driver(tmp_path)
    page = write_html([], driver.study, Corpus(driver.corpus), tmp_path / "report.html")
    assert "No searched trial has spent its full budget yet" in page.read_text()


def test_status_of_a_study_that_was_cut_off(tmp_path):
    driver = make_driver(tmp_path, None, "search.num_trials=3")
    (driver.folder / "study.yaml").write_text(driver.study.to_yaml())
    driver.next_trial()
    output = run_cli("status", driver.folder)
    assert "1 interrupted" in output
    assert "nobody drives it now" in output
    assert "0 of 4 trials ended" in run_cli("status", driver.folder, "--watch")


def test_watching_ends_with_the_study(tmp_path):
    run_cli("search", tiny_study(tmp_path), "--dir", tmp_path / "run", "--serial", "search.num_trials=2")
    for command in ("status", "report"):
        output = run_cli(command, tmp_path / "run", "--watch")
        assert max(map(len, output.splitlines())) <= 80
    assert (tmp_path / "run" / "report.html").is_file()


PROBE = """<script>
const asked = performance.getEntriesByType('resource').filter(r => !r.name.startsWith('data:')).length;
const errors = []; window.addEventListener('error', e => errors.push(e.message));
setTimeout(() => {
  const plots = [...document.querySelectorAll('.plot')];
  const result = {
    plots: plots.length, drawn: plots.filter(p => p.querySelector('.main-svg')).length, asked, errors,
    wide: plots.filter(p => p.querySelector('.main-svg').getBoundingClientRect().width > innerWidth).length,
    ink: getComputedStyle(document.body).color, overflow: document.documentElement.scrollWidth - innerWidth,
  };
  document.body.setAttribute('data-result', JSON.stringify(result));
}, 2500);
</script></body>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 500])
def test_a_browser_draws_every_plot(page, dark, width, tmp_path):
    probed = tmp_path / "probed.html"
    probed.write_text(page.read_text().replace("</body>", PROBE))
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0", "--virtual-time-budget=9000",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}", f"--window-size={width},2000",
        "--host-resolver-rules=MAP * ~NOTFOUND", "--dump-dom", f"file://{probed}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    result = json.loads(re.search(r'data-result="([^"]*)"', done.stdout)[1].replace("&quot;", '"'))
    assert result["plots"] == result["drawn"] == 8
    assert (result["asked"], result["errors"], result["wide"]) == (0, [], 0)
    assert result["overflow"] <= 0
    assert result["ink"] == ("rgb(228, 232, 237)" if dark else "rgb(28, 33, 40)")
    assert "CONSOLE" not in done.stderr, done.stderr


def test_a_predicted_map_is_made_once(driver, monkeypatch):
    """For each state of a study; what is kept badly is made again."""
    records = driver.records
    facts, made, original = Corpus(driver.folder / "data").facts, [], explain._predict_effects
    monkeypatch.setattr(explain, "_predict_effects", lambda *given: made.append(1) or original(*given))

    def effects(shown=records):
        return explain.kept_effects([r for r in shown if r.rungs], driver.study, facts, driver.folder)

    (driver.folder / PREDICTED).unlink(missing_ok=True)
    first = effects()
    assert first
    assert effects() == first
    assert len(made) == 1
    effects(records[:-3])
    assert len(made) == 2
    for damage in (
        "",
        "{",
        "[]",
        '{"state": 1, "effects": []}',
        '{"state": "x", "effects": [{"place": -1, "level": "a", "loss": 0}]}',
    ):
        (driver.folder / PREDICTED).write_text(damage)
        assert effects() == first
    assert len(made) == 7


COMMANDS = [
    "status run",
    "report run",
    "check tiny.yaml",
    "search tiny.yaml traning.lr=1",
    "list",
    "describe quickstart",
    "count tiny.yaml",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_what_only_reads_leaves_torch_out(tmp_path, command):
    end_all(make_driver(tmp_path))
    script = (
        "import sys\nfrom studies.cli import app\n"
        f"try: app({command.split()!r}, standalone_mode=False)\nexcept BaseException as error: print(type(error), error)\n"
        "print(sorted({'torch', 'ray', 'torch_geometric'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout[-2000:]


def again(number, arch_id, seed, score, *, flops=1e9, template=None):
    """A promotion that has ended."""
    rung = Rung(flops=flops, tokens=1, score=score, metrics={})
    return dataclasses.replace(
        template, number=number, purpose="promotion", state="complete", arch_id=arch_id, seed=seed, rungs=(rung,),
        training={**template.training, "flops": flops},
    )  # fmt: skip


def test_finalists_are_told_apart_only_beyond_their_seeds(tmp_path):
    driver = end_all(make_driver(tmp_path, None, "search.num_trials=1"))
    template = driver.records[0]
    means, order = {"a": 1.0, "b": 1.004, "c": 1.1, "d": 1.2}, {1: 0.05, 2: -0.05, 3: 0.0}
    noise = dict(
        zip(
            [(arch, seed) for arch in means for seed in order],
            np.random.default_rng(0).normal(0, 0.01, 12),
            strict=True,
        )
    )
    records = [
        again(i, arch, seed, means[arch] + order[seed] + noise[arch, seed], template=template)
        for i, (arch, seed) in enumerate(noise)
    ]
    found = finals(records)
    by_name = {group.runs[0].arch_id: group for group in found.groups}
    assert found.freedom == 6
    assert 0.003 < found.noise < 0.02  # what seeds share, five times as large, is taken out
    assert not found.decided(by_name["a"], by_name["b"])
    assert found.decided(by_name["a"], by_name["c"])
    assert found.decided(by_name["d"], by_name["c"])
    # Five of the six pairs are 0.1 apart and more; the sixth is less than the noise.
    assert found.seeds_to_decide(2 / 3) == 2
    # The fourth largest gap is 0.1: t(9) sqrt(2/4) 0.08 = 0.104 with four seeds, t(12) sqrt(2/5) 0.08 = 0.090 with five.
    assert dataclasses.replace(found, noise=0.08).seeds_to_decide(2 / 3) == 5
    assert found.seeds_to_decide(1.0) is None
    alone = finals([record for record in records if record.seed == 1])
    assert alone.noise is None
    assert alone.seeds_to_decide(2 / 3) is None
    assert alone.decided(*alone.groups[:2]) is None
    # A seed that one of them lost takes its share of luck away from the others too.
    lame = [record for record in records if (record.arch_id, record.seed) != ("b", 1)]
    fewer = finals(lame)
    groups = {group.runs[0].arch_id: group for group in fewer.groups}
    a, b, error = fewer.gap(groups["a"], groups["b"])
    assert fewer.freedom == 4
    assert abs(a - b) < 0.02 < abs(groups["a"].mean - groups["b"].mean)
    assert error == pytest.approx(fewer.noise)
    assert not fewer.decided(groups["a"], groups["b"])
    # The best of many is not believed as one that was chosen beforehand.
    edge = dataclasses.replace(found, noise=abs(by_name["a"].mean - by_name["c"].mean) / 2.2 / (2 / 3) ** 0.5)
    assert edge.decided(by_name["a"], by_name["c"])
    assert not edge.decided(by_name["a"], by_name["c"], among=5)
    longer = [again(50 + i, arch, 1, 0.5, flops=1e10, template=template) for i, arch in enumerate(means)]
    assert {group.runs[0].seed for group in promotions([*records, *longer])} == {1}
    assert all(group.mean == 0.5 for group in promotions([*records, *longer]))
    assert finals([]).groups == ()


def test_a_page_leads_with_what_other_seeds_say(tmp_path):
    driver = end_all(make_driver(tmp_path, None, "search.num_trials=4", "search.stopper=none", "search.promote=2"))
    file = write_html(driver.records, driver.study, Corpus(driver.corpus), tmp_path / "page.html")
    page = file.read_text()
    assert page.count("Trained again with 2 other seeds, the best found") == 1
    assert page.index("Trained again with 2 other seeds") < page.index('class="facts"')


@pytest.mark.parametrize(("tokens", "told"), [(lambda flops: 1000, False), (lambda flops: int(1e9 / flops), True)])
def test_loss_that_follows_flops_is_put_down_to_the_data_only_where_some_saw_more(tmp_path, tokens, told):
    driver = make_driver(tmp_path, ORDER_ANY, "search.num_trials=12", "search.stopper=none")
    while (spec := driver.next_trial()) is not None:
        flops = driver.record(spec.number).cost.flops_per_token
        rungs = tuple(Rung(flops=4e8 * share, tokens=tokens(flops), score=flops / 1e5) for share in spec.rungs)
        driver.report(spec.number, Report(kind="done", attempt=1, rungs=rungs))
    found = notes(driver.records, Corpus(driver.corpus), driven=False)
    assert any("Loss follows FLOPs" in line for line in found) == told
