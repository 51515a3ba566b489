"""Distributed training: two processes by torchrun, gloo on the CPU. What they do is in distributed_cases.py."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
ROUNDING = 1e-6  # relative, of float32: a rank sums over its part of the rows or columns, and then over the ranks

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="this torch has no gloo"
)


def torchrun(*arguments: str) -> str:
    """What two processes of a script print."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    environment |= {"TORCHINDUCTOR_COMPILE_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What each case found, by case and rank."""
    file = tmp_path_factory.mktemp("distributed") / "cases.json"
    torchrun(str(ROOT / "tests/distributed_cases.py"), str(file))
    found: dict[str, list[dict[str, Any]]] = json.loads(file.read_text())
    return found


def of_both(cases: dict[str, list[dict[str, Any]]], name: str) -> dict[str, Any]:
    """The facts of a case, which are the same on both ranks."""
    first, second = ({k: v for k, v in facts.items() if k != "seconds"} for facts in cases[name])
    assert "fault" not in first, first["fault"]
    assert first == second
    return first


# Bytes per rank that inductor holds for the backward, and fewbit; and the rounding of the gradients.
SETTINGS = {
    "ddp": (213_504, 35_328, 0.0),
    "ddp_around_compiled": (213_504, 35_328, 0.0),
    "ddp_buckets": (147_456, 37_888, 0.0),
    "ddp_batch_norm": (49_408, 8_960, 0.0),
    "fsdp_compiled_in_blocks": (213_504, 35_328, 0.0),
    "fsdp_compiled_whole": (213_504, 35_328, 0.0),
    "tensor_parallel_gelu": (49_152, 8_704, ROUNDING),
    "tensor_parallel_gated": (65_536, 13_056, ROUNDING),
    "sequence_parallel": (65_536, 13_056, ROUNDING),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_gradients_are_those_of_one_process_with_the_same_codes(cases: Any, name: str) -> None:
    assert of_both(cases, name)["error"] <= SETTINGS[name][2]


@pytest.mark.parametrize("name", SETTINGS)
def test_the_forward_is_bit_identical_to_inductors(cases: Any, name: str) -> None:
    facts = of_both(cases, name)
    assert facts["forward is identical"]
    assert facts["buffers are identical"]


@pytest.mark.parametrize("name", SETTINGS)
def test_each_rank_holds_what_is_reported_and_less_than_with_inductor(cases: Any, name: str) -> None:
    """Neither do parameters that FSDP gathers live on, for what it frees has no bytes."""
    facts = of_both(cases, name)
    assert (facts["inductor"], facts["held"]) == SETTINGS[name][:2]
    assert facts["reported"] == facts["held"]


@pytest.mark.parametrize("name", SETTINGS)
def test_parameters_are_not_coded(cases: Any, name: str) -> None:
    """Behind a DTensor torch 2.13 takes other inputs for them, so that they were."""
    assert not of_both(cases, name)["parameters are coded"]


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("tensor_parallel_gelu", {"all_reduce"}),
        ("tensor_parallel_gated", {"all_reduce"}),
        ("sequence_parallel", {"all_gather_into_tensor", "reduce_scatter_tensor"}),
    ],
)
def test_no_collective_runs_twice(cases: Any, name: str, kinds: set[str]) -> None:
    """Each of the joint graph is in the forward or in the backward graph, once."""
    facts = of_both(cases, name)
    joint = facts["collectives, joint"]
    assert joint.keys() == {f"_c10d_functional.{kind}.default" for kind in {*kinds, "wait_tensor"}}
    assert facts["collectives, cut"] == joint


def test_buckets_are_graphs_of_their_own_whose_exact_gradients_are_those_of_eager(cases: Any) -> None:
    facts = of_both(cases, "ddp_buckets")
    assert facts["graphs"] == 3
    assert facts["error of exact"] <= ROUNDING


@pytest.mark.parametrize("name", ["ddp_buckets_that_keep_what_they_return", "fsdp_blocks_that_keep_what_they_return"])
def test_what_another_bucket_or_block_keeps_is_not_coded(cases: Any, name: str) -> None:
    """A code would come to what is kept: 4,352 bytes."""
    facts = of_both(cases, name)
    assert facts["graphs"] == 2
    assert facts["held"] == facts["inductor"] == 49_152


def test_distributed_tensors_are_coded_and_exact_where_another_graph_keeps_them(cases: Any) -> None:
    facts = of_both(cases, "distributed_tensors")
    assert (facts["inductor"], facts["held"]) == (49_152, 14_720)
    assert facts["error of exact"] == 0
    assert 0 < facts["error"] < 0.01


def test_seeds_of_rounding_differ_by_rank(cases: Any) -> None:
    facts = of_both(cases, "stochastic_rounding")
    assert facts["again"], "the same rank and seed"
    assert facts["ranks alike nearest"] == [True, True], "the data are equal"
    assert facts["ranks alike at random"] == [False, False]


@pytest.mark.parametrize("name", ["verify_ddp", "verify_tensor_parallel"])
def test_verify_and_explain_find_what_they_find_in_one_process(cases: Any, name: str) -> None:
    facts, of_one = of_both(cases, name), of_both(cases, "verify_one_process")
    *_, errors = facts["verified"]
    before, after, identical, expected = of_one["verified"]
    assert errors == pytest.approx(expected, rel=1e-4)
    assert identical
    assert facts["verified"][2]
    assert facts["gradients"] == pytest.approx(of_one["gradients"], rel=1e-5), "of a step afterwards"
    if name == "verify_ddp":  # in tensor parallel a rank saves its part
        assert facts["verified"][:2] == [before, after]
        assert facts["explained"] == of_one["explained"]


def test_verify_says_that_it_is_for_models_that_are_not_sharded(cases: Any) -> None:
    facts, of_one = of_both(cases, "verify_fsdp"), of_both(cases, "verify_one_process")
    assert facts["verified"].endswith("verify it before it is sharded")
    assert facts["explained"] == of_one["explained"]
    assert facts["gradients"] == pytest.approx(of_one["gradients"], rel=1e-5), "of a step afterwards"


@pytest.mark.parametrize("mode", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_the_example_runs(mode: str) -> None:
    small = ["--width", "64", "--blocks", "1", "--steps", "2"]
    printed = torchrun(str(ROOT / "examples/distributed.py"), "--mode", mode, *small)
    losses = re.findall(r"rank (\d)  step (\d)  loss \d+\.\d+", printed)
    assert sorted(losses) == [("0", "0"), ("0", "1"), ("1", "0"), ("1", "1")]
    saved = re.findall(r"rank (\d)  saved: inductor ([\d,]+)  fewbit ([\d,]+) bytes", printed)
    (first, second) = sorted(saved)
    assert first[1:] == second[1:]
    assert int(first[2].replace(",", "")) < 0.5 * int(first[1].replace(",", ""))
