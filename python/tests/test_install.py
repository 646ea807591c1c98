"""The plugin on a vLLM that is not there: what it replaces, and what it leaves alone."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

import moe_lora.vllm as stand_in  # noqa: E402
from moe_lora.vllm import __main__ as command  # noqa: E402
from moe_lora.vllm import fallback, operators, plugin  # noqa: E402
from vllm_files import stand_in as module  # noqa: E402

OPERATORS = "vllm.lora.ops.triton_ops.fused_moe_lora_op"
NAMES = ["fused_moe_lora", "fused_moe_lora_shrink", "fused_moe_lora_expand"]


@pytest.fixture(autouse=True)
def unmarked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a fresh process."""
    monkeypatch.setattr(fallback, "THEIRS", {})
    monkeypatch.setattr(fallback, "_WARNED", set())
    monkeypatch.delenv(plugin.VARIABLE, raising=False)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., dict[str, Any]]]:
    """Makes the modules of a vLLM of this version, whose operator takes these arguments."""
    before = dict(sys.modules)

    def make(
        operator: Callable[..., None] = operators._fused_moe_lora,
        version: str = "0.33.0",
        wrapper: str = plugin.THEIR_WRAPPER,
    ) -> dict[str, Any]:
        find = metadata.version
        monkeypatch.setattr(metadata, "version", lambda name: version if name == "vllm" else find(name))
        functions: dict[str, Any] = {name: object() for name in NAMES}
        functions["moe_lora_align_block_size"] = align = object()
        for package in [
            "vllm",
            "vllm.lora",
            "vllm.lora.ops",
            "vllm.lora.ops.triton_ops",
            "vllm.lora.punica_wrapper",
        ]:
            module(package).__path__ = []
        three = {name: functions[name] for name in NAMES}
        vars(sys.modules["vllm.lora.ops.triton_ops"]).update(three)
        module(OPERATORS, _fused_moe_lora=operator, **three)
        module("vllm._custom_ops", moe_lora_align_block_size=align)

        class Platform:
            @classmethod
            def get_punica_wrapper(cls) -> str:
                return wrapper

        module("vllm.platforms", current_platform=Platform())
        envs = module("vllm.envs", compile_factors=lambda: {"VLLM_USE": "1"})
        vars(sys.modules["vllm"])["envs"] = envs
        module(
            "vllm.lora.punica_wrapper.punica_gpu",
            renamed=functions["fused_moe_lora"],
            other=align,
            untouched=3,
        )
        return functions

    yield make
    for name in set(sys.modules) - set(before):
        del sys.modules[name]
    sys.modules.update(before)


def names_wrapper() -> str:
    found: str = sys.modules["vllm.platforms"].current_platform.get_punica_wrapper()
    return found


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_replaces_every_import(vllm: Callable[..., dict[str, Any]], caplog: pytest.LogCaptureFixture) -> None:
    functions = vllm()
    # A second time changes nothing.
    for _ in range(2):
        stand_in.install()
        assert sys.modules[OPERATORS].fused_moe_lora is stand_in.fused_moe_lora
        assert sys.modules[OPERATORS].fused_moe_lora_expand is stand_in.fused_moe_lora_expand
        assert sys.modules["vllm.lora.ops.triton_ops"].fused_moe_lora_shrink is stand_in.fused_moe_lora_shrink
        assert sys.modules["vllm._custom_ops"].moe_lora_align_block_size is stand_in.moe_lora_align_block_size
        user = sys.modules["vllm.lora.punica_wrapper.punica_gpu"]
        assert user.renamed is stand_in.fused_moe_lora
        assert user.other is stand_in.moe_lora_align_block_size
        assert user.untouched == 3
        assert names_wrapper() == plugin.OUR_WRAPPER
        assert list(sys.modules["vllm.envs"].compile_factors()) == ["VLLM_USE", "MOE_LORA"]
        assert functions == fallback.THEIRS
    assert warnings(caplog) == []


# Version, setting, and what is said of it; None: nothing.
LEFT_ALONE = [
    ("0.25.1", None, "vLLM 0.25.1 is none that moe_lora"),
    ("0.34.0", None, "which are 0.26 to 0.33"),
    ("1.0", "on", "vLLM 1.0 is none"),
    ("0.33.0", "off", None),
    ("0.34.0", "OFF", None),
    ("0.33.0", "of", "MOE_LORA_VLLM is of, expected on or off"),
]


@pytest.mark.parametrize(("version", "setting", "said"), LEFT_ALONE)
def test_leaves_it_alone(
    vllm: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    version: str,
    setting: str | None,
    said: str | None,
) -> None:
    functions = vllm(version=version)
    if setting is not None:
        monkeypatch.setenv(plugin.VARIABLE, setting)
    stand_in.install()
    stand_in.install()
    assert sys.modules[OPERATORS].fused_moe_lora is functions["fused_moe_lora"]
    assert names_wrapper() == plugin.THEIR_WRAPPER
    assert list(sys.modules["vllm.envs"].compile_factors()) == ["VLLM_USE"]
    assert len(warnings(caplog)) == (0 if said is None else 1)
    assert said is None or said in warnings(caplog)[0]


@pytest.mark.parametrize("version", ["0.26.0", "0.27.1", "0.33.1", "0.33.1.dev4+g1234567"])
def test_versions_that_are_known(vllm: Callable[..., dict[str, Any]], version: str) -> None:
    vllm(version=version)
    stand_in.install()
    assert names_wrapper() == plugin.OUR_WRAPPER


def test_an_operator_with_other_arguments_is_left(
    vllm: Callable[..., dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    def operator(output: object, adapter_enabled: object) -> None: ...

    functions = vllm(operator)
    stand_in.install()
    assert sys.modules[OPERATORS].fused_moe_lora is functions["fused_moe_lora"]
    assert names_wrapper() == plugin.OUR_WRAPPER
    assert warnings(caplog) == [
        "moe_lora leaves fused_moe_lora to vLLM: it takes output, adapter_enabled here"
    ]


def test_another_platform_keeps_its_wrapper(
    vllm: Callable[..., dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    vllm(wrapper="vllm.lora.punica_wrapper.punica_xpu.PunicaWrapperXPU")
    stand_in.install()
    assert names_wrapper().endswith("PunicaWrapperXPU")
    assert "this platform has vllm.lora.punica_wrapper.punica_xpu" in warnings(caplog)[0]


def test_whatever_is_missing_vllm_starts(
    vllm: Callable[..., dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    vllm()
    del sys.modules["vllm.platforms"]
    stand_in.install()
    assert "ModuleNotFoundError" in warnings(caplog)[0]


def test_what_is_refused_goes_to_vllm_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    calls: list[tuple[Any, ...]] = []

    def refuses(*_: Any, **__: Any) -> None:
        raise ValueError("x: expected bfloat16, got float32")

    guarded = fallback.guard("fused_moe_lora", refuses)
    # Nobody else is there to do it.
    with pytest.raises(ValueError, match="expected bfloat16"):
        guarded(1)
    fallback.THEIRS["fused_moe_lora"] = lambda *args, **kwargs: calls.append((args, kwargs))
    guarded(1, add_inputs=False)
    guarded(2)
    assert calls == [((1,), {"add_inputs": False}), ((2,), {})]
    assert warnings(caplog) == ["moe_lora leaves fused_moe_lora to vLLM: x: expected bfloat16, got float32"]


def method(names: list[str]) -> Callable[..., None]:
    """A function that takes arguments of these names."""
    scope: dict[str, Any] = {}
    exec(f"def function({', '.join(names)}): ...", scope)
    found: Callable[..., None] = scope["function"]
    return found


def wrapper_class(**changed: list[str]) -> type:
    """A wrapper as vLLM's, but for the methods that take other arguments."""
    from moe_lora.vllm.versions import METHODS

    methods = {name: names for kind in METHODS.values() for name, names in kind.items()}
    made = {name: method(names) for name, names in {**methods, **changed}.items()}
    return type("PunicaWrapperGPU", (), made)


def test_the_doctor(
    vllm: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    vllm()
    gpu = sys.modules["vllm.lora.punica_wrapper.punica_gpu"]
    gpu.PunicaWrapperGPU = wrapper_class()
    assert command.doctor() == 0
    said = capsys.readouterr().out
    assert "vLLM            0.33.0" in said
    assert "add_lora_w13, add_lora_w2: replaced" in said
    assert "add_lora_linear: replaced" in said

    gpu.PunicaWrapperGPU = wrapper_class(add_lora_w2=["self", "y", "x"])
    assert command.doctor() == 1
    said = capsys.readouterr().out
    assert "add_lora_w13, add_lora_w2: left to vLLM: add_lora_w2 takes self, y, x here" in said
    assert "add_lora_linear: replaced" in said

    for variable, value, why in [
        ("VLLM_PLUGINS", "another", "VLLM_PLUGINS does not name moe_lora"),
        (plugin.VARIABLE, "off", "MOE_LORA_VLLM is off"),
    ]:
        monkeypatch.setenv(variable, value)
        assert command.doctor() == 1
        assert f"Nothing would be replaced: {why}." in capsys.readouterr().out
        monkeypatch.delenv(variable)

    vllm(version="0.25.1")
    assert command.doctor() == 1
    assert "Nothing would be replaced: vLLM 0.25.1 is none" in capsys.readouterr().out


def test_the_doctor_without_vllm(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert command.doctor() == 1
    assert "vLLM            not installed" in capsys.readouterr().out


class Layer(SimpleNamespace):
    """A LoRA layer of vLLM, as far as ranks matter."""

    def set_lora(self, index: int, lora_a: Any, lora_b: Any) -> None:
        self.reset_lora(index)
        if lora_b == "fails":
            raise RuntimeError(lora_b)

    def reset_lora(self, index: int) -> None:
        self.reset = index


def linear_layer(slots: int = 3, rank: int = 16, fully_sharded: bool = False) -> Layer:
    stacked = tuple(torch.zeros(slots, 1, rank, 8) for _ in range(2))
    return Layer(lora_a_stacked=stacked, lora_config=SimpleNamespace(fully_sharded_loras=fully_sharded))


def test_ranks_are_those_that_were_set() -> None:
    from moe_lora.vllm import ranks

    layer = linear_layer()
    first, second = layer.lora_a_stacked
    assert ranks.of(first) is None
    ranks.follow(layer)
    ranks.follow(layer)
    noted = ranks.of(first)
    assert noted is not None and ranks.of(second) is noted
    assert noted.tolist() == [0, 0, 0]
    layer.set_lora(1, [torch.zeros(4, 8), None], None)
    layer.set_lora(2, [torch.zeros(4, 8), torch.zeros(9, 8)], None)
    layer.set_lora(0, torch.zeros(99, 8), None)
    assert noted.tolist() == [16, 4, 9]
    with pytest.raises(RuntimeError):
        layer.set_lora(0, torch.zeros(3, 8), "fails")
    layer.reset_lora(2)
    assert layer.reset == 2
    layer.set_lora(1, [None, None], None)
    assert noted.tolist() == [0, 0, 0]
    # A view from the tensor's beginning, as shared factors arrive in.
    assert ranks.of(first.expand(-1, 5, -1, -1)) is noted


def test_ranks_of_experts_are_one_for_all_their_tensors() -> None:
    from moe_lora.vllm import ranks

    layer = Layer(
        w13_lora_a_stacked=tuple(torch.zeros(2, 4, 16, 8) for _ in range(2)),
        w2_lora_a_stacked=(torch.zeros(2, 4, 16, 8),),
        lora_a_stacked=[torch.zeros(16, 8)],
        fully_sharded=False,
    )
    ranks.follow(layer)
    noted = ranks.of(layer.w13_lora_a_stacked[0])
    assert noted is not None and ranks.of(layer.w2_lora_a_stacked[0]) is noted
    layer.set_lora(1, [torch.zeros(4, 8, 8), torch.zeros(4, 12, 8), torch.zeros(4, 8, 8)], None)
    assert noted.tolist() == [0, 12]


def test_ranks_of_a_tensor_that_is_gone_are_nobodys() -> None:
    from moe_lora.vllm import ranks

    layer = linear_layer()
    ranks.follow(layer)
    # Memory that another tensor has by now.
    other = torch.empty(0).set_(layer.lora_a_stacked[0].untyped_storage(), 0, (3, 1, 16, 8))
    assert ranks.of(other) is not None
    del layer.lora_a_stacked
    assert ranks.of(other) is None


def test_ranks_that_are_divided_among_devices_are_not_noted() -> None:
    from moe_lora.vllm import ranks

    layer = linear_layer(fully_sharded=True)
    ranks.follow(layer)
    assert ranks.of(layer.lora_a_stacked[0]) is None
