//! The command line as people and scripts see it: help, errors, exit codes and output, of the real binary.
//!
//! The binary is the one that `KM_BIN` names, or the one that `cargo build -p kata-manager` put beside these tests. It runs with
//! an environment of its own. Snapshots are in `snapshots/`; `INSTA_UPDATE=always` writes them anew.

#![expect(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    reason = "tests prepare their files and start their program plainly, and fail by panicking"
)]

use std::path::{Path, PathBuf};
use std::process::Command;

use insta::assert_snapshot;
use tempfile::TempDir;

const GPU: &str = "artifactsDir: /opt/artifacts
runtimeClasses:
- name: kata-qemu-nvidia-gpu
  nodeSelector:
    example.com/gpu: present
  artifacts:
    url: registry.example/kata/guest:v1
    pullSecret: \"\"
- name: kata-qemu-nvidia-gpu-snp
  artifacts:
    url: registry.example/kata/guest:v1-snp
";

fn binary() -> PathBuf {
    if let Some(path) = std::env::var_os("KM_BIN") {
        return PathBuf::from(path);
    }
    // This program is target/PROFILE/deps/cli-HASH.
    let me = std::env::current_exe().unwrap();
    let path = me.parent().unwrap().parent().unwrap().join("kata-manager");
    assert!(
        path.is_file(),
        "{} is not there: `cargo build -p kata-manager` first, or set KM_BIN",
        path.display()
    );
    path
}

/// A folder with a `config.yaml` (none when `config` is `None`), and an empty root of a host.
struct Place {
    dir: TempDir,
}

/// What a run said.
struct Said {
    code: i32,
    stdout: String,
    stderr: String,
}

impl std::fmt::Display for Said {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "exit code: {}", self.code)?;
        write!(f, "--- stdout\n{}--- stderr\n{}", self.stdout, self.stderr)
    }
}

impl Place {
    fn new(config: Option<&str>) -> Place {
        let dir = TempDir::new().unwrap();
        std::fs::create_dir_all(dir.path().join("root/etc/containerd")).unwrap();
        if let Some(text) = config {
            std::fs::write(dir.path().join("config.yaml"), text).unwrap();
        }
        Place { dir }
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Runs with this place's configuration and root, and nothing of ours in the environment. Paths of the place are replaced.
    fn run(&self, words: &[&str]) -> Said {
        self.run_with(&[], words)
    }

    /// As [`Place::run`], with these variables too.
    fn run_with(&self, variables: &[(&str, &str)], words: &[impl AsRef<std::ffi::OsStr>]) -> Said {
        let output = Command::new(binary())
            .args(words)
            .env_clear()
            .envs(variables.iter().copied())
            .env("PATH", "/usr/bin:/bin")
            .env("KATA_MANAGER_CONFIG", self.path().join("config.yaml"))
            .env("KATA_MANAGER_HOST_ROOT", self.path().join("root"))
            .output()
            .unwrap();
        let place = self.path().display().to_string();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap().replace(&place, "[PLACE]");
        Said {
            code: output.status.code().unwrap(),
            stdout: text(output.stdout),
            stderr: text(output.stderr),
        }
    }

    /// What lies in the place, so that a test can see that nothing was made.
    fn files(&self) -> Vec<PathBuf> {
        let mut found = Vec::new();
        let mut folders = vec![self.path().to_owned()];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() && !path.is_symlink() {
                    folders.push(path.clone());
                }
                found.push(path.strip_prefix(self.path()).unwrap().to_owned());
            }
        }
        found.sort();
        found
    }
}

/// Help, without a configuration or an environment, as its text alone.
fn help(words: &[&str]) -> String {
    let output = Command::new(binary())
        .args(words)
        .arg("--help")
        .env_clear()
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(0), "{words:?}");
    assert!(output.stderr.is_empty(), "{words:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn help_of_the_program() {
    assert_snapshot!(help(&[]));
}

#[test]
fn help_of_each_command() {
    const COMMANDS: &[&[&str]] = &[
        &["plan"],
        &["apply"],
        &["status"],
        &["uninstall"],
        &["artifacts"],
        &["artifacts", "push"],
        &["artifacts", "pull"],
        &["artifacts", "list"],
        &["containerd"],
        &["containerd", "show"],
        &["containerd", "diff"],
        &["containerd", "restore"],
        &["runtimeclasses"],
        &["runtimeclasses", "print"],
        &["devices"],
        &["devices", "list"],
        &["devices", "bind"],
        &["devices", "unbind"],
        &["cdi"],
        &["cdi", "generate"],
        &["cdi", "list"],
        &["cdi", "validate"],
        &["doctor"],
        &["device-plugin"],
        &["topology"],
        &["config"],
        &["config", "schema"],
        &["config", "check"],
        &["completions"],
    ];
    for words in COMMANDS {
        assert_snapshot!(format!("help_{}", words.join("_")), help(words));
    }
}

#[test]
fn usage_errors_exit_with_4() {
    let place = Place::new(Some(GPU));
    let wrong: &[&[&str]] = &[
        &[],
        &["aply"],
        &["plan", "--exitcode"],
        &["status", "--output", "xml"],
        &["apply", "--lock-timeout", "soon"],
        &["artifacts", "push", "folder"],
    ];
    for words in wrong {
        let said = place.run(words);
        assert_eq!(said.code, 4, "{words:?}: {said}");
        assert!(said.stdout.is_empty() && !said.stderr.is_empty(), "{said}");
    }
    let said = place.run(&["aply"]);
    assert!(
        said.stderr.contains("'apply'"),
        "no nearest command: {said}"
    );
}

#[test]
fn a_missing_configuration() {
    let place = Place::new(None);
    assert_snapshot!("missing_config_as_text", place.run(&["plan"]));
    assert_snapshot!(
        "missing_config_as_json",
        place.run(&["plan", "--output", "json"])
    );
}

#[test]
fn wrong_configurations() {
    let cases = [
        ("unknown key", GPU.replace("artifactsDir", "artifactDir")),
        (
            "unknown nested key",
            GPU.replace("pullSecret", "pullSecrets"),
        ),
        ("class twice", GPU.replace("gpu-snp", "gpu")),
        ("class unknown", GPU.replace("gpu-snp", "gpu-spn")),
        (
            "bad reference",
            GPU.replace("registry.example/kata/guest:v1\n", "Not A Reference\n"),
        ),
        (
            "relative folder",
            GPU.replace("/opt/artifacts", "opt/artifacts"),
        ),
        (
            "not yaml",
            GPU.replace("runtimeClasses:", "runtimeClasses: {"),
        ),
        (
            "no restart command",
            format!("{GPU}containerd: {{restart: {{mode: command}}}}\n"),
        ),
    ];
    for (name, text) in cases {
        let place = Place::new(Some(&text));
        let said = place.run(&["config", "check"]);
        assert_eq!(said.code, 4, "{name}: {said}");
        assert_snapshot!(format!("config_with_{}", name.replace(' ', "_")), said);
        for command in ["plan", "apply", "status", "uninstall"] {
            let other = place.run(&[command]);
            assert_eq!((other.code, &other.stderr), (4, &said.stderr), "{command}");
        }
        let json = place.run(&["plan", "--output", "json"]);
        let error: serde_json::Value = serde_json::from_str(&json.stderr).unwrap();
        assert_eq!(error["kind"], "Error");
        assert_eq!(error["apiVersion"], "kata-manager/v1");
        assert_eq!(error["exitCode"], 4);
        assert!(error["message"].is_string() && error["causes"].is_array());
    }
    let place = Place::new(Some(&GPU.replace("artifactsDir", "artifactDir")));
    assert_snapshot!(
        "config_with_unknown_key_as_json",
        place.run(&["apply", "--output", "json"])
    );
}

#[test]
fn files_that_the_configuration_names_are_checked() {
    for (name, more) in [
        (
            "no_such_key",
            "verify: {policy: key, keys: [/etc/kata-manager/none.pub]}\n",
        ),
        (
            "no_such_authority",
            "registry: {caFile: /etc/kata-manager/none.pem}\n",
        ),
    ] {
        let place = Place::new(Some(&format!("{GPU}{more}")));
        let said = place.run(&["config", "check"]);
        assert_eq!(said.code, 4, "{said}");
        assert_snapshot!(format!("config_with_{name}"), said);
    }
}

#[test]
fn a_right_configuration() {
    let place = Place::new(Some(GPU));
    assert_snapshot!("config_check", place.run(&["config", "check"]));
    assert_snapshot!(
        "config_check_as_json",
        place.run(&["config", "check", "--output", "json"])
    );
}

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

#[test]
fn runtime_classes() {
    let place = Place::new(Some(GPU));
    assert_snapshot!(
        "runtimeclasses_print",
        place.run(&["runtimeclasses", "print"])
    );
    let one = place.run(&[
        "runtimeclasses",
        "print",
        "kata-qemu-nvidia-gpu-snp",
        "--output",
        "json",
    ]);
    assert_snapshot!("runtimeclasses_print_of_one_as_json", one);
    let none = place.run(&["runtimeclasses", "print", "nobody"]);
    assert_snapshot!("runtimeclasses_print_of_an_unknown_class", none);
}

#[test]
fn the_schema() {
    let said = Place::new(None).run(&["config", "schema"]);
    assert_eq!(said.code, 0, "{said}");
    serde_json::from_str::<serde_json::Value>(&said.stdout).unwrap();
    assert_snapshot!("config_schema", said.stdout);
}

/// A place whose root shows a machine.
fn machine(machine: &km_tests_sysfs::Machine) -> Place {
    let place = Place::new(Some(""));
    machine.write(&place.path().join("root"));
    place
}

#[test]
fn devices_of_prepared_machines() {
    use km_tests_sysfs::shapes;
    let shapes = [
        ("one_gpu", shapes::one_gpu()),
        ("two_models", shapes::two_models()),
        ("eight_gpus", shapes::eight_gpus()),
        ("shared_group", shapes::shared_group()),
        ("no_iommu", shapes::no_iommu()),
    ];
    for (name, shape) in shapes {
        let place = machine(&shape);
        let before = place.files();
        assert_snapshot!(
            format!("devices_list_{name}"),
            place.run(&["devices", "list"])
        );
        assert_snapshot!(format!("topology_{name}"), place.run(&["topology"]));
        let dry = place.run(&["devices", "bind", "--all", "--dry-run"]);
        assert_snapshot!(format!("devices_bind_{name}"), dry);
        let svg = place.run(&["topology", "--svg", "-"]);
        assert!(svg.code == 0 && svg.stdout.ends_with("</svg>\n"), "{svg}");
        assert_eq!(place.files(), before, "something was made");
    }
    let place = machine(&shapes::two_models());
    assert_snapshot!(
        "devices_list_as_json",
        place.run(&["devices", "list", "--output", "json"])
    );
    assert_snapshot!(
        "devices_unbind_held",
        place.run(&["devices", "unbind", "01:00.0"])
    );
    assert_eq!(place.run(&["devices", "bind", "05:00.0"]).code, 9);
    assert_eq!(place.run(&["devices", "bind", "nonsense"]).code, 4);
    assert_eq!(place.run(&["devices", "bind"]).code, 4);
    assert_eq!(place.run(&["devices", "bind", "--all", "81:00.0"]).code, 4);
}

#[test]
fn cdi_specs_of_prepared_machines() {
    use km_tests_sysfs::shapes;
    let generate = |place: &Place| place.run(&["cdi", "generate"]);
    let specs = |place: &Place| {
        let dir = place.path().join("root/var/run/cdi");
        let entries = std::fs::read_dir(dir).map_or(Vec::new(), Iterator::collect);
        let mut names: Vec<String> = entries
            .into_iter()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    };
    for (name, shape) in [
        ("two_models", shapes::two_models()),
        ("shared_group", shapes::shared_group()),
        ("no_iommu", shapes::no_iommu()),
    ] {
        let place = machine(&shape);
        let before = place.files();
        let dry = place.run(&["cdi", "generate", "--dry-run"]);
        assert_eq!(place.files(), before, "something was made");
        assert_snapshot!(format!("cdi_generate_{name}"), dry);
    }
    let place = machine(&shapes::eight_gpus());
    assert_eq!(generate(&place).code, 0);
    let both = ["nvidia.com-nvswitch.yaml", "nvidia.com-pgpu.yaml"];
    assert_eq!(specs(&place), both);
    assert!(generate(&place).stdout.starts_with("Nothing to do"));
    // Only where containerd listens is taken from it.
    std::fs::write(place.path().join("config.yaml"), GPU).unwrap();
    assert_snapshot!("cdi_list", place.run(&["cdi", "list"]));
    let valid = place.run(&["cdi", "validate"]);
    assert_snapshot!("cdi_validate", valid);
    let models = place.run(&[
        "cdi",
        "generate",
        "--gpu-alias",
        "",
        "--nvswitch-alias",
        "sw",
    ]);
    assert_snapshot!("cdi_generate_with_models", models);
    let named = ["nvidia.com-GH100_H100_SXM5_80GB.yaml", "nvidia.com-sw.yaml"];
    assert_eq!(specs(&place), named);
    assert_snapshot!("uninstall_of_cdi_specs", place.run(&["uninstall"]));
    assert_eq!(specs(&place), [""; 0]);
    let bad = place.run(&["cdi", "generate", "--gpu-alias", "9.x"]);
    assert_snapshot!("cdi_generate_with_a_bad_alias", bad);
}

#[test]
fn cdi_specs_of_others() {
    use km_tests_sysfs::shapes;
    let foreign = "cdiVersion: 0.5.0\nkind: nvidia.com/pgpu\ndevices:\n- {name: \"3\", containerEdits: {deviceNodes: [{path: \"/dev/\\e[2J\"}]}}\n";
    let shape = shapes::eight_gpus()
        .file("/var/run/cdi/nvidia.com-pgpu.yaml", foreign)
        .file("/etc/cdi/old.json", "{\"cdiVersion\": \"0.2.0\"}");
    let place = machine(&shape);
    std::fs::write(place.path().join("config.yaml"), GPU).unwrap();
    let before = place.files();
    let refused = place.run(&["cdi", "generate"]);
    assert_snapshot!("cdi_generate_beside_another", refused);
    assert_snapshot!("cdi_list_of_others", place.run(&["cdi", "list"]));
    let invalid = place.run(&["cdi", "validate", "--output", "json"]);
    assert_snapshot!("cdi_validate_as_json", invalid);
    assert_eq!(place.files(), before, "something was made");
    let one = place.path().join("root/var/run/cdi/nvidia.com-pgpu.yaml");
    let one = place.run(&["cdi", "validate", one.to_str().unwrap()]);
    assert_eq!(one.code, 0, "{one}");
    assert_eq!(place.run(&["cdi", "validate", "/nowhere"]).code, 7);
}

#[test]
fn guests_of_prepared_machines_are_planned() {
    use km_tests_sysfs::shapes;
    let place = |machine: &km_tests_sysfs::Machine| {
        let place = Place::new(Some(GPU));
        machine.write(&place.path().join("root"));
        place
    };
    let eight = place(&shapes::eight_gpus());
    let before = eight.files();
    let plan = |words: &[&str]| eight.run(&[&["topology", "--plan"], words].concat());
    assert_snapshot!("topology_plan_all", plan(&["all"]));
    let numa = ["13:00.0,94:00.0", "--numa", "0,1", "--vcpus", "8"];
    assert_snapshot!("topology_plan_numa", plan(&numa));
    let arguments = plan(&[&numa[..], &["--arguments"]].concat());
    assert_snapshot!("topology_plan_arguments", arguments);
    let json = plan(&["13:00.0", "--kata-version", "4.1", "--output", "json"]);
    assert_snapshot!("topology_plan_as_json", json);
    let svg = plan(&["13:00.0,94:00.0", "--layout", "switch-port", "--svg", "-"]);
    assert_snapshot!("topology_plan_svg", svg);
    for (code, words) in [
        (3, &["all", "--numa", "0,2"][..]),
        (3, &["all", "--kata-version", "4.0"]),
        (3, &["all", "--kata-runtime", "rust"]),
        (3, &["13:00.0,13:00.0", "--layout", "numa"]),
        (4, &["nothing"]),
        (4, &["13:00.0", "--class", "runc"]),
        (8, &["default/pod"]),
        (9, &["01:00.0"]),
    ] {
        let said = plan(words);
        assert_eq!(said.code, code, "{words:?}: {said}");
        assert!(said.stdout.is_empty() && !said.stderr.is_empty(), "{said}");
    }
    let alone = eight.run(&["topology", "--arguments"]);
    assert_eq!(alone.code, 4, "{alone}");
    assert_eq!(eight.files(), before, "something was made");
    let shared = place(&shapes::shared_group());
    let said = shared.run(&["topology", "--plan", "01:00.0"]);
    assert_snapshot!("topology_plan_shared_group", said);
    let off = place(&shapes::no_iommu()).run(&["topology", "--plan", "all"]);
    assert_snapshot!("topology_plan_no_iommu", off);
}

#[test]
fn cdi_specs_by_configuration_and_variables() {
    use std::os::unix::ffi::OsStrExt as _;
    let place = machine(&km_tests_sysfs::shapes::eight_gpus());
    let config = "devices:\n  gpuAlias: \"\"\n  nvswitchAlias: sw\n  cdiDir: /etc/specs\n";
    std::fs::write(place.path().join("config.yaml"), config).unwrap();
    let specs = || -> Vec<String> {
        let files = place.files().into_iter();
        let files = files.filter(|file| file.extension().is_some_and(|end| end == "yaml"));
        let names = files.map(|file| file.display().to_string());
        names.filter(|name| name.contains("nvidia")).collect()
    };
    // Everything is with VFIO already: nothing moves, and the specs follow all the same.
    assert_snapshot!(
        "devices_bind_writes_specs",
        place.run(&["devices", "bind", "--all"])
    );
    let by_model = "root/etc/specs/nvidia.com-GH100_H100_SXM5_80GB.yaml";
    assert_eq!(specs(), [by_model, "root/etc/specs/nvidia.com-sw.yaml"]);
    let again = place.run(&["devices", "bind", "--all"]);
    assert!(!again.stdout.contains("write"), "{again}");
    // A variable comes before the configuration, an option before both.
    let variables = [("P_GPU_ALIAS", "gpus"), ("NVSWITCH_ALIAS", "")];
    let said = place.run_with(
        &variables,
        &["cdi", "generate", "--nvswitch-alias", "switch"],
    );
    assert_eq!(said.code, 0, "{said}");
    let named = [
        "root/etc/specs/nvidia.com-gpus.yaml",
        "root/etc/specs/nvidia.com-switch.yaml",
    ];
    assert_eq!(specs(), named);
    assert_eq!(place.run(&["uninstall"]).code, 0);
    assert_eq!(specs(), [""; 0]);
    // Nodes of iommufd alone are demanded, and there are none.
    let strict = place.run(&["cdi", "generate", "--backend", "iommufd"]);
    assert!(
        strict.stdout.contains("CONFIG_VFIO_DEVICE_CDEV"),
        "{strict}"
    );
    assert_eq!(place.run(&["cdi", "generate", "--backend", "both"]).code, 4);
    std::fs::write(
        place.path().join("config.yaml"),
        "devices: {gpuAlias: 9.x}\n",
    )
    .unwrap();
    assert_snapshot!("config_with_a_bad_alias", place.run(&["config", "check"]));

    let odd = place.path().join(std::ffi::OsStr::from_bytes(b"\xff.yaml"));
    std::fs::write(&odd, "").unwrap();
    let said = place.run_with(&[], &["cdi".as_ref(), "validate".as_ref(), odd.as_os_str()]);
    assert_eq!(said.code, 4, "{said}");
}

#[test]
fn another_specs_owner_does_not_keep_devices_from_moving() {
    let foreign = "cdiVersion: 0.5.0\nkind: nvidia.com/pgpu\ndevices: []\n";
    let shape = km_tests_sysfs::shapes::eight_gpus();
    let place = machine(&shape.file("/var/run/cdi/nvidia.com-pgpu.yaml", foreign));
    let before = place.files();
    let said = place.run(&["devices", "bind", "--all"]);
    assert_snapshot!("devices_bind_beside_another_spec", said);
    assert_eq!(place.files(), before, "something was made");
}

#[test]
fn doctor_on_prepared_machines() {
    use km_tests_sysfs::shapes;
    for (name, shape) in [
        ("one_gpu", shapes::one_gpu()),
        ("two_models", shapes::two_models()),
        ("shared_group", shapes::shared_group()),
        ("no_iommu", shapes::no_iommu()),
    ] {
        let place = machine(&shape.file("/proc/cmdline", "quiet\n"));
        let before = place.files();
        assert_snapshot!(format!("doctor_{name}"), place.run(&["doctor"]));
        assert_eq!(place.files(), before, "something was made");
    }
    let place = machine(&shapes::two_models());
    let json = place.run(&["doctor", "--output", "json", "01:00.0"]);
    assert_snapshot!("doctor_as_json", json);
    let said: serde_json::Value = serde_json::from_str(&json.stdout).unwrap();
    assert_eq!(said["kind"], "Doctor");
    assert_eq!(place.run(&["doctor", "nonsense"]).code, 4);
    std::fs::write(place.path().join("config.yaml"), GPU).unwrap();
    let confidential = place.run(&["doctor"]);
    assert!(
        confidential.stdout.contains("kvm_amd.sev_snp=1"),
        "{confidential}"
    );
}

#[test]
fn readiness_is_told_and_taken_back() {
    use km_tests_sysfs::shapes;
    let place = machine(&shapes::two_models());
    let folder = place.path().join("root/run/nvidia/validations");
    let said = place.run(&["doctor", "--write-ready"]);
    assert!(
        said.stdout.contains("0000:81:00.0 is with nvidia"),
        "{said}"
    );
    assert!(!folder.join("vfio-pci-ready").exists(), "{said}");
    std::fs::write(folder.join("vfio-pci-ready"), "").unwrap();
    let said = place.run(&["doctor", "--write-ready"]);
    assert!(!folder.join("vfio-pci-ready").exists(), "{said}");
    let place = machine(&shapes::eight_gpus());
    let said = place.run(&["doctor", "--write-ready"]);
    assert!(
        said.stdout.contains("told that this node is ready.\n"),
        "{said}"
    );
    let folder = place.path().join("root/run/nvidia/validations");
    let kind = std::fs::read_to_string(folder.join("workload-type")).unwrap();
    assert_eq!(kind, "vm-passthrough\n");
    assert!(folder.join("vfio-pci-ready").is_file());
}

#[test]
fn names_that_are_markup_stay_text() {
    use km_tests_sysfs::shapes;
    let evil = "</text><script>alert('x')</script>\u{1b}[2J";
    let hostile = shapes::one_gpu()
        .file(
            "/usr/share/misc/pci.ids",
            &format!("10de  x\n\t2331  {evil}\n"),
        )
        .process(7, "<b>\u{1b}[31m", &["/dev/vfio/12"]);
    let place = machine(&hostile);
    let svg = place.run(&["topology", "--svg", "-"]);
    assert!(
        !svg.stdout.contains("<script") && svg.stdout.contains("&lt;"),
        "{svg}"
    );
    for words in [&["topology"][..], &["devices", "list"]] {
        let said = place.run(words);
        assert!(said.code == 0 && !said.stdout.contains('\u{1b}'), "{said}");
    }
}

#[test]
fn completions_for_each_shell() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let said = Place::new(None).run(&["completions", shell]);
        assert_eq!((said.code, &*said.stderr), (0, ""), "{shell}");
        assert!(said.stdout.contains("uninstall"), "{shell}");
    }
    assert_eq!(Place::new(None).run(&["completions", "tcsh"]).code, 4);
}

#[test]
fn what_is_piped_may_end_early() {
    use std::io::Read as _;
    let mut child = Command::new(binary())
        .args(["config", "schema"])
        .env_clear()
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let mut said = String::new();
    child
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut said)
        .unwrap();
    assert!(!said.contains("panicked"), "{said}");
    child.wait().unwrap();
}
