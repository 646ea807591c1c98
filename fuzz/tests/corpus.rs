//! What libFuzzer once found worth keeping, and bytes from a generator of fixed seed, keep their promises.

use moe_lora_fuzz::TARGETS;
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};
use std::path::Path;

/// Inputs from the generator, for each target.
const INPUTS: u64 = 2_000;
/// Their most bytes.
const MOST: usize = 512;

#[test]
fn the_corpus_keeps_its_promises() {
    for (target, check) in TARGETS {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
        let files =
            std::fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
        let mut inputs = 0;
        for file in files {
            let path = file.expect("a file").path();
            // A failing input's name is the last line.
            println!("{}", path.display());
            check(&std::fs::read(path).expect("a file that can be read"));
            inputs += 1;
        }
        assert!(inputs > 0, "{} is empty", folder.display());
    }
}

/// Not of adapters, which are JSON and tensors' headers: such bytes are refused at the first one.
#[test]
fn any_bytes_keep_their_promises() {
    for (target, check) in TARGETS.into_iter().filter(|(target, _)| *target != "adapter") {
        for seed in 0..INPUTS {
            println!("{target}, seed {seed}");
            let mut random = StdRng::seed_from_u64(seed);
            let mut bytes = vec![0; random.random_range(0..MOST)];
            random.fill_bytes(&mut bytes);
            check(&bytes);
        }
    }
}
