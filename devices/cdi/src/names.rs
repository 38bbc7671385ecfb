//! Names: of classes, which are CDI kinds and Kubernetes resources at once, and what CDI takes as a name. Text in, text out.

use std::fmt;

use serde::Serialize;

/// The longest class: what follows the `/` in a resource's name is a label's name, which has at most 63 characters (Kubernetes,
/// "Labels and Selectors", "Syntax and character set").
const LONGEST: usize = 63;

/// What stands before a device's number where it has no name: CDI wants a letter first.
const NAMELESS: &str = "PCI_";

/// A class: the part of `nvidia.com/<class>` that tells what the device is. CDI takes it as a class, and Kubernetes as the name of
/// a resource; it has no dot, which CDI takes from version 0.6.0 on only.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct Class(String);

/// A text that is no [`Class`].
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "{0:?} cannot be the name of a device class: begin with a letter, end with a letter or digit, use letters, digits, - and _, at most 63 in all"
)]
pub struct ClassError(String);

impl Class {
    /// Checks an alias.
    ///
    /// # Errors
    /// [`ClassError`] when CDI or Kubernetes would not take it.
    pub fn new(alias: &str) -> Result<Class, ClassError> {
        let fits = alias.len() <= LONGEST && !alias.contains('.') && vendor_or_class(alias).is_ok();
        match fits {
            true => Ok(Class(alias.to_owned())),
            false => Err(ClassError(alias.chars().take(80).collect())),
        }
    }

    /// The class of a model, by the rule of NVIDIA's Sandbox Device Plugin: upper case; `/` and `.` become `_`, white space
    /// becomes one `_`; what is no letter, digit, `_` or `-` goes. So `GH100 [H100 PCIe]` is `GH100_H100_PCIE`.
    ///
    /// Where that gives no class (nothing is left, a digit or `_` comes first, it is too long), what is too much at the ends goes,
    /// and a name that does not begin with a letter gets `PCI_` before it. A device without a name is `PCI_` with its number.
    pub fn of_model(name: Option<&str>, device: u16) -> Class {
        let mangled = name.map(mangle).unwrap_or_default();
        let trimmed = mangled.trim_matches(|char: char| !char.is_ascii_alphanumeric());
        let full = match trimmed.chars().next() {
            None => format!("{NAMELESS}{device:04X}"),
            Some(first) if first.is_ascii_alphabetic() => trimmed.to_owned(),
            Some(_) => format!("{NAMELESS}{trimmed}"),
        };
        // All of it is ASCII, so any cut is between characters.
        let cut = &full[..full.len().min(LONGEST)];
        Class(cut.trim_end_matches(['_', '-']).to_owned())
    }

    /// The class as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The CDI kind, which is also the resource's name: `nvidia.com/pgpu`.
    pub fn kind(&self) -> String {
        format!("{}/{}", crate::VENDOR, self.0)
    }

    /// The name of the spec's file: `nvidia.com-pgpu.yaml` (CDI, SPEC.md, recommends `<vendor>-<class>`).
    pub fn file(&self) -> String {
        format!("{}-{}.yaml", crate::VENDOR, self.0)
    }
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// See [`Class::of_model`].
fn mangle(name: &str) -> String {
    let mut mangled = String::new();
    let mut words = name.split_whitespace();
    if let Some(first) = words.next() {
        mangled.push_str(first);
    }
    for word in words {
        mangled.push('_');
        mangled.push_str(word);
    }
    mangled
        .chars()
        .map(|char| match char {
            '/' | '.' => '_',
            other => other.to_ascii_uppercase(),
        })
        .filter(|char| char.is_ascii_alphanumeric() || matches!(char, '_' | '-'))
        .collect()
}

/// Whether CDI takes a text as a vendor or a class: a letter first, a letter or digit last, and letters, digits, `_`, `-` and `.`
/// between (CDI, SPEC.md, "kind").
///
/// # Errors
/// What is wrong with it.
pub fn vendor_or_class(text: &str) -> Result<(), &'static str> {
    match text.chars().next() {
        None => Err("is empty"),
        Some(first) if !first.is_ascii_alphabetic() => Err("does not begin with a letter"),
        Some(_) => rest(text, ""),
    }
}

/// Whether CDI takes a text as a device's name: a letter or digit first and last, and letters, digits, `_`, `-`, `.` and `:` between
/// (CDI, SPEC.md, "devices").
///
/// # Errors
/// What is wrong with it.
pub fn device(text: &str) -> Result<(), &'static str> {
    match text.chars().next() {
        None => Err("is empty"),
        Some(first) if !first.is_ascii_alphanumeric() => {
            Err("does not begin with a letter or digit")
        }
        Some(_) => rest(text, ":"),
    }
}

/// Whether CDI takes a text as an annotation's key: a qualified name of Kubernetes, in whatever case (CDI's validation of annotations;
/// Kubernetes, "Annotations", "Syntax and character set"): 63 letters, digits, `-`, `_` and `.`, a letter or digit at both ends, after a
/// DNS subdomain and `/` or alone.
///
/// # Errors
/// What is wrong with it.
pub fn annotation(text: &str) -> Result<(), &'static str> {
    let text = text.to_lowercase();
    let (prefix, name) = match text.split_once('/') {
        Some((prefix, name)) => (Some(prefix), name),
        None => (None, text.as_str()),
    };
    let label = |text: &str, more: &str| {
        let good = |char: char| char.is_ascii_alphanumeric() || more.contains(char);
        let edge = |char: char| char.is_ascii_alphanumeric();
        text.starts_with(edge) && text.ends_with(edge) && text.chars().all(good)
    };
    if prefix
        .is_some_and(|prefix| prefix.len() > 253 || !prefix.split('.').all(|part| label(part, "-")))
    {
        return Err("has no DNS subdomain before the slash");
    }
    if name.len() > LONGEST || !label(name, "-_.") {
        return Err("is no qualified name");
    }
    Ok(())
}

fn rest(text: &str, more: &str) -> Result<(), &'static str> {
    if !text.ends_with(|last: char| last.is_ascii_alphanumeric()) {
        return Err("does not end with a letter or digit");
    }
    let good =
        |char: char| char.is_ascii_alphanumeric() || "_-.".contains(char) || more.contains(char);
    match text.chars().all(good) {
        true => Ok(()),
        false => Err("has a character that CDI does not take"),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn models_are_named_as_nvidia_names_them() {
        for (model, class) in [
            ("GH100 [H100 PCIe]", "GH100_H100_PCIE"),
            ("GH100 [H100 SXM5 80GB]", "GH100_H100_SXM5_80GB"),
            ("GH100 [GH200 120GB / 480GB]", "GH100_GH200_120GB___480GB"),
            ("GB100 [HGX GB200]", "GB100_HGX_GB200"),
            ("A.B/C-D", "A_B_C-D"),
            ("\t GP102GL \u{2003}  [Tesla P40] ", "GP102GL_TESLA_P40"),
        ] {
            assert_eq!(Class::of_model(Some(model), 1).as_str(), class, "{model:?}");
        }
    }

    #[test]
    fn models_without_a_usable_name_still_get_a_class() {
        let of = |model| Class::of_model(model, 0x2331).0;
        assert_eq!(of(None), "PCI_2331");
        assert_eq!(of(Some("")), "PCI_2331");
        assert_eq!(of(Some("[]")), "PCI_2331");
        assert_eq!(of(Some("\u{441}\u{43b}\u{43e}\u{43d}")), "PCI_2331");
        assert_eq!(of(Some("3D thing")), "PCI_3D_THING");
        assert_eq!(of(Some("_x_")), "X");
        assert_eq!(of(Some(&"y ".repeat(100))).len(), LONGEST);
    }

    #[test]
    fn annotations_are_qualified_names() {
        let long = "a".repeat(63);
        for good in ["a", "A.b_c-9", "vendor.com/a", "Vendor.COM/A", &long] {
            assert_eq!(annotation(good), Ok(()), "{good:?}");
        }
        let longer = "a".repeat(64);
        let deep = format!("{}/a", "a.".repeat(127) + "ab");
        for bad in [
            "", "/", "/a", "a/", "a/b/c", "a b", "-a", "a_", "v_/a", "v..com/a", "\u{e4}", &longer,
            &deep,
        ] {
            assert!(annotation(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn aliases_are_checked() {
        for good in ["pgpu", "GH100_H100_PCIE", "a", "a-b_c9"] {
            assert_eq!(Class::new(good).unwrap().as_str(), good);
        }
        let long = "a".repeat(64);
        for bad in [
            "", "9a", "a.b", "a/b", "a_", "-a", "a b", "a=b", "\u{e4}", &long,
        ] {
            assert!(Class::new(bad).is_err(), "{bad:?}");
        }
        assert_eq!(Class::new("pgpu").unwrap().kind(), "nvidia.com/pgpu");
        assert_eq!(Class::new("pgpu").unwrap().file(), "nvidia.com-pgpu.yaml");
    }

    proptest! {
        #[test]
        fn any_model_gives_a_class(name in proptest::option::of("\\PC{0,150}"), device: u16) {
            let class = Class::of_model(name.as_deref(), device);
            prop_assert_eq!(Class::new(class.as_str()), Ok(class));
        }

        #[test]
        fn a_class_is_its_own_model(text in "[A-Z][A-Z0-9_-]{0,40}[A-Z0-9]") {
            prop_assert_eq!(Class::of_model(Some(&text), 7).0, text);
        }
    }
}
