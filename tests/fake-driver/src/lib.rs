//! A CUDA driver without a GPU, for tests of programs that call one.
//!
//! Built as a shared library, it is found as `libcuda.so.1` and plays the driver API by its rules, on host
//! memory. Kernels do not run: a launch is checked and noted in a log. The driver is strict. Whatever a
//! correct program would not do is refused with an error code, and is a *fault*: a line of text that tests
//! ask for ([`fake_faults`]).
//!
//! It needs nothing but `std`: `rustc --crate-type cdylib --edition 2024 -O src/lib.rs` builds it, and with
//! `--cfg 'feature="old"'` a driver of before CUDA 12.0.
//!
//! What it is like is read from the environment when it is loaded, and again by [`fake_reset`]:
//!
//! | variable | what it is | otherwise |
//! |---|---|---|
//! | `MOE_LORA_FAKE_DEVICES` | devices | 2 |
//! | `MOE_LORA_FAKE_CAPABILITY` | their compute capability | 9.0 |
//! | `MOE_LORA_FAKE_DRIVER` | version, as of `cuDriverGetVersion` | 13000; 11080 if `old` |
//! | `MOE_LORA_FAKE_REFUSE_CUBIN` | code that loading a cubin fails with | it loads |
//! | `MOE_LORA_FAKE_REFUSE_PTX` | code that loading PTX fails with | it loads |
//! | `MOE_LORA_FAKE_FAIL` | `cuInit=803;cuMemAlloc_v2=2@3`: calls that fail, always or the third | none |
//! | `MOE_LORA_FAKE_LENIENT` | `1`: as lenient as a driver was seen to be | strict |
//!
//! Codes are those that driver 580 (CUDA 13.0) was seen to return. It lets pass, and a lenient fake does too,
//! what the manual promises nothing of and other drivers refuse: objects used while the context of another
//! device, or none, is current; a stream destroyed while it is captured; a module loaded, or pageable host
//! memory copied, in a capture.
//!
//! Not modelled, and refused as a fault where a call shows it: contexts that are not primary, peer access,
//! graphs over several devices, pinned and managed memory, memory pools. Work ends at once, so nothing is
//! ever "not ready". Captured copies are not made again by a replay. The parameters of a cubin's kernels are
//! not known. Occupancy is a guess.

#![allow(non_snake_case)]
#![cfg_attr(feature = "old", allow(dead_code, unused_imports))]

// Shared by all calls.
mod answer;
mod calls;
mod cuda_h;
mod rules;
mod state;

// The calls, by the driver API manual's modules.
mod context;
mod device;
mod error;
mod event;
mod graph;
mod launch;
mod memory;
mod module;
mod stream;

// What tests ask the driver itself.
mod control;
