//! A configuration from its text, with an error that says the line and what was meant. Reads no file.

use anyhow::{Context as _, Result};

use super::{Config, check::check, hint::nearest};
use crate::failure::{Failure, Kind};

/// Reads a configuration from its text, and checks what the types cannot say.
pub(crate) fn parse(text: &str) -> Result<Config> {
    let options = serde_saphyr::options! { with_snippet: false };
    let config: Config = if text.trim().is_empty() {
        serde_json::from_str("{}").context("the defaults")?
    } else {
        serde_saphyr::from_str_with_options(text, options).map_err(|error| explain(&error))?
    };
    check(text, &config)?;
    Ok(config)
}

fn explain(error: &serde_saphyr::Error) -> Failure {
    let error = error.without_snippet();
    let message = error.to_string();
    let first = message.lines().next().unwrap_or_default();
    // serde's own words for deny_unknown_fields: unknown field `x`, expected one of a, b, c
    let unknown = first
        .split_once("unknown field `")
        .or_else(|| first.split_once("unknown variant `"));
    let unknown = unknown.and_then(|(_, rest)| rest.split_once('`'));
    let nearest = unknown.and_then(|(unknown, rest)| {
        let (_, expected) = rest.split_once("expected ")?;
        let expected = expected.split(" at line ").next().unwrap_or_default();
        let known: Vec<&str> = expected
            .trim_start_matches("one of ")
            .split([',', ' '])
            .map(|name| name.trim_matches('`'))
            .filter(|name| !name.is_empty() && *name != "or")
            .collect();
        nearest(unknown, &known)
    });
    // The parser says the place last; it reads better first.
    let said = first
        .rsplit_once(" at line ")
        .map_or(first, |(said, _)| said);
    let line = error
        .location()
        .filter(|at| at.line() > 0)
        .map(|at| format!("line {}: ", at.line()))
        .unwrap_or_default();
    let hint = nearest
        .map(|name| format!("; did you mean `{name}`?"))
        .unwrap_or_default();
    Failure::new(Kind::Configuration, format!("{line}{said}{hint}"))
}
