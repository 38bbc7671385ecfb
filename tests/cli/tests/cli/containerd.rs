//! containerd while it does not run: its files, a plan, nothing to uninstall.

use insta::assert_snapshot;

use crate::place::{GPU, Place};

#[test]
fn containerd_is_not_running() {
    let more = "provider: {prefix: /opt/kata}\n";
    let place = Place::new(Some(&format!("{GPU}{more}")));
    let before = place.files();
    let said = place.run(&["plan"]);
    assert_eq!(said.code, 8, "{said}");
    assert_snapshot!("containerd_not_running", said);
    assert_snapshot!(
        "containerd_not_running_as_json",
        place.run(&["plan", "--output", "json"])
    );
    assert_eq!(place.run(&["apply"]).code, 8);
    assert_eq!(place.files(), before, "something was made");
}

#[test]
fn containerds_files() {
    let place = Place::new(Some(GPU));
    let etc = place.path().join("root/etc/containerd");
    std::fs::create_dir_all(etc.join("conf.d")).unwrap();
    let main = "version = 3\nimports = ['conf.d/*.toml', '/gone.toml']\n\
        [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]\nruntime_type = 'io.containerd.runc.v2'\n";
    std::fs::write(etc.join("config.toml"), main).unwrap();
    let toolkit = "version = 3\n[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.nvidia]\n\
        runtime_type = 'io.containerd.runc.v2'\n\
        [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.nvidia.options]\n\
        BinaryName = '/usr/bin/nvidia-container-runtime'\n";
    std::fs::write(etc.join("conf.d/99-nvidia.toml"), toolkit).unwrap();
    assert_snapshot!(
        "containerd_show_while_it_is_down",
        place.run(&["containerd", "show"])
    );
    let json = place.run(&["containerd", "show", "--output", "json"]);
    assert_snapshot!("containerd_show_as_json", json);
    assert_snapshot!(
        "containerd_diff_while_it_is_down",
        place.run(&["containerd", "diff"])
    );
}

#[test]
fn nothing_to_uninstall() {
    let place = Place::new(Some(GPU));
    let before = place.files();
    assert_snapshot!("uninstall_of_nothing", place.run(&["uninstall"]));
    assert_eq!(place.files(), before, "something was made");
    assert_eq!(place.run(&["artifacts", "list"]).code, 0);
}
