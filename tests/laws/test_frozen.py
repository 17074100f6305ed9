"""L9: a frozen parameter is bit-equal after training, whatever the optimizer does to the others.

What OSFT protects does not move: all movement lies in the free singular directions, up to a stated share.
"""

import pytest
import torch

from tests.fixtures.models import build_pack, save_model
from tests.fixtures.oracles import protected_share
from tests.fixtures.runs import weights_of
from tests.fixtures.splitting import change_of, move_at_random, split_matrices, started
from tests.fixtures.tolerances import OSFT_LEAK
from trainer.config.groups import ModelArguments
from trainer.model.build import load_model
from trainer.model.loss import token_loss_sum

PATTERNS = {
    "embeddings": ["embed_tokens"],
    "first block": [r"layers\.0\."],
    "all but the head": ["^model"],
    "norms and one matrix": ["norm", r"1\.mlp\.up_proj"],
}


def train(prepared, num_steps=3):
    optimizer = torch.optim.AdamW(prepared.model.parameters(), lr=0.1, weight_decay=0.1)
    with prepared.in_use():
        for step in range(num_steps):
            token_loss_sum(prepared, build_pack([7, 4], seed=step)).backward()
            optimizer.step()
            optimizer.zero_grad()


def check_training_moves_only_what_is_not_frozen(directory, patterns, mesh=None, **options):
    args = ModelArguments(model_name_or_path=str(directory), freeze_patterns=patterns, **options)
    prepared = load_model(args, None, mesh, seed=0)
    model = prepared.model
    before = weights_of(model)
    train(prepared)
    moved = {name for name, value in weights_of(model).items() if not torch.equal(value, before[name])}
    assert moved == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert 0 < len(moved) < len(before)


@pytest.mark.parametrize("patterns", PATTERNS.values(), ids=PATTERNS)
def test_frozen_parameters_do_not_move(patterns, tmp_path):
    save_model(tmp_path)
    check_training_moves_only_what_is_not_frozen(tmp_path, patterns)


@pytest.mark.parametrize("pattern", ["lm_head", "embed_tokens"])
def test_freezing_either_name_of_a_tied_weight_freezes_it(pattern, tmp_path):
    save_model(tmp_path, "llama_tied")
    check_training_moves_only_what_is_not_frozen(tmp_path, [pattern])


@pytest.mark.parametrize("options", [{"bf16": True}, {"gradient_checkpointing": True}], ids=str)
def test_frozen_parameters_do_not_move_with(options, tmp_path):
    save_model(tmp_path)
    check_training_moves_only_what_is_not_frozen(tmp_path, PATTERNS["embeddings"], **options)


@pytest.mark.world_size(2)
@pytest.mark.parametrize("patterns", PATTERNS.values(), ids=PATTERNS)
def test_frozen_parameters_do_not_move_when_sharded(patterns, ranks):
    if ranks.is_main:
        save_model(ranks.tmp_path)
    ranks.barrier()
    check_training_moves_only_what_is_not_frozen(ranks.tmp_path, patterns, ranks.mesh())


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_what_osft_protects_does_not_move_in_500_steps(weight_decay):
    layers = split_matrices()
    osft = started(layers)
    before = weights_of(layers)
    optimizer = torch.optim.AdamW([layer.osft_update for layer in layers], lr=1e-2, weight_decay=weight_decay)
    move_at_random(osft, optimizer, num_steps=500)
    for layer in layers:
        weight, change = layer.matrix(layer.weight).detach(), change_of(layer)
        assert protected_share(change, weight, layer.osft_free.shape[1]) < OSFT_LEAK[torch.float32]
        assert change.norm() > 1  # beside singular values of 1, 2, 3 ...
    moved = {name for name, value in weights_of(layers).items() if not torch.equal(value, before[name])}
    assert moved == {f"{index}.osft_update" for index in range(3)}
