//! An artifact's own Kata configuration with its paths led to the generation and to the provider. Only the values of those
//! paths change; every other byte stays.

use std::ops::Range;

use toml_edit::{Document, Item, Table, TableLike, Value};

use crate::{ConfigError, GuestFile, Provider, Reference, Rendered, Reroot};

/// Keys that name files which an artifact brings (`src/runtime/config/configuration-qemu*.toml.in` of Kata).
const GUEST_KEYS: [&str; 5] = ["kernel", "image", "initrd", "firmware", "firmware_volume"];

/// The key of QEMU.
const PROGRAM_KEY: &str = "path";

/// The key of the daemon for shared folders. It is led to the provider like QEMU, but need not exist: published
/// configurations name it for guests that share none (`shared_fs = "none"`) too.
const DAEMON_KEY: &str = "virtio_fs_daemon";

/// Lists of programs of the provider.
const PROGRAM_LISTS: [&str; 2] = ["valid_hypervisor_paths", "valid_virtio_fs_daemon_paths"];

struct Rerooter<'a> {
    provider: &'a Provider,
    dir: &'a str,
    files: &'a [GuestFile],
    name: &'a str,
    edits: Vec<(Range<usize>, String)>,
    rerooted: Vec<Reroot>,
    references: Vec<Reference>,
}

pub(crate) fn reroot(
    provider: &Provider,
    dir: &str,
    files: &[GuestFile],
    name: &str,
    text: &str,
) -> Result<Rendered, ConfigError> {
    let document = Document::parse(text).map_err(|source| ConfigError::Parse {
        name: name.to_owned(),
        source: Box::new(source),
    })?;
    let mut rerooter = Rerooter {
        provider,
        dir,
        files,
        name,
        edits: Vec::new(),
        rerooted: Vec::new(),
        references: Vec::new(),
    };
    rerooter.document(&document)?;
    let Rerooter {
        mut edits,
        rerooted,
        references,
        ..
    } = rerooter;
    let mut text = text.to_owned();
    edits.sort_by_key(|(span, _)| std::cmp::Reverse(span.start));
    for (span, value) in edits {
        text.replace_range(span, &value);
    }
    Ok(Rendered {
        text,
        rerooted,
        references,
    })
}

impl Rerooter<'_> {
    fn content(&self, problem: impl Into<String>) -> ConfigError {
        ConfigError::Content {
            name: self.name.to_owned(),
            problem: problem.into(),
        }
    }

    fn document(&mut self, root: &Table) -> Result<(), ConfigError> {
        let hypervisors = root
            .get("hypervisor")
            .and_then(Item::as_table_like)
            .ok_or_else(|| {
                self.content("has no [hypervisor.*] table: it is no Kata configuration")
            })?;
        let mut kernels = 0;
        for (kind, item) in hypervisors.iter() {
            let table = item
                .as_table_like()
                .ok_or_else(|| self.content(format!("has hypervisor.{kind}, which is no table")))?;
            kernels += usize::from(table.contains_key("kernel"));
            self.hypervisor(&format!("hypervisor.{kind}"), table)?;
        }
        if kernels == 0 {
            Err(self.content("names no kernel in [hypervisor.*]"))
        } else {
            Ok(())
        }
    }

    fn hypervisor(&mut self, prefix: &str, table: &dyn TableLike) -> Result<(), ConfigError> {
        for key in GUEST_KEYS {
            let Some(value) = table.get(key) else {
                continue;
            };
            let key = format!("{prefix}.{key}");
            let from = self.string(&key, value)?;
            if !from.is_empty() {
                let to = self.guest_path(&key, from)?;
                self.put(&key, value.span(), from, &to, false)?;
            }
        }
        for key in [PROGRAM_KEY, DAEMON_KEY] {
            let Some(value) = table.get(key) else {
                continue;
            };
            let named = format!("{prefix}.{key}");
            let from = self.string(&named, value)?;
            let to = self.provider_path(from);
            if key == PROGRAM_KEY && !from.is_empty() {
                self.put(&named, value.span(), from, &to, true)?;
            } else {
                self.replace(&named, value.span(), from, &to)?;
            }
        }
        for key in PROGRAM_LISTS {
            let values = table.get(key).and_then(Item::as_array);
            for value in values.into_iter().flatten() {
                if let Some(from) = value.as_str() {
                    let to = self.provider_path(from);
                    self.replace(&format!("{prefix}.{key}"), value.span(), from, &to)?;
                }
            }
        }
        Ok(())
    }

    fn string<'v>(&self, key: &str, item: &'v Item) -> Result<&'v str, ConfigError> {
        item.as_str()
            .ok_or_else(|| self.content(format!("has {key}, which is no string")))
    }

    /// The artifact's file of that name if there is one, else a path of the host.
    fn guest_path(&self, key: &str, value: &str) -> Result<String, ConfigError> {
        let name = value.rsplit('/').next().unwrap_or(value);
        let base = |file: &&GuestFile| file.path.rsplit('/').next() == Some(name);
        let found: Vec<&GuestFile> = self.files.iter().filter(base).collect();
        match found.as_slice() {
            [file] => Ok(format!("{}/{}", self.dir, file.path)),
            [] if value.starts_with('/') => Ok(self.provider_path(value)),
            [] => Err(ConfigError::Dangling {
                name: self.name.to_owned(),
                key: key.to_owned(),
                value: value.to_owned(),
                files: self.files.iter().map(|file| file.path.clone()).collect(),
            }),
            several => Err(ConfigError::Ambiguous {
                what: "file for one path of its configuration",
                candidates: several.iter().map(|file| file.path.clone()).collect(),
                hint: format!("{key} is {value:?}"),
            }),
        }
    }

    /// A path under the conventional prefix, led to where the provider is.
    fn provider_path(&self, value: &str) -> String {
        match value
            .strip_prefix(Provider::DEFAULT_PREFIX)
            .and_then(|rest| rest.strip_prefix('/'))
        {
            Some(rest) => self.provider.path(rest),
            None => value.to_owned(),
        }
    }

    fn put(
        &mut self,
        key: &str,
        span: Option<Range<usize>>,
        from: &str,
        to: &str,
        executable: bool,
    ) -> Result<(), ConfigError> {
        self.references.push(Reference {
            key: key.to_owned(),
            path: to.to_owned(),
            executable,
        });
        self.replace(key, span, from, to)
    }

    fn replace(
        &mut self,
        key: &str,
        span: Option<Range<usize>>,
        from: &str,
        to: &str,
    ) -> Result<(), ConfigError> {
        if from == to {
            return Ok(());
        }
        let span = span
            .ok_or_else(|| self.content(format!("has {key} in a form that cannot be changed")))?;
        self.edits.push((span, Value::from(to).to_string()));
        self.rerooted.push(Reroot {
            key: key.to_owned(),
            from: from.to_owned(),
            to: to.to_owned(),
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn files(paths: &[&str]) -> Vec<GuestFile> {
        paths
            .iter()
            .map(|path| GuestFile {
                path: (*path).to_owned(),
            })
            .collect()
    }

    fn run(text: &str) -> Result<Rendered, ConfigError> {
        let provider = Provider {
            prefix: "/usr/kata".to_owned(),
            ..Provider::default()
        };
        reroot(
            &provider,
            "/gen/1",
            &files(&["vmlinuz", "boot/kata.initrd"]),
            "configuration.toml",
            text,
        )
    }

    const OWN: &str = "# ours\r\n[hypervisor.qemu]\r\npath   = '/opt/kata/bin/qemu'  # keep\r\nkernel=\"/build/vmlinuz\"\r\n\
        initrd = \"kata.initrd\"\r\nimage = \"\"\r\nfirmware = \"/opt/kata/share/ovmf/OVMF.fd\"\r\n\
        valid_hypervisor_paths = [ '/opt/kata/bin/qemu' ]\r\n[runtime]\r\nx = 1";

    #[test]
    fn paths_are_led_to_the_generation_and_the_provider_and_nothing_else_changes() {
        let rendered = run(OWN).unwrap();
        let expected = OWN
            .replace("'/opt/kata/bin/qemu'", "\"/usr/kata/bin/qemu\"")
            .replace("/build/vmlinuz", "/gen/1/vmlinuz")
            .replace("\"kata.initrd\"", "\"/gen/1/boot/kata.initrd\"")
            .replace("/opt/kata/share", "/usr/kata/share");
        assert_eq!(rendered.text, expected);
        let named: Vec<_> = rendered
            .references
            .iter()
            .map(|r| (r.path.as_str(), r.executable))
            .collect();
        assert_eq!(
            named,
            [
                ("/gen/1/vmlinuz", false),
                ("/gen/1/boot/kata.initrd", false),
                ("/usr/kata/share/ovmf/OVMF.fd", false),
                ("/usr/kata/bin/qemu", true)
            ]
        );
    }

    #[test]
    fn what_leads_nowhere_is_refused() {
        let error = run("[hypervisor.qemu]\nkernel = \"vmlinux\"\n")
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("hypervisor.qemu.kernel") && error.contains("vmlinuz, boot/kata.initrd"),
            "{error}"
        );
        assert!(
            run("kernel = ")
                .unwrap_err()
                .to_string()
                .contains("no valid TOML")
        );
        assert!(
            run("[runtime]\n")
                .unwrap_err()
                .to_string()
                .contains("no Kata configuration")
        );
        assert!(run("hypervisor.qemu = 3").is_err());
        assert!(run("[hypervisor.qemu]\nkernel = 3").is_err());
        assert!(
            run("[hypervisor.qemu]\npath = \"/q\"")
                .unwrap_err()
                .to_string()
                .contains("no kernel")
        );
    }

    #[test]
    fn a_daemon_for_shared_folders_is_led_to_the_provider_and_need_not_exist() {
        let text = "[hypervisor.qemu]\nkernel = \"vmlinuz\"\nvirtio_fs_daemon = \"/opt/kata/libexec/virtiofsd\"\n";
        let rendered = run(text).unwrap();
        assert!(
            rendered.text.contains("\"/usr/kata/libexec/virtiofsd\""),
            "{}",
            rendered.text
        );
        let keys: Vec<_> = rendered.references.iter().map(|r| r.key.as_str()).collect();
        assert_eq!(keys, ["hypervisor.qemu.kernel"]);
    }

    #[test]
    fn every_hypervisor_is_led_and_other_tables_are_not() {
        let text = "[hypervisor.qemu]\nkernel = \"vmlinuz\"\n[hypervisor.clh]\nkernel = \"/opt/x/vmlinuz\"\n[other]\nkernel = \"vmlinuz\"\n";
        let rendered = run(text).unwrap();
        let changed: Vec<_> = rendered
            .rerooted
            .iter()
            .map(|r| (r.key.as_str(), r.from.as_str()))
            .collect();
        assert_eq!(
            changed,
            [
                ("hypervisor.qemu.kernel", "vmlinuz"),
                ("hypervisor.clh.kernel", "/opt/x/vmlinuz")
            ]
        );
        assert!(rendered.text.ends_with("[other]\nkernel = \"vmlinuz\"\n"));
    }

    #[test]
    fn a_name_that_two_files_have_is_refused_with_both() {
        let error = reroot(
            &Provider::default(),
            "/gen/1",
            &files(&["a/vmlinuz", "b/vmlinuz"]),
            "configuration.toml",
            "[hypervisor.qemu]\nkernel = \"/build/vmlinuz\"\n",
        )
        .unwrap_err()
        .to_string();
        assert!(
            error.contains("a/vmlinuz, b/vmlinuz") && error.contains("hypervisor.qemu.kernel"),
            "{error}"
        );
    }

    #[test]
    fn only_whole_components_of_the_prefix_are_led() {
        let text = "[hypervisor.qemu]\nkernel = \"/boot/other\"\nfirmware = \"/opt/katana/OVMF.fd\"\npath = \"/opt/kata\"\n";
        let rendered = run(text).unwrap();
        assert_eq!(rendered.text, text);
        assert_eq!(rendered.rerooted, []);
        assert_eq!(rendered.references.len(), 3);
    }

    #[test]
    fn nesting_without_end_is_an_error_and_no_overflow_of_the_stack() {
        let many = 100_000;
        for text in [
            format!("{}kernel = 1", "a.".repeat(many)),
            format!("[{}a]", "a.".repeat(many)),
            format!("a = {}", "[".repeat(many)),
            format!("a = {}", "{a=".repeat(many)),
        ] {
            assert!(matches!(run(&text), Err(ConfigError::Parse { .. })));
        }
        assert!(run("[[hypervisor]]\nkernel = \"vmlinuz\"").is_err());
        assert!(run("[[hypervisor.qemu]]\nkernel = \"vmlinuz\"").is_err());
    }

    /// The ways to write the kernel's key: what stands before its value, and what after.
    const PLACES: [(&str, &str); 6] = [
        ("[hypervisor.qemu]\nkernel = ", "\n"),
        ("[ hypervisor . \"qemu\" ]  # c\n'kernel'=\t", " # c\n"),
        ("hypervisor.qemu.kernel = ", "\n"),
        ("[hypervisor]\nqemu.kernel = ", "\n"),
        ("hypervisor = { qemu = { kernel = ", " , image = '' } }\n"),
        (
            "[runtime]\nkernel = 'vmlinuz'\n\n[hypervisor.qemu]\nx = [ 1,\n 2 ]\nkernel   =   ",
            "",
        ),
    ];

    proptest! {
        #[test]
        fn any_text_is_an_answer_not_a_panic(text in "(\\[hypervisor\\.qemu\\]|kernel|image|path| = |\"[a-z/]*\"|'x'|\n|\\[|\\]|\\{|\\}|[ -~]){0,20}") {
            let _ = run(&text);
        }

        #[test]
        fn any_value_is_an_answer_and_what_comes_out_is_toml(
            key in "(image|initrd|path|firmware|virtio_fs_daemon|valid_hypervisor_paths)",
            value in any::<String>(),
            at_prefix: bool,
        ) {
            let value = if at_prefix { format!("/opt/kata/{value}") } else { value };
            let text = format!("[hypervisor.qemu]\nkernel = \"vmlinuz\"\n{key} = {}\n", Value::from(value));
            match run(&text) {
                Ok(rendered) => prop_assert!(Document::parse(rendered.text.as_str()).is_ok(), "{}", rendered.text),
                Err(error) => prop_assert!(matches!(error, ConfigError::Dangling { .. }), "{error}"),
            }
        }

        #[test]
        fn however_it_is_written_only_the_value_changes(
            place in 0..PLACES.len(),
            quotes in prop::sample::select(vec!["\"", "'", "\"\"\"", "'''"]),
            folder in "(/[a-z]{1,8}){0,3}",
            bom: bool,
            crlf: bool,
        ) {
            let (before, after) = PLACES[place];
            let value = if folder.is_empty() { "vmlinuz".to_owned() } else { format!("{folder}/vmlinuz") };
            let bytes = |value: &str| {
                let text = format!("{}{before}{value}{after}", if bom { "\u{feff}" } else { "" });
                if crlf { text.replace('\n', "\r\n") } else { text }
            };
            let rendered = run(&bytes(&format!("{quotes}{value}{quotes}"))).unwrap();
            prop_assert_eq!(&rendered.text, &bytes("\"/gen/1/vmlinuz\""));
            prop_assert_eq!(run(&rendered.text).unwrap().text, rendered.text);
        }

        #[test]
        fn spacing_and_comments_are_kept(before in "[ \t]{0,4}", after in "[ \t]{0,4}(#[ -~]{0,20})?", crlf: bool) {
            let end = if crlf { "\r\n" } else { "\n" };
            let text = format!("[hypervisor.qemu]{end}kernel{before}={before}\"vmlinuz\"{after}{end}other = 'vmlinuz'{end}");
            let rendered = run(&text).unwrap();
            prop_assert_eq!(rendered.text, text.replacen("\"vmlinuz\"", "\"/gen/1/vmlinuz\"", 1));
        }
    }
}
