//! The GPU back end keeps the operator's contract: as the planner chooses, and with both index widths on
//! every tile.

use libtest_mimic::Arguments;
use moe_lora_tests::skip::skipped;

fn main() {
    let arguments = Arguments::from_args();
    #[cfg(feature = "cuda")]
    let tests = gpu::tests(&arguments);
    #[cfg(not(feature = "cuda"))]
    let tests = vec![skipped(&arguments, "cuda", "built without the feature `cuda`")];
    libtest_mimic::run(&arguments, tests).exit();
}

#[cfg(feature = "cuda")]
#[path = "cuda/adapters.rs"]
mod adapters;
#[cfg(feature = "cuda")]
#[path = "cuda/blocks.rs"]
mod blocks;
#[cfg(feature = "cuda")]
#[path = "cuda/engine.rs"]
mod engine;
#[cfg(feature = "cuda")]
#[path = "cuda/graphs.rs"]
mod graphs;
#[cfg(feature = "cuda")]
#[path = "cuda/wide.rs"]
mod wide;

#[cfg(feature = "cuda")]
mod gpu {
    use super::{adapters, blocks, engine, graphs, skipped, wide};
    use libtest_mimic::{Arguments, Failed, Trial};
    use moe_lora::cuda::{Cubin, Device, Embedded, LoadedFrom, Options, Packed, Stream};
    use moe_lora::{DType, OutDims};
    use moe_lora_tests::cases::check_cases;
    use moe_lora_tests::refusals::check_refusals;
    use moe_lora_verify::{
        Case, Experts, Form, Loras, check_each, full_grid, new_forms, quick_grid, vllm_grid,
    };

    type Test = Box<dyn FnOnce(&Device) -> Result<(), Failed> + Send>;

    /// Every test, on device 0; all of them skipped where there is none.
    pub fn tests(arguments: &Arguments) -> Vec<Trial> {
        match Device::new(0) {
            Ok(device) => {
                let trial = |(name, test): (String, Test)| {
                    let device = device.clone();
                    Trial::test(name, move || test(&device))
                };
                list().into_iter().map(trial).collect()
            }
            Err(why) => list().iter().map(|(name, _)| skipped(arguments, name, &why.to_string())).collect(),
        }
    }

    fn list() -> Vec<(String, Test)> {
        let mut tests = Vec::new();
        let mut test = |name: &str, test: fn(&Device) -> Result<(), Failed>| {
            let test: Test = Box::new(test);
            tests.push((name.to_owned(), test));
        };
        test("whatever_is_wrong_is_refused_and_nothing_is_written", |device| {
            check_refusals(&device.new_stream()?, false);
            Ok(())
        });
        test("every_mode_passes_on_calls_of_many_shapes", |device| all_pass(device, &full_grid()));
        test("kernels_of_the_oldest_generation_pass_too", |_| {
            all_pass(&Device::with_generation(0, 80)?, &full_grid())
        });
        test("kernels_load_from_their_cubin_and_without_it_from_ptx", |device| {
            let kernels = *device.kernels();
            let has_cubin = kernels.cubin.is_some();
            assert_eq!(*device.loaded_from() == LoadedFrom::Cubin, has_cubin, "{:?}", device.loaded_from());
            // One run of 15 literals.
            let image = Packed::of(b"\x0f\0\0\0\xf0\0no machine code");
            assert_eq!(image.unpack(), b"no machine code");
            let broken = Cubin { image, ptxas: "0.0.0" };
            for cubin in [None, Some(broken)] {
                // As static as those of the program.
                let kernels = Box::leak(Box::new([Embedded { cubin, ..kernels }]));
                // SAFETY: the PTX is the program's own, and what is no cubin is not loaded.
                let device = unsafe { Device::with_kernels(0, kernels)? };
                match device.loaded_from() {
                    LoadedFrom::Ptx { cubin_refused } => assert_eq!(cubin_refused.is_some(), cubin.is_some()),
                    LoadedFrom::Cubin => panic!("loaded a cubin where none will do"),
                }
                pass(&device, vec![Options::default()], &quick_grid())?;
            }
            Ok(())
        });
        test("every_form_takes_what_engines_have", |device| all_pass(device, &what_engines_have()));
        // As planned: its adapters are large, and each way would upload them again.
        test("vllms_own_grid_passes", |device| pass(device, vec![Options::default()], &vllm_grid()));
        test("any_number_of_buckets_is_routed", |device| all_pass(device, &many_buckets()));
        test("vllms_own_grid_of_blocks_passes", blocks::vllms_own_grid_of_blocks_passes);
        test("blocks_of_every_size_pass", blocks::blocks_of_every_size_pass);
        test("captured_blocks_replay_with_other_routing", blocks::captured_blocks_replay_with_other_routing);
        test(
            "an_engine_owns_all_of_it_and_drops_it_in_any_order",
            engine::an_engine_owns_all_of_it_and_drops_it_in_any_order,
        );
        test("captured_calls_replay_with_other_routing", graphs::captured_calls_replay_with_other_routing);
        test("adapters_are_exchanged_between_replays", adapters::adapters_are_exchanged_between_replays);
        test("rows_past_31_bits_are_reached", wide::rows_past_31_bits_are_reached);
        test("weights_past_31_bits_are_reached", wide::weights_past_31_bits_are_reached);
        for (name, options) in ways() {
            let name = format!("every_call_agrees_with_the_reference_and_touches_nothing_else::{name}");
            let test: Test = Box::new(move |device| Ok(check_cases(&device.new_stream_with(options)?)?));
            tests.push((name, test));
        }
        tests
    }

    /// Every way to make the back end work.
    fn ways() -> Vec<(String, Options)> {
        Options::every().into_iter().map(|options| (options.name("way").replace(' ', "_"), options)).collect()
    }

    /// More (slot, expert) buckets than `route` counts at a time, for one block and for a cluster of them.
    fn many_buckets() -> Vec<Case> {
        let case = Case {
            top_k: 4,
            experts: 128,
            slots: 300,
            in_dim: 8,
            out_dims: OutDims::uniform(8, 1),
            max_rank: 8,
            ..Case::default()
        };
        // 4 × 1,100 pairs are more than one block is given.
        let tokens = [100, 1100].map(|tokens| Case { tokens, loras: Loras::Random, ..case.clone() });
        let overwriting =
            tokens.clone().map(|case| Case { accumulate: false, routing: Experts::OutOfRange, ..case });
        tokens.into_iter().chain(overwriting).collect()
    }

    /// Slices of own widths and in other orders, rows by an index, adapters by address and other ids: few
    /// pairs a segment, many, and a call in halves.
    fn what_engines_have() -> Vec<Case> {
        let few = Case { tokens: 12, out_dims: OutDims::uniform(64, 2), in_dim: 136, ..Case::default() };
        let many = Case { tokens: 700, max_rank: 40, dtype: DType::F16, in_dim: 520, ..few.clone() };
        let one = Case { tokens: 1, max_rank: 64, in_dim: 2048, ..few.clone() };
        let split = Case { form: Form::Split, tokens: 90, max_rank: 24, ..few.clone() };
        [few, many, one, split].iter().flat_map(new_forms).collect()
    }

    fn all_pass(device: &Device, cases: &[Case]) -> Result<(), Failed> {
        pass(device, ways().into_iter().map(|(_, options)| options).collect(), cases)
    }

    fn pass(device: &Device, ways: Vec<Options>, cases: &[Case]) -> Result<(), Failed> {
        let streams: Vec<Stream> =
            ways.into_iter().map(|options| device.new_stream_with(options)).collect::<Result<_, _>>()?;
        for case in cases {
            check_each(&streams, case)?;
        }
        Ok(())
    }
}
