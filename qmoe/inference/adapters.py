"""peft beside encoded experts: adapters on dense layers train as ever, adapters on the experts'
matrices are refused. Without this, peft would find no such parameter, warn, and train nothing."""

from typing import Any

from torch import nn

from qmoe.errors import UnsupportedModelError
from qmoe.inference.experts import EncodedExperts
from qmoe.system.imports import after_import

_done = False


def watch_peft() -> None:
    """Lets peft's tuners ask `refuse` first, as soon as peft is imported; may be called again."""
    global _done
    if not _done:
        _done = True
        after_import("peft.tuners.tuners_utils", _wrap)


def refuse(model: nn.Module, targets: Any) -> None:
    """Args:
        model: that an adapter is for.
        targets: the adapter's ``target_parameters``; may be None.

    Raises:
        UnsupportedModelError: one of them is an encoded matrix.
    """
    names = {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, EncodedExperts)
        for name in module.encoded_names
    }
    for target in targets or ():
        if any(name == target or name.endswith(f".{target}") for name in names):
            raise UnsupportedModelError(
                f"target_parameters: {target} is encoded and cannot be trained; choose attention "
                "or other dense layers (target_modules), or train the original and compress it"
            )


def _wrap() -> None:
    from peft.tuners.tuners_utils import BaseTuner

    plain = BaseTuner.inject_adapter

    def inject_adapter(self: Any, model: nn.Module, adapter_name: str, *a: Any, **k: Any) -> Any:
        refuse(model, getattr(self.peft_config[adapter_name], "target_parameters", None))
        return plain(self, model, adapter_name, *a, **k)

    BaseTuner.inject_adapter = inject_adapter
