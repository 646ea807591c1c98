//! The fake driver keeps the driver API's rules: each case is a few calls and the codes that they return.
//! Where a driver was asked (580, CUDA 13.0), the codes are its own, and a machine with a GPU asks its driver
//! again.

#[path = "fake_driver/capture.rs"]
mod capture;
#[path = "fake_driver/rules.rs"]
mod rules;
#[path = "fake_driver/stage.rs"]
mod stage;

use libtest_mimic::{Arguments, Failed, Trial};
use moe_lora_tests::fake::{self, LIBRARY, Version};
use moe_lora_tests::skip::skipped;
use stage::Cuda;
use std::fs;
use std::path::Path;

/// Calls on a driver with device 0's context current.
type Test = fn(&Cuda);

/// On the fake as it is.
const STRICT: &[(&str, Test)] = &[
    ("what_is_asked_within_a_capture", |cuda| capture::check(cuda, true)),
    ("each_call_alone", |cuda| rules::check_calls(cuda, true)),
    ("objects_are_used_while_their_context_is_current", rules::contexts),
    ("two_devices_keep_apart", rules::two_devices),
    ("the_stack_of_contexts", rules::stack),
    ("what_is_left_when_a_context_is_released_is_a_fault", rules::release),
    ("images_that_load_and_that_do_not", rules::images),
    ("memory_holds_what_was_copied_and_set", rules::memory),
    ("launches_that_name_memory_that_was_freed", rules::freed),
    ("graphs_run_what_was_captured", rules::graphs),
    ("the_log_tells_which_work_is_ordered", rules::order),
    ("calls_fail_that_shall", rules::failures),
    ("errors_have_names_and_texts", rules::errors),
];

/// As a driver is: one test, since captures forbid calls of other threads.
const LENIENT: Test = |cuda| {
    capture::check(cuda, false);
    rules::check_calls(cuda, false);
};

fn main() {
    let arguments = Arguments::from_args();
    let mut trials = Vec::new();
    for (name, test) in STRICT {
        trials.push(match built() {
            Ok(()) => Trial::test(*name, || on_a_copy(*test)),
            Err(why) => skipped(&arguments, name, &why),
        });
    }
    let here = || Cuda::open(Path::new(LIBRARY)).expect("the fake driver is found");
    let lenient = &[("MOE_LORA_FAKE_LENIENT", "1")];
    trials.push(fake::trial(
        &arguments,
        "a_lenient_one_answers_as_a_driver_does",
        Version::New,
        lenient,
        move || {
            start(&here(), LENIENT);
        },
    ));
    let variables = &[
        ("MOE_LORA_FAKE_DEVICES", "3"),
        ("MOE_LORA_FAKE_CAPABILITY", "8.9"),
        ("MOE_LORA_FAKE_DRIVER", "12040"),
        ("MOE_LORA_FAKE_REFUSE_CUBIN", "209"),
        ("MOE_LORA_FAKE_FAIL", "cuCtxSynchronize=719@2;cuDeviceTotalMem_v2=999"),
    ];
    trials.push(fake::trial(
        &arguments,
        "the_environment_says_what_it_is_like",
        Version::New,
        variables,
        move || {
            start(&here(), rules::environment);
        },
    ));
    trials.push(fake::trial(&arguments, "an_old_driver_lacks_functions", Version::Old, &[], rules::old));
    trials.push(on_the_machines_own(&arguments, "the_driver_of_this_machine_answers_so", LENIENT));
    libtest_mimic::run(&arguments, trials).exit();
}

/// Whether there is a fake: children have it.
fn built() -> Result<(), String> {
    if fake::is_child() { Ok(()) } else { fake::build(Version::New).map(drop) }
}

/// Runs a test on a fake of its own: each copy of the file is loaded apart.
fn on_a_copy(test: Test) -> Result<(), Failed> {
    let folder = tempfile::tempdir()?;
    let copy = folder.path().join(LIBRARY);
    fs::copy(fake::build(Version::New)?.join(LIBRARY), &copy)?;
    start(&Cuda::open(&copy)?, test);
    Ok(())
}

/// The test on the driver of this machine, where there is one with a device.
fn on_the_machines_own(arguments: &Arguments, name: &str, test: Test) -> Trial {
    let cuda = match Cuda::open(Path::new(LIBRARY)) {
        _ if fake::is_child() => return skipped(arguments, name, "the driver is the fake"),
        Ok(cuda) => cuda,
        Err(error) => return skipped(arguments, name, &error.to_string()),
    };
    cuda.cuInit(0);
    match cuda.codes().as_str() {
        "0" => Trial::test(name, move || {
            start(&cuda, test);
            Ok(())
        }),
        code => skipped(arguments, name, &format!("cuInit returns {code}")),
    }
}

/// Starts a driver and makes device 0's context current.
fn start(cuda: &Cuda, test: Test) {
    cuda.cuInit(0);
    let context = cuda.retain(0);
    cuda.cuCtxSetCurrent(context);
    cuda.quiet(|| test(cuda));
}
