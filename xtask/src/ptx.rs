//! `cargo xtask build-ptx`

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use moe_lora_codegen::ptxas::{Report, Usage};
use moe_lora_codegen::{Arch, Budget, CompileError, Compiler, Module, Nvdisasm, Ptxas, entries, sass};

use crate::setup::{self, CodegenArgs};
use crate::shell::{remove_file, target_dir};

/// Compile the kernels to PTX and show what each one costs.
///
/// For every architecture this writes NAME.ptx, stamped with launch bounds and checked: local
/// memory, calls, panics and entry points that the table lacks are errors. Where ptxas is found
/// (PTXAS, the PATH, /usr/local/cuda*, target/cuda-tools) it also assembles NAME.cubin and prints
/// registers, stack, spills and static shared memory of every kernel; spills, a stack frame or a
/// ptxas warning are errors too. Where nvdisasm is found as well, so are kernels that lack tensor-core
/// instructions, 16-byte loads or, with 32-bit offsets, form 64-bit ones in their main loops.
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
    /// Download ptxas and nvdisasm into target/cuda-tools where they are not installed (needs pip)
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
    let compiler = setup::compiler(&args.codegen)?;
    let judged = build(&compiler, &arches, &out, args.fetch_ptxas || !args.cubin.is_empty())?;
    if let Err(reason) = judged {
        ensure!(args.cubin.is_empty(), "no cubin without ptxas: {reason}");
        println!("\nnot assembled: {reason}");
        println!("With --fetch-ptxas this command downloads one; a CUDA toolkit 12.8 or later has one too.");
    }
    Ok(())
}

/// What NVIDIA's tools found out about the modules.
pub struct Judged {
    /// What every kernel costs.
    pub budget: Budget,
    /// Why the machine code was not read, where it was not.
    pub unread: Option<String>,
}

/// Builds `arches` into `out` and prints what every kernel costs. The inner error tells why nothing was
/// assembled: there is no ptxas, and `fetch` did not help.
pub fn build(
    compiler: &Compiler,
    arches: &[Arch],
    out: &Path,
    fetch: bool,
) -> Result<Result<Judged, String>> {
    let ptxas = setup::ptxas(fetch);
    let nvdisasm = setup::nvdisasm(fetch);
    std::fs::create_dir_all(out).with_context(|| format!("cannot create {}", out.display()))?;

    // rustc and ptxas use one core each here: the architectures go side by side.
    let built: Vec<Result<Built>> = std::thread::scope(|scope| {
        let (ptxas, nvdisasm) = (ptxas.as_ref().ok(), nvdisasm.as_ref().ok());
        let build = |&arch| scope.spawn(move || build_one(compiler, ptxas, nvdisasm, arch, out));
        let threads: Vec<_> = arches.iter().map(build).collect();
        threads.into_iter().map(|thread| thread.join().expect("building a module does not panic")).collect()
    });

    let generator = compiler.generator().name();
    let mut budget = Budget::default();
    let mut faults = Vec::new();
    // Every architecture has much the same: each warning is shown once.
    let mut warnings = BTreeSet::new();
    for built in built {
        let built = built?;
        built.print();
        faults.extend(built.faults());
        if let Some(Assembled { ptxas, report, .. }) = &built.assembled {
            let compilers = format!("{}, ptxas {ptxas}", built.module.compilers);
            budget.compilers.insert(generator, compilers);
            budget.kernels.extend(
                report
                    .kernels
                    .iter()
                    .map(|usage| ((generator, built.module.arch, usage.kernel.clone()), usage.into())),
            );
        }
        warnings.insert(built.module.warnings);
    }
    for warning in warnings.iter().filter(|warning| !warning.is_empty()) {
        eprintln!("\n{warning}");
    }
    if !faults.is_empty() {
        bail!("kernels that are not fit to ship:\n  {}", faults.join("\n  "));
    }
    let unread = nvdisasm.err().map(|error| format!("{error:#}"));
    Ok(ptxas.map(|_| Judged { budget, unread }).map_err(|error| format!("{error:#}")))
}

/// A module that was built.
struct Built {
    module: Module,
    ptx: PathBuf,
    compiled_in: Duration,
    assembled: Option<Assembled>,
}

/// What ptxas and nvdisasm say of a module.
struct Assembled {
    /// The version of ptxas.
    ptxas: String,
    took: Duration,
    report: Report,
    /// Instructions of each kernel; empty where there is no nvdisasm.
    instructions: BTreeMap<String, usize>,
    /// What is wrong with the machine code.
    findings: Vec<sass::Finding>,
}

fn build_one(
    compiler: &Compiler,
    ptxas: Option<&Ptxas>,
    nvdisasm: Option<&Nvdisasm>,
    arch: Arch,
    out: &Path,
) -> Result<Built> {
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
            let took = start.elapsed();
            let sass = nvdisasm.map(|nvdisasm| nvdisasm.disassemble(&cubin)).transpose()?;
            let kernels = sass.as_deref().map(sass::parse);
            Some(Assembled {
                ptxas: ptxas.version.clone(),
                took,
                report,
                instructions: kernels
                    .iter()
                    .flatten()
                    .map(|code| (code.kernel.to_owned(), code.instructions.len()))
                    .collect(),
                findings: kernels.map_or_else(Vec::new, |kernels| sass::check(&kernels, &entries(arch))),
            })
        }
        None => {
            // One of an earlier build would be taken for this one's.
            remove_file(&cubin)?;
            None
        }
    };
    Ok(Built { module, ptx, compiled_in, assembled })
}

impl Built {
    fn print(&self) {
        print!(
            "\n{}: {}, compiled in {:.1} s",
            self.module.arch,
            self.ptx.display(),
            self.compiled_in.as_secs_f64()
        );
        match &self.assembled {
            Some(assembled) => {
                let Assembled { ptxas, took, report, instructions, .. } = assembled;
                println!(", assembled by ptxas {ptxas} in {:.1} s", took.as_secs_f64());
                print_table(&report.kernels, instructions);
                for remark in &report.remarks {
                    println!("  {remark}");
                }
            }
            None => println!(),
        }
    }

    /// What is wrong with it, a line a fault.
    fn faults(&self) -> Vec<String> {
        let arch = self.module.arch;
        let mut faults = Vec::new();
        if !self.module.warnings.is_empty() {
            faults.push(format!("{arch}: the compiler warns"));
        }
        if let Some(Assembled { report, findings, .. }) = &self.assembled {
            let costly = report.kernels.iter().filter(|kernel| kernel.uses_local_memory());
            faults.extend(costly.map(|kernel| {
                format!(
                    "{arch}: {} has {} bytes of stack, {} of spill stores, {} of spill loads",
                    kernel.kernel, kernel.stack, kernel.spill_stores, kernel.spill_loads
                )
            }));
            faults.extend(report.remarks.iter().map(|remark| format!("{arch}: {remark}")));
            faults.extend(findings.iter().map(|finding| format!("{arch}: {finding}")));
        }
        faults
    }
}

fn print_table(kernels: &[Usage], instructions: &BTreeMap<String, usize>) {
    let width = kernels.iter().map(|kernel| kernel.kernel.len()).max().unwrap_or(0).max("kernel".len());
    println!(
        "  {:width$}  registers  stack  spill stores  spill loads  static shared  instructions",
        "kernel"
    );
    let mut kernels: Vec<_> = kernels.iter().collect();
    kernels.sort_by_key(|kernel| &kernel.kernel);
    for Usage { kernel, registers, stack, spill_stores, spill_loads, static_shared } in kernels {
        let instructions = instructions.get(kernel).map_or("-".to_owned(), usize::to_string);
        println!(
            "  {kernel:width$}  {registers:>9}  {stack:>5}  {spill_stores:>12}  {spill_loads:>11}  \
             {static_shared:>13}  {instructions:>12}"
        );
    }
}
