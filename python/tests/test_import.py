"""What importing the package does and does not need."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import moe_lora
from moe_lora import _native


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_needs_neither_pytorch_nor_a_driver() -> None:
    code = "import sys, moe_lora; print([m for m in ('torch', 'vllm', 'numpy') if m in sys.modules])"
    assert python(code).strip() == "[]"


def test_leaves_the_driver_alone() -> None:
    """vLLM forks after its plugins were imported: nothing may have been started by then."""
    code = "import moe_lora; print('libcuda' in open('/proc/self/maps').read())"
    assert python(code).strip() == "False"


def test_exports_its_own_functions_alone() -> None:
    """The driver's functions, which the module defines for itself, must not take libcuda's place."""
    import ctypes

    library = ctypes.CDLL(_native.__file__)
    assert library.PyInit__native
    for name in ("cuInit", "cuLaunchKernel", "cuMemAlloc_v2"):
        assert not hasattr(library, name), name


def test_is_typed_and_says_its_version() -> None:
    assert Path(moe_lora.__file__).with_name("py.typed").is_file()
    assert moe_lora.__version__.count(".") == 2
    folder = Path(moe_lora.__file__).parent
    stub = "".join((folder / name).read_text(encoding="utf-8") for name in ("_native.pyi", "table.py"))
    for name in moe_lora.__all__:
        assert f"def {name}(" in stub or f"class {name}" in stub or f"{name}:" in stub, name
