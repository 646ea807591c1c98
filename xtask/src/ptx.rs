//! `cargo xtask build-ptx`

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use moe_lora_codegen::ptxas::{Report, Usage};
use moe_lora_codegen::{Arch, CompileError, Compiler, Ptxas};

use crate::setup::{self, CodegenArgs};
use crate::shell::{remove_file, target_dir};

/// Compile the kernels to PTX and show what each one costs.
///
/// For every architecture this writes NAME.ptx, stamped with launch bounds and checked: local
/// memory, calls, panics and entry points that the table lacks are errors. Where ptxas is found
/// (PTXAS, the PATH, /usr/local/cuda*, target/cuda-tools) it also assembles NAME.cubin and prints
/// registers, stack, spills and static shared memory of every kernel; spills, a stack frame or a
/// ptxas warning are errors too.
///
/// moe-lora embeds the kernels as cubins too when ptxas is found at its own build, so that the driver has
/// nothing to compile.
///
/// To read the machine code: cuobjdump -sass target/ptx/sm_90a.cubin
#[derive(clap::Args)]
pub struct Args {
    /// Architectures, separated by commas: sm_80, sm_90a, sm_100, sm_120
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_values_t = Arch::EMBEDDED)]
    arch: Vec<Arch>,
    /// Architectures whose cubin must come out: without a ptxas, one is downloaded
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    cubin: Vec<Arch>,
    /// Folder to write to [default: target/ptx]
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,
    #[command(flatten)]
    codegen: CodegenArgs,
    /// Download ptxas into target/cuda-tools where none is installed (needs python3 with pip)
    #[arg(long)]
    fetch_ptxas: bool,
}

/// Carries the command out.
pub fn run(args: &Args) -> Result<()> {
    let out = match &args.out {
        Some(out) => out.clone(),
        None => target_dir()?.join("ptx"),
    };
    let arches: BTreeSet<_> = args.arch.iter().chain(&args.cubin).copied().collect();
    let arches: Vec<_> = arches.into_iter().collect();
    let assembled = build(&args.codegen, &arches, &out, args.fetch_ptxas || !args.cubin.is_empty())?;
    if let Err(reason) = assembled {
        ensure!(args.cubin.is_empty(), "no cubin without ptxas: {reason}");
        println!("\nnot assembled: {reason}");
        println!("With --fetch-ptxas this command downloads one; a CUDA toolkit 12.8 or later has one too.");
    }
    Ok(())
}

/// Whether the modules were assembled; if not, why.
pub type Assembled = Result<(), String>;

/// Builds `arches` into `out` and prints what every kernel costs.
pub fn build(codegen: &CodegenArgs, arches: &[Arch], out: &Path, fetch_ptxas: bool) -> Result<Assembled> {
    let compiler = setup::compiler(codegen)?;
    let ptxas = setup::ptxas(fetch_ptxas);
    std::fs::create_dir_all(out).with_context(|| format!("cannot create {}", out.display()))?;

    // rustc and ptxas use one core each here: the architectures go side by side.
    let built: Vec<Result<Built>> = std::thread::scope(|scope| {
        let (compiler, ptxas) = (&compiler, ptxas.as_ref().ok());
        let build = |&arch| scope.spawn(move || build_one(compiler, ptxas, arch, out));
        let threads: Vec<_> = arches.iter().map(build).collect();
        threads.into_iter().map(|thread| thread.join().expect("building a module does not panic")).collect()
    });

    let mut faults = Vec::new();
    // Every architecture has much the same: each warning is shown once.
    let mut warnings = BTreeSet::new();
    for built in built {
        let built = built?;
        built.print();
        faults.extend(built.faults());
        warnings.insert(built.warnings);
    }
    for warning in warnings.iter().filter(|warning| !warning.is_empty()) {
        eprintln!("\n{warning}");
    }
    if !faults.is_empty() {
        bail!("kernels that are not fit to ship:\n  {}", faults.join("\n  "));
    }
    Ok(ptxas.map(drop).map_err(|error| format!("{error:#}")))
}

/// A module that was built.
struct Built {
    arch: Arch,
    ptx: PathBuf,
    warnings: String,
    compiled_in: Duration,
    assembled: Option<(String, Duration, Report)>,
}

fn build_one(compiler: &Compiler, ptxas: Option<&Ptxas>, arch: Arch, out: &Path) -> Result<Built> {
    let start = Instant::now();
    let module = match compiler.compile(arch) {
        Err(CompileError::Refused { faults, ptx, .. }) => {
            let refused = out.join(format!("{arch}.refused.ptx"));
            std::fs::write(&refused, ptx)?;
            bail!("the PTX for {arch} is refused (see {}):\n{faults}", refused.display());
        }
        other => other?,
    };
    let compiled_in = start.elapsed();
    let ptx = out.join(format!("{arch}.ptx"));
    std::fs::write(&ptx, &module.ptx).with_context(|| format!("cannot write {}", ptx.display()))?;

    let start = Instant::now();
    let cubin = out.join(format!("{arch}.cubin"));
    let assembled = match ptxas {
        Some(ptxas) => {
            let report = ptxas.assemble(&ptx, arch, &cubin)?;
            Some((ptxas.version.clone(), start.elapsed(), report))
        }
        None => {
            // One of an earlier build would be taken for this one's.
            remove_file(&cubin)?;
            None
        }
    };
    Ok(Built { arch, ptx, warnings: module.warnings, compiled_in, assembled })
}

impl Built {
    fn print(&self) {
        print!(
            "\n{}: {}, compiled in {:.1} s",
            self.arch,
            self.ptx.display(),
            self.compiled_in.as_secs_f64()
        );
        match &self.assembled {
            Some((version, time, report)) => {
                println!(", assembled by ptxas {version} in {:.1} s", time.as_secs_f64());
                print_table(&report.kernels);
                for remark in &report.remarks {
                    println!("  {remark}");
                }
            }
            None => println!(),
        }
    }

    /// What is wrong with it, a line a fault.
    fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        if !self.warnings.is_empty() {
            faults.push(format!("{}: the compiler warns", self.arch));
        }
        if let Some((_, _, report)) = &self.assembled {
            let costly = report.kernels.iter().filter(|kernel| kernel.uses_local_memory());
            faults.extend(costly.map(|kernel| {
                format!(
                    "{}: {} has {} bytes of stack, {} of spill stores, {} of spill loads",
                    self.arch, kernel.kernel, kernel.stack, kernel.spill_stores, kernel.spill_loads
                )
            }));
            faults.extend(report.remarks.iter().map(|remark| format!("{}: {remark}", self.arch)));
        }
        faults
    }
}

fn print_table(kernels: &[Usage]) {
    let width = kernels.iter().map(|kernel| kernel.kernel.len()).max().unwrap_or(0).max("kernel".len());
    println!("  {:width$}  registers  stack  spill stores  spill loads  static shared", "kernel");
    let mut kernels: Vec<_> = kernels.iter().collect();
    kernels.sort_by_key(|kernel| &kernel.kernel);
    for Usage { kernel, registers, stack, spill_stores, spill_loads, static_shared } in kernels {
        println!(
            "  {kernel:width$}  {registers:>9}  {stack:>5}  {spill_stores:>12}  {spill_loads:>11}  {static_shared:>13}"
        );
    }
}
