//! What is said of a driver that fails or is too old: the name that CUDA has for it and the number, which is
//! what one searches for.

use libtest_mimic::Arguments;
#[cfg(not(feature = "cuda"))]
use moe_lora_tests::skip::skipped;

fn main() {
    let arguments = Arguments::from_args();
    #[cfg(feature = "cuda")]
    let tests = failures::tests(&arguments);
    #[cfg(not(feature = "cuda"))]
    let tests = vec![skipped(&arguments, "driver_failures", "built without the feature `cuda`")];
    libtest_mimic::run(&arguments, tests).exit();
}

#[cfg(feature = "cuda")]
mod failures {
    use libtest_mimic::{Arguments, Trial};
    use moe_lora::cuda::Device;
    use moe_lora_tests::fake::{self, Control, Version};

    struct Case {
        test: &'static str,
        version: Version,
        variables: &'static [(&'static str, &'static str)],
        /// What the error must say; where there is nothing, the device opens.
        said: &'static [&'static str],
    }

    const fn init(
        test: &'static str,
        fail: &'static [(&'static str, &'static str)],
        said: &'static [&'static str],
    ) -> Case {
        Case { test, version: Version::New, variables: fail, said }
    }

    /// Where a build embeds cubins, they are refused too.
    const REFUSE: &[(&str, &str)] =
        &[("MOE_LORA_FAKE_REFUSE_CUBIN", "209"), ("MOE_LORA_FAKE_REFUSE_PTX", "222")];

    const CASES: &[Case] = &[
        init("a_driver_that_works_opens", &[], &[]),
        init("a_stub_is_named", &[("MOE_LORA_FAKE_FAIL", "cuInit=34")], &["CUDA_ERROR_STUB_LIBRARY", "34"]),
        init("no_device_is_named", &[("MOE_LORA_FAKE_FAIL", "cuInit=100")], &["CUDA_ERROR_NO_DEVICE", "100"]),
        init(
            "a_library_of_another_version_than_the_driver_is_named",
            &[("MOE_LORA_FAKE_FAIL", "cuInit=803")],
            &["CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", "803"],
        ),
        init(
            "a_library_too_new_for_the_device_is_named",
            &[("MOE_LORA_FAKE_FAIL", "cuInit=804")],
            &["CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE", "804"],
        ),
        init(
            "an_unknown_error_is_named",
            &[("MOE_LORA_FAKE_FAIL", "cuInit=999")],
            &["CUDA_ERROR_UNKNOWN", "999"],
        ),
        init("ptx_too_new_for_the_driver_is_named", REFUSE, &["CUDA_ERROR_UNSUPPORTED_PTX_VERSION", "222"]),
        Case {
            test: "a_driver_without_launch_attributes_is_too_old",
            version: Version::Old,
            variables: &[],
            said: &["the driver is for CUDA 11.8, expected CUDA 12.0 or newer"],
        },
    ];

    /// Opens device 0 and lets it go; what is said if that fails.
    fn open() -> Result<(), String> {
        Device::new(0).map(drop).map_err(|error| error.to_string())
    }

    pub fn tests(arguments: &Arguments) -> Vec<Trial> {
        let trial = |case: &'static Case| {
            fake::trial(arguments, case.test, case.version, case.variables, || check(case.said))
        };
        CASES.iter().map(trial).collect()
    }

    fn check(said: &[&str]) {
        let opened = open();
        let driver = Control::here();
        let faults = driver.faults();
        assert!(faults.is_empty(), "{faults:#?}");
        for kind in ["memory", "stream", "event", "module", "graph", "context"] {
            assert_eq!(driver.live(kind), 0, "{kind} left behind: {opened:?}");
        }
        match opened {
            Ok(()) => assert!(said.is_empty(), "the device opened"),
            Err(error) => {
                assert!(!said.is_empty(), "{error}");
                let missing: Vec<_> = said.iter().filter(|text| !error.contains(**text)).collect();
                assert!(missing.is_empty(), "{missing:?} is missing from: {error}");
            }
        }
    }
}
