//! Layers by hand, each rule of the specification, hostile ones, and random ones against a plain model.

use std::convert::Infallible;

use proptest::prelude::*;

use super::*;
use crate::unpack::{NewFile, Output, UnpackError, unpack};

/// An entry of a layer.
#[derive(Clone, Debug)]
enum Entry {
    File(&'static [u8], u32),
    Folder,
    Link(&'static str),
    Hard(&'static str),
    Device,
}

use Entry::{Device, Folder, Hard, Link};

/// A plain file.
fn file(content: &'static [u8]) -> Entry {
    Entry::File(content, 0o644)
}

/// An empty file, as whiteouts are.
const MARK: Entry = Entry::File(b"", 0o644);

fn layer(entries: &[(&str, Entry)]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (path, entry) in entries {
        let mut header = tar::Header::new_gnu();
        header.as_gnu_mut().unwrap().name[..path.len()].copy_from_slice(path.as_bytes());
        header.set_mode(0o755);
        let (kind, content, target) = match entry {
            Entry::File(content, mode) => {
                header.set_mode(*mode);
                (tar::EntryType::Regular, *content, "")
            }
            Folder => (tar::EntryType::Directory, &b""[..], ""),
            Link(target) => (tar::EntryType::Symlink, &b""[..], *target),
            Hard(target) => (tar::EntryType::Link, &b""[..], *target),
            Device => (tar::EntryType::Char, &b""[..], ""),
        };
        header.set_entry_type(kind);
        header.set_size(content.len() as u64);
        header.as_gnu_mut().unwrap().linkname[..target.len()].copy_from_slice(target.as_bytes());
        header.set_cksum();
        builder.append(&header, content).unwrap();
    }
    builder.into_inner().unwrap()
}

struct Tars(Vec<Vec<u8>>);

impl Layers for Tars {
    fn count(&self) -> usize {
        self.0.len()
    }

    fn open(&self, layer: usize) -> io::Result<(Box<dyn Read + Send + '_>, Format)> {
        Ok((Box::new(&self.0[layer][..]), Format::Tar))
    }
}

struct Memory;

impl Output for Memory {
    type Open = Vec<u8>;
    type File = Vec<u8>;
    type Error = Infallible;

    fn begin(&mut self, _: &NewFile) -> Result<Vec<u8>, Infallible> {
        Ok(Vec::new())
    }

    fn write(&mut self, open: &mut Vec<u8>, bytes: &[u8]) -> Result<(), Infallible> {
        open.extend_from_slice(bytes);
        Ok(())
    }

    fn hole(&mut self, _: &mut Vec<u8>, _: u64) -> Result<(), Infallible> {
        panic!("it makes no holes");
    }

    fn end(&mut self, open: Vec<u8>) -> Result<Vec<u8>, Infallible> {
        Ok(open)
    }
}

type Tree = BTreeMap<String, String>;

fn tar_of(layers: &Tars, folder: &str) -> Result<Vec<u8>, FlattenError> {
    let limits = Limits::default();
    let flat = flatten(layers, folder, &limits)?;
    let mut tar = Vec::new();
    flat.write(layers, &limits, &mut tar)?;
    Ok(tar)
}

fn unpacked(tar: &[u8]) -> Result<Tree, UnpackError<Infallible>> {
    let limits = Limits::default();
    let found = unpack(tar, Format::Tar, &limits, &mut Memory, &mut |_| {})?;
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    let files = found.files.into_iter().map(|(p, f)| (p, text(f)));
    let links = found.links.into_iter();
    Ok(files
        .chain(links.map(|(p, t)| (p, format!("-> {t}"))))
        .collect())
}

/// What is left of a folder.
fn left(folder: &str, layers: &[&[(&str, Entry)]]) -> Result<Tree, FlattenError> {
    let layers = Tars(layers.iter().map(|entries| layer(entries)).collect());
    Ok(unpacked(&tar_of(&layers, folder)?).unwrap())
}

fn tree(all: &[(&str, &str)]) -> Tree {
    let all = all.iter().map(|(p, c)| ((*p).to_owned(), (*c).to_owned()));
    all.collect()
}

fn refused(folder: &str, layers: &[&[(&str, Entry)]]) -> Refusal {
    match left(folder, layers) {
        Err(FlattenError::Refused { source, .. }) => source.reason,
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_folder_alone_is_left_and_devices_elsewhere_do_no_harm() {
    let base: &[(&str, Entry)] = &[
        ("dev/null", Device),
        ("usr/bin/su", Entry::File(b"su", 0o4755)),
        ("opt/kata-other", file(b"x")),
        ("opt/", Folder),
        ("./opt/kata/", Folder),
        ("./opt/kata/vmlinuz", file(b"kernel")),
        ("/opt/kata/share/kata.img", file(b"image")),
        ("opt/kata/latest", Link("share/kata.img")),
    ];
    let want = [
        ("vmlinuz", "kernel"),
        ("share/kata.img", "image"),
        ("latest", "-> share/kata.img"),
    ];
    assert_eq!(left("opt/kata", &[base]).unwrap(), tree(&want));
    assert_eq!(
        left("opt/kata/share", &[base]).unwrap(),
        tree(&[("kata.img", "image")])
    );
}

#[test]
fn upper_layers_replace_and_whiteouts_hide_what_is_below_them_alone() {
    let base: &[(&str, Entry)] = &[
        ("k/a", file(b"1")),
        ("k/b", file(b"1")),
        ("k/d/x", file(b"1")),
        ("k/d/y", file(b"1")),
        ("k/e/x", file(b"1")),
        ("k/l", Link("a")),
    ];
    let upper: &[(&str, Entry)] = &[
        ("k/a", file(b"2")),
        ("k/.wh.b", MARK),
        // In either order, a whiteout is for the layers below.
        ("k/d/z", file(b"2")),
        ("k/d/.wh..wh..opq", MARK),
        ("k/.wh.e", MARK),
        ("k/e/", Folder),
        ("k/e/new", file(b"2")),
        ("k/l", file(b"now a file")),
        ("k/.wh..wh.plnk/1.2", file(b"bookkeeping")),
        ("k/.wh..wh.aufs", MARK),
    ];
    let want = [
        ("a", "2"),
        ("d/z", "2"),
        ("e/new", "2"),
        ("l", "now a file"),
    ];
    assert_eq!(left("k", &[base, upper]).unwrap(), tree(&want));
    // And of a folder below another.
    assert_eq!(left("k/d", &[base, upper]).unwrap(), tree(&[("z", "2")]));
}

#[test]
fn whiteouts_above_the_folder_count() {
    let base: &[(&str, Entry)] = &[("opt/kata/a", file(b"1"))];
    for mark in [
        "opt/.wh.kata",
        ".wh.opt",
        ".wh..wh..opq",
        "opt/.wh..wh..opq",
        "opt/kata/.wh..wh..opq",
    ] {
        let gone = left("opt/kata", &[base, &[(mark, MARK)]]);
        assert!(matches!(gone, Err(FlattenError::Nothing { .. })), "{mark}");
        let again: &[(&str, Entry)] = &[("opt/kata/b", file(b"2")), (mark, MARK)];
        assert_eq!(
            left("opt/kata", &[base, again]).unwrap(),
            tree(&[("b", "2")]),
            "{mark}"
        );
    }
    for mark in [
        "opt/.wh.kat",
        "opt/.wh.kata2",
        ".wh.kata",
        "opt/kata/.wh.b",
        "x/.wh..wh..opq",
    ] {
        let stays = left("opt/kata", &[base, &[(mark, MARK)]]);
        assert_eq!(stays.unwrap(), tree(&[("a", "1")]), "{mark}");
    }
}

#[test]
fn a_folder_takes_the_place_of_a_file_and_the_other_way_round() {
    let base: &[(&str, Entry)] = &[("k/x", file(b"1")), ("k/y/z", file(b"1"))];
    let upper: &[(&str, Entry)] = &[
        ("k/x/", Folder),
        ("k/x/in", file(b"2")),
        ("k/y", Link("x/in")),
    ];
    assert_eq!(
        left("k", &[base, upper]).unwrap(),
        tree(&[("x/in", "2"), ("y", "-> x/in")])
    );
    let unsaid: &[(&str, Entry)] = &[("k/x/in", file(b"2"))];
    assert!(matches!(
        refused("k", &[base, unsaid]),
        Refusal::UnderNonFolder { .. }
    ));
}

#[test]
fn what_stands_in_the_folders_place_is_named() {
    let base: &[(&str, Entry)] = &[("opt/kata/a", file(b"1"))];
    let moved: &[(&str, Entry)] = &[("opt", Link("usr/opt"))];
    let error = left("opt/kata", &[base, moved]).unwrap_err().to_string();
    assert!(
        error.contains("/opt/kata") && error.contains("/opt is no folder"),
        "{error}"
    );
    let through: &[(&str, Entry)] = &[("opt/kata/b", file(b"2"))];
    assert!(matches!(
        refused("opt/kata", &[moved, through]),
        Refusal::UnderNonFolder { via } if via == "opt"
    ));
    for back in [("opt/", Folder), (".wh.opt", MARK)] {
        let back: &[(&str, Entry)] = &[back, ("opt/kata/b", file(b"2"))];
        assert_eq!(
            left("opt/kata", &[base, moved, back]).unwrap(),
            tree(&[("b", "2")])
        );
    }
}

#[test]
fn hard_links_keep_their_content_when_their_first_name_goes() {
    let base: &[(&str, Entry)] = &[
        ("k/a", file(b"content")),
        ("k/b", Hard("k/a")),
        ("k/c", Hard("/k/b")),
    ];
    let all = [("a", "content"), ("b", "content"), ("c", "content")];
    assert_eq!(left("k", &[base]).unwrap(), tree(&all));
    assert_eq!(
        left("k", &[base, &[("k/.wh.a", MARK)]]).unwrap(),
        tree(&all[1..])
    );
    // To a file of a layer below.
    let upper: &[(&str, Entry)] = &[("k/a", file(b"other")), ("k/d", Hard("k/b"))];
    let found = left("k", &[base, upper]).unwrap();
    assert_eq!((&*found["a"], &*found["d"]), ("other", "content"));
    for target in ["etc/passwd", "k/none", "k", "../k/a", "k/"] {
        let outside: &[(&str, Entry)] = &[("etc/passwd", file(b"x")), ("k/x", Hard(target))];
        assert!(matches!(
            refused("k", &[outside]),
            Refusal::HardLinkTarget { .. }
        ));
    }
}

#[test]
fn what_is_hostile_is_refused() {
    let cases: [(&[(&str, Entry)], Refusal); 8] = [
        (&[("../k/x", file(b"x"))], Refusal::Climbs),
        (&[("x/../../k/x", file(b"x"))], Refusal::Climbs),
        (&[("k/.wh...", MARK)], Refusal::Whiteout),
        (&[("k/.wh.", MARK)], Refusal::Whiteout),
        (&[("k/.wh.a/b", MARK)], Refusal::Whiteout),
        (
            &[("k/x", file(b"1")), ("k/./x", file(b"2"))],
            Refusal::Duplicate,
        ),
        (
            &[("k/null", Device)],
            Refusal::Kind {
                what: "a character device",
            },
        ),
        (&[("k/.generation.json", file(b"x"))], Refusal::Reserved),
    ];
    for (entries, reason) in cases {
        assert_eq!(refused("k", &[entries]), reason, "{entries:?}");
    }
    // What is gone in the end does no harm.
    let device: &[(&str, Entry)] = &[("k/null", Device), ("k/a", file(b"1"))];
    let gone = left("k", &[device, &[("k/.wh.null", MARK)]]);
    assert_eq!(gone.unwrap(), tree(&[("a", "1")]));
    // What only the whole can tell is told when the result is unpacked.
    let judged: [&[(&str, Entry)]; 3] = [
        &[("k/su", Entry::File(b"su", 0o4755))],
        &[("k/out", Link("../../etc/passwd"))],
        &[("k/out", Link("/etc/passwd"))],
    ];
    for entries in judged {
        let tar = tar_of(&Tars(vec![layer(entries)]), "k").unwrap();
        assert!(unpacked(&tar).is_err(), "{entries:?}");
    }
}

#[test]
fn limits_hold() {
    let many: Vec<_> = (0..5).map(|n| format!("k/{n}")).collect();
    let entries: Vec<_> = many.iter().map(|path| (&**path, file(b"x"))).collect();
    let layers = Tars(vec![layer(&entries)]);
    let entries = Limits {
        entries: 4,
        ..Limits::default()
    };
    let bytes = Limits {
        unpacked_bytes: 1024,
        ..Limits::default()
    };
    for limits in [entries, bytes] {
        let refused = flatten(&layers, "k", &limits);
        assert!(
            matches!(
                &refused,
                Err(FlattenError::Refused { source, .. }) if matches!(
                    source.reason,
                    Refusal::TooManyEntries { .. } | Refusal::TooLarge { .. }
                )
            ),
            "{refused:?}"
        );
    }
}

#[test]
fn a_layer_that_ends_early_or_changes_is_damaged() {
    let whole = layer(&[("k/a", file(b"content")), ("k/b", file(b"more"))]);
    let cut = Tars(vec![whole[..700].to_vec()]);
    let damaged = flatten(&cut, "k", &Limits::default());
    assert!(matches!(
        damaged,
        Err(FlattenError::Damaged { layer: 1, .. })
    ));
    let flat = flatten(&Tars(vec![whole]), "k", &Limits::default()).unwrap();
    for changed in [
        layer(&[("k/a", file(b"longer content"))]),
        cut.0[0].clone(),
        Vec::new(),
    ] {
        let written = flat.write(&Tars(vec![changed]), &Limits::default(), io::sink());
        assert!(
            matches!(written, Err(FlattenError::Damaged { .. })),
            "{written:?}"
        );
    }
}

#[test]
fn long_names_come_through() {
    let long = format!("{}/{}", "d".repeat(200), "f".repeat(200));
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = plain(tar::EntryType::Regular, 0o644);
    header.set_size(1);
    builder
        .append_data(&mut header, format!("k/{long}"), &b"x"[..])
        .unwrap();
    let layers = Tars(vec![builder.into_inner().unwrap()]);
    let found = unpacked(&tar_of(&layers, "k").unwrap()).unwrap();
    assert_eq!(found, tree(&[(&long, "x")]));
}

/// What a random layer makes of a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Made {
    File(u8),
    Link,
    Folder,
}

#[derive(Clone, Debug)]
struct RandomLayer {
    made: BTreeMap<String, Made>,
    hidden: Vec<String>,
    opaque: Vec<String>,
    marks_first: bool,
}

fn path() -> impl Strategy<Value = String> {
    prop::collection::vec(prop::sample::select(vec!["a", "b", "c"]), 1..4)
        .prop_map(|parts| parts.join("/"))
}

fn random_layer() -> impl Strategy<Value = RandomLayer> {
    let made = prop_oneof![
        3 => any::<u8>().prop_map(Made::File),
        1 => Just(Made::Link),
        1 => Just(Made::Folder),
    ];
    let made = prop::collection::vec((path(), made), 0..8);
    let paths = || prop::collection::vec(path(), 0..3);
    (made, paths(), paths(), any::<bool>()).prop_map(|(all, hidden, opaque, marks_first)| {
        let mut made = BTreeMap::new();
        for (path, what) in all {
            // Real layers have no path through what is no folder, and an entry for each folder.
            let through = parents(&path).any(|p| made.get(p).is_some_and(|m| *m != Made::Folder));
            if through || made.contains_key(&path) {
                continue;
            }
            for parent in parents(&path) {
                made.insert(parent.to_owned(), Made::Folder);
            }
            made.insert(path, what);
        }
        RandomLayer {
            made,
            hidden,
            opaque,
            marks_first,
        }
    })
}

impl RandomLayer {
    fn tar(&self) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        let mut append = |path: &str, kind, content: &[u8]| {
            let mut header = plain(kind, 0o644);
            if kind == tar::EntryType::Symlink {
                builder.append_link(&mut header, path, "b").unwrap();
                return;
            }
            header.set_size(content.len() as u64);
            builder.append_data(&mut header, path, content).unwrap();
        };
        let mut marks: Vec<String> = Vec::new();
        for path in &self.hidden {
            let (folder, name) = path.rsplit_once('/').unwrap_or(("", path));
            marks.push(
                format!("{folder}/.wh.{name}")
                    .trim_start_matches('/')
                    .to_owned(),
            );
        }
        marks.extend(
            self.opaque
                .iter()
                .map(|path| format!("{path}/.wh..wh..opq")),
        );
        for marking in [self.marks_first, !self.marks_first] {
            if marking {
                for mark in &marks {
                    append(mark, tar::EntryType::Regular, b"");
                }
                continue;
            }
            for (path, made) in &self.made {
                match made {
                    Made::File(content) => {
                        append(path, tar::EntryType::Regular, &[content % 26 + 65])
                    }
                    Made::Link => append(path, tar::EntryType::Symlink, b""),
                    Made::Folder => append(path, tar::EntryType::Directory, b""),
                }
            }
        }
        builder.into_inner().unwrap()
    }

    /// The specification, word for word.
    fn apply(&self, tree: &mut BTreeMap<String, Made>) {
        for hidden in &self.hidden {
            tree.retain(|path, _| path != hidden && !lies_in(path, hidden));
        }
        for opaque in &self.opaque {
            tree.retain(|path, _| !lies_in(path, opaque));
        }
        for (path, made) in &self.made {
            let both_folders = *made == Made::Folder && tree.get(path) == Some(&Made::Folder);
            if !both_folders {
                tree.retain(|other, _| other != path && !lies_in(other, path));
            }
            tree.insert(path.clone(), *made);
        }
    }
}

proptest! {
    #[test]
    fn random_layers_give_what_the_model_gives(layers in prop::collection::vec(random_layer(), 1..5), folder in path()) {
        let tars = Tars(layers.iter().map(RandomLayer::tar).collect());
        let mut model = BTreeMap::new();
        for layer in &layers {
            layer.apply(&mut model);
        }
        let want: Tree = model.iter().filter_map(|(path, made)| {
            let below = path.strip_prefix(&folder)?.strip_prefix('/')?;
            let said = match made {
                Made::File(content) => char::from(content % 26 + 65).to_string(),
                Made::Link => "-> b".to_owned(),
                Made::Folder => return None,
            };
            Some((below.to_owned(), said))
        }).collect();
        match tar_of(&tars, &folder) {
            Ok(tar) => {
                prop_assert_eq!(unpacked(&tar).unwrap(), want);
                prop_assert!(tar_of(&tars, &folder).unwrap() == tar);
            }
            Err(FlattenError::Nothing { .. }) => prop_assert!(want.is_empty()),
            Err(other) => prop_assert!(false, "{other:?}"),
        }
    }

    #[test]
    fn any_bytes_are_an_error_or_a_tar_that_can_be_judged(bytes in prop::collection::vec(any::<u8>(), 0..2000), cut in 0usize..2000) {
        let mut good = layer(&[("k/a", file(b"content")), ("k/.wh.b", MARK)]);
        let at = cut.min(good.len());
        for (old, new) in good[at..].iter_mut().zip(&bytes) {
            *old = *new;
        }
        for layers in [Tars(vec![bytes.clone()]), Tars(vec![good])] {
            if let Ok(tar) = tar_of(&layers, "k") {
                let _ = unpacked(&tar);
            }
        }
    }
}
