//! What crates say of what goes on (tracing events), as lines on standard error.
//!
//! Only events of our own crates: those of libraries may hold what must not be shown, such as headers.

use std::fmt;

use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::FmtContext;
use tracing_subscriber::fmt::format::{FormatEvent, FormatFields, Writer};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt as _;

/// `warning: what happened`, as errors are written.
struct Lines;

impl<S, N> FormatEvent<S, N> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let level = match *event.metadata().level() {
            Level::ERROR => "error",
            Level::WARN => "warning",
            Level::INFO => "note",
            _ => "debug",
        };
        write!(writer, "{level}: ")?;
        context.format_fields(writer.by_ref(), event)?;
        writeln!(writer)
    }
}

/// Begins to write; the first call counts.
pub(crate) fn start(level: Level) {
    let ours = ["kata_manager", "km_artifacts", "km_host", "km_plugin"].map(|name| (name, level));
    let filter = Targets::new().with_targets(ours);
    let lines = tracing_subscriber::fmt::layer()
        .event_format(Lines)
        .with_ansi(false)
        .with_writer(std::io::stderr);
    // A second one in the same process is refused, and the first goes on.
    let _ = tracing_subscriber::registry()
        .with(filter)
        .with(lines)
        .try_init();
}
