"""scripts/prepare_weights.py: files of a known digest, and those of the hub, which state none beforehand."""

import hashlib
import sys
import types
from pathlib import Path

import pytest
from torch_fidelity import feature_extractor_inceptionv3 as torch_fidelity_inception

from extractors.vision_transformer import Dinov2Extractor
from scripts import prepare_weights as script
from utils.errors import UserError


def test_inception_has_the_source_of_torch_fidelity():
    assert script.WEIGHTS["inception"].urls == (torch_fidelity_inception.URL_INCEPTION_V3,)


def test_a_local_weights_file_is_checked_and_copied(tmp_path, monkeypatch, capsys):
    source, root = tmp_path / "mine.pth", tmp_path / "weights"
    source.write_bytes(b"weights")
    arguments = ["--name", "inception", "--weights_root", str(root), "--source", str(source)]
    assert script.main(arguments) == 2
    assert "not the published file" in capsys.readouterr().err
    assert [path for path in root.rglob("*") if path.is_file()] == []

    name = f"weights-{hashlib.sha256(b'weights').hexdigest()[:8]}.pth"
    monkeypatch.setitem(script.WEIGHTS, "inception", script.RemoteFile(name, ("file:///absent",)))
    assert script.main(arguments) == 0
    assert (root / name).read_bytes() == b"weights"
    source.unlink()
    assert script.main(arguments) == 0  # what is there and intact is kept
    (root / name).write_bytes(b"broken")
    assert script.main(arguments) == 2
    assert "there is no such file" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ the hub


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the package: `hub["files"]` are in every repository, `hub["asked"]` is what was fetched."""
    state = {"files": {"config.json": b"{}", "pytorch_model.bin": b"old", "README.md": b""}, "asked": []}

    def fetch(repository: str, name: str, local_dir: Path) -> None:
        state["asked"].append((repository, name))
        (local_dir / name).write_bytes(state["files"][name])

    package = types.ModuleType("huggingface_hub")
    package.list_repo_files = lambda repository: list(state["files"])
    package.hf_hub_download = fetch
    monkeypatch.setitem(sys.modules, "huggingface_hub", package)
    return state


def test_files_are_downloaded_from_the_hub_once(hub, tmp_path, monkeypatch):
    for _ in range(2):
        assert script.main(["--name", "dinov2", "--weights_root", str(tmp_path)]) == 0
    source = Dinov2Extractor.SOURCE
    assert hub["asked"] == [(source, "config.json"), (source, "pytorch_model.bin")]
    folder = tmp_path / "dinov2-large"
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    assert lines[1] == f"{hashlib.sha256(b'old').hexdigest()}  pytorch_model.bin"
    monkeypatch.setitem(sys.modules, "transformers", types.ModuleType("transformers"))
    assert Dinov2Extractor.check(tmp_path) == folder / "pytorch_model.bin"


def test_safetensors_are_preferred(hub, tmp_path):
    hub["files"]["model.safetensors"] = b"new"
    script.prepare_hub(script.WEIGHTS["clip"], tmp_path, None)
    assert [name for _, name in hub["asked"]] == ["config.json", "model.safetensors"]


def test_changed_file_is_reported(hub, tmp_path, capsys):
    arguments = ["--name", "clip", "--weights_root", str(tmp_path)]
    assert script.main(arguments) == 0
    path = tmp_path / "clip-vit-large-patch14-336" / "pytorch_model.bin"
    path.write_bytes(b"damaged")
    assert script.main(arguments) == 2
    assert f"{path}: is not what was fetched" in capsys.readouterr().err


def test_a_folder_of_files_is_copied(tmp_path):
    source = tmp_path / "mine"
    source.mkdir()
    (source / "ImageReward.pt").write_bytes(b"weights")
    wanted = script.WEIGHTS["image_reward"]
    with pytest.raises(UserError, match=r"mine: has no med_config\.json"):
        script.prepare_hub(wanted, tmp_path / "root", source)
    (source / "med_config.json").write_bytes(b"{}")
    folder = script.prepare_hub(wanted, tmp_path / "root", source)
    assert sorted(path.name for path in folder.iterdir()) == [
        "ImageReward.pt",
        "SHA256SUMS",
        "med_config.json",
    ]


def test_missing_package_or_network_is_reported_with_a_remedy(hub, tmp_path, monkeypatch):
    def offline(*_):
        raise OSError("cannot connect\nto the hub")

    monkeypatch.setattr(sys.modules["huggingface_hub"], "list_repo_files", offline)
    with pytest.raises(UserError, match=r"cannot connect to the hub.*--source"):
        script.prepare_hub(script.WEIGHTS["dinov2"], tmp_path, None)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="pip install huggingface_hub"):
        script.prepare_hub(script.WEIGHTS["dinov2"], tmp_path, None)
