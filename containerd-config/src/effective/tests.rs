//! Tests over files in memory.

use super::*;

const V16: ContainerdVersion = ContainerdVersion::new(1, 6, 20);
const V17: ContainerdVersion = ContainerdVersion::new(1, 7, 24);
const V2: ContainerdVersion = ContainerdVersion::new(2, 1, 9);

/// Files in memory.
pub(crate) struct Memory(pub(crate) BTreeMap<String, String>);

impl Memory {
    pub(crate) fn new(files: &[(&str, &str)]) -> Memory {
        let own = |(path, text): &(&str, &str)| ((*path).to_owned(), (*text).to_owned());
        Memory(files.iter().map(own).collect())
    }
}

impl Files for Memory {
    fn read(&self, path: &HostPath) -> Result<Option<Vec<u8>>, km_host::Error> {
        Ok(self
            .0
            .get(path.as_str())
            .map(|text| text.clone().into_bytes()))
    }

    fn names(&self, folder: &HostPath) -> Result<Vec<String>, km_host::Error> {
        let prefix = format!("{}/", folder.as_str().trim_end_matches('/'));
        let below = self.0.keys().filter_map(|path| path.strip_prefix(&prefix));
        let names: BTreeSet<String> = below
            .filter_map(|rest| rest.split('/').next().map(str::to_owned))
            .collect();
        Ok(names.into_iter().collect())
    }
}

fn path(text: &str) -> HostPath {
    HostPath::new(text).unwrap()
}

fn load(files: &[(&str, &str)], version: ContainerdVersion) -> Effective {
    Effective::load(
        &Memory::new(files),
        &path("/etc/containerd/config.toml"),
        version,
    )
    .unwrap()
}

fn names(effective: &Effective) -> Vec<String> {
    effective
        .handlers()
        .into_iter()
        .map(|handler| handler.name)
        .collect()
}

fn paths(effective: &Effective) -> Vec<&str> {
    effective
        .files
        .iter()
        .map(|file| file.path.as_str())
        .collect()
}

fn v2(name: &str) -> String {
    format!(
        "[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.{name}]\nruntime_type = \"x.y.v1\"\n"
    )
}

fn v3(name: &str) -> String {
    format!(
        "[plugins.\"io.containerd.cri.v1.runtime\".containerd.runtimes.{name}]\nruntime_type = \"x.y.v1\"\n"
    )
}

const MAIN: &str = "/etc/containerd/config.toml";

#[test]
fn imports_are_found_as_each_version_finds_them() {
    let main = "version = 2\nimports = ['conf.d/*.toml', 'sub/../b.toml', '/c.toml']\n";
    let files = [
        (MAIN, main),
        ("/etc/containerd/conf.d/2.toml", ""),
        (
            "/etc/containerd/conf.d/1.toml",
            "imports = ['../b.toml', 'own.toml', '/etc/containerd/config.toml']",
        ),
        ("/etc/containerd/conf.d/own.toml", ""),
        ("/etc/containerd/conf.d/no.txt", "["),
        ("/conf.d/root.toml", ""),
        ("/etc/containerd/b.toml", ""),
    ];
    let found = load(&files, V17);
    assert_eq!(
        paths(&found),
        [
            MAIN,
            "/etc/containerd/conf.d/1.toml",
            "/etc/containerd/conf.d/2.toml",
            "/etc/containerd/conf.d/own.toml",
            "/etc/containerd/b.toml",
        ]
    );
    assert_eq!(found.missing[0].path, path("/c.toml"));
    assert_eq!(found.missing[0].by, path(MAIN));
    assert_eq!(
        paths(&load(&files, V16)),
        [MAIN, "/conf.d/root.toml", "/etc/containerd/b.toml"]
    );
    assert_eq!(
        found.imported_folder("60-x.toml"),
        Some(path("/etc/containerd/conf.d/60-x.toml"))
    );
    assert_eq!(found.imported_folder("60-x.conf"), None);
}

#[test]
fn one_x_takes_the_last_table_of_a_plugin_whole() {
    let main = format!(
        "version = 2\nimports = ['/i/*']\n{}{}",
        v2("runc"),
        v2("kata")
    );
    let other = v2("foo");
    let files = [
        (MAIN, main.as_str()),
        ("/i/a", other.as_str()),
        ("/i/b", "version = 2\n[grpc]\n"),
    ];
    for version in [V16, V17] {
        let found = load(&files, version);
        assert_eq!(names(&found), ["foo"]);
        assert_eq!(found.replaces_main().unwrap().path, path("/i/a"));
        assert_eq!(found.owners()["io.containerd.grpc.v1.cri"], [path("/i/a")]);
        let runtimes =
            &found.merged()["plugins"]["io.containerd.grpc.v1.cri"]["containerd"]["runtimes"];
        assert_eq!(runtimes.as_object().unwrap().len(), 1);
    }
    let found = load(&files, V2);
    assert_eq!(names(&found), ["foo", "kata", "runc"]);
    assert!(found.replaces_main().is_none());
    assert_eq!(found.owners()["io.containerd.grpc.v1.cri"].len(), 2);
}

/// What `containerd config dump` of 2.1.9 showed for the same files.
#[test]
fn versions_that_do_not_meet_lose_handlers() {
    for (main_version, main, import, wanted) in [
        (
            "version = 3",
            v3("m"),
            format!("version = 2\n{}", v2("a")),
            &["m"][..],
        ),
        (
            "version = 2",
            v2("m"),
            format!("version = 3\n{}", v3("q")),
            &["q"],
        ),
        ("version = 3", v3("m"), v3("n"), &["m", "n"]),
        ("version = 3", v3("m"), v2("o"), &["m"]),
        ("version = 2", v2("m"), v3("n"), &["n"]),
        ("version = 2", v2("m"), v2("o"), &["m", "o"]),
        ("", String::new(), v3("n"), &["n"]),
    ] {
        let main = format!("{main_version}\nimports = ['/i']\n{main}");
        let found = load(&[(MAIN, &main), ("/i", &import)], V2);
        assert_eq!(names(&found), wanted, "{main}\n---\n{import}");
    }
}

#[test]
fn a_later_file_wins_key_by_key_on_two_x() {
    let main = format!(
        "version = 3\nimports = ['/i']\n{}pod_annotations = ['a', 'b']\n",
        v3("m")
    );
    let import =
        "[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.m]\npod_annotations = ['c']\n";
    let found = load(&[(MAIN, &main), ("/i", import)], V2);
    let handler = &found.handlers()[0];
    assert_eq!(handler.settings["runtime_type"], "x.y.v1");
    assert_eq!(
        handler.settings["pod_annotations"],
        serde_json::json!(["c"])
    );
    assert_eq!(handler.files, [path(MAIN), path("/i")]);
}

#[test]
fn no_file_is_nothing_and_a_broken_one_is_named() {
    let found = load(&[], V17);
    assert!(found.main().is_none() && found.files.is_empty() && found.missing.is_empty());
    let files = Memory::new(&[(MAIN, "imports = ['x']\n"), ("/etc/containerd/x", "a = [")]);
    let error = Effective::load(&files, &path(MAIN), V2).unwrap_err();
    assert!(error.to_string().contains("/etc/containerd/x"), "{error}");
    let files = Memory::new(&[(MAIN, "imports = ['[*']\n")]);
    let error = Effective::load(&files, &path(MAIN), V2).unwrap_err();
    assert!(error.to_string().contains("[*"), "{error}");
}

#[test]
fn what_is_to_be_is_read_before_what_is() {
    let files = Memory::new(&[
        (MAIN, "imports = ['d/*.toml']\n"),
        ("/etc/containerd/d/old.toml", ""),
    ]);
    let changes = [
        (path("/etc/containerd/d/old.toml"), None),
        (path("/etc/containerd/d/new.toml"), Some(Vec::new())),
    ];
    let changed = Changed {
        files: &files,
        changes: changes.into_iter().collect(),
    };
    let found = Effective::load(&changed, &path(MAIN), V2).unwrap();
    assert_eq!(paths(&found), [MAIN, "/etc/containerd/d/new.toml"]);
}
