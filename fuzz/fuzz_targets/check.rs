#![no_main]
use libfuzzer_sys::{fuzz_mutator, fuzz_target, fuzzer_mutate};

fuzz_target!(|data: &[u8]| qcow2_snapshot_fuzz::check(data));

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    // One time in eight what libFuzzer does by itself.
    if seed % 8 == 0 {
        return fuzzer_mutate(data, size, max_size);
    }
    qcow2_snapshot_fuzz::mutate::mutate(data, size, max_size, seed.into())
});
