//! Mirrors of `hosts.toml` files, real ones: docker-registry as a pull-through cache of another.

use std::fs;

use anyhow::{Context, Result, ensure};
use km_tests_e2e::images;
use km_tests_e2e::process::Finished;
use km_tests_e2e::proxy::{Fault, Proxy};
use km_tests_e2e::registry::{self, Registry};
use km_tests_e2e::sandbox::Sandbox;

use super::{ARTIFACT, Site, content, user, write_hosts};

/// A registry and its mirror, both behind a network of their own.
struct Mirrored<'a> {
    site: Site<'a>,
    _origin: Registry,
    _mirror: Registry,
    before_origin: Proxy,
    before_mirror: Proxy,
    settings: String,
}

impl<'a> Mirrored<'a> {
    fn new(sandbox: &'a Sandbox) -> Result<Self> {
        let origin = Registry::start(sandbox, registry::Options::default())?;
        let mirror = registry::Options {
            mirror_of: Some(format!("http://{}", origin.host())),
            ..Default::default()
        };
        let mirror = Registry::start(sandbox, mirror)?;
        let site = Site::new(sandbox)?;
        site.push(&origin.host(), "")?;
        let before_origin = Proxy::start(sandbox, origin.port())?;
        let before_mirror = Proxy::start(sandbox, mirror.port())?;
        let text = format!(
            "server = \"http://{}\"\n[host.\"http://{}\"]\n",
            before_origin.host(),
            before_mirror.host()
        );
        let folder = format!("127.0.0.1_{}_", before_origin.port());
        let settings = site.hosts("certs.d", &folder, &text)?;
        Ok(Self {
            site,
            _origin: origin,
            _mirror: mirror,
            before_origin,
            before_mirror,
            settings,
        })
    }

    fn pulls(&self) -> Result<Finished> {
        self.site.pulls(&self.before_origin.host(), &self.settings)
    }

    /// The paths that the registry itself was asked for.
    fn asked(&self) -> Vec<String> {
        let requests = self.before_origin.take_requests().into_iter();
        requests.map(|request| request.path).collect()
    }
}

pub(super) fn a_mirror_serves(sandbox: &Sandbox) -> Result<()> {
    let all = Mirrored::new(sandbox)?;
    let said = all.pulls()?;
    ensure!(!said.stderr.contains("warning"), "{said}");
    ensure!(all.asked().is_empty(), "the registry itself was asked");
    let seen = all.before_mirror.take_requests();
    let ns = format!("ns=127.0.0.1%3A{}", all.before_origin.port());
    ensure!(
        seen.len() >= 2 && seen.iter().all(|request| request.path.contains(&ns)),
        "{seen:?}"
    );

    // Asked for content alone, when it may not say what a tag means.
    let text = format!(
        "server = \"http://{}\"\n[host.\"http://{}\"]\ncapabilities = [\"pull\"]\n",
        all.before_origin.host(),
        all.before_mirror.host()
    );
    let settings = all
        .site
        .hosts("pull-only", &all.before_origin.host(), &text)?;
    all.site.pulls(&all.before_origin.host(), &settings)?;
    let asked = all.asked();
    ensure!(
        !asked.is_empty() && asked.iter().all(|path| path.contains("/manifests/")),
        "{asked:?}"
    );
    let seen = all.before_mirror.take_requests();
    ensure!(
        !seen.is_empty() && seen.iter().all(|request| request.path.contains("/blobs/")),
        "{seen:?}"
    );
    Ok(())
}

pub(super) fn what_a_mirror_cannot_give(sandbox: &Sandbox) -> Result<()> {
    let all = Mirrored::new(sandbox)?;
    let mirror = all.before_mirror.host();
    let digest = images::sha256(&content());
    let half = content().len() as u64 / 2;
    for (path, fault) in [
        ("/", Fault::Status(404)),
        ("/", Fault::Status(502)),
        ("/manifests/", Fault::Corrupt(100)),
        (&digest, Fault::Status(404)),
        (&digest, Fault::Corrupt(half)),
        (&digest, Fault::Reset(half)),
        (&digest, Fault::Truncate(half)),
    ] {
        all.before_mirror.clear();
        all.before_mirror.rule(path, fault, u32::MAX);
        let said = all
            .pulls()
            .with_context(|| format!("{fault:?} at {path}"))?;
        ensure!(
            said.stderr.contains("warning: ") && said.stderr.contains(&mirror),
            "no warning of {fault:?}: {said}"
        );
        ensure!(
            !all.asked().is_empty(),
            "{fault:?} at {path}: the registry was not asked"
        );
    }
    // Nobody listens where the mirror should be.
    let text = format!(
        "[host.\"http://127.0.0.1:{}\"]\ndial_timeout = \"1s\"\n",
        sandbox.port()
    );
    let down = all.site.hosts("down", "_default", &text)?;
    let said = all.site.pulls(&all.before_origin.host(), &down)?;
    ensure!(said.stderr.matches("warning: ").count() == 1, "{said}");
    // The registry is down as well: its error is told, after a warning of the mirror.
    all.before_mirror.rule("/", Fault::Status(404), u32::MAX);
    all.before_origin.rule("/", Fault::Status(404), u32::MAX);
    let origin = all.before_origin.host();
    all.site
        .fails(&origin, &all.settings, 5, &[&mirror, "is not at", &origin])?;
    Ok(())
}

pub(super) fn a_hosts_toml_that_is_broken(sandbox: &Sandbox) -> Result<()> {
    let registry = Registry::start(sandbox, registry::Options::default())?;
    let (site, host) = (Site::new(sandbox)?, registry.host());
    site.push(&host, "")?;
    let cases = [
        ("server = 1", "server is not a text"),
        ("[host.\"https://m\"]\ncapabilities = [", "not TOML"),
        ("ca = \"absent.pem\"", "absent.pem"),
        ("proxy = \"ftp://p:hush-hush-horse@x\"", "HTTP proxy"),
    ];
    for (text, why) in cases {
        let named = site.hosts("named", &host, text)?;
        site.fails(&host, &named, 4, &[&host, why])?;
    }
    let nowhere = site.folder.join("nowhere").display().to_string();
    site.fails(&host, &format!("configPath: {nowhere}"), 4, &[&nowhere])?;

    // containerd's own folder, below a root of its own.
    let root = sandbox.folder("root")?;
    let certs_d = root.join("etc/containerd/certs.d");
    let config = site.folder.join("config.yaml");
    for (n, (text, why)) in cases.into_iter().enumerate() {
        write_hosts(&certs_d, &host, text)?;
        fs::write(&config, format!("artifactsDir: /opt/artifacts-{n}\n"))?;
        let reference = registry.reference(ARTIFACT);
        let root = root.display().to_string();
        let words = ["artifacts", "pull", &reference, "--host-root", &root];
        let said = site.km.expect(&words, 0)?;
        ensure!(
            said.stderr.contains("warning: ")
                && said.stderr.contains(why)
                && said.stderr.contains(&format!("{host} itself is asked")),
            "no warning of {text:?}: {said}"
        );
        ensure!(!said.stderr.contains(&user().password), "{said}");
    }
    Ok(())
}
