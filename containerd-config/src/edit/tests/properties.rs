//! Generated configurations.

use proptest::prelude::*;

use super::*;

/// A generated configuration: its lines are joined by one kind of line break.
#[derive(Debug, Clone)]
struct Config {
    text: String,
    version: u32,
    foreign: Vec<String>,
}

fn plugin(version: u32, quote: u8) -> String {
    let name = if version == 2 {
        document::PLUGIN_V2
    } else {
        document::PLUGIN_V3
    };
    match quote % 3 {
        0 => format!("plugins.\"{name}\""),
        1 => format!("plugins.'{name}'"),
        _ => format!(" \"plugins\" . '{name}' "),
    }
}

/// Lines that may stand anywhere between tables.
fn filler() -> impl Strategy<Value = String> {
    prop_oneof![
        Just(String::new()),
        Just("  \t".to_owned()),
        "# [a-z \\[\\]=\"]{0,20}",
        Just("# >>> somebody else: begin".to_owned()),
        Just("#[plugins.x]".to_owned()),
    ]
}

/// Values in every form.
fn value() -> impl Strategy<Value = String> {
    prop_oneof![
        Just("1".to_owned()),
        Just("true  # yes".to_owned()),
        Just("-0.5e3".to_owned()),
        Just("inf".to_owned()),
        Just("1979-05-27T07:32:00Z".to_owned()),
        "\"[a-z #\\[\\]é]{0,12}\"",
        "'[a-z\\\\ #]{0,12}'",
        Just("[ \"a\", # one\n  'b',\n  # [two]\n]".to_owned()),
        Just("{ a = 1, b.c = \"x\", 'd e' = [1, 2] }".to_owned()),
        Just("\"\"\"\n[x]\n# <<< kata-manager\n#kata-manager:kept# a\n\"\"\"".to_owned()),
        Just("'''a\n\n# >>> kata-manager: runtime handlers\n'''".to_owned()),
    ]
}

/// Key and value lines whose keys begin with `prefix`, so that they do not clash.
fn keys(prefix: &'static str) -> impl Strategy<Value = Vec<String>> {
    prop::collection::vec((value(), 0..4u8, filler()), 0..4).prop_map(move |values| {
        let values = values.into_iter().enumerate();
        values
            .flat_map(|(i, (value, form, filler))| {
                let line = match form {
                    0 => format!("{prefix}{i} = {value}"),
                    1 => format!("  {prefix}{i}={value}"),
                    2 => format!("\"{prefix} {i}\"\t=\t{value}"),
                    _ => format!("{prefix}{i}.sub . 'dotted' = {value}"),
                };
                [filler, line]
            })
            .collect()
    })
}

/// Tables that have nothing to do with handlers.
fn other_table(index: usize) -> impl Strategy<Value = Vec<String>> {
    (0..4u8, keys("k"), filler()).prop_map(move |(form, keys, filler)| {
        let header = match form {
            0 => format!("[other{index}]"),
            1 => format!("  [ other{index} . \"deep er\" ]  # why"),
            2 => format!("[[list{index}]]\n[[list{index}]]"),
            _ => format!("[plugins.\"io.containerd.x.v{index}\".containerd.runtimes.a]"),
        };
        [vec![filler, header], keys].concat()
    })
}

/// A foreign handler in one of the ways that have lines of their own.
fn foreign_table(version: u32, name: String) -> impl Strategy<Value = Vec<String>> {
    (0..3u8, any::<u8>(), keys("f"), filler()).prop_map(move |(form, quote, keys, filler)| {
        let path = format!("{}.containerd.runtimes.{name}", plugin(version, quote));
        let options = [
            format!("    [{path}.options]"),
            "BinaryName = \"/x\"".to_owned(),
        ];
        let own = [vec![filler, format!("  [{path}]")], keys].concat();
        match form {
            0 => own,
            1 => [own, options.to_vec()].concat(),
            _ => [options.to_vec(), own].concat(),
        }
    })
}

fn config() -> impl Strategy<Value = Config> {
    let names = ["f-a", "f-b", "\"f.c\""];
    (2..4u32, 0..=names.len(), 0..4usize).prop_flat_map(move |(version, foreign, others)| {
        let mut tables: Vec<BoxedStrategy<Vec<String>>> = Vec::new();
        for name in &names[..foreign] {
            tables.push(foreign_table(version, (*name).to_owned()).boxed());
        }
        for index in 0..others {
            tables.push(other_table(index).boxed());
        }
        if others > 1 {
            let header = format!("[{}.containerd]", plugin(version, 0));
            tables.push(
                keys("c")
                    .prop_map(move |k| [vec![header.clone()], k].concat())
                    .boxed(),
            );
        }
        let foreign: Vec<String> = names[..foreign]
            .iter()
            .map(|n| n.trim_matches('"').to_owned())
            .collect();
        let shape = (any::<bool>(), any::<bool>(), any::<bool>());
        let parts = (
            keys("r"),
            tables,
            filler(),
            shape,
            any::<prop::sample::Index>(),
        );
        parts.prop_map(
            move |(root, mut tables, filler, (crlf, bom, newline), turn)| {
                if !tables.is_empty() {
                    let by = turn.index(tables.len());
                    tables.rotate_left(by);
                }
                let head = vec![filler, format!("version = {version}")];
                let lines = [vec![head, root], tables].concat().concat();
                let mut text = lines.join("\n");
                if newline {
                    text.push('\n');
                }
                if crlf {
                    text = text.replace('\n', "\r\n");
                }
                if bom {
                    text.insert(0, '\u{feff}');
                }
                Config {
                    text,
                    version,
                    foreign: foreign.clone(),
                }
            },
        )
    })
}

fn some_text() -> impl Strategy<Value = String> {
    "[ -~é\"\\\\]{1,12}"
}

fn wanted(prefix: &'static str) -> impl Strategy<Value = Vec<Handler>> {
    let one = (
        some_text(),
        prop::option::of(some_text()),
        prop::option::of(some_text()),
        prop::collection::vec(some_text(), 0..3),
        any::<bool>(),
        "[a-z\\. \"-]{0,5}",
    );
    prop::collection::vec(one, 1..4).prop_map(move |handlers| {
        let handlers = handlers.into_iter().enumerate();
        handlers
            .map(
                |(i, (runtime_type, path, config, annotations, privileged, name))| Handler {
                    name: format!("{prefix}{i}{name}"),
                    runtime_type,
                    runtime_path: path.clone(),
                    config_path: config,
                    pod_annotations: annotations.clone(),
                    container_annotations: annotations,
                    privileged_without_host_devices: privileged,
                    snapshotter: path,
                },
            )
            .collect()
    })
}

fn reads_as(text: &str, wanted: &[Handler]) -> Result<(), TestCaseError> {
    let document = Document::parse(text).unwrap();
    let found = document.handlers().into_iter();
    let mut found: Vec<Handler> = found
        .filter(|handler| handler.owner == Owner::Ours)
        .map(|handler| Handler::from_settings(&handler.name, &handler.settings))
        .collect();
    let mut wanted = wanted.to_vec();
    found.sort_by(|a, b| a.name.cmp(&b.name));
    wanted.sort_by(|a, b| a.name.cmp(&b.name));
    prop_assert_eq!(found, wanted);
    Ok(())
}

/// How many cases each property is tried on: `PROPTEST_CASES`, or a number that takes a few seconds.
fn cases() -> u32 {
    let wanted = std::env::var("PROPTEST_CASES").ok();
    wanted.and_then(|cases| cases.parse().ok()).unwrap_or(2500)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(cases()))]

    #[test]
    fn set_then_remove_is_the_identity(config in config(), first in wanted("w"), second in wanted("w")) {
        let options = options(config.version);
        let edited = set_handlers(&config.text, &first, &options).unwrap();
        reads_as(&edited.text, &first)?;
        // Nothing of the text was touched: ours was put in at one place.
        let common = config.text.bytes().zip(edited.text.bytes()).take_while(|(a, b)| a == b).count();
        prop_assert!(edited.text.ends_with(&config.text[common..]));
        prop_assert_eq!(&set_handlers(&edited.text, &first, &options).unwrap().text, &edited.text);
        prop_assert_eq!(&remove_all(&edited.text, &[]).unwrap().text, &config.text);

        let changed = set_handlers(&edited.text, &second, &options).unwrap();
        reads_as(&changed.text, &second)?;
        let direct = set_handlers(&config.text, &second, &options).unwrap();
        prop_assert_eq!(&changed.text, &direct.text, "the way there does not matter");
        prop_assert_eq!(&remove_all(&changed.text, &[]).unwrap().text, &config.text);
    }

    #[test]
    fn adopt_then_remove_is_the_identity(config in config(), more in wanted("w")) {
        let mut handlers: Vec<Handler> = config.foreign.iter().map(|name| plain(name)).collect();
        handlers.extend(more);
        let allow = SetOptions { adopt: &config.foreign, ..options(config.version) };
        let edited = set_handlers(&config.text, &handlers, &allow).unwrap();
        reads_as(&edited.text, &handlers)?;
        prop_assert_eq!(edited.adopted.len(), config.foreign.len());
        prop_assert_eq!(&set_handlers(&edited.text, &handlers, &options(config.version)).unwrap().text, &edited.text);
        prop_assert_eq!(&remove_all(&edited.text, &[]).unwrap().text, &config.text);
    }

    #[test]
    fn later_edits_of_others_survive(config in config(), first in wanted("w"), second in wanted("w"), newline in any::<bool>()) {
        let options = options(config.version);
        let edited = set_handlers(&config.text, &first, &options).unwrap().text;
        let later = if newline { "\n[later]\nx = 1\n" } else { "[later]\nx = 1" };
        let text = format!("# first\n{}{later}", edited.trim_start_matches('\u{feff}'));
        let changed = set_handlers(&text, &second, &options).unwrap().text;
        reads_as(&changed, &second)?;
        for text in [text, changed] {
            let undone = remove_all(&text, &[]).unwrap().text;
            // A line break that we had to add stays when somebody wrote on after it.
            let base = config.text.trim_start_matches('\u{feff}');
            let eol = if base.contains("\r\n") { "\r\n" } else { "\n" };
            let joint = if base.ends_with('\n') { "" } else { eol };
            prop_assert_eq!(undone, format!("# first\n{base}{joint}{later}"));
        }
    }

    #[test]
    fn any_text_is_edited_or_refused(text in "\\PC{0,60}", lines in prop::collection::vec(prop_oneof![
        filler(), Just("version = 2".to_owned()), Just("[plugins]".to_owned()), Just(marks::END.to_owned()),
        Just(marks::BEGIN_HANDLERS.to_owned()), Just(marks::BEGIN_VERSION.to_owned()), Just("#kata-manager:kept# [a]".to_owned()),
        Just("[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.w]\nruntime_type = \"x\"".to_owned()),
        Just("# kata-manager state: {\"handlers\":{\"w\":\"0\"},\"joined\":true}".to_owned()),
    ], 0..8)) {
        for text in [text, lines.join("\n")] {
            if let Ok(edited) = set_handlers(&text, &[plain("w")], &options(2)) {
                reads_as(&edited.text, &[plain("w")])?;
                prop_assert_eq!(&set_handlers(&edited.text, &[plain("w")], &options(2)).unwrap().text, &edited.text);
            }
            if let Ok(undone) = remove_all(&text, &[]) {
                prop_assert_eq!(&remove_all(&undone.text, &[]).unwrap().text, &undone.text);
            }
        }
    }
}

/// `imports` in every layout, each of files that are there.
fn imports() -> impl Strategy<Value = &'static str> {
    prop_oneof![
        Just(""),
        Just("imports = []\n"),
        Just("imports = [ # none\n]\n"),
        Just("imports = ['/a.toml']\n"),
        Just("\"imports\"=[\n  \"/a.toml\", # one, two\n  '''/b.toml''',\n] # end\n"),
        Just("imports = [ \"d/*.toml\" , '/a.toml' ]\n"),
        Just("imports = ['conf.d/*.toml']\n"),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(cases()))]

    /// Main file and drop-in: outside our lines every byte stays, the merged reading is what was wanted, and back is the identity.
    #[test]
    fn each_placement_is_there_and_back(config in config(), imports in imports(), wanted in wanted("w"), beside in any::<bool>()) {
        use crate::effective::{Effective, tests::Memory};
        use crate::place::{Placement, Request, plan};

        let version = format!("version = {}", config.version);
        let eol = if config.text.contains("\r\n") { "\r\n" } else { "\n" };
        let with = format!("{version}\n{}", imports.trim_end()).replace('\n', eol);
        let text = if imports.is_empty() { config.text.clone() } else { config.text.replacen(&version, &with, 1) };
        let main = km_host::HostPath::new("/etc/containerd/config.toml").unwrap();
        let files = Memory::new(&[(main.as_str(), &text), ("/a.toml", ""), ("/b.toml", "# b"), ("/etc/containerd/d/x.toml", "")]);
        let rules = crate::ContainerdVersion::new(2, 1, 9);
        let placement = if beside { Placement::DropIn } else { Placement::Main };
        let ask = |files: &Memory, wanted: &[Handler], placement| {
            let effective = Effective::load(files, &main, rules).unwrap();
            plan(files, &effective, &main, &Request { wanted, placement, ..Request::default() }).unwrap()
        };
        let placed = ask(&files, &wanted, placement);
        let after = crate::place::tests::carried_out(&files, &placed);
        prop_assert!(!ask(&after, &wanted, Placement::Auto).differs());
        let effective = Effective::load(&after, &main, rules).unwrap();
        let found: Vec<Handler> = effective.handlers().iter()
            .filter(|found| found.owner == Owner::Ours)
            .map(|found| Handler::from_settings(&found.name, &found.settings))
            .collect();
        let mut sorted = wanted.clone();
        sorted.sort_by(|a, b| a.name.cmp(&b.name));
        prop_assert_eq!(found, sorted);
        if beside {
            // The main file has lost nothing, and won an import at most.
            let now = &after.0[main.as_str()];
            let common = text.bytes().zip(now.bytes()).take_while(|(a, b)| a == b).count();
            prop_assert!(now.ends_with(&text[common..]), "{}", now);
        }
        let removed = ask(&after, &[], Placement::Auto);
        prop_assert_eq!(&crate::place::tests::carried_out(&after, &removed).0, &files.0);
    }
}
