"""The tensors of a model that a checkpoint holds: parameters once, whatever ties them, and buffers that are stored.

Invariant: what `model_tensors` gives is all that a model built from the same configuration lacks; of a PEFT model that
is what is trained, for its base model comes from elsewhere.
"""

from __future__ import annotations

from torch import Tensor, nn

from trainer.checkpoint.optimizer import NAME
from trainer.checkpoint.storage import StoredTensors, fill
from trainer.errors import CheckpointError


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Give the tensors to save, sharded as they are.

    Raises:
        CheckpointError: the model keeps state that is no tensor.
    """
    stored = model.state_dict()
    strange = [name for name, value in stored.items() if not isinstance(value, Tensor)]
    if strange:
        raise CheckpointError(f"{strange[0]} of the model is no tensor: a checkpoint cannot hold it")
    is_adapted = hasattr(model, "peft_config")
    tensors: dict[str, Tensor] = {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad or not is_adapted
    }
    return tensors | {name: buffer for name, buffer in model.named_buffers() if name in stored}


def restore_model(model: nn.Module, stored: StoredTensors) -> None:
    """Fill a model, in place, with the weights of a checkpoint.

    Raises:
        CheckpointError: the checkpoint belongs to another model.
    """
    tensors = model_tensors(model)
    strange = [name for name in stored.entries if name not in tensors and not name.startswith(f"{NAME}/")]
    if strange:
        raise CheckpointError(f"{stored.folder} holds {strange[0]}, which this model lacks; it is another model's")
    for name, tensor in tensors.items():
        fill(tensor, name, stored)
