"""From options to an optimizer: names, settings, parameter groups, and what is mixed into packages' classes."""

from __future__ import annotations

import contextlib
import logging
import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import SchedulerType

from tests.fixtures.models import build_model, tiny_llama
from tests.fixtures.optimizers import (
    Regression,
    build_for,
    copy_of,
    regression_batch,
    state_tensors,
    take_steps,
    through_plain_values,
)
from tests.fixtures.runs import weights_of
from tests.fixtures.tolerances import BY_HAND_FP32, NORM_FP32, ROUNDED_MEAN
from trainer.config import choices
from trainer.config.groups import OptimizerArguments
from trainer.errors import MissingPackageError, UsageError
from trainer.optim.adapters import averaged_weights, round_at_random
from trainer.optim.build import build_optimizer, parse_options
from trainer.optim.gradients import global_norm, last_backward
from trainer.optim.groups import parameter_groups, split_targets, target_matrices
from trainer.optim.registry import GONE, OPTIMIZERS, is_installed, load_class


def arguments(**options: Any) -> OptimizerArguments:
    return OptimizerArguments(**options)


def names_of(model: nn.Module, parameters: list[nn.Parameter]) -> set[str]:
    return {name for name, parameter in model.named_parameters() if any(parameter is p for p in parameters)}


class Plain(torch.optim.SGD):
    """An optimizer of the user's."""


class Undecayed(torch.optim.Optimizer):
    """Another, that knows no decay."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})


def make_adam(params: Any, lr: float, betas: tuple[float, float], amsgrad: bool = False) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=lr, betas=betas, amsgrad=amsgrad)


def make_nothing(params: Any, lr: float) -> str:
    return "nothing"


class TestNames:
    def test_every_name_of_transformers_is_there_or_says_why_not(self) -> None:
        from transformers.training_args import OptimizerNames

        assert {name.value for name in OptimizerNames} <= {*OPTIMIZERS, *GONE}

    def test_commands_know_names_and_packages_without_importing_torch(self) -> None:
        modules = {name: choices.OPTIMIZERS[name] for name in OPTIMIZERS}
        needed = {
            name: spec.path.partition(":")[0].partition(".")[0] for name, spec in OPTIMIZERS.items() if spec.package
        }
        assert {name: module for name, module in modules.items() if module is not None} == needed
        assert [*choices.OPTIMIZERS] == [*OPTIMIZERS]
        assert set(choices.GONE) == set(GONE)
        assert set(choices.SCHEDULES) >= {kind.value for kind in SchedulerType}

    @pytest.mark.parametrize("name", GONE)
    def test_a_name_that_is_gone_names_the_nearest(self, name: str) -> None:
        with pytest.raises(UsageError, match=f"{name}' is not there: .*; nearest: adamw_torch"):
            build_optimizer(Regression(), arguments(optim=name))

    def test_an_unknown_name_names_the_nearest(self) -> None:
        with pytest.raises(UsageError, match=r"did you mean 'galore_adamw'\? expected one of .*module:Class$"):
            build_optimizer(Regression(), arguments(optim="galore_adam"))

    def test_a_missing_package_is_named_with_its_install(self) -> None:
        with pytest.raises(MissingPackageError, match=r"optim = 'new' cannot import .*: pip install no-such-package"):
            load_class("new", "no_such_package:Adam", "no-such-package")

    @pytest.mark.parametrize("name", [name for name, spec in OPTIMIZERS.items() if spec.package])
    def test_each_missing_package_is_named(self, name: str) -> None:
        if is_installed(OPTIMIZERS[name]):
            pytest.skip(f"{OPTIMIZERS[name].package} is there")
        options = {"optim_target_modules": "all-linear"} if OPTIMIZERS[name].target_options else {}
        with pytest.raises((UsageError, MissingPackageError), match="pip install|cannot train on a CPU"):
            build_optimizer(Regression(), arguments(optim=name, max_grad_norm=0.0, **options))

    def test_a_package_is_told_with_its_licence(self, caplog: pytest.LogCaptureFixture) -> None:
        if not is_installed(OPTIMIZERS["apollo_adamw"]):
            pytest.skip("pip install apollo-torch")
        with caplog.at_level(logging.WARNING):
            build_for(Regression(), "apollo_adamw")
        assert re.search(r"apollo-torch \S+, licence CC-BY-NC: not for commercial use", caplog.text)

    def test_an_optimizer_of_torch_is_logged_without_a_licence(self, caplog: pytest.LogCaptureFixture) -> None:
        build_for(Regression(), "adamw_torch")
        assert caplog.text == ""


class TestOwnOptimizer:
    def test_a_class_is_built_over_the_groups(self) -> None:
        optim_args = "momentum=0.5, nesterov=True"
        args = arguments(optim=f"{__name__}:Plain", optim_args=optim_args, weight_decay=0.1, learning_rate=0.2)
        optimizer = build_optimizer(Regression(), args)
        assert isinstance(optimizer, Plain)
        assert [(g["lr"], g["momentum"], g["weight_decay"]) for g in optimizer.param_groups] == [
            (0.2, 0.5, 0.1),
            (0.2, 0.5, 0.0),
        ]

    def test_a_function_gets_what_it_takes(self) -> None:
        args = arguments(optim=f"{__name__}:make_adam", optim_args="amsgrad=True", adam_beta1=0.8)
        assert build_optimizer(Regression(), args).defaults["betas"] == (0.8, 0.999)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"optim": f"{__name__}:Absent"}, "no attribute 'Absent'"),
            ({"optim": "no_such_module:Adam"}, "install the package that holds it"),
            ({"optim": f"{__name__}:make_nothing"}, "made a str: it must make a torch optimizer"),
            ({"optim": f"{__name__}:Undecayed", "weight_decay": 0.1}, "weight_decay = 0.1 has no effect"),
            ({"optim": f"{__name__}:Plain", "adam_beta1": 0.5}, "adam_beta1 has no effect"),
            ({"optim": f"{__name__}:Plain", "optim_args": "momentun=1"}, "did you mean 'momentum'"),
            ({"optim": f"{__name__}:Plain", "optim_bf16_state": True}, "optim_bf16_state has no effect"),
            ({"optim": f"{__name__}:Plain", "optim_target_modules": "x"}, "optim_target_modules has no effect"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises((UsageError, MissingPackageError), match=message):
            build_optimizer(Regression(), arguments(**options))


class TestOptions:
    @pytest.mark.parametrize(
        ("text", "options"),
        [
            (None, {}),
            ("", {}),
            ("momentum=0.9", {"momentum": 0.9}),
            ("a=(0.9, 0.95), b = True,c=random", {"a": (0.9, 0.95), "b": True, "c": "random"}),
            ("a=[1,2],b=None", {"a": [1, 2], "b": None}),
        ],
    )
    def test_optimizer_options_are_read(self, text: str | None, options: dict[str, Any]) -> None:
        assert parse_options(text) == options

    @pytest.mark.parametrize("text", ["momentum", "=3", "a=1,a=2", "a=1,,=2", "a b=1"])
    def test_optimizer_options_are_refused_unless_named_once(self, text: str) -> None:
        with pytest.raises(UsageError, match="write name=value"):
            parse_options(text)

    @given(st.text())
    def test_any_text_is_read_or_refused(self, text: str) -> None:
        with contextlib.suppress(UsageError):
            assert all(name.isidentifier() for name in parse_options(text))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"optim": "sgd", "optim_args": "momentun=0.9"}, "sgd has no option 'momentun'; did you mean 'momentum'"),
            ({"optim": "sgd", "optim_args": "lr=0.9"}, "sgd has no option 'lr'"),
            ({"optim": "adamw_torch", "optim_args": "betas=(0.5,0.5)"}, "has no option 'betas'"),
            ({"optim": "adamw_torch", "optim_args": "fused=True"}, "has no option 'fused'"),
            ({"optim": "sgd", "optim_args": "nesterov=True"}, "Nesterov momentum requires"),
            ({"optim": "sgd", "optim_args": "momentum=much"}, "optim_args = 'momentum=much'"),
            ({"optim": "sgd", "adam_beta1": 0.5}, "adam_beta1 has no effect with optim = 'sgd'"),
            ({"optim": "adagrad", "adam_epsilon": 0.5}, "adam_epsilon has no effect"),
            ({"optim": "sgd", "optim_target_modules": "all-linear"}, "optim_target_modules has no effect"),
            ({"optim": "sgd", "optim_bf16_state": True}, "optim_bf16_state has no effect"),
            ({"optim": "lomo"}, "max_grad_norm = 1.0 cannot be kept, set it to 0"),
        ],
    )
    def test_optimizer_options_without_effect_are_refused(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(UsageError, match=re.escape(message)):
            build_optimizer(Regression(), arguments(**options))

    def test_optimizer_options_reach_the_optimizer(self) -> None:
        optimizer = build_optimizer(Regression(), arguments(optim="sgd", optim_args="momentum=0.9,nesterov=True"))
        assert all((group["momentum"], group["nesterov"]) == (0.9, True) for group in optimizer.param_groups)


class TestGroups:
    def test_norms_and_biases_do_not_decay(self) -> None:
        groups = parameter_groups(tiny_llama(), arguments(weight_decay=0.1))
        assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
        assert all(parameter.ndim >= 2 for parameter in groups[0]["params"])
        assert all(parameter.ndim < 2 for parameter in groups[1]["params"])

    def test_frozen_parameters_are_left_out(self) -> None:
        model = tiny_llama()
        model.lm_head.weight.requires_grad_(False)
        held = {id(p) for group in parameter_groups(model, arguments()) for p in group["params"]}
        assert held == {id(p) for p in model.parameters()} - {id(model.lm_head.weight)}

    def test_target_matrices_alone_get_the_settings_and_no_parameter_is_lost(self) -> None:
        model = tiny_llama()
        groups = split_targets(
            parameter_groups(model, arguments(weight_decay=0.1)), target_matrices(model, ["q_proj"]), {"rank": 2}
        )
        held = [name for group in groups for name in names_of(model, group["params"])]
        assert sorted(held) == sorted(name for name, _ in model.named_parameters())
        (targets,) = [names_of(model, group["params"]) for group in groups if "rank" in group]
        assert targets == {name for name, _ in model.named_parameters() if "q_proj" in name}
        assert [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.1]

    def test_a_pattern_has_its_own_rate_and_decay(self) -> None:
        model = tiny_llama()
        settings = {"self_attn": {"learning_rate": 0.5}, "layers.0.*norm": {"weight_decay": "1e-2"}}
        groups = parameter_groups(model, arguments(weight_decay=0.1, optim_groups=settings))
        found = [(g.get("lr"), g["weight_decay"], names_of(model, g["params"])) for g in groups]
        assert [(rate, decay) for rate, decay, _ in found] == [(None, 0.1), (None, 0.0), (0.5, 0.1), (None, 0.01)]
        assert found[3][2] == {
            f"model.layers.0.{name}.weight" for name in ("input_layernorm", "post_attention_layernorm")
        }
        assert set().union(*(names for *_, names in found)) == {name for name, _ in model.named_parameters()}

    @pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
    def test_embeddings_and_head_are_separable_whatever_they_are_called(self, architecture: str) -> None:
        model = build_model(architecture)
        settings = {"embeddings": {"learning_rate": 1.0}, "head": {"learning_rate": 2.0}}
        embeddings, head = parameter_groups(model, arguments(optim_groups=settings))[-2:]
        assert embeddings["params"] == [model.get_input_embeddings().weight]
        assert head["params"] == [model.get_output_embeddings().weight]

    def test_tied_embeddings_and_head_are_one(self) -> None:
        settings = {"embeddings": {"learning_rate": 1.0}, "head": {"learning_rate": 2.0}}
        with pytest.raises(UsageError, match="'embeddings' and 'head' both match model.embed_tokens.weight"):
            parameter_groups(build_model("llama_tied"), arguments(optim_groups=settings))

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"no_such": {"learning_rate": 1.0}}, "'no_such' matches no trained parameter; names like it: "),
            ({"mlp": {"weight_decay": 0.0}, "up_proj": {"weight_decay": 0.1}}, "'mlp' and 'up_proj' both match"),
            ({"(": {"learning_rate": 1.0}}, "not a regular expression"),
            ({"mlp": {}}, "give one or both of learning_rate and weight_decay"),
            ({"mlp": {"lr": 1.0}}, "give one or both of learning_rate and weight_decay"),
            ({"mlp": 3}, "give one or both of learning_rate and weight_decay"),
            ({"mlp": {"learning_rate": "fast"}}, "are numbers"),
            ({"mlp": {"learning_rate": -1}}, "are at least 0"),
            ({"mlp": {"learning_rate": math.nan}}, "are at least 0"),
        ],
    )
    def test_what_is_no_group_is_refused(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(UsageError, match=re.escape(message)):
            parameter_groups(tiny_llama(), arguments(optim_groups=settings))

    def test_own_rates_and_decays_are_used(self) -> None:
        model = Regression()
        inputs, targets = regression_batch(8)
        nn.functional.mse_loss(model(inputs), targets).backward()
        weight, bias = model.linear.weight, model.linear.bias
        expected = weight.detach() - 0.3 * (weight.grad + 0.2 * weight.detach()), bias.detach() - 0.1 * bias.grad
        model.zero_grad()
        settings = {"linear.weight": {"learning_rate": 0.3, "weight_decay": 0.2}}
        take_steps(model, build_for(model, "sgd", learning_rate=0.1, optim_groups=settings), [(inputs, targets)])
        for found, value in zip((weight, bias), expected, strict=True):
            torch.testing.assert_close(found.detach(), value.detach(), rtol=0, atol=BY_HAND_FP32)


class TestTargets:
    @pytest.mark.parametrize(
        ("targets", "expected"),
        [
            ("all-linear", 15),
            (r".*layers\.0\.self_attn.*", 4),
            (["q_proj", "model.layers.1.mlp.up_proj"], 3),
            ([r".*\.1\..*proj"], 7),
        ],
    )
    def test_all_three_forms_mean_linear_modules(self, targets: Any, expected: int) -> None:
        if not is_installed(OPTIMIZERS["galore_adamw"]):
            pytest.skip("pip install galore-torch")
        optimizer = build_for(tiny_llama(), "galore_adamw", optim_target_modules=targets)
        assert sum(len(group["params"]) for group in optimizer.param_groups if "rank" in group) == expected

    def test_no_module_is_an_error(self) -> None:
        with pytest.raises(UsageError, match="means no trained linear module"):
            build_for(tiny_llama(), "galore_adamw", optim_target_modules="embed_tokens")

    def test_targets_must_be_given(self) -> None:
        with pytest.raises(UsageError, match="needs optim_target_modules"):
            build_for(tiny_llama(), "galore_adamw", optim_target_modules=None)


class TestMuon:
    def test_hidden_matrices_go_to_muon_and_the_rest_to_adamw(self) -> None:
        model = tiny_llama()
        optimizer = build_for(model, "muon")
        hidden = [p for g in optimizer.param_groups if g["is_hidden_matrix"] for p in g["params"]]
        assert names_of(model, hidden) == {
            name
            for name, p in model.named_parameters()
            if p.ndim == 2 and "embed" not in name and "lm_head" not in name
        }

    def test_a_model_without_hidden_matrices_goes_to_adamw(self) -> None:
        model = nn.Sequential(nn.LayerNorm(4))
        optimizer = build_for(model, "muon")
        model(torch.arange(4.0)).square().sum().backward()
        optimizer.step()
        assert optimizer.state_dict()["state"][0].keys() == {"step", "exp_avg", "exp_avg_sq"}


class TestInBackward:
    def test_no_gradient_is_left(self) -> None:
        model = Regression()
        optimizer = build_for(model, "lomo")
        inputs, targets = regression_batch(8)
        with last_backward(optimizer):
            nn.functional.mse_loss(model(inputs), targets).backward()
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_the_norm_is_that_of_all_gradients(self) -> None:
        inputs, targets = regression_batch(8)
        plain, model = Regression(), Regression()
        nn.functional.mse_loss(plain(inputs), targets).backward()
        optimizer = build_for(model, "lomo")
        with last_backward(optimizer):
            nn.functional.mse_loss(model(inputs), targets).backward()
        expected = global_norm(plain.parameters()).item()
        assert global_norm(model.parameters(), optimizer).item() == pytest.approx(expected, rel=NORM_FP32)

    def test_a_parameter_that_the_last_micro_batch_leaves_out_moves_too(self) -> None:
        model, plain = Regression(), Regression()
        for each, name in ((model, "lomo"), (plain, "sgd")):
            optimizer = build_for(each, name, max_grad_norm=0.0)
            inputs, targets = regression_batch(8)
            nn.functional.mse_loss(each(inputs, is_deep=True), targets).backward()
            with last_backward(optimizer):
                nn.functional.mse_loss(each(inputs), targets).backward()
            optimizer.step()
        assert not torch.equal(model.unused.weight, Regression().unused.weight)
        assert all(torch.equal(value, weights_of(plain)[name]) for name, value in weights_of(model).items())

    def test_an_optimizer_of_before_does_not_step(self) -> None:
        model, plain = Regression(), Regression()
        kept = build_for(model, "lomo")
        for each in (model, plain):
            take_steps(each, build_for(each, "lomo"), [regression_batch(8)])
        assert kept.param_groups
        assert torch.equal(model.linear.weight, plain.linear.weight)

    @pytest.mark.parametrize(("name", "cls"), [("lomo", "Lomo"), ("adalomo", "AdaLomo")])
    def test_the_steps_are_those_of_lomo_optim(self, name: str, cls: str, monkeypatch: pytest.MonkeyPatch) -> None:
        lomo_optim = pytest.importorskip("lomo_optim", reason="pip install lomo-optim")
        monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)  # its AdaLomo knows no other device
        model, theirs = Regression(), Regression()
        for each in (model, theirs):
            each.unused.requires_grad_(False)
        take_steps(model, build_for(model, name, learning_rate=0.1), [regression_batch(8, seed=s) for s in range(4)])
        optimizer = getattr(lomo_optim, cls)(theirs, lr=0.1)
        for step in range(4):
            inputs, targets = regression_batch(8, seed=step)
            optimizer.fused_backward(nn.functional.mse_loss(theirs(inputs), targets), 0.1)
        for n, value in weights_of(model).items():
            torch.testing.assert_close(value, weights_of(theirs)[n], rtol=0, atol=BY_HAND_FP32)


SCHEDULE_FREE = ["schedule_free_adamw", "schedule_free_radam", "schedule_free_sgd"]


@pytest.mark.skipif(not is_installed(OPTIMIZERS["schedule_free_adamw"]), reason="pip install schedulefree")
@pytest.mark.parametrize("name", SCHEDULE_FREE)
class TestScheduleFree:
    def run(self, name: str) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = Regression()
        optimizer = build_for(model, name)
        take_steps(model, optimizer, [regression_batch(8, seed=step) for step in range(6)])
        return model, optimizer

    def test_reading_averaged_weights_changes_nothing(self, name: str) -> None:
        model, optimizer = self.run(name)
        before = weights_of(model)
        with averaged_weights(optimizer):
            inside = weights_of(model)
        assert not torch.equal(inside["linear.weight"], before["linear.weight"])
        assert all(torch.equal(value, before[n]) for n, value in weights_of(model).items())
        take_steps(model, optimizer, [regression_batch(8)])

    def test_the_averages_are_the_packages_own(self, name: str) -> None:
        model, optimizer = self.run(name)
        with averaged_weights(optimizer):
            inside = weights_of(model)
        optimizer.eval()
        assert all(torch.equal(value, inside[n]) for n, value in weights_of(model).items())

    def test_loading_needs_no_switch(self, name: str) -> None:
        model, optimizer = self.run(name)
        resumed = copy_of(model)
        again = build_for(resumed, name)
        again.load_state_dict(through_plain_values(optimizer.state_dict()))
        with averaged_weights(optimizer), averaged_weights(again):
            assert torch.equal(model.linear.weight, resumed.linear.weight)


class TestBfloat16State:
    NAMES = [name for name, spec in OPTIMIZERS.items() if spec.has_plain_state]

    @pytest.mark.learns
    @pytest.mark.parametrize("name", NAMES)
    def test_bf16_state_takes_half_the_bytes_and_learns(self, name: str) -> None:
        found = []
        for is_small in (False, True):
            model = Regression()
            optimizer = build_for(model, name, optim_bf16_state=is_small)
            losses = take_steps(model, optimizer, [regression_batch()] * 40)
            used = [optimizer.state[p] for p in (model.linear.weight, model.norm.weight)]
            found.append((sum(t.nbytes for state in used for t in state_tensors(state)), losses[-1] / losses[0]))
        assert found[0][0] == 2 * found[1][0]
        assert found[1][1] < 0.3

    @pytest.mark.parametrize("name", NAMES)
    def test_bf16_state_resumes_bit_equal(self, name: str) -> None:
        batches = [regression_batch(8, seed=step) for step in range(6)]
        model = Regression()
        optimizer = build_for(model, name, optim_bf16_state=True)
        take_steps(model, optimizer, batches[:3])
        resumed = copy_of(model)
        again = build_for(resumed, name, optim_bf16_state=True)
        again.load_state_dict(through_plain_values(optimizer.state_dict()))
        assert take_steps(model, optimizer, batches[3:]) == take_steps(resumed, again, batches[3:])

    def test_rounding_keeps_the_mean(self) -> None:
        """A second moment that loses a thousandth a step: rounded to the nearest bfloat16 it would not move."""
        value = torch.full((100_000,), 1.001)
        assert value.bfloat16()[0] == 1.0
        rounded = round_at_random(value, torch.Generator().manual_seed(0)).double()
        assert rounded.unique().tolist() == [1.0, 1.0078125]
        assert rounded.mean().item() == pytest.approx(1.001, rel=ROUNDED_MEAN)

    @given(st.floats(-(2.0**126), 2.0**126, width=32, allow_subnormal=False))
    def test_what_fits_stays_and_all_else_goes_to_a_neighbour(self, value: float) -> None:
        rounded = round_at_random(torch.tensor([value]), torch.Generator().manual_seed(0))
        fits = torch.tensor([value]).bfloat16()
        assert abs(rounded.double() - value) <= 2 * abs(fits.double() - value) + abs(value) * 2**-7
        assert torch.equal(round_at_random(fits.float(), torch.Generator().manual_seed(1)), fits)

    def test_a_hook_on_the_step_runs_once(self) -> None:
        model = Regression()
        build_for(model, "adamw_torch")  # torch now wraps the class's own step
        optimizer = build_for(model, "adamw_torch", optim_bf16_state=True)
        calls: list[int] = []
        optimizer.register_step_post_hook(lambda *_: calls.append(1))
        take_steps(model, optimizer, [regression_batch(8)])
        assert calls == [1]
