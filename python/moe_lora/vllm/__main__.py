"""``python -m moe_lora.vllm doctor``: what the plugin would do in a vLLM that starts here."""

import argparse
import os
import sys

from moe_lora import __version__
from moe_lora.vllm import plugin
from moe_lora.vllm.versions import METHODS, SUPPORTED


def doctor() -> int:
    """Prints it. The status is 0 where everything would be replaced, and 1 elsewhere."""
    finding = plugin.examine()
    plugins = os.environ.get("VLLM_PLUGINS")
    loaded = plugins is None or "moe_lora" in plugins.split(",")
    print(f"moe_lora        {__version__}, for vLLM {SUPPORTED[0]} to {SUPPORTED[-1]}")
    print(f"vLLM            {finding.version or 'not installed'}")
    print(f"VLLM_PLUGINS    {'not set: all plugins are loaded' if plugins is None else plugins}")
    print(f"{plugin.VARIABLE}   {os.environ.get(plugin.VARIABLE, 'not set')}")
    reason = finding.reason
    if reason is None and not loaded:
        reason = "VLLM_PLUGINS does not name moe_lora"
    if reason is not None:
        print(f"\nNothing would be replaced: {reason}.")
        return 1
    try:
        unknown = plugin.unknown_methods()
    except ImportError as error:
        print(f"\nvLLM does not load here: {error}")
        return 1
    print()
    for kind, methods in METHODS.items():
        state = f"left to vLLM: {unknown[kind]}" if kind in unknown else "replaced"
        print(f"{kind:<23} {', '.join(methods)}: {state}")
    print("LoRA of logits and embeddings: left to vLLM")
    return 1 if unknown else 0


def main() -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m moe_lora.vllm", description="moe_lora as a plugin of vLLM."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "doctor",
        help="say what would be replaced in a vLLM that starts here, and why not",
        description="Says what would be replaced in a vLLM that starts here, and why not. Starts nothing on "
        "the GPU. The status is 0 where everything would be replaced.",
    )
    parser.parse_args()
    return doctor()


if __name__ == "__main__":
    sys.exit(main())
