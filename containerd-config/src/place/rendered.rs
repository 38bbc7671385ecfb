//! Placement where the main file is rendered from a template at each start (k3s and RKE2): the rendered file is read and never
//! written.
//!
//! Which template counts: `config-v3.toml.tmpl` on containerd 2.x; else `config.toml.tmpl`; else none, and the built-in one
//! is used (`pkg/agent/containerd` and `pkg/agent/templates` in k3s-io/k3s).

use km_host::HostPath;

use super::choose::Planner;
use super::proof::Draft;
use super::{DryText, FileEdit, PlaceError, Placed, Placement, Request, text_of};
use crate::edit::{self, Document, Owner, SetOptions};
use crate::effective::{Effective, Files};

/// The template of containerd 2.x.
const TEMPLATE_V3: &str = "config-v3.toml.tmpl";
/// The template of every version.
const TEMPLATE: &str = "config.toml.tmpl";

/// Where templates of a rendered main file may lie.
pub(super) fn templates(main: &HostPath) -> Vec<HostPath> {
    let folder = main.parent().unwrap_or_else(|| main.clone());
    [TEMPLATE_V3, TEMPLATE]
        .map(|name| folder.join(name))
        .to_vec()
}

/// The template that counts, or would count if it were made, and its bytes.
fn template<F: Files>(
    files: &F,
    effective: &Effective,
    main: &HostPath,
) -> Result<(HostPath, Option<Vec<u8>>), PlaceError> {
    let both = templates(main);
    let (new, old) = (&both[0], &both[1]);
    if effective.version.major < 2 {
        return Ok((old.clone(), files.read(old)?));
    }
    if let Some(bytes) = files.read(new)? {
        return Ok((new.clone(), Some(bytes)));
    }
    match files.read(old)? {
        Some(bytes) => Ok((old.clone(), Some(bytes))),
        None => Ok((new.clone(), None)),
    }
}

/// Plans the edit where the main file is rendered.
pub(super) fn plan<F: Files>(
    files: &F,
    effective: &Effective,
    main: &HostPath,
    request: &Request<'_>,
) -> Result<Placed, PlaceError> {
    let planner = Planner::new(files, effective, main, request)?;
    planner.refuse_foreign()?;
    let (path, before) = template(files, effective, main)?;
    let text = before
        .as_deref()
        .map(|bytes| text_of(&path, Some(bytes)))
        .transpose()?;
    let in_template = text.is_some_and(|text| text.contains(edit::BLOCK));
    let folder = effective
        .imported_folder(super::DROP_IN)
        .filter(|_| effective.version.major >= 2);
    let beside = match request.placement {
        Placement::Main => false,
        Placement::DropIn if folder.is_none() => {
            return Err(PlaceError::NoFolder { main: main.clone() });
        }
        Placement::DropIn => true,
        Placement::Auto => folder.is_some() && !in_template,
    };
    if beside && !in_template {
        let drop_in = if request.wanted.is_empty() {
            None
        } else {
            planner.drop_in_to_use()
        };
        return planner.carry_out(files, drop_in);
    }
    let Some(rendered) = effective.main() else {
        return Err(PlaceError::NotRendered { main: main.clone() });
    };
    let wanted = if beside { &[] } else { request.wanted };
    let version = rendered
        .document
        .version()
        .unwrap_or(effective.version.config_version());
    let at = |path: &HostPath| {
        let path = path.clone();
        move |source| PlaceError::Edit { path, source }
    };
    let after = edit::set_template(text, wanted, version).map_err(at(&path))?;
    refuse_foreign_in_template(&rendered.document, main, wanted)?;
    // What will be rendered is what is rendered now, with the same block.
    let rendered_text = text_of(main, Some(&rendered.bytes))?;
    let options = SetOptions {
        assume_version: effective.version.config_version(),
        recorded: request.recorded,
        ..SetOptions::default()
    };
    let edited = edit::set_handlers(rendered_text, wanted, &options).map_err(at(main))?;
    let stand_in = FileEdit {
        path: main.clone(),
        before: Some(rendered.bytes.clone()),
        after: Some(edited.text.clone().into_bytes()),
    };
    let draft = Draft {
        main: stand_in,
        drop_ins: Vec::new(),
        live: request.wanted.to_vec(),
        target: path.clone(),
        edited,
    };
    let mut placed = planner.prove(files, draft, false)?;
    placed.dry_run = Some(DryText {
        main: placed.edited.text.clone(),
        copies: Vec::new(),
    });
    placed.main = FileEdit {
        path,
        before,
        after: after.map(String::into_bytes),
    };
    Ok(placed)
}

/// A handler that the template brings cannot be set aside: the template is not read.
fn refuse_foreign_in_template(
    rendered: &Document,
    main: &HostPath,
    wanted: &[crate::handler::Handler],
) -> Result<(), PlaceError> {
    let handlers = rendered.handlers();
    let theirs = handlers.iter().find(|found| {
        found.owner == Owner::Foreign && wanted.iter().any(|handler| handler.name == found.name)
    });
    match theirs {
        None => Ok(()),
        Some(found) => Err(PlaceError::InTemplate {
            name: found.name.clone(),
            main: main.clone(),
            line: found.line,
        }),
    }
}
