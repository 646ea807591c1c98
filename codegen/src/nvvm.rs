//! Code generator `nvvm`: rustc's LLVM IR through NVIDIA's libNVVM.
//!
//! rustc does what it does for its own back end, optimisation and link-time optimisation included, and
//! writes the IR instead of PTX. libNVVM from CUDA 13.5 on reads the IR of LLVM 22, which is rustc
//! 1.95's and 1.96's, for `compute_100` and later; for older chips it still wants LLVM 7's. So:
//!
//! ```text
//! IR of rustc            data layout and !nvvmir.version as the NVVM IR specification has them
//!    ↓
//! libNVVM                compute_100 for sm_80, sm_90a and sm_100; compute_120 for sm_120
//!    ↓
//! PTX for sm_100         .version and .target restated: what an older chip lacks, ptxas would refuse
//! ```
//!
//! Instructions that one generation alone has (`wgmma`) are inline assembly, which libNVVM passes on as
//! it is.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use libloading::Library;
use moe_lora_kernels::{Entry, Kernel};

use crate::{Arch, cuda_tools};

/// Names the libNVVM to use.
pub const LIBNVVM_VAR: &str = "LIBNVVM";

/// The file, in a toolkit and in this project's `target/cuda-tools`.
pub const LIBRARY: &str = if cfg!(windows) { "nvvm64_40_0.dll" } else { "libnvvm.so.4" };

/// The folder of [`LIBRARY`] in a CUDA toolkit.
const FOLDER: &str = if cfg!(windows) { "nvvm/bin" } else { "nvvm/lib64" };

/// NVVM IR specification, "Data Layout", in the words of libNVVM 13.5's own complaint about any other.
/// rustc's is shorter, and differs in `i256` alone, which no kernel has.
const DATA_LAYOUT: &str = "e-p:64:64:64-p6:32:32:32-i1:8:8-i8:8:8-i16:16:16-i32:32:32-i64:64:64-i128:128:128\
-f32:32:32-f64:64:64-f128:128:128-v16:16:16-v32:32:32-v64:64:64-v128:128:128-n16:32:64-a:8:8";

/// A libNVVM that reads the IR of today's rustc.
#[derive(Clone)]
pub struct Nvvm {
    /// The library.
    pub path: PathBuf,
    /// Open; its functions may be called from several threads (libNVVM API, "Thread Safety").
    library: Arc<Library>,
}

/// What libNVVM made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compiled {
    /// The PTX, for the architecture that was asked for.
    pub ptx: String,
    /// The release of CUDA that libNVVM is of, for example `13.5.37`.
    pub version: String,
    /// What it had to say.
    pub log: String,
}

/// Why libNVVM gave no PTX.
#[derive(Debug, thiserror::Error)]
pub enum NvvmError {
    /// No usable libNVVM is installed.
    #[error(
        "found no libNVVM that reads LLVM {llvm} (that of CUDA 13.5 does). Looked at:{}\n\
         A CUDA toolkit 13.5 or later has one, and so has `pip download nvidia-nvvm`; \
         `cargo xtask build-ptx --codegen nvvm` fetches that into target/cuda-tools, \
         {LIBNVVM_VAR}=/path/to/{LIBRARY} names another",
        cuda_tools::list(looked)
    )]
    NotFound {
        /// rustc's LLVM, the major version.
        llvm: u32,
        /// What was looked at, and why it will not do.
        looked: Vec<(PathBuf, String)>,
    },
    /// The library lacks a function, or failed in one.
    #[error("{}: {function}: {reason}", path.display())]
    Failed {
        /// The library.
        path: PathBuf,
        /// The function.
        function: &'static str,
        /// What it said, and its log.
        reason: String,
    },
}

impl fmt::Debug for Nvvm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Nvvm").field(&self.path).finish()
    }
}

impl Nvvm {
    /// The first libNVVM that reads the IR of LLVM `llvm`: `$LIBNVVM`, the CUDA toolkits, and then
    /// `target/cuda-tools` of this project.
    ///
    /// # Errors
    ///
    /// [`NvvmError::NotFound`], with everything that was looked at.
    pub fn find(llvm: u32) -> Result<Self, NvvmError> {
        let candidates = match cuda_tools::set(LIBNVVM_VAR) {
            Some(named) => vec![named.into()],
            None => cuda_tools::toolkits()
                .into_iter()
                .map(|toolkit| toolkit.join(FOLDER).join(LIBRARY))
                .chain(cuda_tools::project_dir().map(|dir| dir.join(LIBRARY)))
                .collect(),
        };
        Self::first_of(candidates, llvm)
    }

    fn first_of(candidates: Vec<PathBuf>, llvm: u32) -> Result<Self, NvvmError> {
        let mut looked = Vec::new();
        for path in candidates {
            match Self::probe(&path, llvm) {
                Ok(nvvm) => return Ok(nvvm),
                Err(reason) => looked.push((path, reason)),
            }
        }
        Err(NvvmError::NotFound { llvm, looked })
    }

    /// Looks at one library; an error tells in words why it will not do.
    fn probe(path: &Path, llvm: u32) -> Result<Self, String> {
        if !path.is_file() {
            return Err("no such file".to_owned());
        }
        // SAFETY: libNVVM's initialisers have no preconditions.
        let library = unsafe { Library::new(path) }.map_err(|error| format!("does not load: {error}"))?;
        let reads = Api { library: &library, path }
            .llvm_version(c"compute_100")
            .map_err(|_| "does not tell which LLVM it reads: it is older than CUDA 13".to_owned())?;
        // Newer LLVMs read older IR, never the other way round.
        if reads < llvm {
            return Err(format!("reads LLVM {reads}"));
        }
        Ok(Self { path: path.to_owned(), library: Arc::new(library) })
    }

    /// Compiles a module of rustc's IR for `arch`.
    ///
    /// # Errors
    ///
    /// [`NvvmError::Failed`] with libNVVM's log.
    pub fn compile(&self, ir: &str, arch: Arch) -> Result<Compiled, NvvmError> {
        let api = Api { library: &self.library, path: &self.path };
        let ir = to_nvvm_ir(ir, api.ir_version()?);
        let (ptx, log) = api.compile(&ir, virtual_arch(arch))?;
        let version = cuda_tools::parse_version(&ptx).unwrap_or("unknown").to_owned();
        Ok(Compiled { ptx: restate(&ptx, arch), version, log })
    }
}

/// Blocks of an entry point that must share a multiprocessor. libNVVM's code for `decode` spills in the
/// registers that two blocks leave it, and so has one.
pub(crate) fn min_blocks(entry: &Entry) -> u32 {
    if matches!(entry.kernel, Kernel::Decode { .. }) { 1 } else { entry.min_blocks }
}

/// The architecture that libNVVM compiles for: the first that reads the IR of a current LLVM, unless the
/// chip is later.
fn virtual_arch(arch: Arch) -> &'static str {
    match arch {
        Arch::Sm80 | Arch::Sm90a | Arch::Sm100 => "compute_100",
        Arch::Sm120 => "compute_120",
    }
}

/// rustc's IR as libNVVM wants it: its data layout, the version of NVVM IR (IR major and minor, debug
/// major and minor) that it is written in, and instructions that threads meet at marked as such.
fn to_nvvm_ir(ir: &str, version: [c_int; 4]) -> String {
    let mut nvvm_ir = String::with_capacity(ir.len() + 1024);
    let mut free = 0;
    for line in ir.lines() {
        if line.starts_with("target datalayout = ") {
            nvvm_ir.push_str(&format!("target datalayout = \"{DATA_LAYOUT}\""));
        } else {
            let call_end = end_of_meeting_call(line);
            let (call, rest) = line.split_at(call_end.unwrap_or(line.len()));
            nvvm_ir.push_str(call);
            nvvm_ir.push_str(call_end.map_or("", |_| " convergent"));
            nvvm_ir.push_str(rest);
        }
        nvvm_ir.push('\n');
        // Metadata is numbered, and a number that is taken twice is an error.
        let number = line.strip_prefix('!').and_then(|rest| rest.split_once(" = "));
        if let Some(number) = number.and_then(|(number, _)| number.parse::<u32>().ok()) {
            free = free.max(number + 1);
        }
    }
    let [major, minor, debug_major, debug_minor] = version;
    nvvm_ir.push_str(&format!(
        "!nvvmir.version = !{{!{free}}}\n\
         !{free} = !{{i32 {major}, i32 {minor}, i32 {debug_major}, i32 {debug_minor}}}\n"
    ));
    nvvm_ir
}

/// Where the call ends, in a line that calls inline assembly at which threads meet (`bar.sync`, `mma.sync`,
/// `barrier.cluster.wait.aligned`): all of them must come to one and the same instruction. rustc says that of
/// none, and libNVVM then copies them into the branches of an `if`, where each half of a warp waits for the
/// other for ever.
fn end_of_meeting_call(line: &str) -> Option<usize> {
    let (before, assembly) = line.split_once(" asm ")?;
    let arguments = before.len() + " asm ".len() + assembly.rfind('"')? + 1;
    if !assembly.contains(".sync") && !assembly.contains(".aligned") {
        return None;
    }
    let mut open = 0;
    let is_last = |(_, c): &(usize, char)| {
        open += i32::from(*c == '(') - i32::from(*c == ')');
        open == 0 && *c == ')'
    };
    line[arguments..].char_indices().find(is_last).map(|(at, _)| arguments + at + 1)
}

/// The PTX with another `.version` and `.target`.
pub(crate) fn restate(ptx: &str, arch: Arch) -> String {
    let mut restated = String::with_capacity(ptx.len());
    for line in ptx.lines() {
        match line.split_whitespace().next() {
            Some(".version") => restated.push_str(&format!(".version {}", arch.ptx_version())),
            Some(".target") => restated.push_str(&format!(".target {arch}")),
            _ => restated.push_str(line),
        }
        restated.push('\n');
    }
    restated
}

type Program = *mut c_void;

/// libNVVM's functions (libNVVM API, "Compilation"); each returns 0 or an error.
struct Api<'a> {
    library: &'a Library,
    path: &'a Path,
}

impl Api<'_> {
    fn failed(&self, function: &'static CStr, reason: String) -> NvvmError {
        let function = function.to_str().expect("names of functions are ASCII");
        NvvmError::Failed { path: self.path.to_owned(), function, reason }
    }

    /// Calls `function` by way of `call`.
    ///
    /// # Safety
    ///
    /// `F` must be the function's type, and the call must keep its rules.
    unsafe fn call<F>(
        &self,
        function: &'static CStr,
        call: impl FnOnce(&F) -> c_int,
    ) -> Result<(), NvvmError> {
        // SAFETY: as the caller promises.
        let symbol = unsafe { self.library.get::<F>(function.to_bytes_with_nul()) }
            .map_err(|error| self.failed(function, error.to_string()))?;
        match call(&symbol) {
            0 => Ok(()),
            status => Err(self.failed(function, self.status_name(status))),
        }
    }

    /// `NVVM_ERROR_COMPILATION`, where the library tells.
    fn status_name(&self, status: c_int) -> String {
        type ErrorString = unsafe extern "C" fn(c_int) -> *const c_char;
        // SAFETY: the type is the function's. It takes any number, and its strings are never freed.
        unsafe {
            match self.library.get::<ErrorString>(c"nvvmGetErrorString".to_bytes_with_nul()) {
                Ok(error_string) => CStr::from_ptr(error_string(status)).to_string_lossy().into_owned(),
                Err(_) => format!("error {status}"),
            }
        }
    }

    /// The major version of the LLVM whose IR is read for an architecture.
    fn llvm_version(&self, arch: &CStr) -> Result<u32, NvvmError> {
        let mut major: c_int = 0;
        type Version = unsafe extern "C" fn(*const c_char, *mut c_int) -> c_int;
        // SAFETY: the type is the function's; it reads a string and writes one integer.
        unsafe {
            self.call(c"nvvmLLVMVersion", |version: &Version| version(arch.as_ptr(), &mut major))?;
        }
        Ok(major.unsigned_abs())
    }

    fn ir_version(&self) -> Result<[c_int; 4], NvvmError> {
        let mut version = [0; 4];
        let [major, minor, debug_major, debug_minor] = &mut version;
        type Version = unsafe extern "C" fn(*mut c_int, *mut c_int, *mut c_int, *mut c_int) -> c_int;
        // SAFETY: the type is the function's; it writes four integers.
        unsafe {
            self.call(c"nvvmIRVersion", |read: &Version| read(major, minor, debug_major, debug_minor))?;
        }
        Ok(version)
    }

    /// PTX and log.
    fn compile(&self, ir: &str, arch: &str) -> Result<(String, String), NvvmError> {
        type OnProgram = unsafe extern "C" fn(*mut Program) -> c_int;
        type Add = unsafe extern "C" fn(Program, *const c_char, usize, *const c_char) -> c_int;
        type Compile = unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int;

        let arch = CString::new(format!("-arch={arch}")).expect("an architecture has no NUL");
        let options = [arch.as_ptr(), c"-opt=3".as_ptr()];
        let count = options.len() as c_int;
        let mut program: Program = std::ptr::null_mut();
        // SAFETY: the types are the functions'. The program is destroyed below, whatever happens between; the
        // IR is copied, and the options live until the end.
        unsafe {
            self.call(c"nvvmCreateProgram", |create: &OnProgram| create(&mut program))?;
            let compiled = self
                .call(c"nvvmAddModuleToProgram", |add: &Add| {
                    add(program, ir.as_ptr().cast(), ir.len(), c"moe_lora_kernels".as_ptr())
                })
                .and_then(|()| {
                    self.call(c"nvvmVerifyProgram", |verify: &Compile| {
                        verify(program, count, options.as_ptr())
                    })
                })
                .and_then(|()| {
                    self.call(c"nvvmCompileProgram", |compile: &Compile| {
                        compile(program, count, options.as_ptr())
                    })
                });
            let log = self.text(program, c"nvvmGetProgramLogSize", c"nvvmGetProgramLog").unwrap_or_default();
            let result = match compiled {
                Ok(()) => self
                    .text(program, c"nvvmGetCompiledResultSize", c"nvvmGetCompiledResult")
                    .map(|ptx| (ptx, log)),
                Err(NvvmError::Failed { path, function, reason }) => {
                    Err(NvvmError::Failed { path, function, reason: format!("{reason}\n{log}") })
                }
                Err(other) => Err(other),
            };
            self.call(c"nvvmDestroyProgram", |destroy: &OnProgram| destroy(&mut program))?;
            result
        }
    }

    /// A text of the program, by the functions that tell its size and copy it.
    ///
    /// # Safety
    ///
    /// The program must be live, and the functions a pair.
    unsafe fn text(
        &self,
        program: Program,
        size_of: &'static CStr,
        copy: &'static CStr,
    ) -> Result<String, NvvmError> {
        type SizeOf = unsafe extern "C" fn(Program, *mut usize) -> c_int;
        type Copy = unsafe extern "C" fn(Program, *mut c_char) -> c_int;
        let mut size = 0;
        // SAFETY: the types are the functions'; the second writes as many bytes as the first tells.
        let bytes = unsafe {
            self.call(size_of, |size_of: &SizeOf| size_of(program, &mut size))?;
            let mut bytes = vec![0_u8; size];
            self.call(copy, |copy: &Copy| copy(program, bytes.as_mut_ptr().cast()))?;
            bytes
        };
        let text = bytes.split(|&byte| byte == 0).next().unwrap_or_default();
        Ok(String::from_utf8_lossy(text).trim_end().to_owned() + "\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ir_gets_nvvms_layout_and_a_version_with_a_free_number() {
        let ir = "target datalayout = \"e-p6:32:32-i64:64\"\ntarget triple = \"nvptx64-nvidia-cuda\"\n\
                  define ptx_kernel void @k() {\n  ret void, !noalias !9\n}\n!3 = !{}\n!41 = distinct !{!41}\n!4 = !{!3}\n";
        let nvvm_ir = to_nvvm_ir(ir, [2, 0, 3, 2]);
        let expected = ir.replace("e-p6:32:32-i64:64", DATA_LAYOUT)
            + "!nvvmir.version = !{!42}\n!42 = !{i32 2, i32 0, i32 3, i32 2}\n";
        assert_eq!(nvvm_ir, expected);
    }

    #[test]
    fn what_threads_meet_at_is_convergent_and_nothing_else() {
        let calls = [
            (r#"tail call void asm sideeffect "bar.sync 0;", "~{memory}"()"#, " #5, !srcloc !7"),
            (r#"%1 = call i32 asm "mma.sync $0, [$1];", "=r,l"(ptr addrspace(1) %p, i32 0)"#, ""),
        ];
        for (call, rest) in calls {
            assert_eq!(end_of_meeting_call(&format!("{call}{rest}")), Some(call.len()), "{call}");
            assert!(to_nvvm_ir(call, [2, 0, 3, 2]).starts_with(&format!("{call} convergent")));
        }
        for line in [r#"call void asm sideeffect "cp.async.commit_group;", ""()"#, "; bar.sync", "ret void"] {
            assert_eq!(end_of_meeting_call(line), None, "{line}");
        }
    }

    #[test]
    fn the_target_is_restated_and_nothing_else() {
        let ptx = "//\n.version 9.5\n.target sm_100\n.address_size 64\n\t// .target of a comment\n";
        let restated = "//\n.version 8.1\n.target sm_90a\n.address_size 64\n\t// .target of a comment\n";
        assert_eq!(restate(ptx, Arch::Sm90a), restated);
    }

    #[test]
    fn what_will_not_do_is_told_with_its_reason() {
        let dir = tempfile::tempdir().unwrap();
        let text = dir.path().join("text.so");
        std::fs::write(&text, "no library").unwrap();
        let error = Nvvm::first_of(vec![dir.path().join("nowhere.so"), text], 22).unwrap_err().to_string();
        for part in ["reads LLVM 22", "nowhere.so: no such file", "text.so: does not load", "nvidia-nvvm"] {
            assert!(error.contains(part), "{part:?} is not in: {error}");
        }
    }

    /// The libNVVM of this machine; `None` where there is none.
    fn nvvm() -> Option<Nvvm> {
        let nvvm = Nvvm::find(22).ok();
        if nvvm.is_none() {
            eprintln!("skipped: no libNVVM of CUDA 13.5");
        }
        nvvm
    }

    const KERNEL: &str = "target datalayout = \"\"\ntarget triple = \"nvptx64-nvidia-cuda\"\n\
        define ptx_kernel void @kernel(ptr %p) {\n\
        call void asm sideeffect \"wgmma.fence.sync.aligned;\", \"\"()\n\
        store i32 1, ptr %p\nret void\n}\n";

    #[test]
    fn inline_assembly_of_one_generation_survives() {
        let Some(nvvm) = nvvm() else { return };
        let compiled = nvvm.compile(KERNEL, Arch::Sm90a).unwrap();
        for part in [".version 8.1\n.target sm_90a\n", ".entry kernel(", "wgmma.fence.sync.aligned;"] {
            assert!(compiled.ptx.contains(part), "{part:?} is not in: {}", compiled.ptx);
        }
        assert!(compiled.version.starts_with("13."), "{}", compiled.version);
    }

    #[test]
    fn ir_with_errors_is_told_with_libnvvms_words() {
        let Some(nvvm) = nvvm() else { return };
        let error = nvvm.compile(&KERNEL.replace("store i32 1", "store i33x 1"), Arch::Sm80).unwrap_err();
        let message = error.to_string();
        for part in ["nvvmVerifyProgram: NVVM_ERROR_INVALID_IR", "moe_lora_kernels (5, 9)"] {
            assert!(message.contains(part), "{part:?} is not in: {message}");
        }
    }

    #[test]
    fn one_that_reads_older_ir_alone_will_not_do() {
        let Some(nvvm) = nvvm() else { return };
        let error = Nvvm::probe(&nvvm.path, 99).unwrap_err();
        assert!(error.starts_with("reads LLVM 2"), "{error}");
    }
}
