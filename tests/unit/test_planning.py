"""`l2e-ds plan` against DeepSpeed's estimators, real networks and what autograd really keeps."""

import copy
import json
import shutil

import pytest
import torch
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
from transformers import AutoModelForCausalLM, GPTNeoXConfig

from l2e_ds.checkpoint.disk import checkpoint_bytes, disk_space
from l2e_ds.cli import main
from l2e_ds.config.reading import load_run_config
from l2e_ds.config.sections import ModelConfig
from l2e_ds.errors import ConfigError
from l2e_ds.inhibition import Inhibitor, Settings
from l2e_ds.models.pythia import PYTHIA, network_config
from l2e_ds.models.sites import neuron_sites
from l2e_ds.planning import memory, plan
from l2e_ds.planning.work import Work, inhibition_payload, mfu_range, ring_all_reduce, step_flops, traffic
from l2e_ds.system.gpus import GPUS, peak_tflops
from l2e_ds.training import preflight
from l2e_ds.training.loss import LossHead
from l2e_ds.training.preflight import resolve_run

TINY = ["model.vocab_size=512", "model.num_layers=3", "model.hidden_size=64", "model.num_heads=4"]
TINY += ["data.sequence_length=64", "training.global_batch=24", "training.micro_batch=2"]


@pytest.fixture
def run_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: {name: pythia-14m}\ndata: {source: indexed, path: nowhere}\ntraining: {steps: 9, global_batch: 1024}\n"
    )
    return path


def work_of(run_file, *overrides, ranks=1):
    return Work(resolve_run(run_file, overrides, ranks, has_bf16=True))


def replace(work, **changes):
    changed = copy.copy(work)
    vars(changed).update(changes)
    return changed


# --- model states -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PYTHIA)
def test_parameters_are_those_of_the_published_networks(run_file, name):
    published = {"pythia-70m": 70_426_624, "pythia-410m": 405_334_016, "pythia-2.8b": 2_775_208_960}
    published |= {"pythia-160m": 162_322_944, "pythia-1b": 1_011_781_632, "pythia-1.4b": 1_414_647_808}
    published |= {"pythia-6.9b": 6_857_302_016, "pythia-12b": 11_846_072_320}  # Biderman et al. 2023, table 1
    size, count = PYTHIA[name], work_of(run_file, f"model.name={name}").parameters
    h, layers = size.hidden, size.layers
    by_hand = 2 * size.vocabulary * h + layers * (12 * h * h + 13 * h) + 2 * h
    assert count == by_hand == published.get(name, by_hand)


@pytest.mark.parametrize("ranks", [1, 8, 64, 1024])
@pytest.mark.parametrize("name", PYTHIA)
def test_zero_states_against_deepspeeds_estimators(run_file, name, ranks):
    nodes, of_node = max(1, ranks // 8), min(ranks, 8)
    common = [f"model.name={name}", "training.micro_batch=1", "training.precision=bf16"]
    for stage in (2, 3):
        work = work_of(run_file, *common, f"deepspeed.config=ds_configs/zero{stage}.json", ranks=ranks)
        p, states = work.parameters, memory.model_states(work, ranks)
        mine = states.weights + states.gradients + states.optimizer
        if stage == 2:
            theirs = estimate_zero2_model_states_mem_needs(p, of_node, nodes, cpu_offload=False)[1]
            assert mine == pytest.approx(theirs, rel=0.1)
            mine += 2 * p / ranks  # it counts a partition of 16-bit gradients, which here are in the bucket (`buffers`)
        else:
            theirs = estimate_zero3_model_states_mem_needs(p, 0, of_node, nodes, False, False)[1]
        assert mine == pytest.approx(theirs, abs=4)


@pytest.mark.parametrize("ranks", [1, 8, 64])
def test_offloaded_states_leave_the_gpu(run_file, ranks):
    common = ["model.name=pythia-1b", "training.precision=bf16"]
    for name, on_gpu in (("zero2_offload", lambda p: 2 * p), ("zero3_offload", lambda p: 0)):
        work = work_of(run_file, *common, f"deepspeed.config=ds_configs/{name}.json", ranks=ranks)
        states, p = memory.model_states(work, ranks), work.parameters
        assert states.weights + states.gradients + states.optimizer == on_gpu(p)
        assert states.host * ranks == pytest.approx(p * (12 + 4 + 2))  # states, gradients, 16-bit weights


def test_what_each_precision_and_stage_keeps(run_file):
    """Compare with the bytes a parameter on 4 ranks, written out from DeepSpeed's source (docs/planning.md)."""
    expected = {  # weights, gradients, optimizer
        ("zero0", "fp32"): (4, 4, 8),
        ("zero0", "bf16"): (2, 2, 12),
        ("zero1", "fp32"): (4, 4, 12 / 4),
        ("zero1", "bf16"): (2, 4, 12 / 4),  # BF16_Optimizer, with immediate_grad_update
        ("zero1", "fp16"): (2, 4, 12 / 4),
        ("zero2", "bf16"): (2, 4 / 4, 12 / 4),
        ("zero3", "fp16"): (2 / 4, 4 / 4, 12 / 4),
    }
    for (stage, precision), each in expected.items():
        work = work_of(
            run_file, f"deepspeed.config=ds_configs/{stage}.json", f"training.precision={precision}", ranks=4
        )
        states = memory.model_states(work, 4)
        assert (states.weights, states.gradients, states.optimizer) == pytest.approx(
            [n * work.parameters for n in each]
        )


def test_moments_of_each_optimizer(run_file):
    """Of pythia-14m: Muon keeps one float32 less for 6 layers of 12 h^2, 8-bit AdamW one byte for each float32."""
    of = ["deepspeed.config=ds_configs/zero1.json", "training.precision=bf16"]
    adam, muon, compressed = (
        resolve_run(run_file, [*of, f"optimizer.name={name}"], 4, has_bf16=True)
        for name in ("adamw", "muon", "adamw-8bit")
    )
    p = Work(adam).parameters
    for run, saved in ((muon, 4 * 6 * 12 * 128**2), (compressed, 6 * p)):
        assert preflight.checkpoint_size(adam) - preflight.checkpoint_size(run) == saved
        found = memory.model_states(Work(run), 4).optimizer
        assert found == pytest.approx(memory.model_states(Work(adam), 4).optimizer - saved / 4)


# --- activations ----------------------------------------------------------------------------------------------------


def kept_for_backward(work, checkpointing, settings=None):
    """Return the bytes that autograd keeps of a real forward pass and its loss on the CPU, each storage once, without
    weights."""
    overrides = {"vocab_size": work.vocabulary, "num_layers": work.layers, "hidden_size": work.hidden}
    config = ModelConfig(name="pythia-14m", num_heads=work.heads, **overrides)
    hf_config = network_config(config, work.sequence_length)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[work.precision]
    model = AutoModelForCausalLM.from_config(hf_config, attn_implementation=work.attention, dtype=dtype).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address is used twice
        return tensor

    tokens = torch.randint(work.vocabulary, (2, work.sequence_length + 1))
    if settings is not None:
        Inhibitor(neuron_sites(model, "mid-2"), settings).attach()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        LossHead(model).loss(model, tokens[:, :-1], tokens[:, 1:])
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_autograd_keeps(run_file, precision, attention, checkpointing):
    words = [f"training.precision={precision}", f"model.attention={attention}"]
    work = work_of(run_file, *TINY, *words, f"model.activation_checkpointing={str(checkpointing).lower()}")
    log_probabilities = memory.logits_bytes(work, 2) / 3  # of the three float32 [M, V], cross-entropy keeps one
    predicted = memory.stored_activation_bytes(work, 2) + log_probabilities
    assert predicted == pytest.approx(kept_for_backward(work, checkpointing), rel=0.03)


def test_l2e_keeps_nothing_that_grows_with_tokens_and_memel_one_byte(run_file):
    work = work_of(run_file, *TINY, "training.precision=bf16", "inhibition.method=none")
    plain = kept_for_backward(work, False)
    assert kept_for_backward(work, False, Settings()) == plain
    memel = kept_for_backward(work, False, Settings(retrieval="top-k", mechanism="reverse-deactivation"))
    states = work_of(run_file, *TINY, "training.precision=bf16", "inhibition.method=memel")
    of_mask = memory.memory(states, 1, 2, 12).inhibition - memory.inhibition_state_bytes(states)
    assert memel - plain == of_mask == 2 * (2 * 64) * 256


def test_inhibition_state_is_that_of_a_real_inhibitor(run_file):
    work = work_of(run_file, *TINY)
    model = AutoModelForCausalLM.from_config(
        network_config(ModelConfig(name="pythia-14m", num_layers=3, hidden_size=64, num_heads=4, vocab_size=512), 64)
    )
    inhibitor = Inhibitor(neuron_sites(model, "mid-2"))
    kept = [inhibitor._packed]
    for hook in inhibitor.hooks:
        everything = [hook.variance_at_start, hook.kept_pull, hook.projection_sums, hook.running.selected]
        everything += [*vars(hook.running.moments).values(), *vars(hook.step_statistics).values()]
        kept += [tensor for tensor in everything if tensor.numel() > 1]
    assert memory.inhibition_state_bytes(work) == sum(t.numel() * t.element_size() for t in kept)
    written = [tensor for name, tensor in inhibitor.state_dict().items() if name.startswith("layers.")]
    assert checkpoint_bytes(0, 0, 0, 4, 2, work.neurons) == sum(t.numel() * t.element_size() for t in written)
    once = inhibitor._packed.numel() + inhibitor.coefficients.squares.numel()
    projections = 5 * sum(hook.projection_sums.numel() for hook in inhibitor.hooks)
    assert inhibition_payload(work, 5) == (once + projections) * 8


# --- micro-batch, traffic, time -------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpu", ["L4", "A100-40GB", "H200"])
@pytest.mark.parametrize("ranks", [1, 6, 64])
def test_largest_micro_batch_is_the_largest(run_file, gpu, ranks):
    work = work_of(run_file, "model.name=pythia-160m", f"training.global_batch={ranks * 24}", ranks=ranks)
    usable = GPUS[gpu].memory * memory.GIB * plan.USABLE_MEMORY
    found = memory.largest_micro_batch(work, ranks, ranks * 24, usable)

    def fits(micro_batch):
        return memory.memory(work, ranks, micro_batch, 24 // micro_batch).total <= usable

    assert found == max(m for m in (1, 2, 3, 4, 6, 8, 12, 24) if fits(m))


def test_largest_micro_batch_at_the_very_limit(run_file):
    work = work_of(run_file, "model.name=pythia-160m")
    needed = memory.memory(work, 1, 16, 64).total
    assert memory.largest_micro_batch(work, 1, 1024, needed) == 16
    assert memory.largest_micro_batch(work, 1, 1024, needed - 1) == 8
    assert memory.largest_micro_batch(work, 1, 1024, 1e6) is None


def test_ring_all_reduce_by_walking_the_ring():
    for ranks in (1, 2, 5, 8):
        chunks = [[1.0] * ranks for _ in range(ranks)]  # rank, chunk: 1 where it holds its own part only
        sent = 0
        for phase in (0, 1):
            for hop in range(ranks - 1):
                before = [row[:] for row in chunks]
                for rank in range(ranks):
                    chunk = (rank - hop + phase) % ranks
                    target = chunks[(rank + 1) % ranks]
                    target[chunk] = before[rank][chunk] + (0 if phase else before[(rank + 1) % ranks][chunk])
                    sent += rank == 0
        assert all(value == ranks for row in chunks for value in row)
        assert ring_all_reduce(ranks * 10, ranks) == pytest.approx(sent * 10)


def test_traffic_follows_stage_accumulation_and_reduce(run_file):
    work = replace(work_of(run_file, "inhibition.loss=published", ranks=4), element=2, communication=2)
    size = 2 * work.parameters
    expected = {0: (1.5, 0), 1: (1.5, 0.75), 2: (1.5 * 8, 0.75), 3: (0.75 * 8, 1.5 * 8)}
    for stage, (gradients, weights) in expected.items():
        sent = traffic(replace(work, stage=stage), 4, 8)
        assert (sent.gradients, sent.weights) == pytest.approx((gradients * size, weights * size))
    step, forward, exact = (
        inhibition_payload(replace(work, collectives=kind), 8) for kind in ("step", "forward", "forward-exact")
    )
    n = work.neurons
    assert step == 2 * (3 * n + 3 + 2) * 8
    assert forward == step + 16 * (2 * n + 1) * 8
    assert exact == forward + 16 * (3 * n + 1) * 8
    projected = inhibition_payload(replace(work, projected=True), 8)
    assert projected == step + 8 * 2 * (4 * n + 1) * 8
    deactivated = inhibition_payload(replace(work, deactivation=True), 8)
    assert deactivated == 2 * (3 * n + 3) * 8
    assert inhibition_payload(replace(work, collectives="none"), 8) == 0


def test_operations_with_a_tied_output_matrix(run_file, tmp_path):
    """The same products are computed, with activation checkpointing, too."""
    flops = []
    for tied in (False, True):
        config = GPTNeoXConfig(hidden_size=128, num_hidden_layers=6, num_attention_heads=4, intermediate_size=512)
        (tmp_path / f"{tied}.json").write_text(json.dumps(config.to_dict() | {"tie_word_embeddings": tied}))
        own = ["model.name=null", f"model.config={tmp_path}/{tied}.json", "optimizer.peak_learning_rate=1e-3"]
        flops.append(
            [step_flops(work_of(run_file, *own, f"model.activation_checkpointing={a}"), 8) for a in ("false", "true")]
        )
    assert flops[0] == flops[1]


def test_operations_of_a_step(run_file):
    work = work_of(run_file, "model.name=pythia-1b", "training.precision=bf16")
    flops = (6 * (work.parameters - 50304 * 2048) + 6 * 16 * 2048 * 2048) * 1024 * 2048
    assert step_flops(work, 1024) == pytest.approx(flops)
    assert 1.25 < step_flops(replace(work, checkpointing=True), 1024) / flops < 4 / 3


def test_time_is_operations_over_speed(run_file, capsys):
    words = ["model.name=pythia-1b", "training.precision=bf16", "--gpus", "8", "--gpu", "A100-80GB", "--mfu", "0.5"]
    assert main(["plan", str(run_file), *words]) == 0
    output = capsys.readouterr().out
    step = step_flops(work_of(run_file, *words[:2], ranks=8), 1024) / (8 * 312e12 * 0.5)
    assert f"step          {step:,.2f} s, {1024 * 2048 / step:,.0f} tokens/s" in output
    assert f"run           9 steps, {9 * 1024 * 2048:,} tokens: {9 * step / 86400:,.2f} days" in output


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpus", [1, 8, 128, 10_000])
def test_prints_every_part(run_file, gpus, capsys):
    words = [f"training.global_batch={gpus * 4}", "--gpus", str(gpus), "--gpu", "h100", "--mfu", "0.37"]
    assert main(["plan", str(run_file), *words]) == 0
    output = capsys.readouterr().out
    for part in (
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "logits",
        "inhibition",
        "total",
        "largest micro-batch",
    ):
        assert part in output
    for word in (
        "bf16",
        "step ",
        "days",
        "GPU-hours",
        "traffic",
        "checkpoints   1 kept, ",
        "37% of 989.4",
        "predicted, not measured",
    ):
        assert word in output


@pytest.mark.parametrize("parameters", [70e6, 160e6, 410e6, 1.4e9, 12e9])
def test_share_of_the_peak_is_lower_for_small_models_and_on_fast_gpus(parameters):
    for gpu in ("A100-80GB", "H100"):
        low, high = mfu_range(parameters, GPUS[gpu].peak)
        assert 0 < low < high < 1
        larger = mfu_range(2.5 * parameters, GPUS[gpu].peak)
        assert low <= larger[0] and high <= larger[1]
    assert mfu_range(parameters, GPUS["H200"].peak) < mfu_range(parameters, GPUS["L40S"].peak)


def test_the_peak_of_a_device_is_that_of_its_precision(monkeypatch):
    device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    peaks = [peak_tflops(device, precision, None) for precision in ("fp32", "bf16", "fp16")]
    assert peaks == [GPUS["H100"].peak_fp32, GPUS["H100"].peak, GPUS["H100"].peak]
    assert peak_tflops(device, "fp32", 500.0) == 500.0
    assert peak_tflops(torch.device("cpu"), "fp32", None) is None


def test_time_is_a_range_without_a_given_share(run_file, capsys):
    words = ["model.name=pythia-1b", "training.precision=bf16", "training.steps=9000", "--gpus", "8"]
    assert main(["plan", str(run_file), *words, "--gpu", "A100-80GB"]) == 0
    output = capsys.readouterr().out
    flops = step_flops(work_of(run_file, *words[:2], ranks=8), 1024)
    fast, slow = (flops / (8 * 312e12 * share) for share in (0.56, 0.32))
    assert f"step          {fast:,.2f} s to {slow:,.2f} s, " in output
    assert f": {9000 * fast / 86400:,.2f} to {9000 * slow / 86400:,.2f} days" in output
    assert "32% to 56% of 312 TFLOP/s in a step (published of other programs, not measured by this project" in output


@pytest.mark.parametrize(
    ("known", "written"),
    [
        ("H100", ["H100-80GB", "h100-sxm", "H100-SXM5-80GB", "NVIDIA H100 80GB HBM3", "H100 SXM"]),
        ("H100-PCIe", ["NVIDIA H100 PCIe", "H100-80GB-PCIe"]),
        ("H100-NVL", ["NVIDIA H100 NVL", "H100-NVL-94GB"]),
        ("H200", ["NVIDIA H200", "H200-141GB", "H200-SXM"]),
        ("A100-80GB", ["NVIDIA A100-SXM4-80GB", "A100 80GB PCIe", "a100_80gb", "A100-80G"]),
        ("A100-40GB", ["NVIDIA A100-PCIE-40GB", "A100-40GB-SXM4"]),
        ("V100-32GB", ["Tesla V100-SXM2-32GB", "Tesla V100-PCIE-32GB", "V100-32GB"]),
        ("V100-16GB", ["Tesla V100-PCIE-16GB"]),
        ("H200-NVL", ["NVIDIA H200 NVL"]),
        ("RTX-4090", ["NVIDIA GeForce RTX 4090", "4090"]),
        ("L4", ["NVIDIA L4"]),
    ],
)
def test_gpus_by_the_names_that_people_write(known, written):
    assert {plan.find_gpu(name)[0] for name in [*written, known]} == {known}


def test_each_gpu_has_its_own_names():
    assert [plan.find_gpu(name)[0] for name in GPUS] == list(GPUS)
    for name in ("A100", "V100", "H1000", "A10G", "L40", ""):  # of two sizes, or of other chips
        with pytest.raises(ConfigError, match=f"--gpu: got '{name}', allowed: B200, .*H100, .*RTX-4090"):
            plan.find_gpu(name)


# --- disk -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "line"),
    [
        ({}, "14 kept, 100.0 MB each: 1.4 GB on disk"),
        ({"early": True}, "25 kept, 100.0 MB each: 2.5 GB on disk"),
        ({"keep_last": 3}, "3 of 14 kept, 100.0 MB each: 300.0 MB on disk, 400.0 MB while one is written"),
        ({"keep_last": 14}, "14 kept, 100.0 MB each: 1.4 GB on disk"),
        ({"every": 0, "keep_last": 2}, "1 kept, 100.0 MB each: 100.0 MB on disk"),
    ],
)
def test_disk_space_of_what_is_kept(run_file, tmp_path, section, line):
    words = [f"checkpoint.{key}={str(value).lower()}" for key, value in section.items()]
    config = load_run_config(run_file, ["training.steps=13500", f"training.run_directory={tmp_path}/run", *words])
    assert disk_space(config, 100_000_000) == (line, None)


def test_a_disk_that_is_too_small_is_said(run_file, tmp_path, capsys):
    free = shutil.disk_usage(tmp_path).free
    words = ["training.steps=13500", f"training.run_directory={tmp_path}/run"]
    config = load_run_config(run_file, words)
    assert disk_space(config, free // 15)[1] is None
    _, warning = disk_space(config, free // 13)
    assert warning.startswith(f"the disk of {tmp_path}/run on this machine has only ")
    assert warning.endswith("checkpoint.keep_last=N keeps only the N newest")
    # what is there already will be overwritten or removed: it counts as room
    (tmp_path / "run/checkpoints/step00001000").mkdir(parents=True)
    with (tmp_path / "run/checkpoints/step00001000/states.pt").open("wb") as file:
        file.truncate(free // 10)  # takes no room
    assert disk_space(config, free // 13)[1] is None
    kept = load_run_config(run_file, [*words, "checkpoint.keep_last=1"])
    assert disk_space(kept, free)[1].endswith("; give another run directory")

    # both commands print the same line and the same warning
    words += ["model.name=pythia-12b", "training.precision=bf16", "checkpoint.every=1"]
    assert main(["plan", str(run_file), *words, "--gpus", "8", "--gpu", "H100-80GB"]) == 0
    planned = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    dry_run = preflight.describe(resolve_run(run_file, words, 8, has_bf16=True))
    dry = [" ".join(line.split()) for line in dry_run.splitlines()]
    for label in ("checkpoints ", "warning "):
        (line,) = [line for line in planned if line.startswith(label)]
        assert line in dry


def test_micro_batch_auto_is_the_largest_that_fits(run_file, capsys):
    words = [str(run_file), "--gpus", "2", "--gpu", "A10"]
    assert main(["plan", *words, "training.micro_batch=1"]) == 0
    given = capsys.readouterr().out.splitlines()
    assert main(["plan", *words, "training.micro_batch=auto"]) == 0
    auto = capsys.readouterr().out.splitlines()
    head, largest = given[2].split(), next(line for line in given if line.startswith("largest micro-batch")).split()[2]
    assert head[3:] == ["micro-batch", "1", "micro-batch", largest]
    assert auto[2].split() == ["GiB", "a", "GPU", "micro-batch", largest]
    assert [line for line in auto if line.startswith(("step ", "with "))] == [
        line for line in given if line.startswith(("step ", "with "))
    ]


def test_precision_auto_is_the_gpus_not_this_machines(run_file, capsys):
    for gpu, precision in (("A100-80GB", "bf16"), ("V100-32GB", "fp32")):
        assert main(["plan", str(run_file), "--gpus", "2", "--gpu", gpu]) == 0
        assert f" {precision}, ZeRO-1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpus", "8", "--gpu", "H1000"], ["--gpu", "'H1000'", "A100-80GB", "H200"]),
        (["--gpus", "0", "--gpu", "H200"], ["--gpus", "0", ">= 1"]),
        (["--gpus", "7", "--gpu", "H200"], ["training.global_batch", "1024", "7 ranks"]),
        (["--gpus", "8", "--gpu", "H200", "--mfu", "1.5"], ["--mfu", "1.5"]),
        (["--gpus", "8", "--gpu", "H200", "--mfu", "nan"], ["--mfu", "nan"]),
        (["training.precision=bf16", "--gpus", "8", "--gpu", "V100-16GB"], ["training.precision", "bf16", "fp16"]),
        (["training.steeps=3", "--gpus", "8", "--gpu", "H200"], ["training.steeps", "training.steps"[9:]]),
    ],
)
def test_bad_input_is_one_line(run_file, capsys, words, said):
    assert main(["plan", str(run_file), *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1, error
    assert error[0].startswith("l2e-ds: error: ")
    for word in said:
        assert word in error[0]


def test_another_optimizer_is_refused(run_file, tmp_path, capsys):
    (tmp_path / "sgd.json").write_text('{"optimizer": {"type": "SGD"}, "zero_allow_untested_optimizer": true}')
    words = ["deepspeed.config=sgd.json", "--gpus", "1", "--gpu", "H200"]
    assert main(["plan", str(run_file), *words]) == 2
    assert "optimizer.type: got SGD" in capsys.readouterr().err
