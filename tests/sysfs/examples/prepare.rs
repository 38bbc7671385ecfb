//! Writes one of the shared machines below a folder, to look at it with `kata-manager --host-root DIR devices list`.
//!
//! `cargo run -p km-tests-sysfs --example prepare SHAPE DIR`

use km_tests_sysfs::shapes;

fn main() -> Result<(), String> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [shape, dir] = &words[..] else {
        return Err("usage: prepare SHAPE DIR".to_owned());
    };
    let machine = match shape.as_str() {
        "one-gpu" => shapes::one_gpu(),
        "two-models" => shapes::two_models(),
        "eight-gpus" => shapes::eight_gpus(),
        "shared-group" => shapes::shared_group(),
        "no-iommu" => shapes::no_iommu(),
        "crowd" => shapes::crowd(468),
        other => return Err(format!("no shape {other}")),
    };
    machine.write(std::path::Path::new(dir));
    Ok(())
}
