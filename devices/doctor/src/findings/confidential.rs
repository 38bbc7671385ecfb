//! Confidential guests: whether the machine encrypts their memory.

use super::{Case, list, text};
use crate::fact::{Fact, Found};
use crate::finding::{Check, Finding};
use crate::host::Vendor;

struct Tee<'a> {
    check: Check,
    name: &'static str,
    vendor: Vendor,
    classes: &'a [String],
    parameter: &'a Fact<String>,
    fix: [&'static str; 2],
}

/// Firmware's settings: those that the kernel names when the firmware has not done its part (Linux, drivers/crypto/ccp/sev-dev-tsm.c). The kernel: `sev_snp` of kvm_amd is there since Linux 6.11
/// (arch/x86/kvm/svm/sev.c), and what its IOMMU must not be is in drivers/iommu/amd/init.c, `iommu_snp_enable`.
pub(super) fn sev_snp(case: Case<'_>) -> Finding {
    tee(
        case,
        &Tee {
            check: Check::SevSnp,
            name: "AMD SEV-SNP",
            vendor: Vendor::Amd,
            classes: &case.wants.snp,
            parameter: &case.host.sev_snp,
            fix: [
                "Firmware: switch on \"SMEE\", \"SEV-ES ASID Space Limit\" above 1, \"SNP Memory (RMP Table) Coverage\", \"SEV-SNP Support\" and \"IOMMU\".",
                "Use a kernel of 6.11 or later with CONFIG_KVM_AMD_SEV, and add kvm_amd.sev_snp=1 to its command line; iommu=pt, amd_iommu=off and amd_iommu=pgtbl_v2 prevent it.",
            ],
        },
    )
}

/// Firmware's settings: Canonical's guide to TDX (canonical/tdx, README.md, "Enable Intel TDX in the Host's BIOS"), which has Intel's
/// names. The kernel: `tdx` of kvm_intel is there since Linux 6.16, off unless told (arch/x86/kvm/vmx/tdx.c); its options are those of
/// arch/x86/Kconfig and arch/x86/kvm/Kconfig.
pub(super) fn tdx(case: Case<'_>) -> Finding {
    tee(
        case,
        &Tee {
            check: Check::Tdx,
            name: "Intel TDX",
            vendor: Vendor::Intel,
            classes: &case.wants.tdx,
            parameter: &case.host.tdx,
            fix: [
                "Firmware: switch on \"Total Memory Encryption (TME)\", \"Total Memory Encryption Multi-Tenant (TME-MT)\", \"Trust Domain Extension (TDX)\", \"TDX Secure Arbitration Mode Loader (SEAM Loader)\", a \"TME-MT/TDX key split\" above 0, and \"SW Guard Extensions (SGX)\".",
                "Use a kernel of 6.16 or later with CONFIG_INTEL_TDX_HOST and CONFIG_KVM_INTEL_TDX, and add kvm_intel.tdx=1 to its command line.",
            ],
        },
    )
}

fn tee(case: Case<'_>, tee: &Tee<'_>) -> Finding {
    let name = tee.name;
    let parameter = tee.parameter;
    let wanted = !tee.classes.is_empty();
    let on = match &parameter.found {
        Found::Unknown(_) if !wanted => Some(false),
        Found::Unknown(_) => None,
        Found::Absent => Some(false),
        // How the kernel writes a bool (kernel/params.c); an int of older releases.
        Found::Is(value) => match value.as_str() {
            "Y" | "1" => Some(true),
            "N" | "0" => Some(false),
            _ if !wanted => Some(false),
            _ => None,
        },
    };
    let seen = |finding: Finding| finding.seen(&parameter.source, text(parameter));
    match (on, wanted) {
        (None, _) => seen(Finding::unknown(
            tee.check,
            format!(
                "Whether {name} is on cannot be told from {}.",
                parameter.source
            ),
        )),
        (Some(true), _) => seen(Finding::ok(tee.check, format!("{name} is on."))),
        (Some(false), false) => seen(Finding::not_applicable(
            tee.check,
            format!("{name} is not known to be on, and no configured class asks for it."),
        )),
        (Some(false), true) => {
            let finding = Finding::failed(
                tee.check,
                format!(
                    "{name} is off, and guests of {} need it.",
                    list(tee.classes)
                ),
            );
            let other = case.vendor().is_some_and(|vendor| vendor != tee.vendor);
            let finding = seen(finding);
            match other {
                true => finding
                    .seen(&case.host.cpu.source, "a processor of another maker")
                    .fix(format!("Take these classes out of this node's configuration: its processor has no {name}.")),
                false => tee.fix.iter().fold(finding, |finding, fix| finding.fix(*fix)),
            }
        }
    }
}
