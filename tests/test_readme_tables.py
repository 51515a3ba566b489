"""The README's tables are what the files in bench/results say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from bench.readme_tables import README, TEXTS, render
from bench.result_file import File

OLD = {"device": "CPU x86_64, 2 cores, 2 threads", "torch": "2.13.0+cpu", "date": "2026-11-24"}
NEW = {**OLD, "commit": "abc1234", "device": "AMD EPYC, 2 cores, 2 threads", "date": "2026-11-26"}


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_texts_have_the_tables_that_the_results_give(path: Path) -> None:
    text = path.read_text()
    assert text == render(text), f"{path.name} and bench/results disagree: run `make results`"


def test_the_readme_has_both_tables() -> None:
    text = README.read_text()
    assert "<!-- results: demo cpu -->" in text
    assert "<!-- results: speed cpu -->" in text


def write(folder: Path, name: str, conditions: Mapping[str, str], **data: Any) -> None:
    about = {"settings": "", **conditions}
    command = f"python -m bench.x --seconds 8 --output somewhere/{name}"
    (folder / f"{name}.json").write_text(json.dumps({"command": command, "conditions": about, **data}))


def write_demo(
    folder: Path, bits: int, conditions: Mapping[str, str], steps: int = 400, lora: bool = False, **step: Any
) -> None:
    """A run that held 80 MiB under inductor, and 40 and as many as bits under fewbit; losses of 2 and 2.5."""
    results = {
        backend: {"held_bytes": held * 2**20, "validation_loss": loss, **step.get(backend, {"timing": None})}
        for backend, held, loss in (("inductor", 80, 2.0), ("fewbit", 40 + bits, 2.5))
    }
    write(
        folder,
        f"demo_cpu_{bits}bit{'_lora' * lora}",
        {**conditions, "settings": f"bits {bits}, steps {steps}, device cpu, lora {lora}, batch 4 x 256"},
        results=results,
        first_step={"gradient_error": 0.2},
    )


def table(folder: Path, name: str) -> list[str]:
    """The lines that a table's name is replaced by, without the markers."""
    before, *lines, after = render(f"<!-- results: {name} cpu -->\nold\n<!-- end of results -->", folder).split("\n")
    assert (before, after) == (f"<!-- results: {name} cpu -->", "<!-- end of results -->")
    return [line for line in lines if line]


def test_old_and_new_files_of_the_demo_make_one_table(tmp_path: Path) -> None:
    milliseconds = {"inductor": {"step_ms": 200.0}, "fewbit": {"step_ms": 180.0}}
    timings = {"inductor": {"timing": {"ratio": 1.0}}, "fewbit": {"timing": {"ratio": 0.75}}}
    write_demo(tmp_path, 2, OLD, **milliseconds)
    write_demo(tmp_path, 3, NEW, **timings)
    write_demo(tmp_path, 3, NEW, lora=True, **timings)
    assert table(tmp_path, "demo")[2:] == [
        "| inductor | 80.0 MiB | 2.000 |  | exact |",
        "| **3 (default)** | **43.0 MiB (-46.2 %)** | **+25.00 %** | **x 0.75** | **20 %** |",
        "| 2 | 42.0 MiB (-47.5 %) | +25.00 % | x 0.90 | 20 % |",
        "| LoRA, inductor | 80.0 MiB | 2.000 |  | exact |",
        "| LoRA, 3 | 43.0 MiB (-46.2 %) | +25.00 % | x 0.75 | 20 % |",
        "<sub>AMD EPYC, 2 cores, 2 threads and CPU x86_64, 2 cores, 2 threads; torch 2.13.0+cpu; "
        "2026-11-24 and 2026-11-26; commit abc1234 and not recorded; 400 steps.</sub>",
    ]


def write_recipe(folder: Path, model: str, recipe: str, held: int, ratio: float, seed: int = 0) -> None:
    """A run that held 80 MiB under inductor, 60 within its budget."""
    results = {
        backend: {"held_bytes": held * 2**20, "validation_loss": loss, "timing": {"ratio": ratio}}
        for backend, held, loss, ratio in (
            ("inductor", 80, 2.0, 1.0),
            ("budget_0.9", 60, 2.0, ratio + 0.1),
            ("fewbit", held, 2.02, ratio),
        )
    }
    settings = f"model {model}, recipe {recipe}, bits 3, steps 400, seed {seed}, device cpu, dtype float32, lora False"
    conditions = {**NEW, "settings": settings}
    name = f"demo_cpu_{model}_{recipe}_{seed}"
    write(folder, name, conditions, results=results, first_step={"gradient_error": 0.01})


def test_recipes_stand_beside_inductors_leaner_cut(tmp_path: Path) -> None:
    write_demo(tmp_path, 3, NEW, fewbit={"timing": {"ratio": 0.9}})
    write_recipe(tmp_path, "gpt", "lean", 20, 1.2)
    write_recipe(tmp_path, "gpt", "default", 40, 1.1)
    write_recipe(tmp_path, "llama", "default", 30, 1.0)
    write_recipe(tmp_path, "llama", "default", 30, 1.0, seed=1)
    assert table(tmp_path, "demo")[:-1] == [
        "| recipe | saved for backward | validation loss | median step | error of the first gradient |",
        "| --- | --- | --- | --- | --- |",
        "| inductor | 80.0 MiB | 2.000 |  | exact |",
        "| inductor, budget 0.9 | 60.0 MiB (-25.0 %) | +0.00 % | x 1.20, x 1.30 | exact |",
        "| **3 (default)** | **43.0 MiB (-46.2 %)** | **+25.00 %** | **x 0.90** | **20 %** |",
        "| **default** | **40.0 MiB (-50.0 %)** | **+1.00 %** | **x 1.10** | **1.0 %** |",
        "| lean | 20.0 MiB (-75.0 %) | +1.00 % | x 1.20 | 1.0 % |",
        "| Llama, inductor | 80.0 MiB | 2.000 |  | exact |",
        "| Llama, inductor, budget 0.9 | 60.0 MiB (-25.0 %) | +0.00 % | x 1.10 | exact |",
        "| Llama, default | 30.0 MiB (-62.5 %) | +1.00 % | x 1.00 | 1.0 % |",
        "| Llama, default, seed 1 | 30.0 MiB (-62.5 %) | +1.00 % | x 1.00 | 1.0 % |",
    ]


def write_convergence(folder: Path, name: str, losses: dict[str, list[float]]) -> None:
    runs = [
        {"recipe": recipe, "seed": seed, "validation_loss": loss}
        for recipe, values in losses.items()
        for seed, loss in enumerate(values)
    ]
    conditions = {**NEW, "settings": "model llama, steps 400, dtype float32, batch 4"}
    write(folder, f"convergence_cpu_{name}", conditions, runs=runs)


def test_of_two_trainings_by_a_recipe_the_last_file_counts(tmp_path: Path) -> None:
    write_convergence(tmp_path, "llama", {"inductor": [2.0, 2.2], "lean": [3.0, 3.0]})
    write_convergence(tmp_path, "llama_lean", {"inductor": [2.0, 2.2], "lean": [2.2, 2.3]})
    *rows, about = table(tmp_path, "convergence")
    assert rows == [
        "| validation loss after training | mean | least to most | mean against inductor |",
        "| --- | --- | --- | --- |",
        "| llama, inductor | 2.100 | 2.000 to 2.200 |  |",
        "| llama, lean | 2.250 | 2.200 to 2.300 | +7.14 % |",
    ]
    assert about.endswith("400 steps, 2 seeds, float32.</sub>")


def test_a_short_run_has_neither_loss_nor_time(tmp_path: Path) -> None:
    write_demo(tmp_path, 2, OLD, inductor={"step_ms": 200.0}, fewbit={"step_ms": 180.0})
    write_demo(tmp_path, 1, OLD, steps=3, inductor={"step_ms": 200.0}, fewbit={"step_ms": 9.0})
    *_, short, about = table(tmp_path, "demo")
    assert short == "| 1 | 41.0 MiB (-48.8 %) | - | - | 20 % |"
    assert about.endswith("400 steps (row 1: 3 steps, too few for a loss and a time).</sub>")


def test_an_interrupted_run_shows_what_it_has(tmp_path: Path) -> None:
    write_demo(tmp_path, 1, NEW)
    file = tmp_path / "demo_cpu_1bit.json"
    data = json.loads(file.read_text())
    data["results"]["fewbit"].update(held_bytes=None, validation_loss=None)
    file.write_text(json.dumps({**data, "first_step": {}}))
    assert table(tmp_path, "demo")[-2] == "| 1 | - | - | - | - |"


def operator(name: str, ratio: float, saved: str, bits: int = 3, numel: int = 2**22) -> dict[str, Any]:
    timed = {"both": {"timing": {"ratio": ratio}}}
    return {
        "operator": name,
        "dtype": "bfloat16",
        "numel": numel,
        "backend": "fewbit",
        "bits": bits,
        "saved": [saved],
    } | timed


def test_the_latest_file_counts(tmp_path: Path) -> None:
    old = [operator("tanh", 1.2, "tanh: coded in 3 bits"), operator("gelu", 0.8, "gelu: coded in 3 bits")]
    new = [operator("tanh", 1.0, "tanh: left exact, because inductor saves its output")]
    write(tmp_path, "operator_z_cpu", OLD, rows=old)
    write(tmp_path, "operator_cpu", NEW, rows=new)
    *rows, about = table(tmp_path, "speed")[2:]
    assert rows == [
        "| tanh, 4 Mi elements, left exact |  | 1.00 | `python -m bench.x --seconds 8` |",
        "| GELU, 4 Mi elements, coded in 3 bits |  | 0.80 |  |",
    ]
    assert "2026-11-24 and 2026-11-26; commit abc1234 and not recorded" in about


def test_operators_at_other_bits_and_sizes_have_no_row(tmp_path: Path) -> None:
    rows = [
        operator("gelu", 0.5, "gelu: coded in 2 bits", bits=2),
        operator("gelu", 0.6, "gelu: coded in 3 bits", numel=2**16),
        operator("relu+dropout", 0.3, "dropout: exact one-bit mask", bits=1),
    ]
    write(tmp_path, "operator_cpu", NEW, rows=rows)
    (row,) = table(tmp_path, "speed")[2:-1]
    assert row.startswith("| ReLU + dropout, 4 Mi elements, exact one-bit mask |  | 0.30 |")


def test_blocks_steps_and_compilations_have_rows(tmp_path: Path) -> None:
    case = {"block": "mlp", "training": "full", "dtype": "float32", "batch": 4, "context": 256, "width": 64}
    blocks = [
        {"case": case | {"batch": batch}, "backend": backend, "timing": {"ratio": ratio}}
        for batch, backend, ratio in ((4, "inductor", 1.0), (4, "fewbit", 0.9), (16, "fewbit", 0.8))
    ]
    settings = {"model": "gpt", "layers": 4, "batch": 2, "sequence": 64, "bits": 3, "dtype": "float32", "lora": True}
    timings = {"timings": {"fewbit": {"ratio": 0.7}}}
    write(tmp_path, "block_cpu", NEW, bits=3, rows=blocks)
    write(tmp_path, "step_lora_cpu", NEW, settings=settings, results=timings)
    write(tmp_path, "step_2bit_cpu", NEW, settings=settings | {"bits": 2}, results=timings)
    write(tmp_path, "step_lora_cuda", NEW, settings=settings, results=timings)
    recipe = {"timings": {"fewbit": {"ratio": 1.2}, "budget_0.9": {"ratio": 1.1}}}
    of_llama = settings | {"model": "llama", "recipe": "lean", "lora": False}
    write(tmp_path, "step_llama_cpu", NEW, settings=of_llama, results=recipe)
    compilation = {"layers": 2, "pass_s": 0.25, "fewbit_s": 10.0, "ratio": 1.1}
    write(tmp_path, "compile_time_cpu", NEW, settings={"bits": 3}, rows=[compilation])
    compilation = {"layers": 8, "pass_s": 1.0, "fewbit_s": 20.0, "ratio": 1.3, "budget_ratio": 1.12}
    write(tmp_path, "compile_time_lean_cpu", NEW, settings={"bits": 3, "recipe": "lean"}, rows=[compilation])
    assert [row.split(" | ")[:2] for row in table(tmp_path, "speed")[2:-1]] == [
        ["| MLP block, 4 x 256 x 64, trained", "0.90"],
        ["| training step of the demo's Llama, 4 layers, 2 x 64, recipe lean, 1.10 with inductor, budget 0.9", "1.20"],
        ["| training step of the demo's GPT, 4 layers, 2 x 64, LoRA", "0.70"],
        ["| cold compilation, 2 layers, 2 % of it in fewbit's passes", "1.10"],
        [
            "| cold compilation, 8 layers, recipe lean, 1.12 with inductor, budget 0.9; 5 % of it in fewbit's passes",
            "1.30",
        ],
    ]


def test_saved_bytes_of_one_model_alone_have_the_means_that_there_are(tmp_path: Path) -> None:
    """As ``--only`` makes them."""
    recipes = {name: {"saved_bytes": 2**20, "codes_error": 0.01} for name in ("exact", "default", "lean")}
    sizes = {"inductor_bytes": 2 * 2**20, "budget_bytes": 2**20, "recipes": recipes}
    write(tmp_path, "saved_cpu", {**NEW, "settings": "dtype bfloat16"}, rows=[sizes | {"name": "X", "group": "other"}])
    assert len(table(tmp_path, "saved")) == 3, "a head, no row that is shown, and the conditions"
    of_vit = sizes | {"name": "ViT", "group": "transformer"}
    write(tmp_path, "saved_cpu", {**NEW, "settings": "dtype bfloat16"}, rows=[of_vit])
    _, _, row, mean, _ = table(tmp_path, "saved")
    assert row == "| ViT | 2.0 MiB | -50 % | -50 % (1.0 %) | -50 % (1.0 %) | -50 % (1.0 %) |"
    assert mean == "| mean of 1 transformers |  | -50 % | -50 % | -50 % | -50 % |"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- results: demo cpu -->\n", "a marker is not of the form"),
        ("<!-- results: -->\n<!-- end of results -->", "a marker is not of the form"),
        (
            "<!-- results: memory cpu -->\n<!-- end of results -->",
            "no table 'memory'; allowed is demo or bias or convergence or saved or patterns or evidence_memory or",
        ),
        ("<!-- results: demo cuda -->\n<!-- end of results -->", "no file in .* is named demo_cuda_"),
    ],
)
def test_a_marker_that_makes_no_table(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        render(text, tmp_path)


def test_text_around_tables_stays_as_it_is(tmp_path: Path) -> None:
    write_demo(tmp_path, 3, NEW)
    once = render("before\n<!-- results: demo cpu -->\n<!-- end of results -->\nafter\n", tmp_path)
    assert once.startswith("before\n<!-- results: demo cpu -->\n| bits |")
    assert once.endswith("</sub>\n<!-- end of results -->\nafter\n")
    assert render(once, tmp_path) == once


def test_a_setting_that_a_file_lacks() -> None:
    with pytest.raises(ValueError, match="no steps in its settings, 'bits 3'"):
        File("demo", {"conditions": {"settings": "bits 3"}}).setting("steps")
