"""The papers' own questions as shipped studies: how many candidates they ask about, and that they run."""

import pytest
from helpers import run_cli

from studies.candidates.listing import LISTINGS
from studies.config import load_study

COUNTS = {"mesh_slots": 4, "mesh_schemes": 8, "mesh_figure8": 34, "spiral_ablations": 17, "specialization": 5}


@pytest.mark.parametrize(("name", "count"), COUNTS.items())
def test_a_study_launches_as_many_candidates_as_its_question_has(name, count):
    study = load_study(name)
    assert len(LISTINGS[study.search.sampler](study)) == study.search.num_trials == count


@pytest.mark.parametrize("name", COUNTS)
def test_a_study_runs(name, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i}: {i * i} is {i} squared\n" for i in range(3000)))
    run_cli(
        "search", name, "--dir", tmp_path / "run", "--serial", "data.kind=text", f"data.path={text}", "training.flops=null",
        "training.tokens=2048", "training.batch_tokens=1024", "training.eval_tokens=1024", "search.num_trials=2",
        "search.promote=0", "space.seq_len=64", "baseline=[]",
    )  # fmt: skip
    assert (tmp_path / "run" / "best").is_dir()
