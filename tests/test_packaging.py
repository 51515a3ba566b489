"""What a user installs: a wheel without the repository around it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TRAIN = """
import torch
model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 8))
{before}
assert "fewbit" in torch._dynamo.list_backends()
compiled = torch.compile(model, backend="fewbit", options={{"strict": True}})
compiled(torch.randn(128, 32)).sum().backward()
import fewbit_fx, sys
assert not {{"accelerate", "lightning", "peft", "transformers", "trl", "fewbit_fx.integrations"}} & set(sys.modules)
print(fewbit_fx.__file__, [fewbit_fx.reporting.words.action(s) for s in fewbit_fx.last_report().sites])
"""


IMPORT = "import fewbit_fx, fewbit_fx.passes.partitioner as p; print(fewbit_fx.__file__, p.__file__)"


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    for name in ("fewbit_fx", "passes"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_import_in_a_clone_finds_the_clones_own_passes(clone: Path) -> None:
    """The folder fewbit_fx comes before the installed package there, and holds no passes."""
    done = subprocess.run([sys.executable, "-c", IMPORT], cwd=clone, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(clone / "fewbit_fx/__init__.py"), str(clone / "passes/partitioner.py")]


def test_import_of_half_a_checkout_says_what_to_do(clone: Path) -> None:
    shutil.rmtree(clone / "passes")
    packages = [path for path in sys.path if path.endswith("site-packages")]
    without_pth = f"import sys; sys.path += {packages}; {IMPORT}"  # the development environment would find others
    done = subprocess.run([sys.executable, "-S", "-c", without_pth], cwd=clone, capture_output=True, text=True)
    assert done.returncode != 0
    assert "pip install ." in done.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: what an earlier build left in build/ would come along."""
    folder, source = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("source")
    for name in ("fewbit_fx", "passes"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", str(folder), str(source)], check=True)
    (built,) = folder.glob("fewbit_fx-*.whl")
    return built


def test_the_wheel_holds_every_module_and_nothing_else_at_top_level(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    expected = {str(f.relative_to(ROOT)) for f in (ROOT / "fewbit_fx").rglob("*.py")} | {"fewbit_fx/py.typed"}
    expected |= {f"fewbit_fx/{f.relative_to(ROOT)}" for f in (ROOT / "passes").rglob("*.py")}
    assert {n for n in names if ".dist-info/" not in n} == expected
    assert any(n.endswith("licenses/LICENSE") for n in names)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("before", ["", "import fewbit_fx"])
def test_the_backend_is_there_by_name(wheel: Path, tmp_path: Path, before: str) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", TRAIN.format(before=before)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) in done.stdout
    assert "values in 8 bits" in done.stdout


def test_the_core_needs_torch_and_numpy_only(wheel: Path) -> None:
    metadata = next(n for n in zipfile.ZipFile(wheel).namelist() if n.endswith("METADATA"))
    lines = zipfile.ZipFile(wheel).read(metadata).decode().splitlines()
    required = [line for line in lines if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert required == ["Requires-Dist: torch>=2.11", "Requires-Dist: numpy>=1.24"]
