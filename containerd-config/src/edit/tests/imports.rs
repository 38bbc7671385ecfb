//! The import of a drop-in: in and out of every layout.

use super::*;

const ENTRY: &str = "/etc/containerd/conf.d/60-kata-manager.toml";

#[test]
fn an_import_goes_in_and_out_of_every_layout() {
    for text in [
        "",
        "\u{feff}# only a comment",
        "version = 3",
        "version = 3\r\nroot = \"/x\"\r\n[a]\r\n",
        "version = 3\nimports = []\n[a]\nb = 1\n",
        "version = 3\nimports = [ ]\n",
        "version = 3\nimports = [ # none, yet\n]\n",
        "version = 3\nimports = [\"/a.toml\"]",
        "version = 3\nimports=[ '/a.toml' , \"b/*.toml\", ] # mine\n",
        "imports = [\n  # first\n  \"/a.toml\", # a, b\n  '''/b''' # last\n]\nversion = 2\n",
        "\u{feff}\"imports\" = [\r\n\t\"/a.toml\"\r\n\t,\r\n]\r\nversion = 3\r\n",
    ] {
        let added = add_import(text, ENTRY, 3, false).unwrap();
        let document = Document::parse(&added.text).unwrap();
        assert_eq!(document.imports()[0], ENTRY, "{text}");
        assert!(document.version().is_some(), "{text}");
        assert_eq!(
            add_import(&added.text, ENTRY, 3, false).unwrap(),
            added,
            "{text}"
        );
        let removed = remove_import(&added.text, ENTRY).unwrap();
        assert_eq!(removed.text, text);
        assert!(!removed.remove_file);
        assert_eq!(remove_import(text, ENTRY).unwrap().text, text);
    }
    let created = add_import("", ENTRY, 3, true).unwrap();
    assert!(remove_import(&created.text, ENTRY).unwrap().remove_file);
}

#[test]
fn what_others_did_to_the_list_stays() {
    for (text, wanted) in [
        (format!("imports = [{ENTRY:?}]\n"), "imports = []\n"),
        (
            format!("imports = [\"/a\", {ENTRY:?}]\n"),
            "imports = [\"/a\"]\n",
        ),
        (
            format!("imports = [\"/a\", {ENTRY:?},]\n"),
            "imports = [\"/a\", ]\n",
        ),
        (
            format!("imports = [\n  \"/a\", # a\n  {ENTRY:?}\n]\n"),
            "imports = [\n  \"/a\" # a\n  \n]\n",
        ),
        (
            format!("imports = [{ENTRY:?},\"/a\"]\n"),
            "imports = [\"/a\"]\n",
        ),
        (
            format!("imports = [{ENTRY:?}, \"/a\", {ENTRY:?}]\n"),
            "imports = [ \"/a\"]\n",
        ),
    ] {
        assert_eq!(remove_import(&text, ENTRY).unwrap().text, wanted, "{text}");
    }
    // Somebody wrote into our block, and settings below it: their import and the version that they need stay.
    let created = add_import("", ENTRY, 3, true).unwrap().text;
    let text = created.replace("\"]\n", "\", '/b']\n") + "[x]\ny = 1\n";
    let removed = remove_import(&text, ENTRY).unwrap();
    assert_eq!(removed.text, "version = 3\nimports = [ '/b']\n[x]\ny = 1\n");
    assert!(!removed.remove_file);
    let text = created + "[x]\ny = 1\n";
    assert_eq!(
        remove_import(&text, ENTRY).unwrap().text,
        "version = 3\n[x]\ny = 1\n"
    );
}

#[test]
fn imports_that_are_no_list_are_refused() {
    let error = add_import("version = 3\nimports = \"x\"\n", ENTRY, 3, false).unwrap_err();
    assert_eq!(error, EditError::BadImports { line: 2 });
}

#[test]
fn handlers_and_an_import_live_in_one_file() {
    let text = "version = 3\n[a]\n";
    let added = add_import(text, ENTRY, 3, false).unwrap().text;
    let both = set(&added, &[handler("w")]).text;
    assert_eq!(remove_all(&both, &[]).unwrap().text, added);
    let other = remove_import(&both, ENTRY).unwrap().text;
    assert_eq!(other, set(text, &[handler("w")]).text);
}
