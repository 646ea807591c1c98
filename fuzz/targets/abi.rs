//! libFuzzer's way into [`moe_lora_fuzz::abi`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| moe_lora_fuzz::abi::check(data));
