//! Names inside an artifact: which are accepted and how they are written down.
//!
//! A name comes from a stranger (a tar header, a layer's title) and ends up as a path below a generation. It must not know
//! of files or folders: everything here is text.

use super::Refusal;

/// The longest name that is accepted, in bytes. Linux takes 4096 for a whole path (`PATH_MAX`, limits.h) and the name is
/// appended to the path of a generation.
pub(crate) const NAME_MAX_BYTES: usize = 1024;

/// The longest part of a name between two slashes, in bytes (`NAME_MAX`, limits.h).
const PART_MAX_BYTES: usize = 255;

/// What a generation keeps for itself at its top; an artifact cannot bring one.
pub(crate) const RESERVED: &str = ".generation.json";

/// Turns a name into its one accepted spelling: relative, no `.` or empty parts, no slash at the end. `./` becomes the
/// empty string, which stands for the top folder.
///
/// # Errors
/// When the name is absolute, climbs (`..`), is too long, is not UTF-8, holds control characters or takes our own
/// manifest's name.
pub fn normalise(name: &[u8]) -> Result<String, Refusal> {
    if name.len() > NAME_MAX_BYTES {
        return Err(Refusal::NameTooLong);
    }
    let name = std::str::from_utf8(name).map_err(|_| Refusal::NotUtf8)?;
    if name.chars().any(char::is_control) {
        return Err(Refusal::ControlCharacter);
    }
    if name.is_empty() {
        return Err(Refusal::EmptyName);
    }
    if name.starts_with('/') {
        return Err(Refusal::AbsoluteName);
    }
    let mut parts = Vec::new();
    for part in name.split('/') {
        match part {
            "" | "." => {}
            ".." => return Err(Refusal::Climbs),
            _ if part.len() > PART_MAX_BYTES => return Err(Refusal::NameTooLong),
            _ => parts.push(part),
        }
    }
    if parts.first() == Some(&RESERVED) {
        return Err(Refusal::Reserved);
    }
    Ok(parts.join("/"))
}

/// The folders above a normalised path, outermost first, without the top: `a/b/c` gives `a`, `a/b`.
pub(crate) fn parents(path: &str) -> impl Iterator<Item = &str> {
    path.match_indices('/').map(|(at, _)| &path[..at])
}

/// The paths that a symlink's target visits, lexically, each as a normalised path; the last is where it ends. The top
/// folder is the empty string.
///
/// # Errors
/// When the target is absolute, empty, too long, holds control characters or leaves the top folder on its way.
pub(crate) fn walk_target(link: &str, target: &str) -> Result<Vec<String>, Refusal> {
    if target.is_empty() || target.len() > NAME_MAX_BYTES {
        return Err(Refusal::BadTarget);
    }
    if target.chars().any(char::is_control) {
        return Err(Refusal::ControlCharacter);
    }
    if target.starts_with('/') {
        return Err(Refusal::LinkOutside {
            target: target.to_owned(),
        });
    }
    let mut at: Vec<&str> = link.split('/').collect();
    at.pop();
    let mut visited = Vec::new();
    for part in target.split('/') {
        match part {
            "" | "." => continue,
            ".." => {
                if at.pop().is_none() {
                    return Err(Refusal::LinkOutside {
                        target: target.to_owned(),
                    });
                }
            }
            _ => at.push(part),
        }
        visited.push(at.join("/"));
    }
    Ok(visited)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn accepted_names_get_one_spelling() {
        for (name, want) in [
            ("vmlinuz", "vmlinuz"),
            ("./a//b/./c/", "a/b/c"),
            ("./", ""),
            (".hidden", ".hidden"),
            ("a/.generation.json", "a/.generation.json"),
            ("ünï", "ünï"),
        ] {
            assert_eq!(normalise(name.as_bytes()).as_deref(), Ok(want), "{name}");
        }
    }

    #[test]
    fn hostile_names_are_refused_for_their_own_reason() {
        let long_part = "a".repeat(256);
        let long_name = "a/".repeat(600);
        for (name, want) in [
            (&b"/etc/passwd"[..], Refusal::AbsoluteName),
            (b"../x", Refusal::Climbs),
            (b"a/../../x", Refusal::Climbs),
            (b"a/..", Refusal::Climbs),
            (b"", Refusal::EmptyName),
            (b"a\0b", Refusal::ControlCharacter),
            (b"a\nb", Refusal::ControlCharacter),
            ("a\u{85}b".as_bytes(), Refusal::ControlCharacter),
            (b"a\x7f", Refusal::ControlCharacter),
            (b"\xff\xfe", Refusal::NotUtf8),
            (b".generation.json", Refusal::Reserved),
            (b"./.generation.json/x", Refusal::Reserved),
            (long_part.as_bytes(), Refusal::NameTooLong),
            (long_name.as_bytes(), Refusal::NameTooLong),
        ] {
            assert_eq!(normalise(name), Err(want), "{name:?}");
        }
    }

    #[test]
    fn targets_are_walked_from_the_link_s_folder() {
        assert_eq!(walk_target("a/l", "../b/c").unwrap(), ["", "b", "b/c"]);
        assert_eq!(walk_target("l", "./x").unwrap(), ["x"]);
        for target in ["/etc", "..", "a/../../b"] {
            assert!(
                matches!(walk_target("l", target), Err(Refusal::LinkOutside { .. })),
                "{target}"
            );
        }
        assert!(walk_target("a/b/l", "../..").is_ok());
        assert_eq!(walk_target("l", ""), Err(Refusal::BadTarget));
    }

    proptest! {
        #[test]
        fn a_normalised_name_stays_inside_and_is_a_fixed_point(name in prop::collection::vec(any::<u8>(), 0..40)) {
            if let Ok(path) = normalise(&name) {
                prop_assert!(!path.starts_with('/'));
                prop_assert!(path.split('/').all(|part| part != ".." && part != "."));
                if !path.is_empty() {
                    prop_assert_eq!(normalise(path.as_bytes()), Ok(path.clone()));
                }
            }
        }
    }
}
