//! Holds `src/generated/v1beta1.rs` against `proto/deviceplugin.proto`: builds need no protobuf compiler, because the generated
//! code is committed. After a change of the .proto file, write it anew with `KM_UPDATE=1 cargo test -p km-plugin --test generated`.

use std::path::{Path, PathBuf};
use std::{env, fs};

const PROTO: &str = "deviceplugin.proto";
const GENERATED: &str = "v1beta1.rs";

fn generate(proto_dir: &Path) -> String {
    let files = protox::compile([PROTO], [proto_dir]).expect("proto/deviceplugin.proto compiles");
    let out = tempfile::tempdir().expect("a temporary directory");
    tonic_prost_build::configure()
        .btree_map(".")
        .out_dir(out.path())
        .compile_fds(files)
        .expect("code is generated from the descriptors");
    fs::read_to_string(out.path().join(GENERATED)).expect("the generated file is there")
}

#[test]
fn the_generated_code_is_current() {
    let crate_dir = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let want = generate(&crate_dir.join("proto"));
    let path = crate_dir.join("src/generated").join(GENERATED);
    if env::var_os("KM_UPDATE").is_some_and(|value| value == "1") {
        #[expect(
            clippy::disallowed_methods,
            reason = "writes into this repository, not into a host"
        )]
        fs::write(&path, &want).expect("src/generated is writable");
        return;
    }
    let have = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        have == want,
        "{} is not what proto/{PROTO} gives; run: KM_UPDATE=1 cargo test -p km-plugin --test generated",
        path.display()
    );
}
