"""Brings the files of vLLM that are measured: ``python -m bench.fetch FOLDER``.

``--every-release`` brings those too that say what functions take in each release that the plugin is for. The
files come out of vLLM's own wheels, by pip, and stay in a folder that git ignores.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

FOLDER = "vllm/lora/ops/triton_ops"
OPERATOR = f"{FOLDER}/fused_moe_lora_op.py"
#: What dense layers are computed with, by the names that the files have in vLLM.
DENSE = ("kernel_utils", "utils", "lora_kernel_metadata", "lora_shrink_op", "lora_expand_op")


def dense_file(name: str) -> str:
    """What a file of :data:`DENSE` is called in the folder."""
    return f"dense_{name}.py"


#: For each release: the folder, and which files of the wheel go there under which names. The library is
#: vLLM's compiled operators, of which the routing step is measured; it loads without the rest of vLLM.
RELEASES = {
    "0.17.1": ("v017", {OPERATOR: "fused_moe_lora_op.py"}),
    "0.33.0": (
        "v033",
        {
            OPERATOR: "fused_moe_lora_op.py",
            "vllm/_moe_C_stable_libtorch.abi3.so": "_moe_C.so",
            **{f"{FOLDER}/{name}.py": dense_file(name) for name in DENSE},
        },
    ),
}
#: The releases that the plugin is for (``moe_lora.vllm.versions``), and the files that say what the functions
#: take that it replaces or relies on; each keeps its name under ``releases/VERSION``.
PLUGIN_RELEASES = ("0.26.0", "0.27.1", "0.28.0", "0.29.0", "0.30.0", "0.31.0", "0.32.0", "0.33.0")
PLUGIN_FILES = (
    OPERATOR,
    f"{FOLDER}/lora_shrink_op.py",
    f"{FOLDER}/lora_expand_op.py",
    f"{FOLDER}/lora_kernel_metadata.py",
    "vllm/lora/punica_wrapper/punica_gpu.py",
    "vllm/lora/layers/base.py",
    "vllm/_custom_ops.py",
    "vllm/envs.py",
    "vllm/platforms/cuda.py",
)
PLATFORMS = (
    "manylinux_2_35_x86_64",
    "manylinux_2_31_x86_64",
    "manylinux_2_28_x86_64",
    "manylinux1_x86_64",
)

Release = tuple[str, dict[str, str]]


def every_release() -> dict[str, Release]:
    """What ``--every-release`` brings, as :data:`RELEASES` has it."""
    return {
        version: (f"releases/{version}", {file: file for file in PLUGIN_FILES})
        for version in PLUGIN_RELEASES
    }


def fetch(folder: Path, releases: dict[str, Release]) -> None:
    """Fetches what is not there yet."""
    for version, (name, files) in releases.items():
        target = folder / name
        if all((target / file).is_file() for file in files.values()):
            continue
        print(f"fetching vLLM {version}'s operator files, out of a wheel of some 400 MB", flush=True)
        with tempfile.TemporaryDirectory() as scratch:
            _download(version, Path(scratch))
            wheel = next(Path(scratch).glob("vllm-*.whl"))
            target.mkdir(parents=True, exist_ok=True)
            with zipfile.ZipFile(wheel) as archive:
                for member, file in files.items():
                    (target / file).parent.mkdir(parents=True, exist_ok=True)
                    (target / file).write_bytes(archive.read(member))


def _download(version: str, to: Path) -> None:
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        + ["--python-version", "3.12", "--implementation", "cp", *platforms]
        + ["--dest", str(to), f"vllm=={version}"],
        check=True,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.fetch", description="Brings files of vLLM.")
    parser.add_argument("folder", type=Path, help="where they go")
    parser.add_argument(
        "--every-release", action="store_true", help="also files of each release that the plugin is for: 3 GB"
    )
    args = parser.parse_args()
    fetch(args.folder, RELEASES)
    if args.every_release:
        fetch(args.folder, every_release())
