//! Our block in a Go template from which a distribution renders containerd's configuration at each start.
//!
//! A template is no TOML, so nothing of it is read but our own lines: the block goes to its end, and comes out again. What
//! it says is judged by what is rendered, where our comment lines stand too.

use super::compose::{self, OurTable};
use super::error::EditError;
use super::lines::Lines;
use super::marks::{self, State};
use crate::handler::Handler;

/// A template that gives what the distribution would render without one.
pub const BASE: &str = "{{ template \"base\" . }}\n";

/// The text with these handlers in our block at its end; without a block if there are none. `None` for `text` says that there
/// is no file; the same in the answer that it is to go.
///
/// # Errors
/// When a handler cannot be written in a template, or the text has a half block of ours.
pub fn set_template(
    text: Option<&str>,
    wanted: &[Handler],
    version: u32,
) -> Result<Option<String>, EditError> {
    compose::check_wanted(wanted)?;
    let stripped = strip(text.unwrap_or_default())?;
    let created = text.is_none() || stripped.created;
    if wanted.is_empty() {
        let blank = stripped.text.trim().is_empty() || stripped.text == BASE;
        return Ok(text.filter(|_| !(created && blank)).map(|_| stripped.text));
    }
    let tables: Vec<OurTable> = wanted.iter().map(OurTable::new).collect();
    let base = if text.is_none() { BASE } else { &stripped.text };
    let eol = compose::line_break(base);
    let joined = !base.is_empty() && !base.ends_with('\n');
    let state = State {
        handlers: tables
            .iter()
            .map(|table| (table.name.clone(), table.digest.clone()))
            .collect(),
        joined,
        restated: Vec::new(),
        created,
    };
    let mut block = String::new();
    compose::render_tables(&mut block, &tables, version, &state, eol);
    if let Some(handler) = wanted.iter().find(|_| block.contains("{{")) {
        return Err(EditError::BadHandler {
            name: handler.name.clone(),
            reason: "a setting has {{, which begins an action of the template".to_owned(),
        });
    }
    let joint = if joined { eol } else { "" };
    Ok(Some(format!("{base}{joint}{eol}{block}")))
}

struct Bare {
    text: String,
    created: bool,
}

/// The text without our block and the blank line before it.
fn strip(text: &str) -> Result<Bare, EditError> {
    let lines = Lines::new(text);
    let marks = marks::find(text, &lines, &[]);
    let Some(block) = marks.blocks.first() else {
        return Ok(Bare {
            text: text.to_owned(),
            created: false,
        });
    };
    if marks.blocks.len() > 1 || block.end.is_empty() {
        return Err(EditError::HalfBlock {
            line: lines.number(block.begin.start),
        });
    }
    let mut start = super::strip::separator(&lines, text, block);
    let joined = block.state.as_ref().is_some_and(|state| state.joined);
    if joined && block.end.end == text.len() {
        start = super::strip::line_break_before(text, start);
    }
    Ok(Bare {
        text: format!("{}{}", &text[..start], &text[block.end.end..]),
        created: block.state.as_ref().is_some_and(|state| state.created),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn handler(name: &str) -> Handler {
        Handler {
            name: name.into(),
            runtime_type: "io.containerd.kata.v2".into(),
            ..Handler::default()
        }
    }

    #[test]
    fn a_template_is_made_grows_and_goes() {
        for text in [
            None,
            Some(""),
            Some(BASE),
            Some("{{ template \"base\" . }}"),
            Some("version = 2\r\n{{ if .X }}\r\n[x]\r\n{{ end }}\r\n"),
        ] {
            let one = set_template(text, &[handler("a")], 3).unwrap().unwrap();
            assert!(one.contains("runtimes.a]"), "{one}");
            assert!(one.starts_with(text.unwrap_or(BASE)));
            let again = set_template(Some(&one), &[handler("a")], 3)
                .unwrap()
                .unwrap();
            assert_eq!(again, one);
            let two = set_template(Some(&one), &[handler("a"), handler("b")], 3)
                .unwrap()
                .unwrap();
            assert!(two.contains("runtimes.b]"));
            assert_eq!(set_template(Some(&two), &[], 3).unwrap().as_deref(), text);
            assert_eq!(set_template(text, &[], 3).unwrap().as_deref(), text);
        }
        let made = set_template(None, &[handler("a")], 3).unwrap().unwrap();
        let more = format!("{made}[theirs]\n");
        let left = set_template(Some(&more), &[], 3).unwrap().unwrap();
        assert_eq!(left, format!("{BASE}[theirs]\n"));
    }

    #[test]
    fn an_action_in_a_handler_and_half_a_block_are_refused() {
        let evil = Handler {
            config_path: Some("/{{ .X }}".into()),
            ..handler("a")
        };
        assert!(set_template(None, &[evil], 3).is_err());
        let half = format!("{BASE}{}\n", marks::BEGIN_HANDLERS);
        let error = set_template(Some(&half), &[], 3).unwrap_err();
        assert_eq!(error, EditError::HalfBlock { line: 2 });
    }
}
