"""Tensors that are not there: what an argument says of itself, for tests of what is refused.

They speak DLPack and nothing else, so the tests need neither PyTorch nor a GPU.
"""

from __future__ import annotations

import ctypes
from math import prod

CPU, CUDA = 1, 2
_CODES = {"int": 0, "uint": 1, "float": 2, "bfloat": 4, "bool": 6}


class _Device(ctypes.Structure):
    _fields_ = [("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32)]


class _Type(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _Type),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _Managed(ctypes.Structure):
    _fields_ = [("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]


_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


class Fake:
    """A tensor of this shape and type, at an address that nobody may read."""

    def __init__(
        self,
        *shape: int,
        dtype: str = "bfloat16",
        strides: list[int] | None = None,
        device: tuple[int, int] = (CUDA, 0),
        address: int = 0x7F00_0000_0000,
    ) -> None:
        self._device = device
        if strides is None:
            strides = [prod(shape[i + 1 :]) for i in range(len(shape))]
        sizes = ctypes.c_int64 * len(shape)
        self._shape, self._strides = sizes(*shape), sizes(*strides)
        kind = dtype.rstrip("0123456789")
        bits = int(dtype[len(kind) :] or 8)
        self._managed = _Managed(
            _Tensor(
                address,
                _Device(*device),
                len(shape),
                _Type(_CODES[kind], bits, 1),
                self._shape,
                self._strides,
                0,
            )
        )

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._device

    def __dlpack__(self, *, stream: int | None = None) -> object:
        return _new_capsule(ctypes.addressof(self._managed), b"dltensor", None)
