//! Patterns of `imports`, as Go's `filepath.Glob` and `filepath.Match` read them.

use km_host::HostPath;

use super::Files;

/// The most steps that matching one name may take: a pattern with many stars is quadratic.
const MOST_STEPS: usize = 1 << 20;

/// Whether a name matches a pattern without slashes; an error for a pattern that Go refuses.
pub(super) fn matches(pattern: &str, name: &str) -> Result<bool, String> {
    let items = compile(pattern)?;
    let name: Vec<char> = name.chars().collect();
    if items.len().saturating_mul(name.len()) > MOST_STEPS {
        return Err("it is too long".to_owned());
    }
    // One row of a table: which prefixes of the pattern match the name up to here.
    let mut row = vec![false; items.len() + 1];
    row[0] = true;
    for (index, item) in items.iter().enumerate() {
        row[index + 1] = row[index] && matches!(item, Item::Any);
    }
    for c in name {
        let mut next = vec![false; items.len() + 1];
        for (index, item) in items.iter().enumerate() {
            next[index + 1] = match item {
                Item::Any => next[index] || row[index + 1],
                Item::One => row[index],
                Item::Char(wanted) => row[index] && *wanted == c,
                Item::Class(negated, ranges) => {
                    let inside = ranges.iter().any(|(low, high)| (*low..=*high).contains(&c));
                    row[index] && inside != *negated
                }
            };
        }
        row = next;
    }
    Ok(row[items.len()])
}

enum Item {
    Any,
    One,
    Char(char),
    Class(bool, Vec<(char, char)>),
}

fn compile(pattern: &str) -> Result<Vec<Item>, String> {
    let unfinished = || "it ends inside of `[` or after `\\`".to_owned();
    let mut items = Vec::new();
    let mut rest = pattern.chars().peekable();
    while let Some(c) = rest.next() {
        items.push(match c {
            '*' => Item::Any,
            '?' => Item::One,
            '\\' => Item::Char(rest.next().ok_or_else(unfinished)?),
            '[' => {
                let negated = rest.next_if_eq(&'^').is_some();
                let mut ranges = Vec::new();
                loop {
                    let end = rest.next_if_eq(&']').is_some();
                    if end && !ranges.is_empty() {
                        break;
                    }
                    if end {
                        return Err("it has an empty `[]`".to_owned());
                    }
                    let low = class_char(&mut rest).ok_or_else(unfinished)?;
                    let high = match rest.next_if_eq(&'-') {
                        Some(_) => class_char(&mut rest).ok_or_else(unfinished)?,
                        None => low,
                    };
                    ranges.push((low, high));
                }
                Item::Class(negated, ranges)
            }
            c => Item::Char(c),
        });
    }
    Ok(items)
}

fn class_char(rest: &mut std::iter::Peekable<std::str::Chars<'_>>) -> Option<char> {
    match rest.next()? {
        '\\' => rest.next(),
        '-' | ']' => None,
        c => Some(c),
    }
}

/// The files that match a pattern from the root, in the order in which Go gives them. The inner error says what is wrong
/// with the pattern.
pub(super) fn expand(
    files: &impl Files,
    pattern: &str,
) -> Result<Result<Vec<HostPath>, String>, km_host::Error> {
    let Ok(root) = HostPath::new("/") else {
        return Ok(Ok(Vec::new()));
    };
    let parts: Vec<&str> = pattern.split('/').filter(|part| !part.is_empty()).collect();
    let mut found = vec![root];
    for part in parts {
        if !part.contains(['*', '?', '[', '\\']) {
            found = found.iter().map(|folder| folder.join(part)).collect();
            continue;
        }
        let mut next = Vec::new();
        for folder in &found {
            let mut names = files.names(folder)?;
            names.sort();
            for name in names {
                match matches(part, &name) {
                    Ok(true) => next.push(folder.join(&name)),
                    Ok(false) => {}
                    Err(reason) => return Ok(Err(reason)),
                }
            }
            if next.len() > super::MOST_FILES {
                return Ok(Err(format!(
                    "it matches more than {} files",
                    super::MOST_FILES
                )));
            }
        }
        found = next;
    }
    if let Some(last) = pattern.rsplit('/').next()
        && !last.contains(['*', '?', '[', '\\'])
    {
        let mut there = Vec::new();
        for path in found {
            if files.read(&path)?.is_some() {
                there.push(path);
            }
        }
        found = there;
    }
    Ok(Ok(found))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_match_as_in_go() {
        for (pattern, name, wanted) in [
            ("*.toml", "a.toml", true),
            ("*.toml", ".toml", true),
            ("*.toml", ".a.toml", true),
            ("*.toml", "a.toml.check", false),
            ("?.toml", "é.toml", true),
            ("?.toml", "ab.toml", false),
            ("[0-9]*-*.toml", "60-x.toml", true),
            ("[^0-9]*", "60-x.toml", false),
            ("a\\*b", "a*b", true),
            ("a\\*b", "axb", false),
            ("*a*b*", "xxaxxbxx", true),
            ("*a*b*", "xxbxxaxx", false),
            ("", "", true),
            ("*", "", true),
        ] {
            assert_eq!(matches(pattern, name), Ok(wanted), "{pattern} {name}");
        }
        for pattern in ["[", "[]", "[a", "[a-]", "[-a]", "\\"] {
            assert!(matches(pattern, "a").is_err(), "{pattern}");
        }
        assert!(matches(&"*".repeat(100_000), &"a".repeat(255)).is_err());
    }
}
