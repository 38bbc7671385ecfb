//! What was measured, held against what is asked for.

use std::fmt::Write as _;

/// How a figure is written.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Unit {
    /// Of something else.
    Ratio,
    /// Bytes, written in MiB.
    Mebibytes,
    /// Bytes.
    Bytes,
    /// Milliseconds.
    Milliseconds,
    /// So many.
    Count,
}

/// One figure.
#[derive(Clone, Debug)]
pub(crate) struct Figure {
    pub(crate) work: String,
    pub(crate) unit: Unit,
    /// It must not be above this...
    pub(crate) must: f64,
    /// ...and should not be above this.
    pub(crate) goal: f64,
    pub(crate) measured: f64,
}

impl Figure {
    fn verdict(&self) -> &'static str {
        if self.measured <= self.goal {
            "goal met"
        } else if self.measured <= self.must {
            "met"
        } else {
            "missed"
        }
    }

    fn text(&self, value: f64) -> String {
        match self.unit {
            Unit::Ratio if value < 0.1 => format!("{value:.4}"),
            Unit::Ratio => format!("{value:.2}"),
            Unit::Mebibytes => format!("{:.1} MiB", value / f64::from(1 << 20)),
            Unit::Bytes => format!("{value:.0} B"),
            Unit::Milliseconds => format!("{value:.2} ms"),
            Unit::Count => format!("{value:.0}"),
        }
    }
}

/// Everything that was measured.
#[derive(Debug, Default)]
pub(crate) struct Table {
    figures: Vec<Figure>,
}

impl Table {
    /// Adds a figure.
    pub(crate) fn add(&mut self, figure: Figure) {
        self.figures.push(figure);
    }

    /// Prints the figures, in a form that a book takes too.
    #[expect(clippy::print_stdout, reason = "it is what the program is for")]
    pub(crate) fn print(&self) {
        let mut text =
            String::from("\n| work | must | goal | measured | |\n|---|---|---|---|---|\n");
        for figure in &self.figures {
            let _infallible = writeln!(
                text,
                "| {} | {} | {} | {} | {} |",
                figure.work,
                figure.text(figure.must),
                figure.text(figure.goal),
                figure.text(figure.measured),
                figure.verdict()
            );
        }
        println!("{text}");
    }
}

/// Says how it goes on.
#[expect(clippy::print_stdout, reason = "it is what the program is for")]
pub(crate) fn say(line: &str) {
    println!("{line}");
}
