//! What does not compile: each example would use memory that is gone, that another call writes, or of the
//! wrong place. They are compiled by the tests of documentation, and must fail with the error that they name.
//!
//! A view does not outlive its buffer:
//! ```compile_fail,E0505
//! # use moe_lora::{Backend, Buffer, cpu::Cpu};
//! let buffer = Cpu.upload(&[1.0f32])?;
//! let view = buffer.view();
//! drop(buffer);
//! view.len();
//! # Ok::<(), moe_lora::Error>(())
//! ```
//! A buffer is not read while a call may write it:
//! ```compile_fail,E0502
//! # use moe_lora::{Backend, Buffer, cpu::Cpu};
//! let mut buffer = Cpu.upload(&[1.0f32])?;
//! let out = buffer.view_mut();
//! buffer.view();
//! out.len();
//! # Ok::<(), moe_lora::Error>(())
//! ```
//! Memory that is viewed by address is the caller's promise:
//! ```compile_fail,E0133
//! # use moe_lora::{Host, View};
//! View::<Host, f32>::from_raw(0x1000, 1);
//! ```
//! Host memory is not handed to a GPU:
//! ```compile_fail,E0277
//! # use moe_lora::{Operator, ProjectionSizes, cuda::Device};
//! let [w2] = Operator::builder(&Device::new(0)?.new_stream()?).build([ProjectionSizes::down(8, 8)])?;
//! let (x, w, ids) = ([half::bf16::ONE; 8], [half::bf16::ONE; 512], [0]);
//! let mut out = [half::bf16::ONE; 8];
//! w2.call(&x[..], [&w[..]], [&w[..]], (&ids[..], &ids[..]), &mut out[..]).run()?;
//! # Ok::<(), moe_lora::Error>(())
//! ```
//! A workspace is used by one call at a time:
//! ```compile_fail,E0308
//! # use moe_lora::{Backend, Cuda, Projection, RoutingTensors, cuda::{Stream, Workspace}};
//! fn route(stream: &Stream, workspace: &Workspace, sizes: &Projection, routing: RoutingTensors<'_, Cuda>) {
//!     stream.route(workspace, sizes, 1, routing).unwrap();
//! }
//! ```
//! Kernels that are not this library's own are the caller's promise:
//! ```compile_fail,E0133
//! # use moe_lora::cuda::{Device, EMBEDDED};
//! Device::with_kernels(0, EMBEDDED)?;
//! # Ok::<(), moe_lora::Error>(())
//! ```
//! So is a stream of another library's:
//! ```compile_fail,E0133
//! # use moe_lora::cuda::Device;
//! Device::new(0)?.foreign_stream(std::ptr::null_mut());
//! # Ok::<(), moe_lora::Error>(())
//! ```
//! An adapter is not exchanged while a call is made of its table:
//! ```compile_fail,E0502
//! # use half::bf16;
//! # use moe_lora::{AdapterTable, Projection, ProjectionSizes, cpu::Cpu};
//! let projection = Projection::new(ProjectionSizes::gate_up(16, 32))?;
//! let mut table = AdapterTable::<Cpu, bf16>::new(&Cpu, &projection)?;
//! let adapters = table.adapters();
//! table.remove(0)?;
//! adapters.entries();
//! # Ok::<(), moe_lora::Error>(())
//! ```
