//! QEMU's command line: options in order, and the values of `-device`, `-object` and `-numa` as keys and values.
//!
//! The syntax is that of QEMU's util/qemu-option.c: `driver,key=value,...`, a comma in a value is doubled, a key without a value is
//! a switch; or one JSON object. Every argument is kept as it came, so that an unchanged command line is unchanged byte for byte.

use std::ffi::{OsStr, OsString};

use serde_json::{Map, Value};

/// The longest value that is taken apart, in bytes. Those of devices have some hundred.
const VALUE_LIMIT: usize = 64 << 10;

/// The most keys that are looked at in one value.
const KEYS_LIMIT: usize = 1024;

/// Options without a value (QEMU, qemu-options.hx: those without `HAS_ARG`).
const ALONE: &[&str] = &[
    "h",
    "help",
    "version",
    "S",
    "accel-help",
    "alt-grab",
    "async-teardown",
    "ctrl-grab",
    "curses",
    "daemonize",
    "enable-kvm",
    "enable-sync-profile",
    "full-screen",
    "mem-prealloc",
    "no-acpi",
    "no-fd-bootchk",
    "no-frame",
    "no-hpet",
    "no-quit",
    "no-reboot",
    "no-shutdown",
    "no-user-config",
    "nodefaults",
    "nodefconfig",
    "nographic",
    "old-param",
    "one-insn-per-tb",
    "only-migratable",
    "perfmap",
    "jitdump",
    "portrait",
    "preconfig",
    "sdl",
    "semihosting",
    "singlestep",
    "snapshot",
    "usb",
    "win2k-hack",
    "xen-attach",
    "xen-domid-restrict",
];

/// One option, or a word that is none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Opt {
    /// Its name without dashes; empty for a word that is no option.
    pub name: String,
    /// Where it stands in the arguments.
    pub at: usize,
    /// Where its value stands, if it has one.
    pub value: Option<usize>,
}

/// A command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Argv {
    /// The arguments without the program's name.
    pub words: Vec<OsString>,
    /// What they are.
    pub options: Vec<Opt>,
}

impl Argv {
    /// Reads arguments, the program's name not among them.
    pub fn parse(words: Vec<OsString>) -> Argv {
        let mut options = Vec::new();
        let mut at = 0;
        while let Some(word) = words.get(at) {
            let name = option_name(word);
            let takes = match &name {
                None => false,
                Some(name) => !ALONE.contains(&name.as_str()) && at + 1 < words.len(),
            };
            options.push(Opt {
                name: name.unwrap_or_default(),
                at,
                value: takes.then_some(at + 1),
            });
            at += if takes { 2 } else { 1 };
        }
        Argv { words, options }
    }

    /// The values of an option, each with its place; `None` for one that is not UTF-8.
    pub fn values<'a>(&'a self, name: &'a str) -> impl Iterator<Item = (usize, Option<&'a str>)> {
        self.options
            .iter()
            .filter(move |option| option.name == name)
            .filter_map(|option| option.value)
            .map(|at| (at, self.words.get(at).and_then(|word| word.to_str())))
    }

    /// The name that Kata gave the machine: `-name sandbox-<id>` (src/runtime/virtcontainers/qemu.go; runtime-rs'
    /// cmdline_generator.rs). The last counts, as for QEMU.
    pub fn sandbox(&self) -> Option<&str> {
        let (_, value) = self.values("name").last()?;
        let first = value?.split(',').next()?;
        let name = first.strip_prefix("guest=").unwrap_or(first);
        name.strip_prefix("sandbox-").filter(|id| !id.is_empty())
    }
}

/// `-device` and `--device` are the same; a lone dash is a word.
fn option_name(word: &OsStr) -> Option<String> {
    let text = word.to_str()?;
    let name = text.strip_prefix('-')?;
    let name = name.strip_prefix('-').unwrap_or(name);
    (!name.is_empty()).then(|| name.to_owned())
}

/// A value taken apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Keyed {
    /// Keys and values in order.
    pub pairs: Vec<(String, String)>,
    /// Whether it was written as JSON.
    pub json: bool,
}

impl Keyed {
    /// Takes a value apart. `first` is the key that a first word without `=` is the value of: `driver`, `qom-type`, `type`.
    ///
    /// # Errors
    /// What is wrong, in words.
    pub fn parse(value: &str, first: &str) -> Result<Keyed, String> {
        if value.len() > VALUE_LIMIT {
            return Err(format!("it has more than {VALUE_LIMIT} bytes"));
        }
        let keyed = match value.starts_with('{') {
            true => Keyed {
                pairs: json(value)?,
                json: true,
            },
            false => Keyed {
                pairs: pairs(value, first)?,
                json: false,
            },
        };
        Ok(keyed)
    }

    /// The value of a key; of several, the last, which is the one that QEMU takes.
    pub fn get(&self, key: &str) -> Option<&str> {
        let mut found = self.pairs.iter().rev().filter(|(name, _)| name == key);
        found.next().map(|(_, value)| value.as_str())
    }

    /// Whether a key is there more than once.
    pub fn doubled(&self, key: &str) -> bool {
        self.pairs.iter().filter(|(name, _)| name == key).count() > 1
    }

    /// The value with one key changed or added, in the form in which it was written.
    ///
    /// # Errors
    /// When it was JSON and is not any more; not for what [`Keyed::parse`] took.
    pub fn with(original: &str, first: &str, key: &str, new: &str) -> Result<String, String> {
        let keyed = Keyed::parse(original, first)?;
        if keyed.json {
            let mut object: Map<String, Value> =
                serde_json::from_str(original).map_err(|error| error.to_string())?;
            object.insert(key.to_owned(), Value::String(new.to_owned()));
            return serde_json::to_string(&object).map_err(|error| error.to_string());
        }
        let mut pairs = keyed.pairs;
        match pairs.iter_mut().rev().find(|(name, _)| name == key) {
            Some((_, value)) => new.clone_into(value),
            None => pairs.push((key.to_owned(), new.to_owned())),
        }
        Ok(render(&pairs, first))
    }
}

/// Keys and values as QEMU reads them.
pub fn render(pairs: &[(String, String)], first: &str) -> String {
    let mut out = String::new();
    for (at, (key, value)) in pairs.iter().enumerate() {
        if at > 0 {
            out.push(',');
        }
        if at > 0 || key != first || value.contains('=') || value.starts_with('{') {
            out.push_str(key);
            out.push('=');
        }
        out.push_str(&value.replace(',', ",,"));
    }
    out
}

fn pairs(value: &str, first: &str) -> Result<Vec<(String, String)>, String> {
    let mut found = Vec::new();
    let mut rest = value;
    while !rest.is_empty() {
        if found.len() >= KEYS_LIMIT {
            return Err(format!("it has more than {KEYS_LIMIT} keys"));
        }
        let end = rest.find(['=', ',']).unwrap_or(rest.len());
        let assigned = rest[end..].starts_with('=');
        if assigned {
            let key = rest[..end].to_owned();
            let (text, left) = escaped(&rest[end + 1..]);
            found.push((key, text));
            rest = left;
        } else if found.is_empty() {
            let (text, left) = escaped(rest);
            found.push((first.to_owned(), text));
            rest = left;
        } else {
            // A switch: `multifunction` is `multifunction=on`, `nomultifunction` is off.
            let key = &rest[..end];
            match key.strip_prefix("no") {
                Some(off) => found.push((off.to_owned(), "off".to_owned())),
                None => found.push((key.to_owned(), "on".to_owned())),
            }
            rest = rest.get(end + 1..).unwrap_or_default();
        }
    }
    if found.iter().any(|(key, _)| key.is_empty()) {
        return Err("a value has no key".to_owned());
    }
    Ok(found)
}

/// A value up to a comma that is not doubled, and what comes after that.
fn escaped(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut rest = text;
    loop {
        let Some(end) = rest.find(',') else {
            value.push_str(rest);
            return (value, "");
        };
        value.push_str(&rest[..end]);
        rest = &rest[end + 1..];
        match rest.strip_prefix(',') {
            Some(after) => {
                value.push(',');
                rest = after;
            }
            None => return (value, rest),
        }
    }
}

fn json(value: &str) -> Result<Vec<(String, String)>, String> {
    let object: Map<String, Value> =
        serde_json::from_str(value).map_err(|error| format!("it is no JSON object: {error}"))?;
    // QEMU refuses a key that is there twice (qobject/json-parser.c); a map would take the last and hide the first.
    let seen: Twice = serde_json::from_str(value).map_err(|error| error.to_string())?;
    if let Some(key) = seen.0 {
        return Err(format!("{key:?} is there twice"));
    }
    let text = |value: Value| match value {
        Value::String(text) => text,
        Value::Bool(true) => "on".to_owned(),
        Value::Bool(false) => "off".to_owned(),
        other => other.to_string(),
    };
    Ok(object
        .into_iter()
        .map(|(key, value)| (key, text(value)))
        .collect())
}

/// The first key of an object that is there twice.
struct Twice(Option<String>);

impl<'de> serde::Deserialize<'de> for Twice {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Keys;
        impl<'de> serde::de::Visitor<'de> for Keys {
            type Value = Twice;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: serde::de::MapAccess<'de>>(
                self,
                mut map: A,
            ) -> Result<Twice, A::Error> {
                let mut seen = std::collections::BTreeSet::new();
                let mut twice = None;
                while let Some(key) = map.next_key::<String>()? {
                    map.next_value::<serde::de::IgnoredAny>()?;
                    if !seen.insert(key.clone()) {
                        twice.get_or_insert(key);
                    }
                }
                Ok(Twice(twice))
            }
        }
        deserializer.deserialize_map(Keys)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn words(line: &str) -> Argv {
        Argv::parse(line.split(' ').map(OsString::from).collect())
    }

    #[test]
    fn options_and_values_are_told_apart() {
        let argv = words(
            "-name sandbox-abc,debug-threads=on -nodefaults --no-reboot -append -device -device a,b=c image",
        );
        assert_eq!(argv.sandbox(), Some("abc"));
        let devices: Vec<_> = argv.values("device").map(|(_, value)| value).collect();
        assert_eq!(
            devices,
            [Some("a,b=c")],
            "the kernel's command line is no option"
        );
        assert_eq!(argv.options.last().map(|o| o.name.as_str()), Some(""));
        assert_eq!(words("-version").sandbox(), None);
        assert_eq!(words("-name sandbox- -device").sandbox(), None);
        assert_eq!(words("-name guest=sandbox-x").sandbox(), Some("x"));
    }

    #[test]
    fn values_are_read_as_qemu_reads_them() {
        let read = |text: &str| Keyed::parse(text, "driver").map(|keyed| keyed.pairs);
        let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        assert_eq!(
            read("vfio-pci,id=a,,b,multifunction,nox,host=0000:21:00.0"),
            Ok(vec![
                pair("driver", "vfio-pci"),
                pair("id", "a,b"),
                pair("multifunction", "on"),
                pair("x", "off"),
                pair("host", "0000:21:00.0"),
            ])
        );
        assert_eq!(read("driver=x"), Ok(vec![pair("driver", "x")]));
        assert_eq!(
            read(r#"{"driver": "vfio-pci", "addr": 0, "rombar": false}"#),
            Ok(vec![
                pair("driver", "vfio-pci"),
                pair("addr", "0"),
                pair("rombar", "off"),
            ])
        );
        for wrong in [r#"{"a": 1"#, "{}x", "x,=y", r#"{"host": "a", "host": "b"}"#] {
            assert!(read(wrong).is_err(), "{wrong}");
        }
        assert!(read(&"x".repeat(VALUE_LIMIT + 1)).is_err());
    }

    #[test]
    fn one_key_is_changed_and_the_rest_stays() {
        let with = |text| Keyed::with(text, "driver", "iommufd", "one");
        assert_eq!(
            with("vfio-pci,id=a,,b"),
            Ok("vfio-pci,id=a,,b,iommufd=one".to_owned())
        );
        assert_eq!(
            with("vfio-pci,iommufd=x,id=y"),
            Ok("vfio-pci,iommufd=one,id=y".to_owned())
        );
        assert_eq!(
            with(r#"{"driver":"vfio-pci","addr":0}"#),
            Ok(r#"{"driver":"vfio-pci","addr":0,"iommufd":"one"}"#.to_owned())
        );
    }

    proptest! {
        #[test]
        fn what_is_rendered_is_read_back(pairs in prop::collection::vec(("[a-m]{1,6}", ".{0,12}"), 1..6)) {
            let mut all = vec![("driver".to_owned(), "x".to_owned())];
            all.extend(pairs);
            let text = render(&all, "driver");
            prop_assert_eq!(Keyed::parse(&text, "driver").map(|keyed| keyed.pairs), Ok(all));
        }

        #[test]
        fn any_words_are_read(words in prop::collection::vec("-{0,2}(device|object|name|S)?[ -~]{0,20}", 0..12)) {
            let argv = Argv::parse(words.iter().map(OsString::from).collect());
            prop_assert_eq!(argv.words.len(), words.len());
            for word in &words {
                let _ = Keyed::parse(word, "driver");
            }
            let _ = argv.sandbox();
        }
    }
}
