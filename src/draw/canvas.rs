//! What both drawings are made of: sizes, colours, panels, boxes, wires and cards, and the frame around them. Knows nothing of what is
//! drawn.
//!
//! A picture brings its own background, so it reads on any page, and its own dark colours for viewers that ask for them.
//! Sizes are in pixels.

use std::fmt::Write as _;

/// Around everything.
pub(super) const MARGIN: usize = 24;
/// The heading above the panels.
pub(super) const HEADER: usize = 64;
/// What is said below them.
pub(super) const FOOTER: usize = 40;
/// From one card to the next.
pub(super) const ROW: usize = 58;
/// A card's height.
pub(super) const CARD: usize = 48;
/// A card's width.
pub(super) const CARD_WIDTH: usize = 560;
/// From one column of boxes to the next.
pub(super) const COLUMN: usize = 132;
/// A box's width.
pub(super) const BOX: usize = 104;
/// Half a box's height.
const HALF_BOX: usize = 18;

const STYLE: &str = "\
:root{color-scheme:light dark}\
text{font:13px ui-sans-serif,-apple-system,'Segoe UI','DejaVu Sans',sans-serif;fill:#1f2328}\
.bg{fill:#fff;stroke:#d0d7de}.panel{fill:#f6f8fa;stroke:#d0d7de}.box{fill:#fff;stroke:#afb8c1}\
.wire{fill:none;stroke:#8c959f;stroke-width:1.5}.title{font-size:18px;font-weight:600}\
.name{font-weight:600}.quiet,.small{fill:#59636e}.small{font-size:11px}\
.mono{font-family:ui-monospace,'DejaVu Sans Mono',monospace;font-size:12px}\
.pill{fill:#eaeef2;stroke:none}\
.ready{fill:#1a7f37}.used{fill:#0969da}.idle{fill:#9a6700}.broken{fill:#cf222e}\
.group{fill:none;stroke:#8250df;stroke-width:1.5;stroke-dasharray:5 4}.grouptext{fill:#8250df;font-size:11px}\
@media(prefers-color-scheme:dark){text{fill:#f0f6fc}.bg{fill:#0d1117;stroke:#3d444d}.panel{fill:#151b23;stroke:#3d444d}\
.box{fill:#212830;stroke:#656c76}.wire{stroke:#656c76}.quiet,.small{fill:#9198a1}.pill{fill:#2f3742}\
.ready{fill:#3fb950}.used{fill:#4493f8}.idle{fill:#d29922}.broken{fill:#f85149}\
.group{stroke:#ab7df8}.grouptext{fill:#ab7df8}}";

/// Shapes, in the order in which they were drawn.
#[derive(Default)]
pub(super) struct Canvas {
    shapes: String,
}

impl Canvas {
    /// Draws a shape, as SVG.
    pub(super) fn add(&mut self, shape: std::fmt::Arguments<'_>) {
        // Writing into a String does not fail.
        let _ = writeln!(self.shapes, "{shape}");
    }

    /// Writes text that may be anybody's.
    pub(super) fn text(&mut self, x: usize, y: usize, class: &str, text: &str) {
        let text = escaped(text);
        self.add(format_args!(
            "<text class=\"{class}\" x=\"{x}\" y=\"{y}\">{text}</text>"
        ));
    }

    /// Draws a panel over the whole width, with its title.
    pub(super) fn panel(&mut self, y: usize, width: usize, height: usize, title: &str) {
        let inner = width - 2 * MARGIN;
        self.add(format_args!(
            "<rect class=\"panel\" x=\"{MARGIN}\" y=\"{y}\" width=\"{inner}\" height=\"{height}\" rx=\"10\"/>"
        ));
        self.text(MARGIN + 16, y + 24, "name", title);
    }

    /// Draws wires with right angles, from the box at `x` and `y` (its middle) to each end.
    pub(super) fn wires(&mut self, x: usize, y: usize, ends: &[(usize, usize)]) {
        let from = x + BOX;
        let bend = from + (COLUMN - BOX) / 2;
        for (to_x, to_y) in ends {
            self.add(format_args!(
                "<path class=\"wire\" d=\"M{from} {y}H{bend}V{to_y}H{to_x}\"/>"
            ));
        }
    }

    /// Draws an empty box whose middle is at `y`.
    pub(super) fn frame(&mut self, x: usize, y: usize) {
        let (top, height) = (y - HALF_BOX, 2 * HALF_BOX);
        self.add(format_args!(
            "<rect class=\"box\" x=\"{x}\" y=\"{top}\" width=\"{BOX}\" height=\"{height}\" rx=\"6\"/>"
        ));
    }

    /// Draws an empty card with its top at `y`, and a bar of a colour at its left.
    pub(super) fn card(&mut self, x: usize, y: usize, colour: &str) {
        self.add(format_args!(
            "<rect class=\"box\" x=\"{x}\" y=\"{y}\" width=\"{CARD_WIDTH}\" height=\"{CARD}\" rx=\"8\"/>\
             <rect class=\"{colour}\" x=\"{x}\" y=\"{}\" width=\"4\" height=\"{}\" rx=\"2\"/>",
            y + 8,
            CARD - 16
        ));
    }

    /// The picture, with its heading.
    pub(super) fn finish(self, width: usize, height: usize, heading: &str, title: &str) -> String {
        let (heading, title) = (escaped(heading), escaped(title));
        let shapes = self.shapes;
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" viewBox=\"0 0 {width} {height}\" \
             role=\"img\">\n<title>{heading}: {title}</title>\n<style>{STYLE}</style>\n\
             <rect class=\"bg\" x=\"0.5\" y=\"0.5\" width=\"{}\" height=\"{}\" rx=\"12\"/>\n\
             <text class=\"title\" x=\"{MARGIN}\" y=\"32\">{heading}</text>\n\
             <text class=\"quiet\" x=\"{MARGIN}\" y=\"54\">{title}</text>\n{shapes}</svg>\n",
            width - 1,
            height - 1
        )
    }
}

/// Where a wire comes in between the first and the last of these ends.
pub(super) fn middle(ends: &[(usize, usize)]) -> usize {
    let first = ends.first().map_or(0, |end| end.1);
    let last = ends.last().map_or(0, |end| end.1);
    (first + last) / 2
}

/// Text for XML. Control characters, which XML cannot carry, are left out.
pub(super) fn escaped(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for char in text.chars() {
        match char {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            char if char.is_control() || matches!(char, '\u{fffe}' | '\u{ffff}') => {}
            char => safe.push(char),
        }
    }
    safe
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_cannot_leave_its_element() {
        assert_eq!(
            escaped("</text><script>'\"&\u{1b}\u{0}x"),
            "&lt;/text&gt;&lt;script&gt;&#39;&quot;&amp;x"
        );
    }
}
