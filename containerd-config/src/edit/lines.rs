//! Lines of a text by byte offset.

/// Where the lines of a text begin.
pub(super) struct Lines<'a> {
    text: &'a str,
    starts: Vec<usize>,
}

impl<'a> Lines<'a> {
    pub(super) fn new(text: &'a str) -> Lines<'a> {
        let breaks = memchr::memchr_iter(b'\n', text.as_bytes());
        // The first line begins after a byte order mark, so that nothing of ours ever stands before it.
        let starts = std::iter::once(bom(text)).chain(breaks.map(|at| at + 1));
        Lines {
            text,
            starts: starts.collect(),
        }
    }

    /// The 1-based number of the line that an offset is in.
    pub(super) fn number(&self, offset: usize) -> usize {
        self.starts.partition_point(|start| *start <= offset).max(1)
    }

    /// Where the line of an offset begins.
    pub(super) fn start(&self, offset: usize) -> usize {
        self.starts[self.number(offset) - 1]
    }

    /// Where a line begins, by its 1-based number; the last line for a number that is too high.
    pub(super) fn start_of(&self, number: usize) -> usize {
        let index = number.clamp(1, self.starts.len()) - 1;
        self.starts[index]
    }

    /// Where the line of an offset ends, its line break included.
    pub(super) fn end(&self, offset: usize) -> usize {
        let next = self.starts.get(self.number(offset));
        next.copied().unwrap_or(self.text.len())
    }

    /// Each line that has any text: its offset, and the line with its line break.
    pub(super) fn iter(&self) -> impl Iterator<Item = (usize, &'a str)> {
        let ends = self.starts.iter().skip(1).copied();
        self.starts
            .iter()
            .zip(ends.chain(std::iter::once(self.text.len())))
            .map(|(start, end)| (*start, &self.text[*start..end]))
            .filter(|(_, line)| !line.is_empty())
    }
}

/// The length of the byte order mark that the text begins with, if it does.
pub(super) fn bom(text: &str) -> usize {
    if text.starts_with('\u{feff}') { 3 } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_have_lines() {
        let lines = Lines::new("\u{feff}ab\r\n\nc");
        assert_eq!(
            lines.iter().collect::<Vec<_>>(),
            [(3, "ab\r\n"), (7, "\n"), (8, "c")]
        );
        assert_eq!((lines.number(0), lines.start(0)), (1, 3));
        assert_eq!((lines.number(6), lines.end(6)), (1, 7));
        assert_eq!((lines.start_of(2), lines.start_of(9)), (7, 8));
        assert_eq!((lines.number(9), lines.end(9)), (3, 9));
        let empty = Lines::new("");
        assert_eq!((empty.number(0), empty.end(0)), (1, 0));
        assert_eq!(empty.iter().count(), 0);
    }
}
