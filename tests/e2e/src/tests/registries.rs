//! Registries as sites have them: private authorities, client certificates, credentials of all sorts, proxies, mirrors.
//!
//! Every command says as much as it can (`--log trace`), and no secret may be in it.

mod mirrors;

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use km_tests_e2e::forward::Forward;
use km_tests_e2e::images;
use km_tests_e2e::km::Km;
use km_tests_e2e::process::Finished;
use km_tests_e2e::proxy::{Fault, Proxy};
use km_tests_e2e::registry::{self, NAME, OUTSIDE, Registry, User};
use km_tests_e2e::sandbox::Sandbox;
use km_tests_e2e::suite::Test;
use serde_json::json;

pub(crate) const TESTS: &[Test] = &[
    ("a_private_authority_is_trusted", a_private_authority),
    ("a_certificate_of_ours_is_shown", a_certificate_of_ours),
    ("basic_and_token_over_tls", basic_and_token_over_tls),
    ("a_credential_helper_is_asked", a_credential_helper),
    ("a_secret_of_kubernetes", a_secret_of_kubernetes),
    ("tls_through_a_proxy", tls_through_a_proxy),
    ("plain_http_through_a_proxy", plain_http_through_a_proxy),
    (
        "a_mirror_serves_in_place_of_the_registry",
        mirrors::a_mirror_serves,
    ),
    (
        "what_a_mirror_cannot_give_comes_from_the_registry",
        mirrors::what_a_mirror_cannot_give,
    ),
    (
        "a_hosts_toml_that_is_broken",
        mirrors::a_hosts_toml_that_is_broken,
    ),
    (
        "a_redirect_takes_no_credentials_along",
        a_redirect_takes_no_credentials,
    ),
];

const ARTIFACT: &str = "kata/guest:v1";

/// Long enough to break off in the middle of.
fn content() -> Vec<u8> {
    (0..2_000_000_u32)
        .map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()[3])
        .collect()
}

fn user() -> User {
    User {
        name: "platform".to_owned(),
        password: "hush-hush-horse".to_owned(),
    }
}

/// kata-manager in a folder of its own.
struct Site<'a> {
    sandbox: &'a Sandbox,
    folder: PathBuf,
    km: Km,
}

impl<'a> Site<'a> {
    fn new(sandbox: &'a Sandbox) -> Result<Self> {
        let folder = sandbox.folder("site")?;
        let km = Km::find()?.config(&folder.join("config.yaml"));
        Ok(Self {
            sandbox,
            folder,
            km,
        })
    }

    /// The same with one more variable in the environment.
    fn with(&self, name: &str, value: &str) -> Self {
        Self {
            sandbox: self.sandbox,
            folder: self.folder.clone(),
            km: self.km.clone().env(name, value),
        }
    }

    /// Writes a file for the configuration to name.
    fn file(&self, name: &str, text: &str) -> Result<PathBuf> {
        let path = self.folder.join(name);
        fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
        Ok(path)
    }

    /// Runs a command with an empty store, and sees that it tells no secret.
    fn run(&self, words: &[&str], settings: &str, code: i32) -> Result<(PathBuf, Finished)> {
        let artifacts = self.sandbox.folder("artifacts")?;
        let text = format!(
            "artifactsDir: {}\nregistry: {{{settings}}}\n",
            artifacts.display()
        );
        self.file("config.yaml", &text)?;
        let words = [words, &["--log", "trace"]].concat();
        let finished = self.km.expect(&words, code)?;
        let basic = user().basic();
        let (_, encoded) = basic.split_once(' ').context("a scheme")?;
        for secret in [&user().password, encoded, "Bearer", "eyJ"] {
            ensure!(
                !finished.stdout.contains(secret) && !finished.stderr.contains(secret),
                "{secret:?} is told by {finished}"
            );
        }
        Ok((artifacts, finished))
    }

    /// Publishes [`content`] as [`ARTIFACT`].
    fn push(&self, host: &str, settings: &str) -> Result<()> {
        let folder = self.sandbox.folder("pushed")?;
        fs::write(folder.join("kata.img"), content())?;
        let folder = folder.display().to_string();
        let reference = format!("{host}/{ARTIFACT}");
        self.run(&["artifacts", "push", &folder, &reference], settings, 0)?;
        Ok(())
    }

    /// Pulls [`ARTIFACT`], and compares it with what was published.
    fn pulls(&self, host: &str, settings: &str) -> Result<Finished> {
        self.pulls_with(host, settings, &[])
    }

    fn pulls_with(&self, host: &str, settings: &str, more: &[&str]) -> Result<Finished> {
        let reference = format!("{host}/{ARTIFACT}");
        let words = [&["artifacts", "pull", &reference], more].concat();
        let (artifacts, finished) = self.run(&words, settings, 0)?;
        let content = content();
        let digest = images::sha256(&content);
        let hex = digest.trim_start_matches("sha256:");
        let file = artifacts.join(".store/oci/blobs/sha256").join(hex);
        let got = fs::read(&file).with_context(|| format!("read {}", file.display()))?;
        ensure!(got == content, "something else is there after {finished}");
        Ok(finished)
    }

    /// Fails to pull [`ARTIFACT`], and mentions these.
    fn fails(&self, host: &str, settings: &str, code: i32, mentions: &[&str]) -> Result<Finished> {
        let reference = format!("{host}/{ARTIFACT}");
        let (_, failed) = self.run(&["artifacts", "pull", &reference], settings, code)?;
        for mention in mentions {
            ensure!(
                failed.stderr.contains(mention),
                "the error does not mention {mention:?}; it {failed}"
            );
        }
        Ok(failed)
    }

    /// Writes a registry's `hosts.toml`, and gives the setting that names its folder.
    fn hosts(&self, name: &str, host: &str, text: &str) -> Result<String> {
        let folder = self.folder.join(name);
        write_hosts(&folder, host, text)?;
        Ok(format!("configPath: {}", folder.display()))
    }
}

fn write_hosts(certs_d: &Path, host: &str, text: &str) -> Result<()> {
    let folder = certs_d.join(host);
    fs::create_dir_all(&folder)?;
    fs::write(folder.join("hosts.toml"), text)?;
    Ok(())
}

fn docker_config(host: &str, user: &User) -> String {
    let basic = user.basic();
    let auth = basic.trim_start_matches("Basic ");
    json!({ "auths": { host: { "auth": auth } } }).to_string()
}

fn a_private_authority(sandbox: &Sandbox) -> Result<()> {
    let tls = registry::Options {
        tls: true,
        ..Default::default()
    };
    let registry = Registry::start(sandbox, tls)?;
    let (site, host) = (Site::new(sandbox)?, registry.host());
    let (https, ca) = (
        "https: [\"127.0.0.1\"]",
        registry.ca().display().to_string(),
    );
    let trusting = format!("{https}, caFile: {ca}");
    site.push(&host, &trusting)?;

    site.fails(&host, https, 5, &[&host, "private authority"])?;
    site.pulls(&host, &trusting)?;
    site.pulls_with(&host, https, &["--ca-file", &ca])?;
    site.with("KATA_MANAGER_CA_FILE", &ca).pulls(&host, https)?;
    site.with("SSL_CERT_FILE", &ca).pulls(&host, https)?;

    let named = format!("server = \"https://{host}\"\nca = {ca:?}\n");
    let named = site.hosts("named", &host, &named)?;
    site.pulls(&host, &named)?;
    // As docker keeps them: no hosts.toml, and files by their ending.
    let docker = site.folder.join("docker");
    fs::create_dir_all(docker.join(&host))?;
    fs::copy(&ca, docker.join(&host).join("ca.crt"))?;
    site.pulls(&host, &format!("{https}, configPath: {}", docker.display()))?;

    let absent = site.folder.join("absent.pem").display().to_string();
    site.fails(&host, &format!("{https}, caFile: {absent}"), 4, &[&absent])?;
    let text = site.file("text.pem", "no certificate\n")?;
    let text = format!("{https}, caFile: {}", text.display());
    site.fails(&host, &text, 4, &["no certificate"])?;
    Ok(())
}

fn a_certificate_of_ours(sandbox: &Sandbox) -> Result<()> {
    let asking = registry::Options {
        tls: true,
        client_certificate: true,
        ..Default::default()
    };
    let registry = Registry::start(sandbox, asking)?;
    let (site, host) = (Site::new(sandbox)?, registry.host());
    let (certificate, key) = registry.client();
    let (certificate, key) = (certificate.display(), key.display());
    let ca = registry.ca();
    let https = format!("https: [\"127.0.0.1\"], caFile: {}", ca.display());
    let ours = format!("{https}, clientCertificateFile: {certificate}, clientKeyFile: {key}");
    site.push(&host, &ours)?;

    site.fails(&host, &https, 5, &[&host, "certificate of ours"])?;
    site.pulls(&host, &ours)?;
    let named = format!(
        "server = \"https://{host}\"\nca = \"{}\"\nclient = [[\"{certificate}\", \"{key}\"]]\n",
        ca.display()
    );
    let named = site.hosts("named", &host, &named)?;
    site.pulls(&host, &named)?;

    let half = format!("{https}, clientCertificateFile: {certificate}");
    site.fails(&host, &half, 4, &["clientKeyFile"])?;
    let server = ca.with_file_name("server.key");
    let foreign = ours.replace(&key.to_string(), &server.display().to_string());
    site.fails(&host, &foreign, 4, &["client certificate"])?;
    Ok(())
}

fn basic_and_token_over_tls(sandbox: &Sandbox) -> Result<()> {
    for token in [false, true] {
        let private = registry::Options {
            tls: true,
            token,
            user: Some(user()),
            ..Default::default()
        };
        let registry = Registry::start(sandbox, private)?;
        let (site, host) = (Site::new(sandbox)?, registry.host());
        let https = format!(
            "https: [\"127.0.0.1\"], caFile: {}",
            registry.ca().display()
        );
        let right = site.file("right.json", &docker_config(&host, &user()))?;
        let right = format!("{https}, credentialsFile: {}", right.display());
        site.push(&host, &right)?;
        site.pulls(&host, &right)?;
        let stranger = User {
            password: "guessed".to_owned(),
            ..user()
        };
        let wrong = site.file("wrong.json", &docker_config(&host, &stranger))?;
        let wrong = format!("{https}, credentialsFile: {}", wrong.display());
        site.fails(&host, &wrong, 5, &["check that they are right"])?;
        site.fails(
            &host,
            &https,
            5,
            &["no credentials are known", "docker login"],
        )?;
    }
    let everyone = registry::Options {
        tls: true,
        token: true,
        ..Default::default()
    };
    let registry = Registry::start(sandbox, everyone)?;
    let (site, host) = (Site::new(sandbox)?, registry.host());
    let https = format!(
        "https: [\"127.0.0.1\"], caFile: {}",
        registry.ca().display()
    );
    site.push(&host, &https)?;
    site.pulls(&host, &https)?;
    Ok(())
}

/// A registry that lets in [`user`] alone, with [`ARTIFACT`] in it.
fn private(sandbox: &Sandbox) -> Result<(Registry, Site<'_>)> {
    let options = registry::Options {
        user: Some(user()),
        ..Default::default()
    };
    let registry = Registry::start(sandbox, options)?;
    let site = Site::new(sandbox)?;
    let credentials = site.file("push.json", &docker_config(&registry.host(), &user()))?;
    let credentials = format!("credentialsFile: {}", credentials.display());
    site.push(&registry.host(), &credentials)?;
    Ok((registry, site))
}

/// Writes a credential helper that knows one registry, and writes down how it is called and by which command line.
fn write_helper(site: &Site<'_>, name: &str, host: &str) -> Result<String> {
    let folder = site.folder.join("bin");
    fs::create_dir_all(&folder)?;
    let path = folder.join(format!("docker-credential-{name}"));
    let User { name, password } = user();
    let script = format!(
        r#"#!/bin/sh
read -r server
echo "$* $server" >>'{folder}/calls'
tr '\0' ' ' </proc/self/cmdline >>'{folder}/lines'
tr '\0' ' ' </proc/$PPID/cmdline >>'{folder}/lines'
if [ "$server" = '{host}' ]; then
  echo '{{"ServerURL":"{host}","Username":"{name}","Secret":"{password}"}}'
else
  echo 'credentials not found in native keychain'
  exit 1
fi
"#,
        folder = folder.display()
    );
    fs::write(&path, script)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(format!("{}:/usr/bin:/bin", folder.display()))
}

fn a_credential_helper(sandbox: &Sandbox) -> Result<()> {
    let (registry, site) = private(sandbox)?;
    let host = registry.host();
    let one = site.file(
        "one.json",
        &json!({ "credHelpers": { &*host: "km-test" } }).to_string(),
    )?;
    let one = format!("credentialsFile: {}", one.display());
    let absent = site.fails(&host, &one, 4, &["docker-credential-km-test"])?;
    ensure!(absent.stderr.contains("No such file"), "{absent}");

    let path = write_helper(&site, "km-test", &host)?;
    let site = site.with("PATH", &path);
    site.pulls(&host, &one)?;
    let read = |name: &str| fs::read_to_string(site.folder.join("bin").join(name));
    ensure!(
        read("calls")? == format!("get {host}\n"),
        "{}",
        read("calls")?
    );
    ensure!(!read("lines")?.contains(&user().password));
    ensure!(
        read("lines")?.contains("artifacts pull"),
        "{}",
        read("lines")?
    );

    let store = site.file(
        "store.json",
        &json!({ "credsStore": "km-test" }).to_string(),
    )?;
    let store = format!("credentialsFile: {}", store.display());
    site.pulls(&host, &store)?;
    let elsewhere = Proxy::start(sandbox, registry.port())?;
    // A helper that knows nothing of a registry is no error; the registry's answer is.
    site.fails(
        &elsewhere.host(),
        &store,
        5,
        &["was asked for", &elsewhere.host()],
    )?;

    let helper = site.folder.join("bin/docker-credential-km-test");
    for (script, why) in [
        ("echo locked >&2; exit 3", "locked"),
        ("echo '{\"Secret\": 1}'", "JSON"),
    ] {
        fs::write(&helper, format!("#!/bin/sh\n{script}\n"))?;
        site.fails(&host, &one, 4, &["docker-credential-km-test", why])?;
    }
    Ok(())
}

/// As it is mounted: the key of the secret is the file's name.
fn a_secret_of_kubernetes(sandbox: &Sandbox) -> Result<()> {
    let (registry, site) = private(sandbox)?;
    let host = registry.host();
    let secret = site.file(".dockerconfigjson", &docker_config(&host, &user()))?;
    let settings = format!("credentialsFile: {}", secret.display());
    site.pulls(&host, &settings)?;
    // Who may write a secret may not choose programs of this host.
    let path = write_helper(&site, "km-test", &host)?;
    fs::write(&secret, json!({ "credsStore": "km-test" }).to_string())?;
    let site = site.with("PATH", &path);
    site.fails(&host, &settings, 5, &["no credentials are known"])?;
    ensure!(
        !site.folder.join("bin/calls").exists(),
        "the helper was run"
    );
    fs::write(
        &secret,
        "{\"auths\": {\"r\": {\"auth\": \"hush-hush-horse\"}}}",
    )?;
    site.fails(&host, &settings, 4, &["auths.\"r\"", "base64"])?;
    Ok(())
}

fn tls_through_a_proxy(sandbox: &Sandbox) -> Result<()> {
    let tls = registry::Options {
        tls: true,
        user: Some(user()),
        ..Default::default()
    };
    let registry = Registry::start(sandbox, tls)?;
    let (site, port) = (Site::new(sandbox)?, registry.port());
    let named = format!("{NAME}:{port}");
    let outside = format!("{OUTSIDE}:{port}");
    let all = docker_config(&named, &user());
    let settings = |credentials: &Path| {
        format!(
            "https: [\"127.0.0.1\"], caFile: {}, credentialsFile: {}",
            registry.ca().display(),
            credentials.display()
        )
    };
    let trusting = settings(&site.file("named.json", &all)?);
    let proxy = Forward::start(sandbox, Some(user()))?;
    let through = site.with("HTTPS_PROXY", &proxy.url());
    through.push(&named, &trusting)?;
    let seen = proxy.take_requests();
    ensure!(
        !seen.is_empty() && seen.iter().all(|seen| *seen == format!("CONNECT {named}")),
        "{seen:?}"
    );
    through.pulls(&named, &trusting)?;
    ensure!(!proxy.take_requests().is_empty(), "the proxy was not asked");
    let lower = site.with("https_proxy", &proxy.url());
    lower.pulls(&named, &trusting)?;
    ensure!(!proxy.take_requests().is_empty(), "the proxy was not asked");

    let direct = settings(&site.file("outside.json", &docker_config(&outside, &user()))?);
    through.pulls(&outside, &direct)?;
    ensure!(!proxy.take_requests().is_empty(), "the proxy was not asked");
    for exempt in [OUTSIDE, "192.0.2.0/24", "x.example, 192.0.2.1", "*"] {
        through.with("NO_PROXY", exempt).pulls(&outside, &direct)?;
        let seen = proxy.take_requests();
        ensure!(seen.is_empty(), "despite NO_PROXY={exempt}: {seen:?}");
    }
    let host = registry.host();
    let local = settings(&site.file("local.json", &docker_config(&host, &user()))?);
    through.pulls(&host, &local)?;
    ensure!(proxy.take_requests().is_empty(), "for this machine's own");

    let stranger = proxy.url().replace("horse", "goose");
    let failed =
        site.with("HTTPS_PROXY", &stranger)
            .fails(&named, &trusting, 5, &[&named, "proxy"])?;
    ensure!(!failed.stderr.contains("goose"), "{failed}");
    Ok(())
}

fn plain_http_through_a_proxy(sandbox: &Sandbox) -> Result<()> {
    let (registry, site) = private(sandbox)?;
    let named = format!("{NAME}:{}", registry.port());
    let credentials = site.file("named.json", &docker_config(&named, &user()))?;
    let plain = format!(
        "plainHttp: [{NAME}, \"{OUTSIDE}\"], credentialsFile: {}",
        credentials.display()
    );
    let proxy = Forward::start(sandbox, Some(user()))?;
    for variable in ["HTTP_PROXY", "http_proxy", "ALL_PROXY"] {
        site.with(variable, &proxy.url()).pulls(&named, &plain)?;
        let seen = proxy.take_requests();
        ensure!(
            seen[0].starts_with(&format!("HEAD http://{named}/v2/kata/guest/manifests/"))
                || seen[0].starts_with(&format!("GET http://{named}/v2/kata/guest/manifests/")),
            "{seen:?}"
        );
    }
    // The one for TLS is not for this.
    let tls = site.with("HTTPS_PROXY", &proxy.url());
    let outside = format!("{OUTSIDE}:{}", registry.port());
    let credentials = docker_config(&outside, &user());
    let credentials = site.file("outside.json", &credentials)?;
    let plain = format!(
        "plainHttp: [\"{OUTSIDE}\"], credentialsFile: {}",
        credentials.display()
    );
    tls.pulls(&outside, &plain)?;
    ensure!(proxy.take_requests().is_empty(), "HTTPS_PROXY was asked");
    Ok(())
}

fn a_redirect_takes_no_credentials(sandbox: &Sandbox) -> Result<()> {
    let registry = Registry::start(sandbox, registry::Options::default())?;
    let site = Site::new(sandbox)?;
    site.push(&registry.host(), "")?;
    let ours = Proxy::start(sandbox, registry.port())?;
    let storage = Proxy::start(sandbox, registry.port())?;
    ours.rule("/blobs/", Fault::Redirect(storage.port()), u32::MAX);
    let known = site.file("ours.json", &docker_config(&ours.host(), &user()))?;
    let settings = format!("credentialsFile: {}", known.display());
    site.pulls(&ours.host(), &settings)?;
    let told = ours.take_requests();
    ensure!(
        told.iter()
            .all(|request| request.header("Authorization") == Some(&user().basic())),
        "{told:?}"
    );
    let strangers = storage.take_requests();
    ensure!(
        !strangers.is_empty()
            && strangers
                .iter()
                .all(|request| request.header("Authorization").is_none()),
        "{strangers:?}"
    );
    Ok(())
}
