//! Holds the generated code of each crate that speaks gRPC against its `.proto` file: builds need no protobuf compiler, because the
//! generated code is committed. After a change of a `.proto` file, write it anew with `KM_UPDATE=1 cargo test -p km-tests-generated`.
//! How each crate wants its code is here; it must not know what the messages mean.

#![cfg(test)]

use std::path::Path;
use std::{env, fs};

use tonic_prost_build::Builder;

/// A crate's folder, its `.proto` file below `proto/`, and the file below `src/generated/` that is made of it.
struct Api {
    folder: &'static str,
    proto: &'static str,
    generated: &'static str,
}

impl Api {
    /// What the `.proto` file gives.
    fn generate(&self, root: &Path, builder: Builder) -> String {
        let files = protox::compile([self.proto], [root.join("proto")]).unwrap();
        let out = tempfile::tempdir().unwrap();
        builder.out_dir(out.path()).compile_fds(files).unwrap();
        fs::read_to_string(out.path().join(self.generated)).unwrap()
    }

    /// That the committed code is this; with `KM_UPDATE=1` it becomes this.
    fn is_current(&self, builder: Builder) {
        let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../..")).join(self.folder);
        let want = self.generate(&root, builder);
        let path = root.join("src/generated").join(self.generated);
        if env::var_os("KM_UPDATE").is_some_and(|value| value == "1") {
            #[expect(
                clippy::disallowed_methods,
                reason = "writes into this repository, not into a host"
            )]
            fs::write(&path, &want).unwrap();
            return;
        }
        let have = fs::read_to_string(&path).unwrap_or_default();
        assert!(
            have == want,
            "{} is not what proto/{} gives; run: KM_UPDATE=1 cargo test -p km-tests-generated",
            path.display(),
            self.proto
        );
    }
}

#[test]
fn the_cri_is_current() {
    let builder = tonic_prost_build::configure()
        // Only the crate's own tests serve the CRI.
        .server_mod_attribute(".", "#[cfg(test)]")
        .generate_default_stubs(true)
        // A credential: src/wire.rs gives it a Debug that shows none of it.
        .skip_debug([".runtime.v1.AuthConfig"])
        .btree_map(".");
    let api = Api {
        folder: "cri",
        proto: "runtime.proto",
        generated: "runtime.v1.rs",
    };
    api.is_current(builder);
}

#[test]
fn the_device_plugin_api_is_current() {
    let builder = tonic_prost_build::configure().btree_map(".");
    let api = Api {
        folder: "devices/plugin",
        proto: "deviceplugin.proto",
        generated: "v1beta1.rs",
    };
    api.is_current(builder);
}

#[test]
fn the_pod_resources_api_is_current() {
    let builder = tonic_prost_build::configure()
        // The connection is the crate's own.
        .build_transport(false)
        .server_mod_attribute(".", "#[cfg(any(test, feature = \"server\"))]")
        .generate_default_stubs(true);
    let api = Api {
        folder: "devices/podresources",
        proto: "podresources.proto",
        generated: "v1.rs",
    };
    api.is_current(builder);
}
