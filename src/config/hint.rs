//! What helps a person to find their mistake in the file: the nearest known name, and the line.

/// The known name nearest to what was written, if any is near enough to be meant.
pub(super) fn nearest<'a>(written: &str, known: &[&'a str]) -> Option<&'a str> {
    let (name, distance) = known
        .iter()
        .map(|name| {
            (
                *name,
                strsim::osa_distance(&written.to_lowercase(), &name.to_lowercase()),
            )
        })
        .min_by_key(|(_, distance)| *distance)?;
    (distance <= 1 + written.chars().count() / 3).then_some(name)
}

/// "line N: " of the n-th place where a class's name stands as a value of `name`.
pub(super) fn line_of(text: &str, name: &str, nth: usize) -> String {
    text.lines()
        .enumerate()
        .filter(|(_, line)| {
            let line = line.trim_start().trim_start_matches("- ").trim_start();
            line.strip_prefix("name:")
                .is_some_and(|value| value.trim().trim_matches(['"', '\'']) == name)
        })
        .nth(nth - 1)
        .map(|(index, _)| format!("line {}: ", index + 1))
        .unwrap_or_default()
}
