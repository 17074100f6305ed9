"""Nothing is set on objects of others: neither on a user's model nor on a module of another package."""

import ast
from pathlib import Path

from tests.shape.source import modules, of_each, tree

THE_ONE_PLACE = "trainer/model/borrowing.py"  # puts settings on a model, and takes them back
MODELS = ("model", "module", "block", "layer", "head", "embedding", "embeddings", "config")  # names of others' objects
OWN = {  # modules and configurations that we have built ourselves, before anyone else sees them
    "trainer/model/build.py": {"model.generation_config", "model.config"},
    "trainer/model/export.py": {"double.config"},
    "trainer/model/lora.py": {"layer.weight", "model.config"},  # of the model that `trainer export` has loaded to merge
    "trainer/training/saved_model.py": {"model.generation_config"},
    "trainer/cli/logs.py": {"sys.stdout", "sys.stderr"},  # of a process that the command line owns
    "trainer/hf/seq2seq.py": {"model.generation_config"},  # of the user's arguments, as transformers' class does
}


@of_each(modules())
def test_no_module_assigns_to_attributes_of_a_model_or_of_another_package(module: Path) -> None:
    if str(module) == THE_ONE_PLACE:
        return
    imported = {
        alias.asname or alias.name.partition(".")[0]
        for node in ast.walk(tree(module))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    faults = []
    for node in ast.walk(tree(module)):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        for target in [part for each in targets for part in getattr(each, "elts", [each])]:
            if not isinstance(target, ast.Attribute):
                continue
            place = ast.unparse(target)
            owner = place.rpartition(".")[0]
            is_switch = place.startswith("torch.backends.") or place == "os.environ"  # made to be assigned to
            is_of_others = owner.split(".")[0] in imported and not is_switch
            is_of_model = owner.split(".")[-1] in MODELS
            if (is_of_others or is_of_model) and not any(place.startswith(own) for own in OWN.get(str(module), ())):
                faults.append(f"line {node.lineno}: {place}")
    assert not faults, "; ".join(faults)
