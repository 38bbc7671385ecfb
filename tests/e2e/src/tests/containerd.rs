//! Registration in containerd: every placement, edits of others, rollbacks, distributions that render their files.
//!
//! A scenario changes files, calls kata-manager and asks CRI; how containerd is restarted is the node's business, so that a
//! node with a real systemd can run the same ones.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use km_tests_e2e::containerd::{Flavour, Options, Version};
use km_tests_e2e::images;
use km_tests_e2e::sandbox::Sandbox;
use km_tests_e2e::suite::Test;

use super::node::{DEMO, Node, Stamped};

pub(crate) const TESTS: &[Test] = &[
    ("main_1_6", |s| {
        placement(s, &Options::new(Version::V1_6), "main", true)
    }),
    ("main_1_7", |s| {
        placement(s, &Options::new(Version::V1_7), "auto", true)
    }),
    ("main_2_x", |s| {
        placement(s, &Options::new(Version::V2), "main", true)
    }),
    ("conf_d_2_x", |s| {
        placement(s, &Options::new(Version::V2), "auto", true)
    }),
    ("drop_in_2_x", |s| {
        placement(s, &Options::new(Version::V2), "auto", false)
    }),
    ("drop_in_2_x_with_a_version_2_file", |s| {
        let options = Options::new(Version::V2).flavour(Flavour::Version2);
        placement(s, &options, "dropIn", false)
    }),
    ("a_drop_in_is_refused_on_1_x", a_drop_in_is_refused_on_1_x),
    ("handlers_move_between_files", handlers_move_between_files),
    ("failed_restarts_1_6", |s| failed_restarts(s, Version::V1_6)),
    ("failed_restarts_1_7", |s| failed_restarts(s, Version::V1_7)),
    ("failed_restarts_2_x", |s| failed_restarts(s, Version::V2)),
    (
        "a_replaced_main_table_is_refused",
        a_replaced_main_table_is_refused,
    ),
    ("an_import_that_is_not_there", an_import_that_is_not_there),
    ("a_drop_in_is_killed", a_drop_in_is_killed),
    ("a_full_or_read_only_folder", a_full_or_read_only_folder),
    ("odd_files", odd_files),
    ("a_rendered_configuration", a_rendered_configuration),
    ("unsupported_distributions", unsupported_distributions),
    (
        "cdi_is_switched_on_where_nobody_said",
        cdi_is_switched_on_where_nobody_said,
    ),
    ("handler_settings_1_6", |s| {
        handler_settings(s, Version::V1_6)
    }),
    ("handler_settings_1_7", |s| {
        handler_settings(s, Version::V1_7)
    }),
    ("handler_settings_2_x", |s| handler_settings(s, Version::V2)),
];

/// A node whose containerd's files and placement are as told.
fn node(sandbox: &Sandbox, options: &Options, placement: &str, imports: bool) -> Result<Node> {
    let node = Node::start(sandbox, options)?;
    if !imports {
        let path = node.containerd.config();
        let text = fs::read_to_string(&path)?;
        let lines = text.lines().filter(|line| !line.starts_with("imports"));
        fs::write(
            &path,
            lines.map(|line| format!("{line}\n")).collect::<String>(),
        )?;
        node.containerd.restart()?;
    }
    node.reconfigure(
        "containerd:\n",
        &format!("containerd:\n  placement: {placement}\n"),
    )?;
    Ok(node)
}

/// The file that has our handlers.
fn target(node: &Node) -> Result<PathBuf> {
    let etc = node.containerd.dir().join("etc");
    let candidates = [
        etc.join("conf.d/60-kata-manager.toml"),
        etc.join("config.toml"),
    ];
    let has = |path: &&PathBuf| {
        fs::read_to_string(path).is_ok_and(|text| text.contains(&format!("runtimes.{DEMO}]")))
    };
    candidates
        .iter()
        .find(has)
        .cloned()
        .context("no file has the handler")
}

fn placement(sandbox: &Sandbox, options: &Options, placement: &str, imports: bool) -> Result<()> {
    let node = node(sandbox, options, placement, imports)?;
    let original = Stamped::of(&node.containerd.config())?;
    let before = node
        .containerd
        .cri()
        .run_pod("runc", images::BUSYBOX, &["/bin/sleep", "1000"])?;
    node.apply(&[DEMO])?;
    node.demo_runs()?;
    let survives = || -> Result<()> {
        let said = node
            .containerd
            .cri()
            .exec(&before.container, &["/bin/echo", "alive"])?;
        ensure!(
            said.stdout == "alive\n",
            "the pod from before says {said:?}"
        );
        Ok(())
    };
    survives()?;
    let file = target(&node)?;
    let beside = options.version == Version::V2 && placement != "main";
    ensure!(
        file.ends_with("60-kata-manager.toml") == beside,
        "the handlers are in {file:?}"
    );
    if beside && imports {
        ensure!(
            Stamped::of(&node.containerd.config())? == original,
            "the main file was written"
        );
    }
    let again = node.km.expect(&["apply"], 0)?;
    ensure!(again.stdout.starts_with("Nothing to do"), "{again}");
    let shown = node.km.expect(&["containerd", "show"], 0)?;
    for part in [DEMO, "yes", "kata-manager", &file.display().to_string()] {
        ensure!(shown.stdout.contains(part), "no {part} in {shown}");
    }

    // Somebody edits our table.
    let whole = fs::read_to_string(&file)?;
    let edited = whole.replacen("[\"io.katacontainers.*\"", "[\"example.com/*\"", 1);
    ensure!(edited != whole, "nothing to edit in\n{whole}");
    fs::write(&file, &edited)?;
    for words in [
        &["plan"][..],
        &["status"],
        &["containerd", "diff"],
        &["containerd", "show"],
    ] {
        let told = node.km.expect(words, 0)?;
        ensure!(
            told.stdout.contains("example.com/*"),
            "{words:?} does not tell: {told}"
        );
    }
    node.km.expect(&["apply", "--keep-drift"], 0)?;
    ensure!(
        fs::read_to_string(&file)? == edited,
        "--keep-drift changed the file"
    );
    let config = node.containerd.cri().config()?;
    let kept = config["containerd"]["runtimes"][DEMO]["PodAnnotations"].to_string();
    ensure!(
        kept.contains("example.com"),
        "kept and not in force: {kept}"
    );
    node.apply(&[DEMO])?;
    ensure!(fs::read_to_string(&file)? == whole, "it was not put right");
    survives()?;

    node.km.expect(&["containerd", "restore"], 0)?;
    ensure!(node.containerd.cri().handlers()? == ["runc"]);
    ensure!(fs::read(node.containerd.config())? == original.bytes);
    node.apply(&[DEMO])?;
    node.uninstall(&original.bytes, &["runc"])?;
    survives()
}

fn a_drop_in_is_refused_on_1_x(sandbox: &Sandbox) -> Result<()> {
    let node = node(sandbox, &Options::new(Version::V1_7), "dropIn", true)?;
    node.refuses(&["apply"], 3, &["dropIn", "switch off every handler"])?;
    Ok(())
}

fn handlers_move_between_files(sandbox: &Sandbox) -> Result<()> {
    let node = node(sandbox, &Options::new(Version::V2), "main", false)?;
    let original = fs::read(node.containerd.config())?;
    node.apply(&[DEMO])?;
    ensure!(target(&node)?.ends_with("config.toml"));
    node.reconfigure("placement: main", "placement: dropIn")?;
    node.apply(&[DEMO])?;
    ensure!(target(&node)?.ends_with("60-kata-manager.toml"));
    node.demo_runs()?;
    node.reconfigure("placement: dropIn", "placement: main")?;
    node.apply(&[DEMO])?;
    ensure!(target(&node)?.ends_with("config.toml"));
    node.uninstall(&original, &["runc"])?;
    Ok(())
}

/// Has the next restart meet a file of somebody else's in `conf.d`, and the one after that none.
fn sabotage(node: &Node, text: &str) -> Result<()> {
    let dir = node.containerd.dir();
    let bad = dir.join("bad.toml");
    fs::write(&bad, text)?;
    let script = dir.join("sabotaged-restart");
    let [conf, mark, control] =
        ["etc/conf.d/99-bad.toml", "sabotaged", "control"].map(|name| dir.join(name));
    let lines = format!(
        "#!/bin/sh\nset -e\nif [ -e {mark} ]; then rm -f {conf}; else touch {mark}; cp {bad} {conf}; fi\nexec {control} restart\n",
        mark = mark.display(),
        conf = conf.display(),
        bad = bad.display(),
        control = control.display()
    );
    fs::write(&script, lines)?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
    let old = format!("command: {:?}", node.containerd.restart_command());
    let new = format!("command: [{:?}]", script.display().to_string());
    node.reconfigure(&old, &new)?;
    node.reconfigure("readyTimeoutSeconds: 20", "readyTimeoutSeconds: 4")
}

/// containerd does not start, only its CRI plugin does not load, or it comes up without the handler: each is rolled back, and
/// the pod from before runs on.
fn failed_restarts(sandbox: &Sandbox, version: Version) -> Result<()> {
    let node = Node::start(sandbox, &Options::new(version))?;
    let original = fs::read(node.containerd.config())?;
    let good = fs::read_to_string(&node.config)?;
    let pod = node
        .containerd
        .cri()
        .run_pod("runc", images::BUSYBOX, &["/bin/sleep", "1000"])?;
    let plugin = match version {
        Version::V2 => "io.containerd.cri.v1.runtime",
        Version::V1_6 | Version::V1_7 => "io.containerd.grpc.v1.cri",
    };
    let number = if version == Version::V2 { 3 } else { 2 };
    let no_default = format!(
        "version = {number}\n[plugins.\"{plugin}\".containerd]\ndefault_runtime_name = \"none\"\n"
    );
    // 1.x takes this table in place of the main file's: the handler is gone. 2.x merges, and keeps it with another type.
    let without = format!(
        "version = {number}\n[plugins.\"{plugin}\".containerd]\ndefault_runtime_name = \"runc\"\n\
         [plugins.\"{plugin}\".containerd.runtimes.runc]\nruntime_type = \"io.containerd.runc.v2\"\n{}",
        if version == Version::V2 {
            format!(
                "[plugins.\"{plugin}\".containerd.runtimes.{DEMO}]\nruntime_type = \"io.containerd.other.v2\"\n"
            )
        } else {
            String::new()
        }
    );
    for bad in ["[plugins\n", &no_default, &without] {
        let mark = node.containerd.dir().join("sabotaged");
        if mark.exists() {
            fs::remove_file(&mark)?;
        }
        sabotage(&node, bad)?;
        let failed = node.km.expect(&["apply"], 8)?;
        ensure!(failed.stderr.contains("was restored"), "{bad}: {failed}");
        ensure!(
            fs::read(node.containerd.config())? == original,
            "{bad}: {failed}"
        );
        node.is_clean_of_handlers()?;
        ensure!(
            node.containerd.cri().handlers()? == ["runc"],
            "{bad}: {failed}"
        );
        let said = node
            .containerd
            .cri()
            .exec(&pod.container, &["/bin/echo", "alive"])?;
        ensure!(
            said.stdout == "alive\n",
            "{bad}: the pod from before says {said:?}"
        );
        fs::write(&node.config, &good)?;
    }
    node.apply(&[DEMO])?;
    node.uninstall(&original, &["runc"])?;
    Ok(())
}

/// 1.x: a drop-in of somebody else's that has the CRI plugin's table makes the main file's ineffective.
fn a_replaced_main_table_is_refused(sandbox: &Sandbox) -> Result<()> {
    let node = Node::start(sandbox, &Options::new(Version::V1_7))?;
    let config = fs::read_to_string(node.containerd.config())?;
    let lines = config.lines().filter(|line| !line.starts_with("imports"));
    let drop_in = node.containerd.dir().join("etc/conf.d/50-all.toml");
    fs::write(
        &drop_in,
        lines.map(|line| format!("{line}\n")).collect::<String>(),
    )?;
    node.containerd.restart()?;
    let name = drop_in.display().to_string();
    node.refuses(&["plan"], 3, &[&name, "in place of"])?;
    let shown = node.km.expect(&["containerd", "show"], 0)?;
    ensure!(
        shown.stdout.contains("in place of the main file's"),
        "{shown}"
    );
    fs::remove_file(&drop_in)?;
    node.containerd.restart()?;
    node.apply(&[DEMO])?;
    node.uninstall(config.as_bytes(), &["runc"])?;
    Ok(())
}

fn an_import_that_is_not_there(sandbox: &Sandbox) -> Result<()> {
    let node = Node::start(sandbox, &Options::new(Version::V2))?;
    let path = node.containerd.config();
    let good = fs::read_to_string(&path)?;
    fs::write(
        &path,
        good.replacen("imports = [", "imports = [\"/nowhere/x.toml\", ", 1),
    )?;
    node.refuses(&["apply"], 3, &["/nowhere/x.toml", "imports"])?;
    let shown = node.km.expect(&["containerd", "show"], 0)?;
    ensure!(shown.stdout.contains("MISSING /nowhere/x.toml"), "{shown}");
    fs::write(&path, good)?;
    Ok(())
}

/// The main file and the drop-in: after a kill anywhere, the next run converges, and nothing stays at the end.
fn a_drop_in_is_killed(sandbox: &Sandbox) -> Result<()> {
    const WORDS: [&str; 4] = ["conf.d", "config.toml", "journal", "containerd-"];
    let node = node(sandbox, &Options::new(Version::V2), "auto", false)?;
    let original = fs::read(node.containerd.config())?;
    for (command, first) in [("apply", false), ("containerd restore", true)] {
        let words: Vec<&str> = command.split(' ').collect();
        if first {
            node.apply(&[DEMO])?;
        }
        let (finished, changes) = node.km.traced(sandbox, &words)?;
        finished.success()?;
        node.km.expect(&["uninstall"], 0)?;
        let important =
            (1..=changes.len()).filter(|n| WORDS.iter().any(|word| changes[n - 1].contains(word)));
        let mut kills = 0;
        for n in important.step_by(2) {
            if first {
                node.apply(&[DEMO])?;
            }
            let killed = node.km.killed_after(sandbox, &words, n)?;
            kills += usize::from(killed);
            node.containerd.wait_up()?;
            node.apply(&[DEMO])
                .with_context(|| format!("after {command} was killed after {}", changes[n - 1]))?;
            ensure!(target(&node)?.ends_with("60-kata-manager.toml"));
            node.uninstall_after_a_kill(&original)?;
        }
        ensure!(
            kills > 3,
            "{command} was killed {kills} times only: {changes:?}"
        );
    }
    Ok(())
}

fn a_full_or_read_only_folder(sandbox: &Sandbox) -> Result<()> {
    let node = Node::start(sandbox, &Options::new(Version::V2))?;
    let original = fs::read(node.containerd.config())?;
    let folder = node.containerd.dir().join("etc/conf.d");
    let name = folder.display().to_string();
    let guard = sandbox.read_only(&folder)?;
    node.refuses(&["apply"], 7, &[&name, "ead-only"])?;
    drop(guard);

    let disk = sandbox.small_disk("full-etc", 1)?;
    fs::remove_dir(&folder)?;
    std::os::unix::fs::symlink(&disk, &folder)?;
    // It ends when the disk is full, which is what it is for.
    drop(fs::write(disk.join("filler"), vec![0; 4 << 20]));
    let failed = node.km.expect(&["apply"], 7)?;
    ensure!(failed.stderr.contains("space"), "{failed}");
    ensure!(node.containerd.restarts()? == 0, "containerd was restarted");
    fs::remove_file(disk.join("filler"))?;
    node.apply(&[DEMO])?;
    ensure!(
        disk.join("60-kata-manager.toml").is_file(),
        "the link was not followed"
    );
    node.uninstall(&original, &["runc"])?;
    ensure!(folder.is_symlink(), "the link is gone");
    Ok(())
}

/// Owners and modes stay; an absent and an empty file come back so.
fn odd_files(sandbox: &Sandbox) -> Result<()> {
    let node = node(sandbox, &Options::new(Version::V2), "auto", false)?;
    let path = node.containerd.config();
    let original = fs::read(&path)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640))?;
    std::os::unix::fs::chown(&path, Some(12), Some(34))?;
    let attributes = || -> Result<(u32, u32, u32)> {
        let meta = fs::metadata(&path)?;
        Ok((meta.mode() & 0o7777, meta.uid(), meta.gid()))
    };
    let before = attributes()?;
    node.apply(&[DEMO])?;
    ensure!(
        attributes()? == before,
        "owner and mode are {:?}",
        attributes()?
    );
    node.uninstall(&original, &["runc"])?;
    ensure!(
        attributes()? == before,
        "owner and mode are {:?}",
        attributes()?
    );

    // Files that this containerd does not read: it is not restarted.
    node.reconfigure("mode: command", "mode: none")?;
    let other = sandbox.folder("odd")?.join("etc/containerd/config.toml");
    let (from, to) = (path.display().to_string(), other.display().to_string());
    for placement in ["auto", "dropIn"] {
        for text in [None, Some(""), Some("# nothing\r\n")] {
            if let Some(text) = text {
                fs::create_dir_all(other.parent().context("its folder")?)?;
                fs::write(&other, text)?;
            }
            let good = fs::read_to_string(&node.config)?;
            node.reconfigure(&format!("config: {from}"), &format!("config: {to}"))?;
            node.reconfigure("placement: auto", &format!("placement: {placement}"))?;
            node.km.expect(&["apply"], 0)?;
            let main = fs::read_to_string(&other)?;
            ensure!(main.contains("version = 3"), "{main}");
            let beside = other.with_file_name("conf.d").join("60-kata-manager.toml");
            ensure!(
                beside.exists() == (placement == "dropIn"),
                "{placement}: {main}"
            );
            node.km.expect(&["uninstall"], 0)?;
            ensure!(
                fs::read_to_string(&other).ok().as_deref() == text,
                "{text:?} is not back"
            );
            let folder = other.parent().context("its folder")?;
            ensure!(
                folder.exists() == text.is_some(),
                "a folder of ours is left, or theirs is gone"
            );
            fs::write(&node.config, good)?;
            if folder.exists() {
                fs::remove_dir_all(folder)?;
            }
        }
    }
    Ok(())
}

/// k3s writes its file anew at each start: the restart command does so here, as `k3s` does.
fn a_rendered_configuration(sandbox: &Sandbox) -> Result<()> {
    for folder_is_imported in [false, true] {
        let node = Node::start(sandbox, &Options::new(Version::V2))?;
        let config = node.containerd.config();
        let etc = config.parent().context("its folder")?.to_owned();
        let mut base = format!(
            "# File generated by k3s. DO NOT EDIT. Use config.toml.tmpl instead.\n{}",
            fs::read_to_string(&config)?
        );
        if !folder_is_imported {
            let lines = base.lines().filter(|line| !line.starts_with("imports"));
            base = lines.map(|line| format!("{line}\n")).collect();
        }
        fs::write(etc.join("base"), &base)?;
        let script = node.containerd.dir().join("render-and-restart");
        let lines = format!(
            "#!/bin/sh\nset -e\ncd {etc}\nt=config-v3.toml.tmpl\n\
             if [ -e $t ]; then {{ cat base; grep -v 'template \"base\"' $t; }} > config.toml; else cp base config.toml; fi\n\
             exec {control} restart\n",
            etc = etc.display(),
            control = node.containerd.dir().join("control").display()
        );
        fs::write(&script, lines)?;
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
        let old = format!("command: {:?}", node.containerd.restart_command());
        node.reconfigure(
            &old,
            &format!("command: [{:?}]", script.display().to_string()),
        )?;
        fs::write(&config, &base)?;

        node.reconfigure("containerd:\n", "containerd:\n  flavor: stock\n")?;
        node.refuses(&["plan"], 3, &["k3s", "template"])?;
        node.reconfigure("flavor: stock", "flavor: auto")?;
        node.apply(&[DEMO])?;
        let template = etc.join("config-v3.toml.tmpl");
        let drop_in = etc.join("conf.d/60-kata-manager.toml");
        ensure!(template.exists() != folder_is_imported && drop_in.exists() == folder_is_imported);
        node.demo_runs()?;
        let again = node.km.expect(&["apply"], 0)?;
        ensure!(again.stdout.starts_with("Nothing to do"), "{again}");
        let shown = node.km.expect(&["containerd", "show"], 0)?;
        ensure!(shown.stdout.contains("(k3s)"), "{shown}");
        node.km.expect(&["uninstall"], 0)?;
        ensure!(
            fs::read_to_string(&config)? == base,
            "the rendered file is not as before"
        );
        ensure!(!template.exists() && !drop_in.exists());
        ensure!(node.containerd.cri().handlers()? == ["runc"]);
    }
    Ok(())
}

fn unsupported_distributions(sandbox: &Sandbox) -> Result<()> {
    let node = Node::start(sandbox, &Options::new(Version::V1_7))?;
    let socket = node.containerd.socket().display().to_string();
    for (path, name) in [
        ("/run/crio/crio.sock", "CRI-O"),
        ("/run/k0s/containerd.sock", "k0s"),
        ("/var/snap/microk8s/common/run/containerd.sock", "MicroK8s"),
    ] {
        node.reconfigure(&format!("socket: {socket}"), &format!("socket: {path}"))?;
        for words in [&["plan"][..], &["apply"], &["containerd", "show"]] {
            node.refuses(words, 3, &[name, "does not support yet"])?;
        }
        node.reconfigure(&format!("socket: {path}"), &format!("socket: {socket}"))?;
    }
    Ok(())
}

/// containerd 1.7 injects no CDI devices unless told to; a value that somebody set stays.
fn cdi_is_switched_on_where_nobody_said(sandbox: &Sandbox) -> Result<()> {
    let node = Node::start(sandbox, &Options::new(Version::V1_7))?;
    let original = fs::read_to_string(node.containerd.config())?;
    node.reconfigure(
        "containerd:\n",
        "containerd:\n  enableCdi: true\n  cdiSpecDirs: [/etc/cdi, /var/run/cdi]\n",
    )?;
    node.apply(&[DEMO])?;
    let config = node.containerd.cri().config()?;
    ensure!(config["enableCDI"] == true, "{}", config["enableCDI"]);
    let again = node.km.expect(&["apply"], 0)?;
    ensure!(again.stdout.starts_with("Nothing to do"), "{again}");
    node.uninstall(original.as_bytes(), &["runc"])?;

    let theirs = original.replacen(
        "  disable_apparmor",
        "  enable_cdi = false\n  disable_apparmor",
        1,
    );
    ensure!(theirs != original, "no place for a setting in\n{original}");
    fs::write(node.containerd.config(), &theirs)?;
    node.apply(&[DEMO])?;
    let config = node.containerd.cri().config()?;
    ensure!(config["enableCDI"] == false, "the user's own value is gone");
    node.uninstall(theirs.as_bytes(), &["runc"])?;
    Ok(())
}

/// What a class sets of its handler is what containerd has in force, and pods run with it; without it, the class's own is back.
fn handler_settings(sandbox: &Sandbox, version: Version) -> Result<()> {
    let node = Node::start(sandbox, &Options::new(version))?;
    let original = fs::read(node.containerd.config())?;
    let kind = "  runtimeType: io.containerd.runc.v2\n";
    let settings = "  handlerSettings:\n    privilegedWithoutHostDevices: true\n    \
                    podAnnotations: [\"example.com/*\"]\n    containerAnnotations: [\"example.com/c\"]\n";
    node.reconfigure(kind, &format!("{kind}{settings}"))?;
    node.apply(&[DEMO])?;
    let in_force = || -> Result<serde_json::Value> {
        let config = node.containerd.cri().config()?;
        Ok(config["containerd"]["runtimes"][DEMO].clone())
    };
    let has = |list: &serde_json::Value, wanted: &str| {
        list.as_array()
            .is_some_and(|list| list.iter().any(|item| item == wanted))
    };
    let found = in_force()?;
    ensure!(
        found["privileged_without_host_devices"] == true
            && has(&found["PodAnnotations"], "example.com/*")
            && has(&found["ContainerAnnotations"], "example.com/c"),
        "{found:#}"
    );
    node.demo_runs()?;
    let again = node.km.expect(&["apply"], 0)?;
    ensure!(again.stdout.starts_with("Nothing to do"), "{again}");

    node.reconfigure(settings, "")?;
    node.apply(&[DEMO])?;
    let found = in_force()?;
    ensure!(
        found["privileged_without_host_devices"] != true
            && !has(&found["PodAnnotations"], "example.com/*"),
        "{found:#}"
    );
    node.uninstall(&original, &["runc"])?;
    Ok(())
}
