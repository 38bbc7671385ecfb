//! Whether a device can be given out. Pure: what was seen of it in, the causes against it out.

use std::collections::BTreeMap;

use km_vfio::Address;

use crate::snapshot::Cause;

/// What a look at one function gave.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FunctionSeen {
    /// Whether it is on the bus.
    pub present: bool,
    /// The driver that has it.
    pub driver: Option<String>,
    /// Whether its configuration space answers all ones.
    pub dead: bool,
    /// How many fatal errors the kernel has counted since it found the function; `None` where it counts none.
    pub fatal: Option<u64>,
}

impl FunctionSeen {
    /// Whether a VFIO driver has it: each has `vfio` in its name.
    pub fn on_vfio(&self) -> bool {
        self.driver
            .as_deref()
            .is_some_and(|driver| driver.contains("vfio"))
    }
}

/// What a look at a device gave.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Its functions.
    pub functions: BTreeMap<Address, FunctionSeen>,
    /// Those of its nodes that the host does not have.
    pub missing: Vec<String>,
    /// Why VFIO cannot give its group away, when it cannot.
    pub group: Option<String>,
}

/// Fatal errors that are past, by function: those that were counted when it was last known to be good.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Past(BTreeMap<Address, u64>);

impl Past {
    /// Takes note of a look. What was counted before the first look is past; so is what was counted while VFIO does not have the
    /// function, and what is of a function that the kernel has recovered. A count that has become lower is that of a function that
    /// was taken off the bus and came back: its errors begin at none.
    pub fn note(&mut self, address: Address, seen: &FunctionSeen, recovered: bool) {
        let Some(count) = seen.fatal else { return };
        let before = self.0.entry(address).or_insert(count);
        if recovered || !seen.on_vfio() {
            *before = count;
        } else if count < *before {
            *before = 0;
        }
    }

    fn new_errors(&self, address: &Address, seen: &FunctionSeen) -> u64 {
        let before = self.0.get(address).copied().unwrap_or_default();
        seen.fatal.unwrap_or_default().saturating_sub(before)
    }
}

/// What is against giving a device out; nothing when it can be given out.
///
/// | seen | cause |
/// |---|---|
/// | a function is not on the bus | [`Cause::Gone`], and nothing else of that function |
/// | a function's driver is none of VFIO's | [`Cause::Driver`] |
/// | a function's configuration space is all ones | [`Cause::Dead`] |
/// | a function has more fatal errors than are past | [`Cause::Fatal`] |
/// | a node is missing | [`Cause::Node`] |
/// | nothing of this, and still VFIO cannot give the group away | [`Cause::Group`] |
pub fn judge(seen: &Seen, past: &Past) -> Vec<Cause> {
    let mut causes = Vec::new();
    for (address, function) in &seen.functions {
        if !function.present {
            causes.push(Cause::Gone(*address));
            continue;
        }
        if !function.on_vfio() {
            causes.push(Cause::Driver {
                function: *address,
                driver: function.driver.clone(),
            });
        }
        if function.dead {
            causes.push(Cause::Dead(*address));
        }
        let errors = past.new_errors(address, function);
        if errors > 0 {
            causes.push(Cause::Fatal {
                function: *address,
                errors,
            });
        }
    }
    // The node goes with the function or its driver, which says more.
    if causes.is_empty() {
        causes.extend(seen.missing.iter().cloned().map(Cause::Node));
    }
    if causes.is_empty() {
        causes.extend(seen.group.clone().map(Cause::Group));
    }
    causes
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GPU: Address = Address {
        domain: 0,
        bus: 1,
        device: 0,
        function: 0,
    };

    fn good() -> FunctionSeen {
        FunctionSeen {
            present: true,
            driver: Some("vfio-pci".to_owned()),
            dead: false,
            fatal: Some(3),
        }
    }

    fn seen(function: FunctionSeen) -> Seen {
        Seen {
            functions: BTreeMap::from([(GPU, function)]),
            ..Seen::default()
        }
    }

    fn after(past: &mut Past, function: &FunctionSeen) -> Vec<Cause> {
        past.note(GPU, function, false);
        judge(&seen(function.clone()), past)
    }

    #[test]
    fn each_cause_comes_and_goes() {
        let past = &mut Past::default();
        assert_eq!(after(past, &good()), []);
        let gone = FunctionSeen::default();
        assert_eq!(after(past, &gone), [Cause::Gone(GPU)]);
        assert_eq!(after(past, &good()), []);
        let dead = FunctionSeen {
            dead: true,
            ..good()
        };
        assert_eq!(after(past, &dead), [Cause::Dead(GPU)]);
        assert_eq!(after(past, &good()), []);
        for driver in [None, Some("nvidia".to_owned())] {
            let other = FunctionSeen {
                driver: driver.clone(),
                ..good()
            };
            let cause = Cause::Driver {
                function: GPU,
                driver,
            };
            assert_eq!(after(past, &other), [cause]);
        }
        assert_eq!(after(past, &good()), []);
        let variant = FunctionSeen {
            driver: Some("nvgrace_gpu_vfio_pci".to_owned()),
            ..good()
        };
        assert_eq!(after(past, &variant), []);
        let mut without = seen(good());
        without.missing = vec!["/dev/vfio/12".to_owned()];
        assert_eq!(
            judge(&without, past),
            [Cause::Node("/dev/vfio/12".to_owned())]
        );
        let mut shared = seen(good());
        shared.group = Some("shared".to_owned());
        assert_eq!(judge(&shared, past), [Cause::Group("shared".to_owned())]);
    }

    #[test]
    fn fatal_errors_count_until_the_function_is_good_again() {
        let count = |fatal| FunctionSeen {
            fatal: Some(fatal),
            ..good()
        };
        let fatal = |errors| {
            vec![Cause::Fatal {
                function: GPU,
                errors,
            }]
        };
        let past = &mut Past::default();
        assert_eq!(after(past, &count(3)), [], "those of before are past");
        assert_eq!(after(past, &count(5)), fatal(2));
        assert_eq!(
            after(past, &count(5)),
            fatal(2),
            "they do not go by themselves"
        );
        past.note(GPU, &count(5), true);
        assert_eq!(
            judge(&seen(count(5)), past),
            [],
            "the kernel has recovered it"
        );
        assert_eq!(after(past, &count(6)), fatal(1));
        let unbound = FunctionSeen {
            driver: None,
            ..count(6)
        };
        after(past, &unbound);
        assert_eq!(after(past, &count(6)), [], "bound again");
        assert_eq!(
            after(past, &count(1)),
            fatal(1),
            "off the bus and back, and one since"
        );
        assert_eq!(
            after(
                past,
                &FunctionSeen {
                    fatal: None,
                    ..good()
                }
            ),
            []
        );
    }

    proptest! {
        #[test]
        fn a_device_is_good_exactly_when_nothing_is_wrong(present: bool, vfio: bool, dead: bool, fatal in 0_u64..3, before in 0_u64..3,
            missing: bool, group: bool) {
            let function = FunctionSeen { present, driver: vfio.then(|| "vfio-pci".to_owned()), dead, fatal: Some(fatal) };
            let mut past = Past::default();
            past.note(GPU, &FunctionSeen { fatal: Some(before), ..good() }, false);
            let mut seen = seen(function);
            seen.missing = if missing { vec!["/dev/vfio/1".to_owned()] } else { Vec::new() };
            seen.group = group.then(|| "no".to_owned());
            let good = present && vfio && !dead && fatal <= before && !missing && !group;
            prop_assert_eq!(judge(&seen, &past).is_empty(), good);
        }
    }
}
