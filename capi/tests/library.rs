//! libmoe_lora.so, through its C functions: what it exports, what it computes, what it refuses.

use libtest_mimic::{Arguments, Failed, Trial};
use moe_lora_tests::skip::skipped;
use std::path::PathBuf;
use std::process::Command;

#[path = "../src/abi.rs"]
#[allow(dead_code)]
mod abi;
#[path = "library/calls.rs"]
mod calls;
#[path = "library/forms.rs"]
mod forms;
#[path = "library/functions.rs"]
mod functions;
#[path = "library/refusals.rs"]
mod refusals;

use functions::Functions;
use object::{Object, ObjectSymbol};

/// Names a folder with `lib/libmoe_lora.so`, `include` and `examples`, to test instead of what Cargo builds.
const FOLDER_VAR: &str = "MOE_LORA_CAPI";

fn main() {
    let arguments = Arguments::from_args();
    let files: &'static Files = Box::leak(Box::new(Files::find()));
    let functions: &'static Functions = Box::leak(Box::new(Functions::load(&files.library)));

    type Test = fn(&Functions) -> Result<(), Failed>;
    let tests: [(&str, Test); 10] = [
        ("the_version_is_the_packages", calls::version),
        ("a_null_argument_is_refused_by_name", refusals::null_arguments),
        ("each_bad_call_has_its_status_and_message_and_writes_nothing", refusals::bad_calls),
        ("a_later_struct_is_taken_when_it_says_nothing_new", refusals::later_structs),
        ("a_call_of_an_earlier_version_is_what_it_was", forms::earlier_structs),
        ("each_form_does_on_the_cpu_what_the_rust_library_does", forms::on_cpu),
        ("a_workspace_outlives_its_context", calls::workspace_outlives_context),
        ("a_plan_is_cut_to_its_capacity", calls::plan_is_cut),
        ("each_call_does_on_the_cpu_what_the_rust_library_does", calls::on_cpu),
        ("a_device_that_is_not_there_is_refused", refusals::no_device),
    ];
    let mut trials: Vec<_> =
        tests.into_iter().map(|(name, test)| Trial::test(name, move || test(functions))).collect();
    trials.push(Trial::test("nothing_but_its_own_functions_is_exported", || exports(files)));
    let compiler = Command::new("cc").arg("--version").output();
    for example in EXAMPLES {
        let name = format!("the_example_{example}_in_c_agrees_with_its_own_loops");
        trials.push(match &compiler {
            Ok(_) => Trial::test(name, move || run_example(files, example)),
            Err(error) => skipped(&arguments, &name, &format!("no C compiler: cc: {error}")),
        });
    }
    trials.extend(on_cuda(&arguments, functions));
    libtest_mimic::run(&arguments, trials).exit();
}

/// The programs in examples/.
const EXAMPLES: [&str; 2] = ["layer", "dense"];

#[cfg(feature = "cuda")]
fn on_cuda(arguments: &Arguments, functions: &'static Functions) -> Vec<Trial> {
    type Test = fn(&Functions, &moe_lora::cuda::Device) -> Result<(), Failed>;
    let tests: [(&str, Test); 2] = [
        ("each_call_does_on_the_gpu_what_the_rust_library_does", calls::on_cuda),
        ("each_form_does_on_the_gpu_what_the_rust_library_does", forms::on_cuda),
    ];
    let device = moe_lora::cuda::Device::new(0);
    let trial = |(name, test): (&'static str, Test)| match &device {
        Ok(device) => {
            let device = device.clone();
            Trial::test(name, move || test(functions, &device))
        }
        Err(why) => skipped(arguments, name, &why.to_string()),
    };
    tests.into_iter().map(trial).collect()
}

#[cfg(not(feature = "cuda"))]
fn on_cuda(arguments: &Arguments, _: &'static Functions) -> Vec<Trial> {
    vec![skipped(arguments, "cuda", "built without the feature `cuda`")]
}

/// What is tested.
struct Files {
    library: PathBuf,
    include: PathBuf,
    examples: PathBuf,
}

impl Files {
    fn find() -> Self {
        let (root, library) = match std::env::var_os(FOLDER_VAR) {
            Some(folder) => (PathBuf::from(&folder), PathBuf::from(folder).join("lib/libmoe_lora.so")),
            None => (env!("CARGO_MANIFEST_DIR").into(), build()),
        };
        Files { library, include: root.join("include"), examples: root.join("examples") }
    }
}

/// Builds the library: Cargo does not, for a test, as no Rust program can be linked with it.
fn build() -> PathBuf {
    let test = std::env::current_exe().expect("a path");
    // This program is target/PROFILE/deps/library-HASH.
    let profile_dir = test.ancestors().nth(2).expect("a profile's folder");
    let profile = if profile_dir.ends_with("debug") { "dev" } else { "release" };
    let status = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["build", "--quiet", "--lib", "--package", "moe-lora-capi", "--profile", profile])
        .args(if cfg!(feature = "cuda") { &[][..] } else { &["--no-default-features"] })
        .arg("--target-dir")
        .arg(profile_dir.parent().expect("a target directory"))
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .status()
        .expect("cargo");
    assert!(status.success(), "the library was not built: {status}");
    profile_dir.join("libmoe_lora.so")
}

/// A driver function that the library exported would take the place of libcuda's own in the process.
fn exports(files: &Files) -> Result<(), Failed> {
    let bytes = std::fs::read(&files.library)?;
    let library = object::File::parse(&*bytes)?;
    let mut exported: Vec<_> = library
        .dynamic_symbols()
        .filter(|symbol| symbol.is_definition())
        .map(|symbol| symbol.name())
        .collect::<Result<_, _>>()?;
    exported.sort_unstable();
    assert_eq!(exported, functions::NAMES);
    Ok(())
}

fn run_example(files: &Files, example: &str) -> Result<(), Failed> {
    let dir = tempfile::tempdir()?;
    let program = dir.path().join(example);
    let lib = files.library.parent().expect("a folder");
    let compiled = Command::new("cc")
        .args(["-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-I"])
        .arg(&files.include)
        .arg(files.examples.join(example).with_extension("c"))
        .arg("-L")
        .arg(lib)
        .args(["-lmoe_lora", "-lm", "-o"])
        .arg(&program)
        .output()?;
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    let ran = Command::new(&program).env("LD_LIBRARY_PATH", lib).output()?;
    assert!(ran.status.success(), "{:?}", ran);
    Ok(())
}
