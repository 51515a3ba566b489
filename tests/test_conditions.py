"""What results say of the machine and the code that they were measured with."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch

from bench import machine
from bench.measure import conditions


def git(folder: Path, *command: str) -> str:
    identity = ("-c", "user.name=test", "-c", "user.email=test@example.com", "-c", "commit.gpgsign=false")
    done = subprocess.run(("git", "-C", folder, *identity, *command), check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("code.py", "README.md", "bench/results/step.json"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("as committed")
    try:
        git(tmp_path, "init")
    except FileNotFoundError:
        pytest.skip("git is not installed")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--message", "all")
    return tmp_path


def test_conditions_say_what_was_measured() -> None:
    about = conditions(torch.device("cpu"), ["bits 3", "steps 5"])
    assert list(about) == ["commit", "device", "torch", "triton", "numpy", "python", "date", "settings"]
    assert all(about.values())
    assert about["torch"] == torch.__version__
    assert about["device"].endswith(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads")
    assert about["settings"] == "bits 3, steps 5"


def test_a_gpu_is_named_in_place_of_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    assert conditions(torch.device("cuda", 1), [])["device"] == "GPU 1"


@pytest.mark.parametrize(
    ("info", "model"),
    [
        (
            "processor\t: 0\nmodel\t\t: 17\nmodel name\t: AMD EPYC 7763\n",
            "AMD EPYC 7763",
        ),
        ("Model name:            Neoverse-N1\nModel:      1\n", "Neoverse-N1"),
        ("machdep.cpu.brand_string: Apple M2\n", "Apple M2"),
    ],
)
def test_the_model_of_the_processor(info: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(info)
    monkeypatch.setattr(machine, "_CPU_INFO", file)
    assert machine.processor().startswith(f"{model}, ")


def test_a_processor_that_no_one_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_CPU_INFO", tmp_path / "missing")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.processor().startswith("CPU ")


def test_the_commit_and_whether_code_differs_from_it(checkout: Path) -> None:
    head = git(checkout, "rev-parse", "--short", "HEAD")
    assert machine.commit(checkout) == head
    (checkout / "bench/results/step.json").write_text("measured again")
    (checkout / "README.md").write_text("tables made again")
    (checkout / "demo.png").write_text("not tracked")
    assert machine.commit(checkout) == head, "results, texts and untracked files are not what is measured"
    (checkout / "code.py").write_text("edited")
    assert machine.commit(checkout) == f"{head}+changes"


def test_no_checkout_has_no_commit(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert machine.commit(checkout / "bench") == "unknown", "a copy inside of another project's checkout"
    assert machine.commit(tmp_path_factory.mktemp("unpacked")) == "unknown"


def test_no_git_has_no_commit(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(checkout))
    assert machine.commit(checkout) == "unknown"
