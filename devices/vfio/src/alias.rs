//! Which VFIO driver fits a device best, by the kernel's `modules.alias`. Text in, module names out.
//!
//! The kernel's build writes a line for each device that a variant of vfio-pci is made for
//! (<https://docs.kernel.org/driver-api/vfio-pci-device-specific-driver-acceptance.html>, `PCI_DRIVER_OVERRIDE_DEVICE_VFIO`):
//!
//! ```text
//! alias vfio_pci:v000010DEd00002342sv*sd*bc*sc*i* nvgrace_gpu_vfio_pci
//! alias vfio_pci:v*d*sv*sd*bc*sc*i* vfio_pci
//! ```
//!
//! A line fits when its pattern matches the device's own `modalias` with `pci:` read as `vfio_pci:`. Of those that fit, the
//! one with the fewest `*` is the most specific and wins; of two alike, the first of the file.

/// The prefix that marks a device for vfio-pci and its variants.
const PREFIX: &str = "vfio_pci:";

/// The most of `modules.alias` that is read, in bytes. Debian's for 6.12 has 1.2 MiB.
pub(crate) const LIMIT: usize = 16 << 20;

/// The longest pattern that is matched, in bytes. Real ones are below 80.
const PATTERN: usize = 256;

/// The module that every kernel with VFIO has, and that takes any device.
pub const GENERIC: &str = "vfio_pci";

/// The module that fits a device best; [`GENERIC`] when the file names none. `modalias` is the device's own, `pci:v...`.
pub fn best_module(modules_alias: &[u8], modalias: &str) -> String {
    let Some(device) = modalias.strip_prefix("pci:") else {
        return GENERIC.to_owned();
    };
    let mut best: Option<(usize, &str)> = None;
    for line in modules_alias.split(|byte| *byte == b'\n') {
        let Some((pattern, module)) = vfio_line(line) else {
            continue;
        };
        let wildcards = pattern.bytes().filter(|byte| *byte == b'*').count();
        if best.is_none_or(|(fewest, _)| wildcards < fewest)
            && matches(pattern.as_bytes(), device.as_bytes())
        {
            best = Some((wildcards, module));
        }
    }
    best.map_or(GENERIC, |(_, module)| module).to_owned()
}

/// The pattern after [`PREFIX`] and the module of a line that is for vfio-pci.
fn vfio_line(line: &[u8]) -> Option<(&str, &str)> {
    let rest = line.strip_prefix(b"alias ")?.trim_ascii_start();
    let rest = std::str::from_utf8(rest.strip_prefix(PREFIX.as_bytes())?).ok()?;
    let (pattern, module) = rest.split_once(char::is_whitespace)?;
    let module = module.trim();
    (pattern.len() <= PATTERN && is_module_name(module)).then_some((pattern, module))
}

/// Whether a text can be a module's name, so that it can be handed to modprobe and looked for in sysfs.
pub(crate) fn is_module_name(text: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-';
    !text.is_empty() && text.len() <= 64 && !text.starts_with('-') && text.bytes().all(plain)
}

/// Whether a text can be a kernel's release, so that it can be part of a path.
pub(crate) fn is_release(text: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._+-~".contains(&byte);
    !text.is_empty() && text.len() <= 64 && !text.starts_with('.') && text.bytes().all(plain)
}

/// Whether a pattern with `*` and `?` matches all of a text; in time proportional to the product of their lengths.
fn matches(pattern: &[u8], text: &[u8]) -> bool {
    let (mut at, mut seen) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while seen < text.len() {
        match pattern.get(at) {
            Some(b'*') => {
                star = Some((at, seen));
                at += 1;
            }
            Some(&byte) if byte == b'?' || byte == text[seen] => {
                at += 1;
                seen += 1;
            }
            _ => match star {
                Some((from, taken)) => {
                    star = Some((from, taken + 1));
                    at = from + 1;
                    seen = taken + 1;
                }
                None => return false,
            },
        }
    }
    pattern[at..].iter().all(|byte| *byte == b'*')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GRACE: &str = "pci:v000010DEd00002342sv000010DEsd000016EBbc03sc02i00";
    const HOPPER: &str = "pci:v000010DEd00002331sv000010DEsd00001626bc03sc02i00";
    const FILE: &[u8] = b"# Aliases extracted from modules themselves.\n\
        alias pci:v000010DEd*sv*sd*bc03sc02i00* nouveau\n\
        alias vfio_pci:v*d*sv*sd*bc*sc*i* vfio_pci\n\
        alias vfio_pci:v000010DEd00002342sv*sd*bc*sc*i* nvgrace_gpu_vfio_pci\n\
        alias vfio_pci:v000010DEd*sv*sd*bc*sc*i* too_wide\n\
        alias vfio_pci:v000010DEd00002342sv*sd*bc*sc*i* second\n";

    #[test]
    fn the_most_specific_line_wins() {
        assert_eq!(best_module(FILE, GRACE), "nvgrace_gpu_vfio_pci");
        assert_eq!(best_module(FILE, HOPPER), "too_wide");
        assert_eq!(
            best_module(FILE, "pci:v00008086d0000sv0sd0bc0sc0i0"),
            "vfio_pci"
        );
    }

    #[test]
    fn without_a_line_it_is_the_generic_one() {
        for file in [
            &b""[..],
            b"alias vfio_pci:* ../../evil\n",
            b"alias vfio_pci:*",
            b"alias vfio_pci:* -rf\n",
        ] {
            assert_eq!(best_module(file, HOPPER), GENERIC);
        }
        assert_eq!(best_module(FILE, "usb:v10DE"), GENERIC);
    }

    #[test]
    fn patterns_match_as_a_shell_would() {
        assert!(matches(b"v*d?sv*", b"v10DEd5sv"));
        assert!(matches(b"*a*b", b"xxaaabab"));
        assert!(!matches(b"*a*b", b"xxaaaba"));
        assert!(matches(b"", b"") && matches(b"**", b"") && !matches(b"?", b""));
        let stars = b"*a".repeat(100);
        assert!(!matches(&stars, &b"a".repeat(99)));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read(file: Vec<u8>, modalias in "\\PC*", tail in "[*?v0-9]{0,40}") {
            best_module(&file, &modalias);
            let line = format!("alias vfio_pci:{tail} some_module");
            best_module(line.as_bytes(), &modalias);
        }

        #[test]
        fn a_text_matches_itself_and_a_star(text in "[a-z0-9]{0,40}", at in 0usize..40) {
            prop_assert!(matches(text.as_bytes(), text.as_bytes()));
            let at = at.min(text.len());
            let starred = format!("{}*{}", &text[..at], &text[at..]);
            prop_assert!(matches(starred.as_bytes(), text.as_bytes()));
        }
    }
}
