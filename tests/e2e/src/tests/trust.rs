//! Signatures that Debian's cosign makes, in both forms, against a registry without the referrers API; and what is live,
//! hashed again.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use km_tests_e2e::containerd::{Options, Version};
use km_tests_e2e::process::{self, Finished};
use km_tests_e2e::proxy::Fault;
use km_tests_e2e::sandbox::Sandbox;
use km_tests_e2e::suite::Test;
use serde_json::Value;

use super::node::{Class, DEMO, Node, SMALL};

pub(crate) const TESTS: &[Test] = &[
    (
        "only_the_right_signature_counts",
        only_the_right_signature_counts,
    ),
    (
        "a_policy_is_tightened_and_keys_change",
        a_policy_is_tightened_and_keys_change,
    ),
    (
        "signatures_travel_without_a_network",
        signatures_travel_without_a_network,
    ),
    (
        "signatures_are_asked_for_once",
        signatures_are_asked_for_once,
    ),
    ("the_referrers_api_is_read", the_referrers_api_is_read),
    ("keys_that_cannot_be_used", keys_that_cannot_be_used),
    ("a_changed_file_is_found", a_changed_file_is_found),
];

/// How cosign writes a signature.
#[derive(Clone, Copy)]
enum Form {
    Bundle,
    SimpleSigning,
}

/// A folder with key pairs, and cosign.
struct Signing<'a> {
    sandbox: &'a Sandbox,
    folder: PathBuf,
}

impl<'a> Signing<'a> {
    fn new(sandbox: &'a Sandbox, keys: &[&str]) -> Result<Self> {
        let signing = Self {
            sandbox,
            folder: sandbox.folder("signing")?,
        };
        for key in keys {
            signing.cosign(&["generate-key-pair", "--output-key-prefix", key])?;
        }
        Ok(signing)
    }

    fn public(&self, key: &str) -> PathBuf {
        self.folder.join(format!("{key}.pub"))
    }

    fn cosign(&self, words: &[&str]) -> Result<Finished> {
        let mut command = Command::new(self.sandbox.parts().cosign());
        command
            .args(words)
            .current_dir(&self.folder)
            .env("HOME", &self.folder)
            .env("COSIGN_PASSWORD", "");
        process::run(&mut command, Duration::from_secs(60))?.success()
    }

    fn sign(&self, key: &str, form: Form, reference: &str) -> Result<()> {
        let key = format!("{key}.key");
        let form = match form {
            Form::Bundle => "--new-bundle-format=true",
            Form::SimpleSigning => "--new-bundle-format=false",
        };
        self.cosign(&[
            "sign",
            "--key",
            &key,
            "--use-signing-config=false",
            "--tlog-upload=false",
            "--allow-http-registry",
            "-y",
            form,
            reference,
        ])?;
        Ok(())
    }
}

fn demo_node(sandbox: &Sandbox) -> Result<Node> {
    Node::start(sandbox, &Options::new(Version::V1_7))
}

/// Configures [`DEMO`] with a policy.
fn demand(node: &Node, tag: &str, keys: &[&Path]) -> Result<()> {
    let verify = if keys.is_empty() {
        String::new()
    } else {
        format!("verify: {{policy: key, keys: {keys:?}}}\n")
    };
    node.configure_with(&[Class::runc(DEMO, node.proxy.reference(tag))], &verify)
}

fn oras(sandbox: &Sandbox, words: &[&str]) -> Result<String> {
    let mut command = Command::new(sandbox.parts().oras());
    command.args(words);
    let finished = process::run(&mut command, Duration::from_secs(30))?.success()?;
    Ok(finished.stdout.trim().to_owned())
}

/// `registry/repository@digest` of a tag.
fn pinned(sandbox: &Sandbox, node: &Node, tag: &str) -> Result<(String, String)> {
    let reference = node.registry.reference(tag);
    let digest = oras(sandbox, &["resolve", "--plain-http", &reference])?;
    let (repository, _) = reference.rsplit_once(':').context("a tag")?;
    Ok((repository.to_owned(), digest))
}

fn generation(node: &Node) -> Result<Value> {
    let path = node.artifacts.join(DEMO).join(".generation.json");
    Ok(serde_json::from_slice(&fs::read(path)?)?)
}

/// A blob that no policy let in must not be fetched.
fn fetched_blobs(node: &Node) -> usize {
    let requests = node.proxy.take_requests();
    let vmlinuz = km_tests_e2e::images::sha256(b"a kernel");
    requests
        .iter()
        .filter(|request| request.path.contains(&vmlinuz))
        .count()
}

/// With the API a signature has no fallback tag, and is found; without the API it is found by that tag alone.
fn the_referrers_api_is_read(sandbox: &Sandbox) -> Result<()> {
    let node = demo_node(sandbox)?;
    let signing = Signing::new(sandbox, &["ours"])?;
    let (_, digest) = pinned(sandbox, &node, SMALL)?;
    let signed = format!("{}@{digest}", node.proxy.reference("kata/small"));
    let tag = digest.replace(':', "-");
    let asked = |what: &str| {
        let requests = node.proxy.take_requests();
        requests
            .iter()
            .filter(|request| request.path.contains(what))
            .count()
    };
    demand(&node, SMALL, &[&signing.public("ours")])?;

    node.proxy.serve_referrers(Some(node.registry.storage()));
    signing.sign("ours", Form::Bundle, &signed)?;
    let fallback = node.registry.reference(&format!("kata/small:{tag}"));
    ensure!(
        oras(sandbox, &["resolve", "--plain-http", &fallback]).is_err(),
        "cosign wrote the fallback tag: it does not take this for the referrers API"
    );
    asked("");
    node.apply(&[DEMO])?;
    let requests = node.proxy.take_requests();
    let about = |what: &str| {
        requests
            .iter()
            .filter(|one| one.path.contains(what))
            .count()
    };
    ensure!(about("/referrers/") > 0, "the API was not asked");
    ensure!(
        about(&tag) == 0,
        "a registry with the API was asked for the tag"
    );
    let form = &generation(&node)?["signers"][0]["form"];
    ensure!(form == "bundle", "signed as {form}");
    node.km.expect(&["uninstall"], 0)?;

    node.proxy.serve_referrers(None);
    node.refuses(&["apply"], 6, &["is not signed"])?;
    signing.sign("ours", Form::Bundle, &signed)?;
    oras(sandbox, &["resolve", "--plain-http", &fallback])?;
    asked("");
    node.apply(&[DEMO])?;
    ensure!(asked(&tag) > 0, "the fallback tag was not asked for");
    Ok(())
}

/// What is kept is verified each time; a registry is asked when that does not do.
fn signatures_are_asked_for_once(sandbox: &Sandbox) -> Result<()> {
    let node = demo_node(sandbox)?;
    let signing = Signing::new(sandbox, &["ours", "theirs"])?;
    let (repository, digest) = pinned(sandbox, &node, SMALL)?;
    signing.sign("ours", Form::Bundle, &format!("{repository}@{digest}"))?;
    demand(&node, SMALL, &[&signing.public("ours")])?;
    let reference = node.proxy.reference(SMALL);
    let to = sandbox.folder("to")?.display().to_string();
    let pull = ["artifacts", "pull", &reference];
    let elsewhere = ["artifacts", "pull", &reference, "--to", &to];
    let asked = |words: &[&str]| -> Result<Vec<String>> {
        node.proxy.take_requests();
        node.km.expect(words, 0)?;
        let requests = node.proxy.take_requests().into_iter();
        Ok(requests.map(|request| request.path).collect())
    };
    let manifest = "/v2/kata/small/manifests/v1";
    let signature = digest.replace(':', "-");
    for (words, signed_before) in [(&["apply"][..], false), (&pull, true), (&elsewhere, false)] {
        let first = asked(words)?;
        let looked = first.iter().any(|path| path.contains(&signature));
        ensure!(looked != signed_before, "{words:?} asked for {first:?}");
        let again = asked(words)?;
        ensure!(again == [manifest], "{words:?} asked again for {again:?}");
    }

    // A new generation of the same artifact.
    let prefix = node.prefix.display().to_string();
    node.reconfigure(&prefix, "/elsewhere")?;
    let again = asked(&["apply"])?;
    ensure!(again == [manifest], "it asked for {again:?}");
    let made = generation(&node)?;
    ensure!(
        made["number"] == 2 && made["signers"][0]["signed"] == digest,
        "{made}"
    );

    // A kept signature that is damaged is none.
    let kept = made["signers"][0]["manifest"]
        .as_str()
        .context("a digest")?;
    let kept = node
        .artifacts
        .join(".store/oci/blobs")
        .join(kept.replace(':', "/"));
    fs::set_permissions(&kept, fs::Permissions::from_mode(0o644))?;
    fs::write(&kept, "{}")?;
    let mended = asked(&pull)?;
    ensure!(
        mended.iter().any(|path| path.contains(&signature)),
        "{mended:?}"
    );
    ensure!(asked(&pull)? == [manifest], "it was not mended");

    demand(&node, SMALL, &[&signing.public("theirs")])?;
    for words in [&["apply"][..], &pull, &elsewhere] {
        node.proxy.take_requests();
        node.refuses(words, 6, &["none of the trusted keys made it"])?;
        let requests = node.proxy.take_requests();
        ensure!(
            requests.iter().any(|one| one.path.contains(&signature)),
            "{words:?} with another key asked for {requests:?}"
        );
    }
    node.store_is_whole()
}

fn signatures_travel_without_a_network(sandbox: &Sandbox) -> Result<()> {
    let node = demo_node(sandbox)?;
    let signing = Signing::new(sandbox, &["ours", "theirs"])?;
    let (repository, digest) = pinned(sandbox, &node, SMALL)?;
    let reference = format!("{repository}@{digest}");
    for form in [Form::Bundle, Form::SimpleSigning] {
        signing.sign("ours", form, &reference)?;
        demand(&node, SMALL, &[&signing.public("ours")])?;
        node.apply(&[DEMO])?;
        let listed = node
            .km
            .expect(&["artifacts", "list", "--output", "json"], 0)?;
        let listed: Value = serde_json::from_str(&listed.stdout)?;
        let signers = listed["generations"][0]["signers"].as_array();
        ensure!(
            signers.is_some_and(|signers| signers.len() == 1),
            "{listed}"
        );
        let file = sandbox.folder("carried")?.join("guest.tar");
        let file = file.display().to_string();
        node.km.expect(&["artifacts", "export", &file], 0)?;
        node.km.expect(&["uninstall"], 0)?;
        node.proxy.rule("/", Fault::Status(403), u32::MAX);
        node.km.expect(&["artifacts", "import", &file], 0)?;
        demand(&node, SMALL, &[&signing.public("theirs")])?;
        node.refuses(&["apply"], 6, &["none of the trusted keys made it"])?;
        demand(&node, SMALL, &[&signing.public("ours")])?;
        node.apply(&[DEMO])?;
        node.km.expect(&["artifacts", "verify"], 0)?;
        node.km.expect(&["uninstall"], 0)?;
        node.proxy.clear();
    }
    Ok(())
}

fn only_the_right_signature_counts(sandbox: &Sandbox) -> Result<()> {
    let node = demo_node(sandbox)?;
    let signing = Signing::new(sandbox, &["ours", "theirs"])?;
    let ours = signing.public("ours");
    demand(&node, SMALL, &[&ours])?;
    let (repository, digest) = pinned(sandbox, &node, SMALL)?;
    let reference = format!("{repository}@{digest}");

    node.proxy.take_requests();
    let hint = format!(
        "cosign sign --key cosign.key --use-signing-config=false --tlog-upload=false {}",
        node.proxy.reference("kata/small")
    );
    let hint = format!("{hint}@{digest}");
    node.refuses(&["apply"], 6, &["is not signed", &hint])?;

    signing.sign("theirs", Form::Bundle, &reference)?;
    signing.sign("theirs", Form::SimpleSigning, &reference)?;
    let refused = node.refuses(
        &["apply"],
        6,
        &["none of the trusted keys made it", "Trusted keys: sha256:"],
    )?;
    let times = refused
        .stderr
        .matches("none of the trusted keys made it")
        .count();
    ensure!(times == 2, "{times} signatures are mentioned: {refused}");

    // A right signature of another artifact, moved here.
    let other = sandbox.folder("other")?;
    fs::write(other.join("vmlinuz"), "another kernel")?;
    node.push(&other, "kata/small:other")?;
    let (_, another) = pinned(sandbox, &node, "kata/small:other")?;
    signing.sign(
        "ours",
        Form::SimpleSigning,
        &format!("{repository}@{another}"),
    )?;
    let tag = |digest: &str| format!("{repository}:{}.sig", digest.replace(':', "-"));
    oras(
        sandbox,
        &[
            "cp",
            "--from-plain-http",
            "--to-plain-http",
            &tag(&another),
            &tag(&digest),
        ],
    )?;
    node.refuses(
        &["apply"],
        6,
        &[&format!("it is for {another}, another artifact")],
    )?;
    ensure!(
        fetched_blobs(&node) == 0,
        "content was fetched before it was trusted"
    );
    ensure!(!node.artifacts.join(DEMO).exists());
    node.refuses(
        &["artifacts", "pull", &node.proxy.reference(SMALL)],
        6,
        &["another artifact"],
    )?;

    signing.sign("ours", Form::Bundle, &reference)?;
    node.apply(&[DEMO])?;
    let signers = &generation(&node)?["signers"];
    ensure!(
        signers[0]["form"] == "bundle" && signers[0]["signed"] == digest,
        "{signers}"
    );
    let again = node.km.expect(&["plan", "--exit-code"], 0)?;
    ensure!(again.stdout.contains("Nothing to do"), "{again}");
    node.store_is_whole()
}

fn a_policy_is_tightened_and_keys_change(sandbox: &Sandbox) -> Result<()> {
    let node = demo_node(sandbox)?;
    let original = fs::read(node.containerd.config())?;
    node.apply(&[DEMO])?;
    let signing = Signing::new(sandbox, &["first", "second"])?;
    let (first, second) = (signing.public("first"), signing.public("second"));
    let (repository, digest) = pinned(sandbox, &node, SMALL)?;
    let reference = format!("{repository}@{digest}");

    demand(&node, SMALL, &[&first])?;
    for command in ["plan", "apply"] {
        node.refuses(&[command], 6, &["is not signed", "generation 1 stays live"])?;
    }
    node.refuses(&["artifacts", "verify"], 6, &[DEMO])?;

    signing.sign("first", Form::SimpleSigning, &reference)?;
    signing.sign("second", Form::Bundle, &reference)?;
    let plan = node.km.expect(&["plan"], 0)?;
    ensure!(
        plan.stdout.contains("generation 2 of demo")
            && plan.stdout.contains("signed by key sha256:"),
        "{plan}"
    );
    node.apply(&[DEMO])?;
    let signers = &generation(&node)?["signers"];
    ensure!(signers[0]["form"] == "simpleSigning", "{signers}");
    let key = signers[0]["key"].as_str().context("a key's id")?.to_owned();

    // From here on the signature is the store's: no registry is needed to check it again.
    let stopped = node.proxy.take_requests();
    drop(stopped);
    let verified = node.km.expect(&["artifacts", "verify", DEMO], 0)?;
    ensure!(verified.stdout.contains(&key), "{verified}");
    ensure!(
        node.proxy.take_requests().is_empty(),
        "the registry was asked"
    );

    demand(&node, SMALL, &[&second])?;
    node.refuses(&["artifacts", "verify"], 6, &[DEMO])?;
    let plan = node.km.expect(&["plan", "--exit-code"], 2)?;
    ensure!(
        plan.stdout
            .contains("is signed by none of the keys that are trusted now"),
        "{plan}"
    );
    node.apply(&[DEMO])?;
    ensure!(generation(&node)?["signers"][0]["form"] == "bundle");
    demand(&node, SMALL, &[&second, &first])?;
    node.km.expect(&["plan", "--exit-code"], 0)?;
    demand(&node, SMALL, &[])?;
    node.km.expect(&["plan", "--exit-code"], 0)?;
    node.store_is_whole()?;
    node.uninstall(&original, &["runc"])?;
    Ok(())
}

fn keys_that_cannot_be_used(sandbox: &Sandbox) -> Result<()> {
    let node = demo_node(sandbox)?;
    let signing = Signing::new(sandbox, &["pair"])?;
    let absent = signing.folder.join("absent.pub");
    let private = signing.folder.join("pair.key");
    let text = signing.folder.join("text");
    fs::write(&text, "no key\n")?;
    for (path, why) in [
        (&absent, "No such file"),
        (&private, "private key"),
        (&text, "no \"PUBLIC KEY\""),
    ] {
        demand(&node, SMALL, &[path])?;
        let named = path.display().to_string();
        let text = fs::read_to_string(&node.config)?;
        let line = text.lines().position(|line| line.contains(&named));
        let line = format!("line {} of the configuration", line.context("a line")? + 1);
        for command in [&["plan"][..], &["config", "check"]] {
            node.refuses(command, 4, &[&named, &line, why])?;
        }
    }
    Ok(())
}

fn a_changed_file_is_found(sandbox: &Sandbox) -> Result<()> {
    let node = demo_node(sandbox)?;
    node.apply(&[DEMO])?;
    node.km.expect(&["artifacts", "verify"], 0)?;
    let path = fs::canonicalize(node.artifacts.join(DEMO).join("share/kata.img"))?;
    let meta = fs::metadata(&path)?;
    let modified = meta.modified()?;
    let mut bytes = fs::read(&path)?;
    let wanted = km_tests_e2e::images::sha256(&bytes);
    bytes[150_000] ^= 1;
    let found = km_tests_e2e::images::sha256(&bytes);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644))?;
    fs::write(&path, &bytes)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o444))?;
    // As a disk that loses a bit would leave it: nothing but the content tells.
    fs::File::open(&path)?.set_modified(modified)?;
    let plan = node.km.expect(&["plan", "--exit-code"], 0)?;
    ensure!(plan.stdout.contains("Nothing to do"), "{plan}");
    let refused = node.refuses(&["artifacts", "verify"], 6, &[DEMO])?;
    for part in [&path.display().to_string(), &wanted, &found] {
        ensure!(
            refused.stdout.contains(part.as_str()),
            "no {part}: {refused}"
        );
    }
    let json = node
        .km
        .expect(&["artifacts", "verify", "--output", "json"], 6)?;
    let json: Value = serde_json::from_str(&json.stdout)?;
    let damage = &json["classes"][0]["damages"][0];
    ensure!(
        damage["wanted"] == wanted && damage["found"] == found,
        "{json}"
    );
    node.refuses(
        &["artifacts", "verify", "nobody"],
        4,
        &["nobody", "artifacts list"],
    )?;
    Ok(())
}
