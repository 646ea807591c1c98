use crate::backends::Machine;
use crate::print::say;

/// Prints what this machine has and what is missing.
pub fn info() -> anyhow::Result<()> {
    let machine = Machine::find();
    say!("moe-lora {}", env!("CARGO_PKG_VERSION"))?;
    say!("{machine}")?;
    for kernels in Machine::kernels() {
        say!("kernels  {kernels}")?;
    }
    Ok(say!("\n{}", advice(&machine))?)
}

fn advice(machine: &Machine) -> &'static str {
    match (machine.missing(), cfg!(feature = "cuda")) {
        (None, _) => "Nothing is missing. Next: moe-lora demo",
        (Some(_), false) => {
            "Everything runs on the CPU. For the GPU, build this program with its default features.\n\
             Next: moe-lora demo"
        }
        (Some(_), true) => {
            "Everything runs on the CPU. The GPU back end needs a device of compute capability 8.0 or later and\n\
             an NVIDIA driver for CUDA 12.0 or later (libcuda.so.1; no toolkit).\n\
             Next: moe-lora demo"
        }
    }
}
