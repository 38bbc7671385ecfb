//! What is measured, one function a subject.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use km_tests_e2e::containerd::{Instance, Options, Version};
use km_tests_e2e::images;
use km_tests_e2e::sandbox::Sandbox;

use crate::measure::{self, Contender, Cost, Runs, in_turns};
use crate::relay::{Relay, Slow};
use crate::site::{self, Site};
use crate::table::{Figure, Table, Unit, say};
use crate::{Arguments, limits};

/// What can be asked for by name.
pub(crate) const NAMES: &[&str] = &[
    "limits", "plain", "rss", "targz", "tarzst", "capped", "streams", "noop", "rehash",
];

/// A storage service that caps each connection.
const CAPPED: Slow = Slow {
    rate: 100_000_000,
    latency: Duration::from_millis(20),
};

fn wall(cost: &Cost) -> f64 {
    cost.wall
}

fn cpu(cost: &Cost) -> f64 {
    cost.cpu
}

fn rss(cost: &Cost) -> f64 {
    cost.rss
}

/// Measures what is asked for.
///
/// # Errors
/// When a program fails; a figure that is missed is none.
pub(crate) fn measure(sandbox: &Sandbox, site: &Site, arguments: &Arguments) -> Result<Table> {
    let bench = Bench {
        sandbox,
        site,
        arguments,
    };
    let mut table = Table::default();
    let mut rows: Vec<(&str, Row<'_>)> = vec![
        ("limits", Bench::limits),
        ("plain", Bench::plain),
        ("rss", Bench::rss),
        ("targz", Bench::targz),
        ("tarzst", Bench::tarzst),
        ("capped", Bench::capped),
        ("streams", Bench::streams),
        ("noop", Bench::noop),
        ("rehash", Bench::rehash),
    ];
    rows.retain(|(name, _)| arguments.wants(name));
    for (name, row) in rows {
        row(&bench, &mut table).with_context(|| format!("row {name}"))?;
    }
    Ok(table)
}

type Row<'a> = fn(&Bench<'a>, &mut Table) -> Result<()>;

struct Bench<'a> {
    sandbox: &'a Sandbox,
    site: &'a Site,
    arguments: &'a Arguments,
}

impl Bench<'_> {
    /// Runs contenders in turns and prints what each cost.
    fn turns(&self, title: &str, contenders: Vec<Contender<'_>>) -> Result<Vec<Runs>> {
        let names: Vec<_> = contenders.iter().map(|(name, _)| *name).collect();
        let (runs, disturbed) = in_turns(self.arguments.runs, contenders)?;
        say(&format!("\n{title} ({} turns)", self.arguments.runs));
        if disturbed > 0 {
            say(&format!(
                "  {disturbed} of the turns were disturbed by other work on the machine"
            ));
        }
        for (name, runs) in names.iter().zip(&runs) {
            let (least, most) = runs.spread(wall);
            say(&format!(
                "  {name:<24} {:.3} s ({least:.3} to {most:.3})  cpu {:.2} s  rss {:.1} MiB",
                runs.median(wall),
                runs.median(cpu),
                runs.median(rss) / f64::from(1 << 20)
            ));
        }
        Ok(runs)
    }

    fn limits(&self, _table: &mut Table) -> Result<()> {
        let (site, servers) = (self.site, self.site.servers());
        let image = site.image();
        let size = fs::metadata(&image)?.len();
        let blob = format!(
            "/v2/kata/gpu-artifacts/blobs/{}",
            images::sha256(&fs::read(&image)?)
        );
        let copy = self.site.pulled.join("copy");
        let title = format!("limits of this machine, for an image of {} MiB", size >> 20);
        self.turns(
            &title,
            vec![
                (
                    "one SHA-256 pass",
                    Box::new(|| measure::own(&servers, || limits::hash(&[&image]))),
                ),
                (
                    "copy with fsync",
                    Box::new(|| measure::own(&servers, || limits::copy(&image, &copy))),
                ),
                (
                    "receive, TLS, HTTP/1.1",
                    Box::new(|| {
                        measure::own(&servers, || {
                            limits::receive(site.registry.port(), &site.registry.ca(), &blob, size)
                        })
                    }),
                ),
            ],
        )?;
        fs::remove_file(&copy)?;
        Ok(())
    }

    fn plain(&self, table: &mut Table) -> Result<()> {
        let (site, reference) = (self.site, self.site.registry.reference(site::PLAIN));
        let runs = self.turns(
            "plain layers; kata-manager's are synced",
            vec![
                ("oras", Box::new(|| site.oras_pulls(&reference))),
                ("kata-manager", Box::new(|| site.km_pulls(&reference, &[]))),
                ("skopeo", Box::new(|| site.skopeo_pulls(&reference))),
            ],
        )?;
        site.km_pulls(&reference, &[])?;
        site.pulled_right("")?;
        let [oras, km, _] = &runs[..] else {
            return Ok(());
        };
        table.add(ratio(
            "plain layers, durable, wall, of oras",
            (0.70, 0.60),
            km.median(wall) / oras.median(wall),
        ));
        table.add(ratio(
            "the same, client CPU",
            (0.70, 0.60),
            km.median(cpu) / oras.median(cpu),
        ));
        table.add(memory("the same, peak RSS", km));
        Ok(())
    }

    /// Memory must not grow with the blob.
    fn rss(&self, table: &mut Table) -> Result<()> {
        if !self.arguments.full {
            return Ok(());
        }
        let reference = self.site.registry.reference(site::LARGE);
        let runs = self.turns(
            "plain layers, image of 2 GiB",
            vec![(
                "kata-manager",
                Box::new(|| self.site.km_pulls(&reference, &[])),
            )],
        )?;
        table.add(memory("plain layers, 2 GiB, peak RSS", &runs[0]));
        Ok(())
    }

    fn targz(&self, table: &mut Table) -> Result<()> {
        let (site, reference) = (self.site, self.site.registry.reference(site::GZIP));
        let runs = self.turns(
            "one tar+gzip layer, unpacked",
            vec![
                ("oras", Box::new(|| site.oras_pulls(&reference))),
                ("kata-manager", Box::new(|| site.km_pulls(&reference, &[]))),
            ],
        )?;
        site.km_pulls(&reference, &[])?;
        site.pulled_right("guest")?;
        let measured = runs[1].median(wall) / runs[0].median(wall);
        table.add(ratio(
            "tar+gzip layer, unpacked, wall, of oras",
            (0.45, 0.38),
            measured,
        ));
        Ok(())
    }

    fn tarzst(&self, table: &mut Table) -> Result<()> {
        let site = self.site;
        let gzip = site.registry.reference(site::GZIP);
        let zstd = site.registry.reference(site::ZSTD);
        let runs = self.turns(
            "one tar+zstd layer, unpacked, against oras on the same content as gzip",
            vec![
                ("oras, gzip", Box::new(|| site.oras_pulls(&gzip))),
                ("kata-manager, zstd", Box::new(|| site.km_pulls(&zstd, &[]))),
            ],
        )?;
        site.km_pulls(&zstd, &[])?;
        site.pulled_right("guest")?;
        let measured = runs[1].median(wall) / runs[0].median(wall);
        table.add(ratio(
            "tar+zstd layer, wall, of oras on gzip",
            (0.35, 0.25),
            measured,
        ));
        Ok(())
    }

    fn capped(&self, table: &mut Table) -> Result<()> {
        let site = self.site;
        let relay = Relay::start(self.sandbox, site.registry.port(), Some(CAPPED))?;
        let reference = relay.reference(site::PLAIN);
        let runs = self.turns(
            "plain layers, each connection capped at 100 MB/s, 20 ms a request",
            vec![
                ("oras", Box::new(|| site.oras_pulls(&reference))),
                ("kata-manager", Box::new(|| site.km_pulls(&reference, &[]))),
                (
                    "kata-manager, one stream",
                    Box::new(|| site.km_pulls(&reference, &["--streams", "1"])),
                ),
            ],
        )?;
        site.km_pulls(&reference, &[])?;
        site.pulled_right("")?;
        let measured = runs[1].median(wall) / runs[0].median(wall);
        table.add(ratio(
            "streams capped at 100 MB/s, wall, of oras",
            (0.40, 0.30),
            measured,
        ));
        table.add(memory("the same, peak RSS", &runs[1]));
        Ok(())
    }

    fn streams(&self, table: &mut Table) -> Result<()> {
        let (site, reference) = (self.site, self.site.registry.reference(site::PLAIN));
        let runs = self.turns(
            "plain layers, no cap: the program's own choice",
            vec![
                (
                    "kata-manager, one stream",
                    Box::new(|| site.km_pulls(&reference, &["--streams", "1"])),
                ),
                ("kata-manager", Box::new(|| site.km_pulls(&reference, &[]))),
            ],
        )?;
        let measured = runs[1].median(wall) / runs[0].median(wall);
        table.add(ratio(
            "no cap: own choice, of one stream",
            (1.05, 1.00),
            measured,
        ));
        Ok(())
    }

    fn noop(&self, table: &mut Table) -> Result<()> {
        let (site, reference) = (self.site, self.site.registry.reference(site::PLAIN));
        let again = site.pulled.join("again").display().to_string();
        let words = ["artifacts", "pull", &reference, "--to", &again];
        site.km.expect(&words, 0)?;
        let runs = self.turns(
            "everything is there",
            vec![
                ("oras", Box::new(|| site.oras_pulls(&reference))),
                (
                    "kata-manager",
                    Box::new(|| measure::run(&mut site.km.command(&words), &site.servers())),
                ),
            ],
        )?;
        fs::remove_dir_all(&again)?;
        let measured = runs[1].median(wall) / runs[0].median(wall);
        table.add(ratio(
            "everything present, wall, of oras",
            (0.01, 0.01),
            measured,
        ));

        let relay = Relay::start(self.sandbox, site.plain.port(), None)?;
        let small = relay.reference(site::SMALL);
        let again = self.sandbox.folder("again")?.display().to_string();
        let words = ["artifacts", "pull", &small, "--to", &again];
        site.km_plain.expect(&words, 0)?;
        relay.take_bytes();
        site.km_plain.expect(&words, 0)?;
        table.add(Figure {
            work: "everything present, bytes received, heads included".to_owned(),
            unit: Unit::Bytes,
            must: 2000.0,
            goal: 1000.0,
            measured: relay.take_bytes() as f64,
        });
        Ok(())
    }

    /// `artifacts verify` of a class that is live.
    fn rehash(&self, table: &mut Table) -> Result<()> {
        let site = self.site;
        let containerd = Instance::start(self.sandbox, &Options::new(Version::V1_7))?;
        let folder = self.sandbox.folder("node")?;
        let config = folder.join("config.yaml");
        let text = format!(
            "artifactsDir: {}\nregistry:\n  https: [127.0.0.1]\n  caFile: {}\n\
             runtimeClasses:\n- name: demo\n  runtimeType: io.containerd.runc.v2\n  artifacts:\n    url: {}\n\
             containerd:\n  config: {}\n  socket: {}\n  restart:\n    mode: command\n    command: {:?}\n",
            folder.join("artifacts").display(),
            site.registry.ca().display(),
            site.registry.reference(site::PLAIN),
            containerd.config().display(),
            containerd.socket().display(),
            containerd.restart_command(),
        );
        fs::write(&config, text)?;
        let km = site.km.clone().config(&config);
        km.expect(&["apply"], 0)?;
        let files = site.files();
        let servers = site.servers();
        let runs = self.turns(
            "everything that is live hashed again",
            vec![
                (
                    "one SHA-256 pass",
                    Box::new(|| measure::own(&servers, || limits::hash(&files))),
                ),
                (
                    "kata-manager",
                    Box::new(|| measure::run(&mut km.command(&["artifacts", "verify"]), &servers)),
                ),
            ],
        )?;
        let verified = km.expect(&["artifacts", "verify"], 0)?;
        ensure!(
            verified.stdout.contains("demo"),
            "nothing was verified: {verified}"
        );
        let measured = runs[1].median(wall) / runs[0].median(wall);
        table.add(ratio(
            "full re-hash, of one SHA-256 pass",
            (1.20, 0.60),
            measured,
        ));
        Ok(())
    }
}

fn ratio(work: &str, (must, goal): (f64, f64), measured: f64) -> Figure {
    Figure {
        work: work.to_owned(),
        unit: Unit::Ratio,
        must,
        goal,
        measured,
    }
}

fn memory(work: &str, runs: &Runs) -> Figure {
    Figure {
        work: work.to_owned(),
        unit: Unit::Mebibytes,
        must: f64::from(32 << 20),
        goal: f64::from(24 << 20),
        measured: runs.spread(rss).1,
    }
}
