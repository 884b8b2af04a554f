"""Predicted memory and checkpoint sizes (l2e_ds.planning) against those of real runs on two ranks."""

import json
from pathlib import Path

import pytest

WORKER = Path(__file__).parent / "workers/memory_peaks.py"
MODEL = {"name": "pythia-14m", "vocab_size": 2048, "num_layers": 4, "hidden_size": 128, "num_heads": 4}


def case(output, stage, precision, micro_batch=8, accumulation=2, **sections):
    ds = {"bf16": {"enabled": "auto", "immediate_grad_update": True}, "zero_optimization": {"stage": stage}}
    if stage:  # as in ds_configs/, but for buckets that would be larger than the model
        ds["zero_optimization"] |= {"reduce_bucket_size": 200_000, "stage3_param_persistence_threshold": 0}
        ds["data_types"] = {"grad_accum_dtype": "fp32"}
    path = output / f"zero{stage}.json"
    path.write_text(json.dumps(ds))
    training = {"micro_batch": micro_batch, "global_batch": 2 * micro_batch * accumulation, "precision": precision}
    model = MODEL | sections.pop("model", {})
    inhibition = {"fused": sections.pop("fused", False)} | sections.pop("inhibition", {})
    return {
        "model": model,
        "training": training,
        "inhibition": inhibition,
        "deepspeed": {"config": str(path)},
        **sections,
    }


CASES = {  # stage, precision, and what else
    "zero0 in one step": (0, "fp32", {"accumulation": 1}),
    "zero1 with checkpointing": (1, "bf16", {"model": {"activation_checkpointing": True}}),
    "zero1 eager": (1, "fp32", {"model": {"attention": "eager"}}),
    "zero1 with Muon": (1, "bf16", {"optimizer": {"name": "muon"}}),
    "zero2 without inhibition": (2, "bf16", {"inhibition": {"method": "none"}}),
    "zero2, small vocabulary": (2, "bf16", {"micro_batch": 16, "model": {"vocab_size": 64}}),
    "zero2, small vocabulary, fused": (2, "bf16", {"micro_batch": 16, "model": {"vocab_size": 64}, "fused": True}),
    "zero2, logits in chunks": (2, "bf16", {"model": {"vocab_size": 4096}}),
    "zero3": (3, "bf16", {}),
}


@pytest.fixture(scope="module")
def found(run_ranks, tmp_path_factory):
    output = tmp_path_factory.mktemp("peaks")
    cases = {name: case(output, stage, precision, **other) for name, (stage, precision, other) in CASES.items()}
    (output / "cases.json").write_text(json.dumps(cases))
    for name in cases:
        run_ranks(2, WORKER, output, name)
    return {name: [json.loads((output / f"{name}-rank{rank}.json").read_text()) for rank in (0, 1)] for name in cases}


@pytest.mark.full
@pytest.mark.parametrize("name", CASES)
def test_peak_within_a_tenth(found, name):
    for rank in found[name]:
        assert rank["predicted"] == pytest.approx(rank["peak"], rel=0.1), rank


@pytest.mark.full
@pytest.mark.parametrize("name", CASES)
def test_checkpoint_size_within_a_tenth(found, name):
    main = found[name][0]
    assert main["predicted_checkpoint"] == pytest.approx(main["checkpoint"], rel=0.1), main
