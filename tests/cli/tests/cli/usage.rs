//! Help, usage errors, completions, and output that ends early.

use std::process::Command;

use insta::assert_snapshot;

use crate::place::{GPU, Place, binary};

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
