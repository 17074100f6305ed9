"""Any module as a model: what its forward takes, and how its loss is found.

The model computes its loss itself, or a function is given that does, or labels are smoothed. Knows nothing of loops.
Invariant: the inputs that are given are never changed.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.generic import can_return_loss, find_labels

from trainer.errors import ModelError
from trainer.labels import IGNORE_INDEX
from trainer.model.fsdp import unwrapped
from trainer.model.precision import accumulation_dtype

ITEMS = "num_items_in_batch"
QUANTISED = (
    "quantised weights cannot be trained, and adapters of them (QLoRA) neither; start from the original model: with "
    "lora_rank and bf16, one that is stored in bfloat16 takes 2 bytes a parameter, shared out over the ranks"
)
LossFunction = Callable[..., Tensor]  # (outputs, labels, num_items_in_batch=) -> loss


@dataclass(frozen=True)
class ModelTraits:
    """What a model's forward says about itself; read before the model is sharded, which changes its class."""

    accepts_loss_kwargs: bool  # it divides its loss by num_items_in_batch
    label_names: list[str]
    columns: list[str]  # that its forward takes, labels included
    shifts_labels: bool  # the first label of each row is never a target
    is_causal_lm: bool
    can_return_loss: bool  # without labels
    main_input_name: str


@dataclass(frozen=True)
class LossRule:
    """How the loss of a micro-batch is found."""

    traits: ModelTraits
    accepts_loss_kwargs: bool
    function: LossFunction | None
    label_smoothing: float


def check_module(model: Any, *, is_packed: bool = False) -> None:
    """Raise ModelError where something is no module, or one that cannot be trained, or not on packs if it shall."""
    if not is_packed and not isinstance(model, nn.Module):
        raise ModelError(f"model is a {type(model).__name__}: give a torch.nn.Module")
    if is_packed and (not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None):
        raise ModelError(f"model is a {type(model).__name__}: give a transformers causal language model, not wrapped")
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel) or hasattr(model, "_orig_mod"):
        raise ModelError(
            f"model is wrapped in {type(model).__name__}, and nothing could load what a run of it exports: give the "
            "model itself; weights are shared out over the ranks that torchrun starts, torch_compile=True compiles"
        )
    if getattr(model, "is_quantized", False):
        raise ModelError(QUANTISED)


def read_traits(model: nn.Module, label_names: Sequence[str] | None = None) -> ModelTraits:
    """Read what a model's forward takes and how it uses labels."""
    inner = unwrapped(model)
    parameters = inspect.signature(inner.forward).parameters
    labels = find_labels(type(inner)) if label_names is None else list(label_names)
    is_encoder_decoder = getattr(getattr(inner, "config", None), "is_encoder_decoder", False)
    loss = LOSS_MAPPING.get(getattr(inner, "loss_type", None))
    return ModelTraits(
        accepts_loss_kwargs=getattr(inner, "accepts_loss_kwargs", _divides_by_items(type(inner))),
        label_names=labels,
        columns=list(dict.fromkeys([*parameters, "label", "label_ids", *labels])),
        shifts_labels=loss is ForCausalLMLoss and not is_encoder_decoder,
        is_causal_lm=type(inner).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(),
        can_return_loss=can_return_loss(type(inner)),
        main_input_name=getattr(inner, "main_input_name", "input_ids"),
    )


def _divides_by_items(kind: type[nn.Module]) -> bool:
    """Return whether a model that says nothing about it divides its loss by num_items_in_batch.

    A forward that takes anything is taken to hand it on; of transformers' models only one that names the number, or the
    `loss_function` that takes it: others, encoder-decoders among them, take anything and ignore this.
    """
    parameters = inspect.signature(kind.forward).parameters.values()
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return "num_items_in_batch" in inspect.signature(kind.forward).parameters
    if not issubclass(kind, PreTrainedModel):
        return True
    codes = [inspect.unwrap(vars(base)["forward"]).__code__ for base in kind.__mro__ if "forward" in vars(base)]
    return any({"loss_function", "num_items_in_batch"} & {*code.co_names, *code.co_consts} for code in codes)


def takes_argument(function: Callable[..., Any], name: str) -> bool:
    """Return whether a function may be called with an argument of this name."""
    parameters = inspect.signature(function).parameters
    return name in parameters or any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())


def reads_argument(function: Callable[..., Any], name: str) -> bool:
    """Return whether a Python function reads its argument of this name otherwise than to hand it to `super()`."""
    code = getattr(inspect.unwrap(getattr(function, "__func__", function)), "__code__", None)
    if code is None or "super" in code.co_names:
        return False
    return any(each.opname.startswith("LOAD_FAST") and name in str(each.argval) for each in dis.get_instructions(code))


def find_loss(
    model: nn.Module, inputs: Mapping[str, Any], num_items: Tensor | None, rule: LossRule
) -> tuple[Tensor, Any]:
    """Run the model; gives loss and outputs.

    Raises:
        ModelError: The model gives no loss.
    """
    finds_loss = rule.function is not None or rule.label_smoothing > 0
    labels = inputs.get("labels") if finds_loss else None
    given = {name: value for name, value in inputs.items() if labels is None or name != "labels"}
    if rule.accepts_loss_kwargs and num_items is not None:
        given["num_items_in_batch"] = num_items
    if "use_cache" in rule.traits.columns:
        given.setdefault("use_cache", False)  # keys and values are for generating
    outputs = model(**given)
    if rule.function is not None:
        return rule.function(outputs, labels, num_items_in_batch=num_items), outputs
    if labels is not None:
        return smoothed_loss(outputs, labels, num_items, rule), outputs
    return own_loss(outputs, given), outputs


def own_loss(outputs: Any, inputs: Mapping[str, Any]) -> Tensor:
    """The loss among a model's outputs: the one of that name, or the first.

    Raises:
        ModelError: There is none.
    """
    if isinstance(outputs, Mapping):
        if "loss" not in outputs:
            raise ModelError(
                f"the model gave no loss, only {', '.join(outputs)}, for the inputs {', '.join(inputs)}: give it labels"
            )
        loss: Tensor = outputs["loss"]
        return loss
    return outputs[0] if isinstance(outputs, tuple | list) else outputs


def smoothed_loss(outputs: Any, labels: Tensor, num_items: Tensor | None, rule: LossRule) -> Tensor:
    """Cross-entropy with a share of the target spread evenly over all classes; labels of -100 do not count."""
    logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
    if rule.traits.is_causal_lm:
        logits, labels = logits[..., :-1, :], labels[..., 1:]
    logits = logits.to(accumulation_dtype(logits.dtype))
    total = cross_entropy(
        logits.flatten(0, -2), labels.flatten(), reduction="sum", label_smoothing=rule.label_smoothing
    )
    return total / ((labels != IGNORE_INDEX).sum() if num_items is None else num_items)


def count_labels(inputs: Mapping[str, Any], traits: ModelTraits) -> int | None:
    """Labels of a micro-batch that are trained; None where there are no tensors of labels."""
    labels = inputs.get("shift_labels", inputs.get("labels"))
    if not isinstance(labels, Tensor):
        return None
    if traits.shifts_labels and "shift_labels" not in inputs:
        labels = labels[..., 1:]
    return int((labels != IGNORE_INDEX).sum())


def count_inputs(inputs: Mapping[str, Any], traits: ModelTraits) -> int:
    """Count the numbers of a model's main input, which are its tokens where it reads tokens."""
    main = inputs.get(traits.main_input_name)
    return main.numel() if isinstance(main, Tensor) else 0


def count_tokens(inputs: Mapping[str, Any], traits: ModelTraits, padding_id: int | None, kind: str) -> int:
    """Tokens of a micro-batch's main input: all, or those that are no padding where that can be told.

    Raises:
        ModelError: The main input is not there, or padding cannot be told.
    """
    main = inputs.get(traits.main_input_name)
    if not isinstance(main, Tensor):
        raise ModelError(
            f"include_num_input_tokens_seen: the model's main_input_name is {traits.main_input_name!r}, but there is "
            f"no such input, only {', '.join(inputs)}: set main_input_name in the model's class"
        )
    if kind == "all":
        return main.numel()
    if "attention_mask" in inputs:
        return int(inputs["attention_mask"].sum())
    if padding_id is None:
        raise ModelError("include_num_input_tokens_seen=non_padding needs attention_mask, or a tokenizer that pads")
    return int((main != padding_id).sum())
