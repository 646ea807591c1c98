"""The plugin that vLLM loads: an entry point of ``vllm.general_plugins``.

It starts nothing on the GPU. It never raises: where it cannot do its work it says so once, and vLLM runs as
without it.
"""

import importlib
import os
import sys
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from moe_lora import __version__
from moe_lora.vllm import fallback, operators
from moe_lora.vllm.versions import METHODS, SUPPORTED, arguments, is_supported

#: Switches the plugin off.
VARIABLE = "MOE_LORA_VLLM"

#: The wrapper that vLLM's LoRA layers call, and the one in its place.
THEIR_WRAPPER = "vllm.lora.punica_wrapper.punica_gpu.PunicaWrapperGPU"
OUR_WRAPPER = "moe_lora.vllm.punica.MoeLoraPunicaWrapper"

_OPERATOR = "vllm.lora.ops.triton_ops.fused_moe_lora_op"


@dataclass
class Finding:
    """What the plugin does in this process."""

    #: Of the vLLM that is installed, if one is.
    version: str | None
    #: Why nothing is replaced; ``None`` where something is.
    reason: str | None = None
    #: Whether somebody wanted it so, and nobody has to be told.
    wanted: bool = False


def examine() -> Finding:
    """Says what is to be replaced, and replaces nothing. Does not import vLLM."""
    try:
        version = metadata.version("vllm")
    except metadata.PackageNotFoundError:
        return Finding(None, "vLLM is not installed")
    setting = os.environ.get(VARIABLE, "")
    if setting.lower() == "off":
        return Finding(version, f"{VARIABLE} is {setting}", wanted=True)
    if setting.lower() not in ("", "on"):
        return Finding(version, f"{VARIABLE} is {setting}, expected on or off")
    if not is_supported(version):
        known = f"{SUPPORTED[0]} to {SUPPORTED[-1]}"
        return Finding(
            version, f"vLLM {version} is none that moe_lora {__version__} was tested with, which are {known}"
        )
    return Finding(version)


def install() -> None:
    """Has vLLM's LoRA run as this package's kernels, as far as this vLLM is known."""
    finding = examine()
    if finding.reason is not None:
        if not finding.wanted:
            fallback.warn("everything", finding.reason)
        return
    try:
        _replace_operators()
        _replace_wrapper()
        _mark_compiled_code()
    # Whatever a vLLM has elsewhere: it starts without the plugin.
    except (ImportError, AttributeError, TypeError) as error:
        fallback.warn("what is not replaced yet", f"{type(error).__name__}: {error}")


def _replace_operators() -> None:
    """Replaces vLLM's operators, in every module of vLLM that has imported them."""
    modules = {name: importlib.import_module(name) for name in operators.OPERATORS}
    theirs = arguments(modules[_OPERATOR]._fused_moe_lora)
    ours = arguments(operators._fused_moe_lora)
    if theirs != ours[: len(theirs)]:
        fallback.warn("fused_moe_lora", f"it takes {', '.join(theirs)} here")
        return
    replaced = {}
    for name, functions in operators.OPERATORS.items():
        for function in functions:
            their = getattr(modules[name], function.__name__)
            if their is not function:
                fallback.THEIRS[function.__name__] = their
                replaced[id(their)] = function
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "vllm" and module is not None:
            for attribute, value in list(vars(module).items()):
                if id(value) in replaced:
                    setattr(module, attribute, replaced[id(value)])


def _replace_wrapper() -> None:
    """Has vLLM's platform name the wrapper of :mod:`moe_lora.vllm.punica`, which is imported when it is made:
    it needs vLLM's layers, and those the engine's configuration."""
    from vllm.platforms import current_platform

    platform = type(current_platform)
    named = platform.get_punica_wrapper()
    if named == THEIR_WRAPPER:
        platform.get_punica_wrapper = classmethod(lambda cls: OUR_WRAPPER)
    elif named != OUR_WRAPPER:
        fallback.warn("LoRA of layers", f"this platform has {named}")


def _mark_compiled_code() -> None:
    """Keeps code that vLLM compiles with these operators apart, in its cache, from code without."""
    from vllm import envs

    theirs = envs.compile_factors
    if hasattr(theirs, "moe_lora"):
        return

    def compile_factors() -> dict[str, Any]:
        return {**theirs(), "MOE_LORA": __version__}

    compile_factors.moe_lora = True  # type: ignore[attr-defined]
    envs.compile_factors = compile_factors


def unknown_methods() -> dict[str, str]:
    """What this vLLM's wrapper takes other arguments for than are known, and which. Imports vLLM's layers."""
    module, _, name = THEIR_WRAPPER.rpartition(".")
    wrapper = getattr(importlib.import_module(module), name)
    unknown = {}
    for kind, methods in METHODS.items():
        for method, expected in methods.items():
            got = arguments(getattr(wrapper, method))
            if got != expected:
                unknown[kind] = f"{method} takes {', '.join(got)} here"
    return unknown
