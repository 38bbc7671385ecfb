//! CDI specs, which any program on the node may have written.

use std::path::Path;

use km_cdi::names::Class;
use km_cdi::spec::Spec;
use km_host::Root;

pub(crate) fn run(bytes: &[u8]) {
    match Spec::parse(bytes) {
        Ok(spec) => {
            assert!(!spec.devices.is_empty());
            assert!(
                spec.qualified()
                    .all(|name| !name.contains(char::is_control))
            );
            // A spec that is taken names nodes that can be looked for, whatever they are called.
            if let Ok(root) = Root::new(Path::new("/proc/self/fdinfo")) {
                for device in spec.devices.iter().take(4) {
                    let _ = km_cdi::files::missing(&root, device);
                }
            }
        }
        Err(error) => assert!(error.to_string().chars().count() < 800, "{error}"),
    }
    let model = String::from_utf8_lossy(bytes);
    let class = Class::of_model(Some(&model), 1);
    assert_eq!(Class::new(class.as_str()), Ok(class));
}
