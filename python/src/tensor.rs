//! Tensors of whatever library, read without a copy: where they are, their type, shape and strides.
//!
//! Three ways, the quickest first: DLPack's C exchange functions (PyTorch from 2.10 on: tens of nanoseconds),
//! its Python protocol, and the CUDA array interface.

use crate::fault::{Fault, Outcome};
use dlpack_ffi::{
    DLDataType, DLDataTypeCode, DLDevice, DLDeviceType, DLManagedTensor, DLPACK_MAJOR_VERSION,
    DLPackExchangeAPI, DLTensor,
};
use pyo3::exceptions::PyRuntimeError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PyCapsuleMethods, PyDict, PyType, PyTypeMethods};
use std::ffi::CStr;
use std::fmt;
use std::mem::MaybeUninit;
use std::ptr::NonNull;
use std::slice;

mod expect;

/// Most dimensions of a tensor that can be told of; the operator's have four at most.
const MAX_DIMS: usize = 8;

/// The argument that a tensor came as.
#[derive(Clone, Copy)]
pub enum Name {
    /// One tensor.
    Whole(&'static str),
    /// One of the slices.
    Slice(&'static str, usize),
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Name::Whole(name) => f.write_str(name),
            Name::Slice(name, slice) => write!(f, "{name}[{slice}]"),
        }
    }
}

/// An element type, as DLPack encodes it. Prints as Python's libraries call it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Type {
    code: u32,
    bits: u8,
}

impl Type {
    pub const BF16: Self = Type { code: DLDataTypeCode::kDLBfloat.0, bits: 16 };
    pub const F16: Self = Type { code: DLDataTypeCode::kDLFloat.0, bits: 16 };
    pub const F32: Self = Type { code: DLDataTypeCode::kDLFloat.0, bits: 32 };
    pub const I32: Self = Type { code: DLDataTypeCode::kDLInt.0, bits: 32 };
    pub const I64: Self = Type { code: DLDataTypeCode::kDLInt.0, bits: 64 };
    pub const U8: Self = Type { code: DLDataTypeCode::kDLUInt.0, bits: 8 };
    pub const BOOL: Self = Type { code: DLDataTypeCode::kDLBool.0, bits: 8 };
}

impl From<DLDataType> for Type {
    fn from(dtype: DLDataType) -> Self {
        Type { code: dtype.code.into(), bits: dtype.bits }
    }
}

impl fmt::Display for Type {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Type { code, bits } = self;
        match DLDataTypeCode(*code) {
            DLDataTypeCode::kDLBool => f.write_str("bool"),
            DLDataTypeCode::kDLInt => write!(f, "int{bits}"),
            DLDataTypeCode::kDLUInt => write!(f, "uint{bits}"),
            DLDataTypeCode::kDLFloat => write!(f, "float{bits}"),
            DLDataTypeCode::kDLBfloat => write!(f, "bfloat{bits}"),
            DLDataTypeCode::kDLComplex => write!(f, "complex{bits}"),
            _ => write!(f, "a type of {bits} bits (DLPack's type code {code})"),
        }
    }
}

/// What one dimension should be.
#[derive(Clone, Copy)]
pub enum Dim {
    /// This many.
    Is(usize),
    /// This many or more.
    AtLeast(usize),
    /// Whatever there is: the size that this names, as in the operator's contract.
    Named(&'static str),
}

impl Dim {
    fn holds(self, size: usize) -> bool {
        match self {
            Dim::Is(expected) => size == expected,
            Dim::AtLeast(least) => size >= least,
            Dim::Named(_) => true,
        }
    }
}

impl fmt::Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Dim::Is(size) => write!(f, "{size}"),
            Dim::AtLeast(size) => write!(f, "≥ {size}"),
            Dim::Named(name) => f.write_str(name),
        }
    }
}

/// `[a, b, c]`.
pub struct List<'a, T>(pub &'a [T]);

impl<T: fmt::Display> fmt::Display for List<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[")?;
        for (i, item) in self.0.iter().enumerate() {
            write!(f, "{}{item}", if i == 0 { "" } else { ", " })?;
        }
        f.write_str("]")
    }
}

/// A tensor of the caller's. Whoever holds the Python object keeps its memory.
#[derive(Clone, Copy)]
pub struct Tensor {
    name: Name,
    address: u64,
    device: DLDevice,
    dtype: Type,
    dims: usize,
    shape: [i64; MAX_DIMS],
    strides: [i64; MAX_DIMS],
}

impl Tensor {
    /// Reads the argument `name`. `exchange` is of the call's first tensor, and so most often of this one's
    /// type.
    pub fn read(name: Name, object: &Bound<'_, PyAny>, exchange: &Exchange<'_>) -> Outcome<Self> {
        if let Some(api) = exchange.of(object)?
            && let Some(read) = api.dltensor_from_py_object_no_sync
        {
            let mut tensor = MaybeUninit::<DLTensor>::uninit();
            // SAFETY: the function is of the object's own type; it fills the tensor or raises.
            if unsafe { read(object.as_ptr().cast(), tensor.as_mut_ptr()) } != 0 {
                return Err(PyErr::take(object.py()).map_or_else(unsaid, Fault::Raised));
            }
            // SAFETY: it was filled.
            return Self::from_dlpack(name, unsafe { tensor.assume_init_ref() });
        }
        if object.hasattr(intern!(object.py(), "__dlpack__"))? {
            return Self::from_protocol(name, object);
        }
        match object.getattr_opt(intern!(object.py(), "__cuda_array_interface__"))? {
            Some(interface) => Self::from_array_interface(name, &interface),
            None => Err(Fault::Argument(format!(
                "{name}: expected a tensor (__dlpack__ or __cuda_array_interface__), got {}",
                object.get_type().name()?
            ))),
        }
    }

    fn from_dlpack(name: Name, tensor: &DLTensor) -> Outcome<Self> {
        let dims = tensor.ndim as usize;
        if dims > MAX_DIMS {
            return Err(Fault::Argument(format!("{name}: expected 4 dimensions at most, got {dims}")));
        }
        let mut shape = [0; MAX_DIMS];
        let mut strides = [1; MAX_DIMS];
        if dims > 0 {
            // SAFETY: `ndim` sizes are there.
            shape[..dims].copy_from_slice(unsafe { slice::from_raw_parts(tensor.shape, dims) });
        }
        if dims > 0 && !tensor.strides.is_null() {
            // SAFETY: `ndim` strides are there.
            strides[..dims].copy_from_slice(unsafe { slice::from_raw_parts(tensor.strides, dims) });
        } else {
            // Packed, as a null pointer said before DLPack 1.2.
            pack(&shape[..dims], &mut strides);
        }
        let address = tensor.data as u64 + tensor.byte_offset;
        let (device, dtype) = (tensor.device, tensor.dtype.into());
        Ok(Tensor { name, address, device, dtype, dims, shape, strides })
    }

    /// DLPack's Python protocol. The capsule is let go of at once: the object keeps the memory.
    fn from_protocol(name: Name, object: &Bound<'_, PyAny>) -> Outcome<Self> {
        const TENSOR: &CStr = c"dltensor";
        let py = object.py();
        // Asked first, since a library of the host's memory refuses a stream.
        let device = object.call_method0(intern!(py, "__dlpack_device__"))?;
        let (device_type, device_id) = device.extract::<(u32, i32)>()?;
        let device = DLDevice { device_type: DLDeviceType(device_type), device_id };
        if !is_cuda(device) {
            return Err(not_on_cuda(name, device));
        }
        // -1: the caller sees to the order of streams.
        let stream = PyDict::new(py);
        stream.set_item(intern!(py, "stream"), -1)?;
        let capsule = object.call_method(intern!(py, "__dlpack__"), (), Some(&stream))?;
        let capsule = capsule.cast::<PyCapsule>().map_err(PyErr::from)?;
        let managed = capsule.pointer_checked(Some(TENSOR))?.cast::<DLManagedTensor>();
        // SAFETY: a capsule of this name holds a managed tensor, alive as long as the capsule.
        Self::from_dlpack(name, unsafe { &managed.as_ref().dl_tensor })
    }

    /// The CUDA array interface, versions 2 and 3. Its `stream` is not waited for: the caller sees to the
    /// order.
    fn from_array_interface(name: Name, interface: &Bound<'_, PyAny>) -> Outcome<Self> {
        let interface = interface.cast::<PyDict>().map_err(PyErr::from)?;
        let py = interface.py();
        let field = |key| {
            let missing = || Fault::Argument(format!("{name}: its __cuda_array_interface__ has no {key}"));
            interface.get_item(key)?.ok_or_else(missing)
        };
        let sizes = field("shape")?.extract::<Vec<i64>>()?;
        let (address, _read_only) = field("data")?.extract::<(u64, bool)>()?;
        let typestr = field("typestr")?.extract::<String>()?;
        let dtype = match typestr.as_str() {
            "<f2" => Type::F16,
            "<f4" => Type::F32,
            "<i4" => Type::I32,
            "<i8" => Type::I64,
            "|u1" => Type::U8,
            "|b1" => Type::BOOL,
            _ => {
                return Err(Fault::Argument(format!(
                    "{name}: expected float16, float32, int32, int64, uint8 or bool through \
                     __cuda_array_interface__ (it has no bfloat16), got {typestr}"
                )));
            }
        };
        let dims = sizes.len();
        if dims > MAX_DIMS {
            return Err(Fault::Argument(format!("{name}: expected 4 dimensions at most, got {dims}")));
        }
        let mut shape = [0; MAX_DIMS];
        shape[..dims].copy_from_slice(&sizes);
        let mut strides = [1; MAX_DIMS];
        let in_bytes = interface.get_item(intern!(py, "strides"))?.filter(|strides| !strides.is_none());
        match in_bytes.map(|strides| strides.extract::<Vec<i64>>()).transpose()? {
            Some(bytes) if bytes.len() == dims => {
                let element = i64::from(dtype.bits / 8);
                strides.iter_mut().zip(&bytes).for_each(|(stride, bytes)| *stride = bytes / element);
            }
            _ => pack(&shape[..dims], &mut strides),
        }
        // The interface does not say which device; the driver knows. Nothing lies at null.
        let device_id = if address == 0 { 0 } else { moe_lora::cuda::device_of(address)? as i32 };
        let device = DLDevice { device_type: DLDeviceType::kDLCUDA, device_id };
        Ok(Tensor { name, address, device, dtype, dims, shape, strides })
    }
}

/// The strides of a packed tensor of this shape, over strides of 1.
fn pack(shape: &[i64], strides: &mut [i64; MAX_DIMS]) {
    for (i, size) in shape.iter().enumerate().skip(1).rev() {
        strides[i - 1] = strides[i] * size;
    }
}

/// DLPack's C functions of a type of tensors, if it has them in a version that this crate knows.
pub struct Exchange<'py> {
    kind: Bound<'py, PyType>,
    /// The functions.
    pub api: Option<&'static DLPackExchangeAPI>,
}

impl<'py> Exchange<'py> {
    /// Those of the object's type.
    pub fn new(object: &Bound<'py, PyAny>) -> Outcome<Self> {
        const API: &CStr = c"dlpack_exchange_api";
        let kind = object.get_type();
        let capsule = kind.getattr_opt(intern!(object.py(), "__dlpack_c_exchange_api__"))?;
        let Some(capsule) = capsule.and_then(|capsule| capsule.cast_into::<PyCapsule>().ok()) else {
            return Ok(Exchange { kind, api: None });
        };
        let api: NonNull<DLPackExchangeAPI> = capsule.pointer_checked(Some(API))?.cast();
        // SAFETY: a capsule of this name holds the table, which lives as long as the process.
        let api = unsafe { api.as_ref() };
        Ok(Exchange { kind, api: (api.header.version.major == DLPACK_MAJOR_VERSION).then_some(api) })
    }

    /// The token that the interpreter is held.
    pub fn py(&self) -> Python<'py> {
        self.kind.py()
    }

    /// Those of another object's type.
    fn of(&self, object: &Bound<'_, PyAny>) -> Outcome<Option<&'static DLPackExchangeAPI>> {
        if object.get_type_ptr() == self.kind.as_type_ptr() {
            return Ok(self.api);
        }
        Ok(Exchange::new(object)?.api)
    }
}

/// A C function reported a failure and raised nothing.
pub fn unsaid() -> Fault {
    Fault::Raised(PyRuntimeError::new_err("a DLPack function failed without saying why"))
}

fn is_cuda(device: DLDevice) -> bool {
    matches!(device.device_type, DLDeviceType::kDLCUDA | DLDeviceType::kDLCUDAManaged)
}

fn device_name(DLDevice { device_type, device_id }: DLDevice) -> String {
    match device_type {
        DLDeviceType::kDLCPU => "the CPU".to_owned(),
        DLDeviceType::kDLCUDA | DLDeviceType::kDLCUDAManaged => format!("cuda:{device_id}"),
        DLDeviceType::kDLCUDAHost => "the CPU (pinned)".to_owned(),
        DLDeviceType::kDLROCM => format!("ROCm device {device_id}"),
        DLDeviceType(kind) => format!("device {device_id} of DLPack's kind {kind}"),
    }
}

fn not_on_cuda(name: Name, device: DLDevice) -> Fault {
    Fault::Argument(format!("{name}: expected a tensor on a CUDA device, got one on {}", device_name(device)))
}
