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
from qplug.model.transposed import with_linears

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
        if "trust_remote_code" in str(error):
            raise QplugError(
                f"{folder}: comes with Python code of its own; if you trust it, pass "
                "--trust-remote-code"
            ) from error
        raise QplugError(
            f"{folder / 'config.json'}: unknown architecture: {reason_of(error)}"
        ) from error
    return config


def build(config: PreTrainedConfig, folder: Path, *, trust_remote_code: bool) -> PreTrainedModel:
    """A hollow model of ``config``: parameters on the meta device, buffers with their values.

    Its linears are ``nn.Linear``, also those that transformers keeps transposed.

    It is of the class that config.json names in ``architectures``. If transformers does not know
    that class, it is of the class that reads text and predicts the next token. Raises QplugError if
    there is none, or if it cannot be built.
    """
    try:
        with _hollow(), _Modest(), quiet_transformers():
            return with_linears(_new_model(config, trust_remote_code=trust_remote_code))
    except QplugError as error:
        raise QplugError(f"{folder / 'config.json'}: {error}") from error
    except Exception as error:  # as in load_config
        raise QplugError(
            f"{folder / 'config.json'}: its model cannot be built: {reason_of(error)}"
        ) from error


#: The classes of transformers that find a model by its configuration, in the order of trial.
_AUTO_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForMultimodalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModel",
)


def _new_model(config: PreTrainedConfig, *, trust_remote_code: bool) -> PreTrainedModel:
    """Returns a new model of ``config``."""
    import transformers

    model: PreTrainedModel
    own_code = getattr(config, "auto_map", None) or {}
    if not (trust_remote_code and own_code):
        for name in getattr(config, "architectures", None) or ():
            named = getattr(transformers, str(name), None)
            if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
                model = named._from_config(config)
                return model
    for name in _AUTO_CLASSES:
        auto: Any = getattr(transformers, name, None)
        known = auto is not None and type(config) in auto._model_mapping
        if known or (trust_remote_code and name in own_code):
            model = auto.from_config(config, trust_remote_code=trust_remote_code)
            return model
    raise QplugError(
        f"transformers has no model of type {config.model_type}; if the model comes with its own "
        "code, pass --trust-remote-code"
    )


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
