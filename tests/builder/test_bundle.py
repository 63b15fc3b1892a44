import json
import subprocess
import sys

import pytest
import torch
from helpers import built, tiny_arch

from builder import compile_arch, load_bundle, save_bundle
from searchspace import SpecError, load_arch

WITHOUT_SEARCH = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("ray", "optuna", "studies", "matplotlib", "rich", "typer"):
            raise ImportError(f"{name} is not here")
sys.meta_path.insert(0, Refuse())
import torch
torch.set_num_threads(1)
from builder import load_bundle
bundle = load_bundle(sys.argv[1])
tokens = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]])
torch.save(bundle.model(tokens), sys.argv[2])
"""


@pytest.fixture
def bundle(tmp_path):
    model = built({"tie_embeddings": True, "graph": {"h": {"topology": "mesh"}}})
    arch = tiny_arch({"tie_embeddings": True, "graph": {"h": {"topology": "mesh"}}})
    return save_bundle(tmp_path / "bundle", arch, model, facts={"seed": 0}), model, arch


def test_loads_without_the_search_stack_bit_for_bit(bundle, tmp_path):
    folder, model, _ = bundle
    script, out = tmp_path / "load.py", tmp_path / "logits.pt"
    script.write_text(WITHOUT_SEARCH)
    subprocess.run([sys.executable, script, folder, out], check=True)
    tokens = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]])
    assert torch.equal(torch.load(out), model(tokens))


def test_holds_what_is_needed_and_nothing_pickled(bundle):
    folder, _, arch = bundle
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md",
        "architecture.yaml",
        "manifest.json",
        "model.safetensors",
    ]
    loaded = load_bundle(folder)
    assert loaded.arch == arch
    assert loaded.manifest["seed"] == 0
    assert loaded.manifest["cost"]["params"] == loaded.cost.params


@pytest.mark.parametrize("name", ["architecture.yaml", "model.safetensors"])
def test_a_flipped_bit_is_noticed(bundle, name):
    folder, _, _ = bundle
    data = bytearray((folder / name).read_bytes())
    data[-3] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(SpecError, match="SHA-256"):
        load_bundle(folder)


def test_truncated_and_missing_files(bundle, tmp_path):
    folder, _, _ = bundle
    weights = (folder / "model.safetensors").read_bytes()
    for size in (0, 10, len(weights) // 2):
        (folder / "model.safetensors").write_bytes(weights[:size])
        with pytest.raises(SpecError):
            load_bundle(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(SpecError, match=r"lacks 'model\.safetensors'"):
        load_bundle(folder)
    with pytest.raises(SpecError, match="is not a bundle"):
        load_bundle(tmp_path)


def test_weights_of_another_architecture_are_refused(bundle):
    folder, _, _ = bundle
    manifest = json.loads((folder / "manifest.json").read_text())
    text = (folder / "architecture.yaml").read_text().replace("d_model: 16", "d_model: 32")
    (folder / "architecture.yaml").write_text(text)
    import hashlib

    manifest["sha256"]["architecture.yaml"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(SpecError, match=f"the manifest '{manifest['arch_id']}'"):
        load_bundle(folder)
    manifest["arch_id"] = compile_arch(load_arch(folder / "architecture.yaml")).arch_id
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(SpecError, match="do not fit the architecture"):
        load_bundle(folder)


def test_a_folder_that_is_no_bundle_is_not_replaced(bundle, tmp_path):
    folder, model, arch = bundle
    save_bundle(folder, arch, model)  # a bundle is
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("x")
    with pytest.raises(SpecError, match="is not a bundle"):
        save_bundle(tmp_path / "precious", arch, model)
    assert (tmp_path / "precious" / "thesis.txt").exists()


def test_a_folder_that_holds_a_bundle_is_told_from_it(tmp_path):
    save_bundle(tmp_path / "study" / "best", tiny_arch(), built())
    with pytest.raises(SpecError) as caught:
        load_bundle(tmp_path / "study")
    assert f"give the one in it: {tmp_path / 'study' / 'best'}" in str(caught.value)
