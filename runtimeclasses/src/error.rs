//! Why no Kata configuration can be made for an artifact.

/// Why no Kata configuration can be made for an artifact.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The artifact's own configuration is no TOML.
    #[error("the artifact's {name} is no valid TOML")]
    Parse {
        /// The file.
        name: String,
        /// Where and why.
        source: Box<toml_edit::TomlError>,
    },
    /// The artifact's own configuration lacks something.
    #[error("the artifact's {name} {problem}")]
    Content {
        /// The file.
        name: String,
        /// What is wrong.
        problem: String,
    },
    /// A path leads neither into the artifact nor to a place on the host.
    #[error("{key} in the artifact's {name} is {value:?}, which is no file of the artifact ({}) and no absolute path", files.join(", "))]
    Dangling {
        /// The file.
        name: String,
        /// The key.
        key: String,
        /// Its value.
        value: String,
        /// The files of the artifact.
        files: Vec<String>,
    },
    /// The artifact lacks a file without which nothing boots.
    #[error("the artifact has no {what}: {hint}; it has {}", files.join(", "))]
    Missing {
        /// What is missing.
        what: &'static str,
        /// What is looked for.
        hint: String,
        /// The files of the artifact.
        files: Vec<String>,
    },
    /// Several files could be meant.
    #[error("the artifact has more than one {what}: {}; {hint}", candidates.join(", "))]
    Ambiguous {
        /// What there is too much of.
        what: &'static str,
        /// The files.
        candidates: Vec<String>,
        /// What to do.
        hint: String,
    },
}
