"""Orthogonal subspace fine-tuning: what trains, what is protected, and that nothing moves it, on any ranks."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor

from tests.fixtures.models import (
    DENSE,
    build_model,
    build_pack,
    packed_model,
    prepared_for_packs,
    save_model,
    tiny_llama,
)
from tests.fixtures.oracles import largest_difference, protected_share, relative_difference
from tests.fixtures.runs import weights_of
from tests.fixtures.splitting import (
    change_of,
    osft_arguments,
    split_matrices,
    split_matrix,
    split_model,
    started,
    train_split,
)
from tests.fixtures.tolerances import (
    LOSS_BF16,
    OSFT_LEAK,
    OSFT_LOGITS_FP32,
    OSFT_MERGED_FP32,
    OSFT_ORTHONORMAL,
    OSFT_TRAJECTORY_FLOAT64,
)
from trainer.checkpoint.tensors import StoredTensors, model_tensors, restore_model
from trainer.checkpoint.writer import CheckpointWriter, Contents
from trainer.config.groups import MachineArguments, ModelArguments, OptimizerArguments
from trainer.distributed.group import Group
from trainer.errors import LeakError, ModelError
from trainer.model.build import load_model
from trainer.model.fsdp import local_part
from trainer.model.loss import token_loss_sum
from trainer.model.osft.factors import decompose, reconstruction_error, start_osft
from trainer.model.osft.layers import Osft, OsftLinear, apply_osft, merged_weight, num_free_directions, osft_layers
from trainer.optim.build import build_optimizer
from trainer.optim.registry import OPTIMIZERS, is_installed

LINEAR_LAYERS_OF_LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@st.composite
def matrices(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    """A matrix (N, M) of any rank, also with singular values that repeat, and how many of its directions are free."""
    num_outputs, num_inputs = draw(st.integers(2, 14)), draw(st.integers(2, 14))
    size = min(num_outputs, num_inputs)
    values = draw(st.lists(st.sampled_from([0.0, 1e-6, 0.5, 1.0, 1.0, 30.0]), min_size=size, max_size=size))
    source = np.random.default_rng(draw(st.integers(0, 99)))
    left, right = (np.linalg.qr(source.standard_normal((n, size)))[0] for n in (num_outputs, num_inputs))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    return torch.tensor(left * values @ right.T, dtype=dtype), draw(st.integers(1, size - 1))


def decomposed(weight: torch.Tensor, num_free: int, **options: bool) -> tuple[OsftLinear, Osft]:
    layer = split_matrix(weight, num_free, **options)
    return layer, started(layer)


@given(matrices(), st.booleans())
def test_a_matrix_is_split_into_protected_and_free_directions(case: tuple[torch.Tensor, int], is_conv: bool) -> None:
    weight, num_free = case
    layer, osft = decomposed(weight, num_free, is_conv=is_conv)
    free, protected = layer.osft_free.double(), layer.osft_protected.double()
    for basis in (free, protected):
        assert (basis.T @ basis - torch.eye(basis.shape[1])).abs().max() < OSFT_ORTHONORMAL[weight.dtype]
    assert osft.reconstruction_error < OSFT_ORTHONORMAL[weight.dtype]
    values = torch.linalg.svdvals(weight)
    matrix = weight if layer.is_tall else weight.T
    of_free = torch.linalg.svdvals(matrix @ layer.osft_free)
    assert torch.allclose(of_free, values[-num_free:], atol=OSFT_ORTHONORMAL[weight.dtype] * values[0].item())


@given(matrices(), st.booleans())
def test_no_optimizer_step_leaks(case: tuple[torch.Tensor, int], is_conv: bool) -> None:
    weight, num_free = case
    layer, osft = decomposed(weight, num_free, is_conv=is_conv)
    free, protected = layer.osft_free.double(), layer.osft_protected.double()
    optimizer = torch.optim.AdamW([layer.osft_update], lr=0.1, weight_decay=0.1)
    inputs = torch.linspace(-1, 1, 3 * weight.shape[1], dtype=weight.dtype).reshape(3, -1)
    for _ in range(3):
        layer(inputs).square().sum().backward()
        osft.project_gradients()
        optimizer.step()
        osft.project_updates()
    change = change_of(layer) if layer.is_tall else change_of(layer).T
    leaked = torch.hypot((protected.T @ change).norm(), (change - change @ free @ free.T).norm())
    assert leaked <= OSFT_LEAK[weight.dtype] * change.norm()
    merged = nn.functional.linear(inputs, layer.matrix(merged_weight(layer)), layer.bias)
    assert torch.allclose(layer(inputs), merged, atol=OSFT_LOGITS_FP32 * (1 + merged.abs().max().item()))


@pytest.mark.parametrize("name", DENSE)
def test_a_model_starts_unchanged(name: str) -> None:
    plain = packed_model(name)
    prepared, osft = split_model(name)
    pack = build_pack([7, 5])
    assert osft.layers
    assert osft.reconstruction_error < OSFT_LEAK[torch.float32]
    with torch.no_grad():
        assert torch.equal(token_loss_sum(prepared, pack), token_loss_sum(plain, pack))
    for name, layer in osft_layers(prepared.model).items():
        assert torch.equal(merged_weight(layer), plain.model.get_submodule(name).weight)


def test_osft_splits_every_linear_layer_of_the_blocks_by_default_and_trains_nothing_else() -> None:
    model = split_model()[0].model
    assert {name.rpartition(".")[2] for name in osft_layers(model)} == set(LINEAR_LAYERS_OF_LLAMA)
    assert len(osft_layers(model)) == 2 * len(LINEAR_LAYERS_OF_LLAMA)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"{name}.osft_update" for name in osft_layers(model)}


def test_ratios_go_by_pattern() -> None:
    patterns = {"mlp": 0.5, "down_proj": 0.25, r"0\.self_attn\.q": 0.0, r"1\.self_attn\.q": 1.0}
    model = split_model(ratio=0.75, osft_rank_ratios=patterns)[0].model
    sizes = {name: layer.osft_free.shape[1] for name, layer in osft_layers(model).items()}
    first, second = "model.layers.0", "model.layers.1"
    assert sizes[f"{first}.mlp.up_proj"] == 16
    assert sizes[f"{first}.mlp.down_proj"] == 8
    assert sizes[f"{first}.self_attn.v_proj"] == 12
    assert not {f"{first}.self_attn.q_proj", f"{second}.self_attn.q_proj"} & sizes.keys()
    assert not model.get_submodule(f"{first}.self_attn.q_proj").weight.requires_grad
    assert model.get_submodule(f"{second}.self_attn.q_proj").weight.requires_grad


@pytest.mark.parametrize(
    ("rank", "ratio", "expected"), [(10, 0.7, 7), (10, 0.71, 8), (10, 0, 0), (10, 1, 10), (7, 1e-3, 1), (3, 0.999, 3)]
)
def test_a_ratio_is_rounded_up(rank: int, ratio: float, expected: int) -> None:
    assert num_free_directions(rank, ratio) == expected


def test_ratio_1_is_full_fine_tuning_of_the_matrices() -> None:
    model = tiny_llama()
    apply_osft(model, osft_arguments(1.0, osft_train_patterns=["."]))
    split, plain = prepared_for_packs(model), packed_model("llama")
    for each in (split, plain):
        optimizer = torch.optim.AdamW([p for p in each.model.parameters() if p.requires_grad], lr=0.1)
        token_loss_sum(each, build_pack([7, 4])).backward()
        optimizer.step()
    assert all(torch.equal(value, weights_of(plain.model)[name]) for name, value in weights_of(model).items())


def test_what_trains_beside_the_matrices_is_said_by_patterns() -> None:
    model = split_model("qwen2", osft_train_patterns=["norm", "q_proj.bias"])[0].model
    trained = {name for name, p in model.named_parameters() if p.requires_grad and not name.endswith("osft_update")}
    assert trained == {name for name, _ in model.named_parameters() if "norm" in name or "q_proj.bias" in name}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("llama", {"osft_target_patterns": ["qproj"]}, r"osft_target_patterns: 'qproj' matches no module.*q_proj"),
        ("llama", {"osft_target_patterns": ["("]}, "osft_target_patterns: '.' is not a regular expression"),
        (
            "llama",
            {"osft_target_patterns": ["embed"]},
            "osft: model.embed_tokens is a Embedding; only Linear",
        ),
        ("llama_tied", {"osft_target_patterns": ["lm_head"]}, "lm_head shares its weight with model.embed_tokens"),
        ("llama", {"osft_rank_ratios": {"lm_head": 0.1}}, "osft_rank_ratios: 'lm_head' matches no target matrix"),
        ("llama", {"osft_train_patterns": ["q_proj"]}, "osft_train_patterns: 'q_proj' matches no parameter outside"),
        ("llama", {"ratio": 0.0}, "every ratio is 0"),
        ("mixtral", {}, r"mlp.* is a Mixtral\w+; only Linear and Conv1D layers can be split"),
    ],
)
def test_what_cannot_be_split_is_refused_by_name(name: str, options: dict, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        apply_osft(build_model(name), osft_arguments(**options))


def is_testable(name: str) -> bool:
    """Not what the engine refuses beside OSFT, nor what works on chosen modules, nor what takes seconds to compile."""
    spec = OPTIMIZERS[name]
    if spec.steps_in_backward or name.startswith("schedule_free"):
        return False
    return is_installed(spec) and not (spec.target_options or spec.not_on_cpu or spec.package == "torchao")


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if is_testable(name)])
def test_fifty_steps_of_every_optimizer_stay_out_of_what_is_protected(name: str) -> None:
    layers = split_matrices()
    osft = started(layers)
    optimizer = build_optimizer(layers, OptimizerArguments(optim=name, learning_rate=1e-2, weight_decay=0.1))
    inputs = torch.linspace(-1, 1, 64).reshape(4, 16)
    for _ in range(50):
        outputs = inputs
        for layer in layers:
            outputs = layer(outputs).tanh()
        outputs.square().sum().backward()
        osft.project_gradients()
        optimizer.step()
        osft.project_updates()
        report = osft.report()
        assert report["osft/leak"] < OSFT_LEAK[torch.float32]
        assert 0 < report["osft/projected_share"] < 1
        optimizer.zero_grad()
    for layer in layers:
        weight = layer.matrix(layer.weight).detach()
        share = protected_share(change_of(layer), weight, layer.osft_free.shape[1])
        assert share < OSFT_LEAK[torch.float32]


def test_the_leak_is_found_and_stops_the_run() -> None:
    _, osft = split_model()
    osft.project_updates()
    assert osft.report()["osft/leak"] == 0
    name, layer = list(osft_layers(osft.model).items())[3]
    layer.osft_update.data.add_(layer.osft_protected[:, :1])
    with pytest.raises(LeakError, match=rf"osft/leak is 1 in {re.escape(name)}, the limit 0.0001 \(osft_leak_limit\)"):
        osft.report()


def test_factors_of_another_matrix_are_no_decomposition() -> None:
    _, osft = split_model()
    layer = osft.layers[0]
    layer.osft_protected.data.copy_(layer.osft_protected.flip(0))
    assert reconstruction_error(osft) > 0.1


def test_what_is_decomposed_already_is_left_alone() -> None:
    _, osft = split_model()
    assert decompose(osft, torch.float32) == 0
    osft.layers[0].osft_free.data.zero_()
    assert decompose(osft, torch.float32) == 1
    assert reconstruction_error(osft) < OSFT_LEAK[torch.float32]


def test_progress_is_told_by_work() -> None:
    model = tiny_llama()
    osft = apply_osft(model, osft_arguments())
    told: list[tuple[int, int]] = []
    decompose(osft, torch.float64, lambda done, total: told.append((done, total)))
    assert len(told) == 14
    assert told[-1][0] == told[-1][1]
    steps = np.diff([0, *(done for done, _ in told)])
    assert all(steps[:-1] >= steps[1:])


def load_split(directory, mesh=None, dtype=None, ratio=0.25, options=None, **model_options):
    args = osft_arguments(ratio, **(options or {}))
    prepared = load_model(
        ModelArguments(model_name_or_path=str(directory), **model_options),
        mesh=mesh,
        seed=0,
        adapt=lambda model: apply_osft(model if dtype is None else model.to(dtype), args),
    )
    start_osft(prepared.osft)
    return prepared, prepared.osft


def trained_weights(prepared, osft, num_steps=3):
    """Merged weights and reports after some steps of AdamW, each on the same packs on every rank, summed."""
    trained = [parameter for parameter in prepared.model.parameters() if parameter.requires_grad]
    reports = train_split(prepared, osft, torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1), num_steps)
    return {name: merged_weight(layer) for name, layer in osft_layers(prepared.model).items()}, reports


def check_same_as_one_process(directory, ranks, mesh, is_compiled=False):
    """Every rank trains on the same packs, so gradients are those of one process times the number of ranks."""
    prepared, osft = load_split(directory, mesh, torch.float64)
    if is_compiled:
        for block in prepared.model.model.layers:
            block.mlp.compile(backend="eager")  # as it is traced: inductor's C++ takes a minute
    alone, alone_osft = load_split(directory, None, torch.float64)
    for layer, other in zip(osft.layers, alone_osft.layers, strict=True):
        local, region = local_part(layer.osft_protected)
        assert torch.equal(local, other.osft_protected[region])
        assert isinstance(layer.osft_protected, DTensor)
        assert local.numel() <= -(-layer.osft_protected.shape[0] // mesh.size(-1)) * local.shape[1]
    for parameter in alone.model.parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda gradient: gradient * ranks.world_size)
    weights, reports = trained_weights(prepared, osft)
    expected, expected_reports = ranks.once(lambda: trained_weights(alone, alone_osft))
    assert relative_difference(weights, expected) < OSFT_TRAJECTORY_FLOAT64
    for report, other in zip(reports, expected_reports, strict=True):
        share = pytest.approx(other["osft/projected_share"], rel=OSFT_TRAJECTORY_FLOAT64)
        assert report["osft/projected_share"] == share


@pytest.mark.world_size(1, 2, 3)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_ranks_train_what_one_process_trains(ranks, name):
    if ranks.is_main:
        save_model(ranks.tmp_path, name, dtype=torch.float64)
    ranks.barrier()
    check_same_as_one_process(ranks.tmp_path, ranks, ranks.mesh())


@pytest.mark.world_size(2)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own tracing asks
def test_compiled_shards_train_what_one_process_trains(ranks):
    if ranks.is_main:
        save_model(ranks.tmp_path, dtype=torch.float64)
    ranks.barrier()
    torch._dynamo.reset()
    try:
        check_same_as_one_process(ranks.tmp_path, ranks, ranks.mesh(), is_compiled=True)
        assert counters["stats"]["unique_graphs"] > 0
    finally:
        torch._dynamo.reset()


@pytest.mark.world_size(4)
def test_replicas_of_shards_train_what_one_process_trains(ranks):
    if ranks.is_main:
        save_model(ranks.tmp_path, dtype=torch.float64)
    ranks.barrier()
    check_same_as_one_process(ranks.tmp_path, ranks, ranks.mesh(replicate=2, shard=2))


@pytest.mark.world_size(1, 2)
def test_a_checkpoint_holds_the_factors(ranks):
    if ranks.is_main:
        save_model(ranks.tmp_path / "model")
    ranks.barrier()
    group = Group.join(MachineArguments(use_cpu=True))
    prepared, osft = load_split(ranks.tmp_path / "model", group.mesh)
    trained_weights(prepared, osft)
    model = prepared.model
    writer = CheckpointWriter(ranks.tmp_path / "saved", group, is_async=False, limit=None)
    folder = writer.save(Contents(3, {"model": model_tensors(model)}, {})) or writer.wait()
    resumed = load_model(
        ModelArguments(model_name_or_path=str(ranks.tmp_path / "model")),
        mesh=group.mesh,
        seed=0,
        adapt=lambda model: apply_osft(model, osft_arguments()),
    )
    restore_model(resumed.model, StoredTensors(folder, ranks.rank, ranks.world_size))
    osft = resumed.osft
    assert start_osft(osft) == 0
    assert osft.reconstruction_error < OSFT_LEAK[torch.float32]
    expected = weights_of(model)
    assert all(torch.equal(value, expected[name]) for name, value in weights_of(resumed.model).items())


@pytest.mark.world_size(2, 3)
def test_decompositions_are_spread_over_the_ranks(ranks, monkeypatch):
    if ranks.is_main:
        save_model(ranks.tmp_path)
    ranks.barrier()
    shapes, decompose_one = [], torch.linalg.svd

    def counted(matrix, **options):
        shapes.append(tuple(matrix.shape))
        return decompose_one(matrix, **options)

    monkeypatch.setattr(torch.linalg, "svd", counted)
    load_split(ranks.tmp_path, ranks.mesh())
    counts = torch.zeros(ranks.world_size)
    counts[ranks.rank] = len(shapes)
    torch.distributed.all_reduce(counts)
    assert counts.sum() == 14
    assert counts.max() - counts.min() <= 1


def test_bf16_computes_what_float32_computes(tmp_path):
    save_model(tmp_path)
    pack = build_pack([9, 5])
    losses = []
    for is_bf16 in (False, True):
        prepared, osft = load_split(tmp_path, bf16=is_bf16)
        optimizer = torch.optim.AdamW([layer.osft_update for layer in osft.layers], lr=1e-2)
        train_split(prepared, osft, optimizer, 5)
        assert {layer.osft_update.dtype for layer in osft.layers} == {torch.float32}
        losses.append(token_loss_sum(prepared, pack).item())
    assert losses[1] == pytest.approx(losses[0], rel=LOSS_BF16)


def test_recomputed_blocks_train_alike(tmp_path):
    save_model(tmp_path)
    expected, _ = trained_weights(*load_split(tmp_path), num_steps=2)
    weights, _ = trained_weights(*load_split(tmp_path, gradient_checkpointing=True), num_steps=2)
    assert largest_difference(weights, expected) < OSFT_MERGED_FP32


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own tracing asks
def test_a_whole_block_trains_as_torch_compiles_it():
    """As it traces it; inductor's C++ takes a minute (docs/osft.md)."""
    expected, _ = trained_weights(*split_model(), num_steps=2)
    prepared, osft = split_model()
    prepared.model.model.layers[0].compile(backend="eager")
    torch._dynamo.reset()
    try:
        weights, _ = trained_weights(prepared, osft, num_steps=2)
    finally:
        torch._dynamo.reset()
    assert largest_difference(weights, expected) < OSFT_MERGED_FP32


def test_blocks_compile_as_one_graph():
    block = split_model()[0].model.model.layers[0].mlp
    inputs = torch.linspace(-1, 1, 96).reshape(3, 32)
    torch._dynamo.reset()
    try:
        compiled = torch.compile(block, backend="eager", fullgraph=True)
        assert torch.equal(compiled(inputs), block(inputs))
    finally:
        torch._dynamo.reset()
