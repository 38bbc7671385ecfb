//! What containerd asks for: the arguments of a shim (containerd, core/runtime/v2/README.md, "Commands"). Arguments in, data out.

use std::ffi::{OsStr, OsString};

/// A call that prepares something: `start` of a container or sandbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Start {
    /// `-id`: the container's or sandbox's id.
    pub id: String,
    /// `-namespace`: containerd's namespace.
    pub namespace: String,
}

/// Reads the arguments. Everything that is not a `start` with an id is `None`: it is none of our business.
///
/// containerd puts flags first and the action last, in Go's form: `-id X`, and `--id X` and `-id=X` mean the same.
pub fn parse(argv: &[OsString]) -> Option<Start> {
    let (action, flags) = argv.get(1..)?.split_last()?;
    if action != OsStr::new("start") {
        return None;
    }
    let mut start = Start {
        id: String::new(),
        namespace: String::new(),
    };
    let mut flags = flags.iter().map(|flag| flag.to_str());
    while let Some(flag) = flags.next() {
        let name = flag?.strip_prefix('-')?;
        let name = name.strip_prefix('-').unwrap_or(name);
        let (name, value) = match name.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (name, None),
        };
        // Flags of Go's `bool` take no value of their own.
        let place = match name {
            "debug" | "v" | "info" => continue,
            "id" => Some(&mut start.id),
            "namespace" => Some(&mut start.namespace),
            _ => None,
        };
        let value = match value {
            Some(value) => value,
            None => flags.next()??,
        };
        if let Some(place) = place {
            *place = value.to_owned();
        }
    }
    (!start.id.is_empty()).then_some(start)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parsed(line: &str) -> Option<(String, String)> {
        let argv: Vec<OsString> = line.split(' ').map(Into::into).collect();
        parse(&argv).map(|start| (start.namespace, start.id))
    }

    #[test]
    fn what_the_containerds_say() {
        let start = Some(("k8s.io".to_owned(), "abc".to_owned()));
        let base = "shim -namespace k8s.io -address /run/containerd/containerd.sock -publish-binary /usr/bin/containerd -id abc";
        assert_eq!(parsed(&format!("{base} start")), start);
        assert_eq!(parsed(&format!("{base} -debug start")), start);
        assert_eq!(parsed("shim --namespace=k8s.io --id=abc start"), start);
        for other in [
            "delete",
            "-bundle /b delete",
            "",
            "-info",
            "-v",
            "-debug delete",
        ] {
            assert_eq!(parsed(&format!("{base} {other}")), None, "{other}");
        }
        for odd in [
            "shim",
            "shim start",
            "shim -id",
            "shim -id start",
            "shim x -id abc start",
        ] {
            assert_eq!(parsed(odd), None, "{odd}");
        }
    }

    proptest! {
        #[test]
        fn any_words_are_a_start_or_none(words in proptest::collection::vec("-{0,2}(id|namespace|debug|[a-z=]{0,4})", 0..8)) {
            let argv: Vec<OsString> = words.into_iter().map(Into::into).collect();
            let _ = parse(&argv);
        }
    }
}
