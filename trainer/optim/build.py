"""From the options to the optimizer: looks the name up, checks what was asked of it, builds its class over the groups.

Knows no optimizer by name. Invariant: an option that the chosen optimizer would not use is an error.
"""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import logging
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from trainer.config.groups import OptimizerArguments
from trainer.config.suggest import nearest
from trainer.distributed.topology import current_topology
from trainer.errors import UsageError
from trainer.optim.adapters import Bfloat16State, is_averaging, mix
from trainer.optim.groups import Group, parameter_groups, split_targets, target_matrices
from trainer.optim.registry import ADAM, Spec, find, load_class

_log = logging.getLogger(__name__)
_GIVEN = ("params", "lr", "weight_decay", *ADAM)  # constructor arguments that have options of their own


def build_optimizer(model: nn.Module, args: OptimizerArguments) -> torch.optim.Optimizer:
    """Build the optimizer that `args.optim` names, over the trainable parameters of the model.

    Raises:
        UsageError: no optimizer has that name, it cannot do what is asked, or nothing is trained.
        MissingPackageError: its package is not installed; the message says how to.
    """
    groups = parameter_groups(model, args)
    options = parse_options(args.optim_args)
    if ":" in args.optim:
        optimizer = _build_own(groups, args, options)
    else:
        optimizer = _build_known(find(args.optim), model, groups, args, options)
    if is_averaging(optimizer):
        optimizer.train()  # type: ignore[attr-defined]
    return optimizer


def find_class(args: OptimizerArguments) -> Any:
    """Import the class (or function) that `args.optim` names.

    Raises:
        UsageError: no optimizer has that name.
        MissingPackageError: its package is not installed; the message says how to.
    """
    if ":" in args.optim:
        return load_class(args.optim, args.optim, None)
    spec = find(args.optim)
    return load_class(args.optim, spec.path, spec.package)


def optimizer_class(model: nn.Module, args: OptimizerArguments) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """Return the class that the options name, and the settings that a model's parameters would have in it."""
    optimizer = build_optimizer(model, args)
    taken = inspect.signature(type(optimizer)).parameters
    return type(optimizer), {name: value for name, value in optimizer.defaults.items() if name in taken}


def parse_options(text: str | None) -> dict[str, Any]:
    """Read `name=value, name=value`; a value is a Python literal (0.9, True, (0.9, 0.95)), or text.

    Raises:
        UsageError: a part is not name=value, or a name stands there twice.
    """
    options: dict[str, Any] = {}
    for part in re.split(r",(?![^(\[]*[)\]])", text or ""):
        name, equals, value = (word.strip() for word in part.partition("="))
        if not part.strip() and not equals:
            continue
        if not name.isidentifier() or not equals or name in options:
            raise UsageError(f"optim_args = {text!r}: write name=value, name=value, each name once")
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[name] = value
    return options


def _build_known(
    spec: Spec, model: nn.Module, groups: list[Group], args: OptimizerArguments, options: dict[str, Any]
) -> torch.optim.Optimizer:
    _check_ability(spec, groups, args)
    if spec.arrange is not None:
        groups = spec.arrange(model, groups)
    elif spec.target_options is not None:
        if args.optim_target_modules is None:
            raise UsageError(
                f"optim = {args.optim!r} needs optim_target_modules: all-linear, a regular expression or a list"
            )
        settings = {name: options.pop(name, default) for name, default in spec.target_options.items()}
        groups = split_targets(groups, target_matrices(model, args.optim_target_modules), settings)
    cls = find_class(args)
    extra = {name: options.pop(name, default) for name, default in spec.extra_options.items()}
    arguments = {**_adam(spec.takes, args), **spec.fixed}
    taken = _constructor_options(cls)
    if "triton" in taken and groups[0]["params"][0].device.type == "cpu":  # no GPU to run Triton kernels
        arguments.setdefault("triton", False)
    allowed = taken - arguments.keys()
    _check_options(args.optim, options, {*allowed, *spec.extra_options, *(spec.target_options or ())})
    if spec.prepare is not None:
        spec.prepare(arguments, extra)
    mixins: tuple[type[torch.optim.Optimizer], ...] = (
        (Bfloat16State, *spec.mixins) if args.optim_bf16_state else spec.mixins
    )
    if spec.package is not None and current_topology().is_main:
        version, limits = importlib.metadata.version(spec.package), f"; {spec.note}" if spec.note else ""
        _log.warning("optim = %s is of %s %s, licence %s%s", args.optim, spec.package, version, spec.licence, limits)
    return _construct(mix(cls, mixins), args, groups, {**arguments, **options})


def _build_own(groups: list[Group], args: OptimizerArguments, options: dict[str, Any]) -> torch.optim.Optimizer:
    """Build by a class, or a function, of the user's: called with the groups, lr, and what it takes of the options."""
    make = find_class(args)
    accepted = _constructor_options(make, given=())
    takes = tuple(name for name in ADAM if name in accepted and name not in options)
    _check_unused(takes, args)
    if args.weight_decay and isinstance(make, type) and "weight_decay" not in accepted:
        raise UsageError(f"weight_decay = {args.weight_decay} has no effect: optim = {args.optim!r} takes none")
    _check_options(args.optim, options, accepted - {"params", "lr", "weight_decay"})
    _refuse(bool(args.optim_target_modules), "optim_target_modules", args)
    _refuse(args.optim_bf16_state, "optim_bf16_state", args)
    optimizer = _construct(make, args, groups, {**_adam(takes, args), **options})
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UsageError(f"optim = {args.optim!r} made a {type(optimizer).__name__}: it must make a torch optimizer")
    return optimizer


def _construct(make: Any, args: OptimizerArguments, groups: list[Group], arguments: dict[str, Any]) -> Any:
    try:
        return make(groups, lr=args.learning_rate, **arguments)
    except (TypeError, ValueError, NotImplementedError, KeyError) as error:
        raise UsageError(f"optim = {args.optim!r}, optim_args = {args.optim_args!r}: {error}") from error


def _check_ability(spec: Spec, groups: list[Group], args: OptimizerArguments) -> None:
    parameters = [parameter for group in groups for parameter in group["params"]]
    if spec.not_sharded and any(isinstance(parameter, DTensor) for parameter in parameters):
        raise UsageError(f"optim = {args.optim!r} cannot train sharded parameters: {spec.not_sharded}; use one process")
    if spec.not_on_cpu and any(parameter.device.type == "cpu" for parameter in parameters):
        raise UsageError(f"optim = {args.optim!r} cannot train on a CPU: {spec.not_on_cpu}")
    if spec.steps_in_backward and args.max_grad_norm > 0:
        raise UsageError(
            f"optim = {args.optim!r} steps during backward, before all gradients are known: max_grad_norm = "
            f"{args.max_grad_norm} cannot be kept, set it to 0"
        )
    _check_unused(spec.takes, args)
    _refuse(args.optim_bf16_state and not spec.has_plain_state, "optim_bf16_state", args)
    _refuse(args.optim_target_modules is not None and spec.target_options is None, "optim_target_modules", args)


def _adam(takes: Iterable[str], args: OptimizerArguments) -> dict[str, Any]:
    values = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    return {name: values[name] for name in takes}


def _constructor_options(make: Any, given: Iterable[str] = _GIVEN) -> set[str]:
    return set(inspect.signature(make).parameters) - {*given}


def _check_options(name: str, options: dict[str, Any], allowed: set[str]) -> None:
    for option in options:
        if option not in allowed:
            near = nearest(option, allowed)
            advice = f"did you mean {near!r}?" if near else f"it takes {', '.join(sorted(allowed)) or 'none'}"
            raise UsageError(f"optim_args: {name} has no option {option!r}; {advice}")


def _check_unused(takes: Iterable[str], args: OptimizerArguments) -> None:
    options = {"adam_beta1": "betas", "adam_beta2": "betas", "adam_epsilon": "eps"}
    for option, argument in options.items():
        is_changed = getattr(args, option) != getattr(OptimizerArguments, option)
        _refuse(is_changed and argument not in takes, option, args)


def _refuse(is_given: bool, option: str, args: OptimizerArguments) -> None:
    if is_given:
        raise UsageError(f"{option} has no effect with optim = {args.optim!r}: leave it out")
