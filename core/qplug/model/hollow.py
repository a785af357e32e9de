"""Models without memory for their parameters, which are on the meta device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from qplug.errors import QplugError
from qplug.model.foreign import reason_of
from qplug.model.quiet import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def load_config(folder: Path, *, trust_remote_code: bool) -> PreTrainedConfig:
    """The typed configuration of a checkpoint. Raises QplugError if its architecture is unknown."""
    from transformers import AutoConfig

    try:
        with quiet_transformers():
            config: PreTrainedConfig = AutoConfig.from_pretrained(
                folder, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # transformers raises anything for a wrong field
        raise QplugError(
            f"{folder / 'config.json'}: unknown architecture: {reason_of(error)}"
        ) from error
    return config


def build(config: PreTrainedConfig, folder: Path, *, trust_remote_code: bool) -> PreTrainedModel:
    """A hollow model of ``config``: parameters on the meta device, buffers with their values."""
    from transformers import AutoModelForCausalLM

    try:
        with _hollow(), _Modest(), quiet_transformers():
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, trust_remote_code=trust_remote_code
            )
    except QplugError as error:
        raise QplugError(f"{folder / 'config.json'}: {error}") from error
    except Exception as error:  # as in load_config
        raise QplugError(
            f"{folder / 'config.json'}: no such causal model: {reason_of(error)}"
        ) from error
    return model


@contextmanager
def _hollow() -> Iterator[None]:
    """Within it, new modules have their parameters on the meta device."""
    register = nn.Module.register_parameter

    def register_hollow(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:  # a tied head shares the embedding's parameter
            param = nn.Parameter(param.to("meta"), requires_grad=False)
            param._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers draws no values for it
        register(module, name, param)

    nn.Module.register_parameter = register_hollow  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


#: The most elements of a buffer that a model fills as it is built, such as a mask or a table.
_MOST = 1 << 28
_FILLED = (torch.arange, torch.eye, torch.full, torch.linspace, torch.ones, torch.rand, torch.zeros)


class _Modest(TorchFunctionMode):
    """Within it, no tensor of more than ``_MOST`` elements is filled, whatever config.json says."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _FILLED:
            count = func(*args, **{**kwargs, "device": "meta"}).numel()
            if count > _MOST:
                raise QplugError(f"its model has a table of {count} numbers besides its weights")
        return func(*args, **kwargs)
