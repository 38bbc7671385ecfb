//! Plans over prepared machines, carried out against a kernel that reacts as far as these tests need. What a real kernel does
//! is for the tests with a real one.

#![expect(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    reason = "tests prepare their files plainly, and fail by panicking"
)]

use std::cell::RefCell;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use km_host::Root;
use km_tests_sysfs::{Machine, shapes};
use km_vfio::apply::{self, ApplyError, BoxError, Kernel};
use km_vfio::plan::{self, Plan, Refusal, Request, Step, Targets};
use km_vfio::{Address, Inventory, Users};

/// A prepared machine and its pretended kernel.
struct Fake {
    dir: tempfile::TempDir,
    root: Root,
    written: RefCell<Vec<String>>,
    /// No driver takes this function.
    stubborn: Option<&'static str>,
    /// What the kernel binds to without an override.
    usual: Option<&'static str>,
}

impl Fake {
    fn new(machine: &Machine) -> Fake {
        let dir = tempfile::tempdir().unwrap();
        machine.write(dir.path());
        let root = Root::new(dir.path()).unwrap();
        Fake {
            dir,
            root,
            written: RefCell::default(),
            stubborn: None,
            usual: None,
        }
    }

    fn at(&self, path: &str) -> PathBuf {
        self.dir.path().join(path.trim_start_matches('/'))
    }

    fn look(&self) -> (Inventory, Users) {
        let inventory = Inventory::observe(&self.root).unwrap();
        let users = Users::observe(&self.root, &inventory).unwrap();
        (inventory, users)
    }

    fn plan_bind(&self, request: &Request) -> Result<Plan, Vec<Refusal>> {
        let (inventory, users) = self.look();
        let choices = apply::choices(&self.root, &inventory);
        plan::bind(&inventory, &users, &choices, request)
    }

    fn plan_unbind(&self, request: &Request) -> Result<Plan, Vec<Refusal>> {
        let (inventory, users) = self.look();
        plan::unbind(&inventory, &users, request)
    }

    fn apply(&self, plan: &Plan) -> Result<(), ApplyError> {
        apply::apply(&self.root, self, plan, &mut |_| {})
    }

    fn driver(&self, address: &str) -> Option<String> {
        let (inventory, _) = self.look();
        inventory
            .function(address.parse().unwrap())
            .unwrap()
            .driver
            .clone()
    }

    fn attribute(&self, address: &str, name: &str) -> String {
        fs::read_to_string(self.at(&format!("sys/bus/pci/devices/{address}/{name}"))).unwrap()
    }
}

impl Kernel for Fake {
    fn write(&self, path: &str, value: &str) -> Result<(), BoxError> {
        self.written
            .borrow_mut()
            .push(format!("{path} {}", value.trim_end()));
        let link = |address: &str| self.at(&format!("sys/bus/pci/devices/{address}/driver"));
        if path.ends_with("/unbind") {
            fs::remove_file(link(value))?;
        } else if path.ends_with("/drivers_probe") {
            let wanted = self.attribute(value, "driver_override");
            let wanted = match wanted.trim() {
                "" | "(null)" => self.usual.unwrap_or_default(),
                driver => driver,
            };
            let there =
                !wanted.is_empty() && self.at(&format!("sys/bus/pci/drivers/{wanted}")).is_dir();
            let refused = self.stubborn == Some(value) && wanted == "vfio-pci";
            if there
                && !refused
                && !link(value).exists()
                && fs::symlink_metadata(link(value)).is_err()
            {
                symlink(Path::new("/sys/bus/pci/drivers").join(wanted), link(value))?;
            }
        } else {
            assert!(self.at(path).is_file(), "{path}");
            fs::write(self.at(path), value)?;
        }
        Ok(())
    }

    fn load(&self, module: &str) -> Result<(), BoxError> {
        self.written.borrow_mut().push(format!("modprobe {module}"));
        let driver = if module == "vfio_pci" {
            "vfio-pci"
        } else {
            module
        };
        Ok(fs::create_dir_all(
            self.at(&format!("sys/bus/pci/drivers/{driver}")),
        )?)
    }
}

fn request(targets: Targets) -> Request {
    Request {
        targets,
        whole_group: false,
        console: false,
    }
}

fn all() -> Request {
    request(Targets::All)
}

fn one(address: &str) -> Request {
    request(Targets::Addresses(vec![address.parse().unwrap()]))
}

fn at(text: &str) -> Address {
    text.parse().unwrap()
}

#[test]
fn a_gpu_goes_to_vfio_and_back() {
    let fake = Fake::new(&shapes::one_gpu());
    let plan = fake.plan_bind(&all()).unwrap();
    let shown: Vec<_> = plan.steps.iter().map(ToString::to_string).collect();
    assert_eq!(
        shown,
        [
            "load module vfio_pci, for driver vfio-pci",
            "0000:01:00.0: no driver -> vfio-pci"
        ]
    );
    fake.apply(&plan).unwrap();
    assert_eq!(fake.driver("0000:01:00.0").as_deref(), Some("vfio-pci"));
    assert_eq!(fake.attribute("0000:01:00.0", "driver_override"), "\n");
    assert_eq!(fake.plan_bind(&all()).unwrap().steps, []);

    fake.apply(&fake.plan_unbind(&one("01:00.0")).unwrap())
        .unwrap();
    assert_eq!(fake.driver("0000:01:00.0"), None);
    assert_eq!(fake.plan_unbind(&all()).unwrap().steps, []);
}

#[test]
fn the_variant_driver_that_fits_is_chosen() {
    let machine = shapes::one_gpu()
        .file("/proc/sys/kernel/osrelease", "6.12.0-x\n")
        .file(
            "/lib/modules/6.12.0-x/modules.alias",
            "alias vfio_pci:v*d*sv*sd*bc*sc*i* vfio_pci\n\
         alias vfio_pci:v000010DEd00002331sv*sd*bc*sc*i* nvgrace_gpu_vfio_pci\n",
        );
    let fake = Fake::new(&machine);
    fake.apply(&fake.plan_bind(&all()).unwrap()).unwrap();
    assert_eq!(
        fake.driver("0000:01:00.0").as_deref(),
        Some("nvgrace_gpu_vfio_pci")
    );
    assert_eq!(fake.written.borrow()[0], "modprobe nvgrace_gpu_vfio_pci");
    assert_eq!(fake.plan_bind(&all()).unwrap().steps, []);
}

#[test]
fn a_sleeping_gpu_is_woken_and_may_sleep_again() {
    let mut machine = shapes::one_gpu();
    let gpu = machine.devices.pop().unwrap();
    machine
        .devices
        .push(gpu.with("power/runtime_status", "suspended\n"));
    let fake = Fake::new(&machine);
    let plan = fake.plan_bind(&all()).unwrap();
    assert!(
        plan.steps
            .iter()
            .any(|step| matches!(step, Step::PowerOn { .. }))
    );
    fake.apply(&plan).unwrap();
    assert_eq!(fake.attribute("0000:01:00.0", "power/control"), "auto");
    let control = "/sys/bus/pci/devices/0000:01:00.0/power/control on".to_owned();
    assert!(fake.written.borrow().contains(&control));
}

#[test]
fn what_is_in_use_is_refused_with_its_users_name() {
    let fake = Fake::new(&shapes::two_models());
    let refusals = fake.plan_unbind(&all()).unwrap_err();
    assert!(
        matches!(&refusals[..], [Refusal::Held { address, by }] if *address == at("01:00.0") && by[0].pid == 4242),
        "{refusals:?}"
    );
    assert!(refusals[0].to_string().contains("qemu-system-x86[4242]"));
    // The one in use is on VFIO already, so binding all has only the other to do.
    assert_eq!(fake.plan_bind(&all()).unwrap().steps.len(), 1);

    let cuda = Fake::new(&shapes::two_models().process(9, "python", &["/dev/nvidia0"]));
    let refusals = cuda.plan_bind(&all()).unwrap_err();
    assert!(matches!(&refusals[..], [Refusal::Held { by, .. }] if by[0].name == "python"));
}

#[test]
fn a_user_that_comes_after_the_plan_stops_it_before_anything_is_written() {
    let fake = Fake::new(&shapes::two_models());
    let plan = fake.plan_bind(&one("81:00.0")).unwrap();
    Machine::default()
        .process(5, "late", &["/dev/nvidia0"])
        .write(fake.dir.path());
    let error = fake.apply(&plan).unwrap_err();
    assert!(error.is_refusal(), "{error}");
    assert!(fake.written.borrow().is_empty());
}

#[test]
fn a_shared_group_goes_whole_or_not_at_all() {
    let mut fake = Fake::new(&shapes::shared_group());
    fs::create_dir_all(fake.at("sys/bus/pci/drivers/vfio-pci")).unwrap();
    let plan = fake.plan_bind(&one("01:00.0")).unwrap();
    let moved = plan.steps.iter().filter_map(|step| match step {
        Step::Move { address, .. } => Some(*address),
        _ => None,
    });
    let moved: Vec<_> = moved.collect();
    assert_eq!(moved, [at("01:00.0"), at("01:00.1")]);

    fake.stubborn = Some("0000:01:00.1");
    let error = fake.apply(&plan).unwrap_err();
    assert!(matches!(error, ApplyError::Undone { .. }), "{error:?}");
    assert_eq!(fake.driver("0000:01:00.0").as_deref(), Some("nouveau"));
    assert_eq!(
        fake.driver("0000:01:00.1").as_deref(),
        Some("snd_hda_intel")
    );
    assert_eq!(fake.attribute("0000:01:00.0", "driver_override"), "\n");

    fake.stubborn = None;
    fake.apply(&plan).unwrap();
    assert!(fake.look().0.groups[0].viable);
}

#[test]
fn another_vendors_function_keeps_its_driver_unless_told() {
    let mut machine = shapes::shared_group();
    machine.devices[3].driver = Some("i40e".to_owned());
    let fake = Fake::new(&machine);
    let refusals = fake.plan_bind(&all()).unwrap_err();
    assert!(
        matches!(&refusals[..], [Refusal::Foreign { driver, group: 2, .. }] if driver == "i40e"),
        "{refusals:?}"
    );
    let whole = Request {
        whole_group: true,
        ..all()
    };
    let plan = fake.plan_bind(&whole).unwrap();
    assert_eq!(plan.functions.len(), 3, "bridges stay");
    fake.apply(&plan).unwrap();
    assert_eq!(fake.driver("0000:02:00.0").as_deref(), Some("vfio-pci"));
}

#[test]
fn what_cannot_be_given_away_is_refused() {
    let fake = Fake::new(&shapes::no_iommu());
    assert_eq!(
        fake.plan_bind(&all()),
        Err(vec![Refusal::NoIommu(at("01:00.0"))])
    );
    let mut machine = shapes::one_gpu();
    machine.devices[1].dead = true;
    let fake = Fake::new(&machine);
    assert_eq!(
        fake.plan_bind(&all()),
        Err(vec![Refusal::Dead(at("01:00.0"))])
    );
    for absent in ["05:00.0", "00:10.0"] {
        assert_eq!(
            fake.plan_bind(&one(absent)),
            Err(vec![Refusal::NotFound(at(absent))])
        );
    }
    let mut machine = shapes::shared_group();
    let gpu = machine.devices[1].clone().with("boot_vga", "1\n");
    machine.devices[1] = gpu;
    let fake = Fake::new(&machine);
    assert_eq!(
        fake.plan_bind(&all()),
        Err(vec![Refusal::Console(at("01:00.0"))])
    );
}

#[test]
fn a_module_that_brings_no_driver_costs_nothing() {
    let fake = Fake::new(&shapes::one_gpu());
    let mut plan = fake.plan_bind(&all()).unwrap();
    plan.steps[0] = Step::LoadModule {
        module: "other".to_owned(),
        driver: "vfio-pci".to_owned(),
    };
    let error = fake.apply(&plan).unwrap_err();
    assert!(
        matches!(&error, ApplyError::Undone { source, .. } if matches!(**source, ApplyError::NoDriver { .. })),
        "{error:?}"
    );
    assert_eq!(*fake.written.borrow(), ["modprobe other"]);
}

#[test]
fn a_function_that_vfio_takes_again_is_told() {
    let mut fake = Fake::new(&shapes::one_gpu());
    fake.apply(&fake.plan_bind(&all()).unwrap()).unwrap();
    fake.usual = Some("vfio-pci");
    let error = fake.apply(&fake.plan_unbind(&all()).unwrap()).unwrap_err();
    assert!(matches!(error, ApplyError::Undone { .. }), "{error:?}");
    assert_eq!(fake.driver("0000:01:00.0").as_deref(), Some("vfio-pci"));
}

#[test]
fn a_claim_of_a_living_sandbox_counts() {
    let claim = |boot: &str| {
        format!(
            r#"{{"format":1,"sandbox":"abc","namespace":"k8s.io","handler":"h","class":"c","generation":1,
            "devices":[{{"address":"0000:81:00.0","class":197120}}],"bundle":"/run/bundle","process":{{"pid":12,"started":5,"boot":"{boot}"}}}}"#
        )
    };
    let machine = |boot: &str| {
        shapes::two_models()
            .file("/proc/sys/kernel/random/boot_id", "b1\n")
            .file("/run/bundle/config.json", "{}")
            .file("/run/kata-manager/sandboxes/abc.json", &claim(boot))
    };
    let fake = Fake::new(&machine("b1"));
    let refusals = fake.plan_bind(&all()).unwrap_err();
    assert!(matches!(&refusals[..], [Refusal::Held { by, .. }] if by[0].name == "sandbox abc"));
    let fake = Fake::new(&machine("of another boot"));
    assert_eq!(fake.plan_bind(&all()).unwrap().steps.len(), 1);
    let fake = Fake::new(&machine("b1").file("/run/kata-manager/sandboxes/abc.json", "{"));
    assert!(matches!(
        fake.plan_bind(&all()).unwrap_err()[..],
        [Refusal::Claim(_)]
    ));
}
