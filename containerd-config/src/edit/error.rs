//! Why a configuration cannot be read or edited.

/// A text that is no TOML.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}, column {column}: {message}")]
pub struct ParseError {
    /// The line, from 1.
    pub line: usize,
    /// The column in characters, from 1.
    pub column: usize,
    /// What is wrong there.
    pub message: String,
}

/// Why an edit is refused. Nothing is changed then. The caller adds the file's name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EditError {
    /// The text is no TOML, so containerd does not read it either.
    #[error("the configuration is not valid TOML")]
    Parse(#[from] ParseError),
    /// There are settings, but no version: containerd reads that as version 1, whose tables have other names.
    #[error(
        "the configuration has settings but no `version`, or version {}: containerd reads its tables by names that were given up. \
         Let `containerd config migrate` rewrite it, or write a new one with `containerd config default`, then try again",
        found.map_or_else(|| "1".to_owned(), |found| found.to_string())
    )]
    OldVersion {
        /// The version that was found.
        found: Option<u32>,
    },
    /// The file is of a version that this containerd does not read.
    #[error(
        "the configuration is version {version}, and containerd 1.x reads version 2 only: it would not see the handlers. \
         Write the file anew with `containerd config default`, then try again"
    )]
    TooNew {
        /// The file's version.
        version: u32,
    },
    /// The version is no number that containerd knows.
    #[error(
        "line {line}: `version = {value}` is no version of containerd's configuration: it must be 2, 3 or 4"
    )]
    BadVersion {
        /// The line of the version.
        line: usize,
        /// The value as written.
        value: String,
    },
    /// A template has our first comment line and not the last, or twice.
    #[error(
        "line {line}: a block of kata-manager's begins here, and has no last line or is there twice. Take out every line from \
         `# >>> kata-manager` to `# <<< kata-manager`, then try again"
    )]
    HalfBlock {
        /// Where it begins.
        line: usize,
    },
    /// `imports` is no list, so containerd does not start with the file.
    #[error(
        "line {line}: `imports` is no list of files. Make it one, such as imports = [], then try again"
    )]
    BadImports {
        /// The line of the key.
        line: usize,
    },
    /// The CRI plugin is switched off, so no handler would ever be used.
    #[error(
        "line {line}: `disabled_plugins` has {plugin:?}, so containerd serves no pods at all (Docker's package ships it so). \
         Take it out of the list, then try again"
    )]
    CriDisabled {
        /// The line of the list.
        line: usize,
        /// The entry.
        plugin: String,
    },
    /// A parent of the handler tables is written in a way that a table header cannot extend.
    #[error(
        "line {line}: `{key}` {what}, and a table below it cannot be added by a header of its own. \
         Rewrite it as a table with a header, such as [{wanted}], then try again"
    )]
    NotExtendable {
        /// The line of the parent.
        line: usize,
        /// Its key.
        key: String,
        /// How it is written.
        what: &'static str,
        /// A header that would do.
        wanted: String,
    },
    /// Somebody else registered a handler of this name.
    #[error(
        "line {line}: the handler {name:?} is already there, and kata-manager did not write it. \
         Give the class another handler name, or adopt the table with --adopt (uninstall gives it back)"
    )]
    Conflict {
        /// The handler.
        name: String,
        /// The line of its table.
        line: usize,
    },
    /// A handler is written inside another table's lines, so that they cannot be set aside or removed alone.
    #[error(
        "line {line}: the handler {name:?} is written with dotted keys or as an inline table, among lines that are not its own. \
         Rewrite it as a table with a header of its own, then try again"
    )]
    NoOwnLines {
        /// The handler.
        name: String,
        /// Its line.
        line: usize,
    },
    /// Keys that somebody wrote after our block belong to our last table.
    #[error(
        "line {line}: a key stands right after kata-manager's lines, so TOML counts it to kata-manager's last table. \
         Move it to the table that it is meant for, then try again"
    )]
    LooseKeys {
        /// The first line after our block.
        line: usize,
    },
    /// An adopted table cannot be given back.
    #[error(
        "line {line}: a table that was adopted cannot be given back: {message}. \
         Remove the lines that begin with `#kata-manager:kept#`, or the table that took their place, then try again"
    )]
    GiveBack {
        /// Where the text with the table given back is wrong.
        line: usize,
        /// What is wrong.
        message: String,
    },
    /// A handler that is to go is the one of pods that name none: the CRI plugin would not start without it.
    #[error(
        "`default_runtime_name` is {name:?}, which would be removed, and containerd's CRI plugin does not start without its \
         default handler. Set `default_runtime_name` to another handler, then try again"
    )]
    DefaultRuntime {
        /// The handler.
        name: String,
    },
    /// A wanted handler cannot be written.
    #[error("the handler {name:?} cannot be written: {reason}")]
    BadHandler {
        /// Its name.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The edited text does not say what it must: a bug of ours. The text is not handed out.
    #[error(
        "the edited configuration is not what was meant ({what}); nothing was changed. Please report this with the configuration"
    )]
    NotAsMeant {
        /// Which check failed.
        what: String,
    },
}
