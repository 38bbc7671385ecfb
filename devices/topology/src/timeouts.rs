//! How long a guest with devices may take to start.
//!
//! Kata ships 1200 seconds for its GPU configurations. Guests with eight B300 in TDX need more, and large confidential guests
//! spend minutes on accepting memory (kata-containers issues 13180 and 13535). The rates here are generous estimates, not measurements:
//! a limit that is too long costs waiting for a guest that is lost, one that is too short costs the pod.

/// What Kata ships (src/runtime/Makefile, `DEFCREATECONTAINERTIMEOUT_NV`), in seconds; never less.
pub const FLOOR: u32 = 1200;

/// Never more, in seconds: by then something is broken.
pub const CEILING: u32 = 7200;

/// Seconds for firmware, kernel and agent.
const BASE: u64 = 300;

/// Seconds for each GPU: its BARs in the firmware, its driver, its attestation.
const EACH_GPU: u64 = 90;

/// Hundredths of a second for each GiB that the guest touches or, encrypted, accepts.
const EACH_GIB: u64 = 25;
const EACH_GIB_CONFIDENTIAL: u64 = 100;

/// Hundredths of a second for each GiB that is pinned and mapped, for each mapping.
const EACH_GIB_MAPPED: u64 = 5;

/// How long a guest may take, in seconds, in whole minutes. `mappings`: how many iommufd objects or containers map its memory.
pub fn seconds(confidential: bool, gpus: usize, memory_mib: u64, mappings: usize) -> u32 {
    let gib = memory_mib.div_ceil(1024);
    let each = if confidential {
        EACH_GIB_CONFIDENTIAL
    } else {
        EACH_GIB
    };
    let mapped = EACH_GIB_MAPPED.saturating_mul(mappings as u64);
    let memory = gib.saturating_mul(each.saturating_add(mapped)) / 100;
    let all = BASE
        .saturating_add(EACH_GPU.saturating_mul(gpus as u64))
        .saturating_add(memory);
    let minutes = u32::try_from(all.div_ceil(60)).unwrap_or(u32::MAX);
    minutes.saturating_mul(60).clamp(FLOOR, CEILING)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_of_anything_never_takes_less() {
        let small = seconds(false, 1, 8192, 1);
        assert_eq!(small, FLOOR);
        let mut before = 0;
        for gib in [8, 64, 512, 1024, 2048, 1 << 40] {
            let now = seconds(true, 8, gib * 1024, 8);
            assert!(now >= before && now.is_multiple_of(60), "{gib}: {now}");
            assert!(now >= seconds(false, 8, gib * 1024, 8));
            before = now;
        }
        assert_eq!(before, CEILING);
        assert!(
            seconds(true, 8, 1024 * 1024, 8) > FLOOR,
            "eight GPUs and a TiB"
        );
    }
}
