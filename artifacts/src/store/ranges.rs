//! Which bytes of a file are there: a set of ranges. Pure.

use std::ops::Range;

/// Ranges in ascending order that neither overlap nor touch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Ranges(Vec<Range<u64>>);

impl Ranges {
    /// Adds a range, which may overlap what is there.
    pub(super) fn insert(&mut self, new: Range<u64>) {
        if new.is_empty() {
            return;
        }
        let from = self.0.partition_point(|range| range.end < new.start);
        let to = self.0.partition_point(|range| range.start <= new.end);
        let mut joined = new;
        if from < to {
            joined.start = joined.start.min(self.0[from].start);
            joined.end = joined.end.max(self.0[to - 1].end);
        }
        self.0.splice(from..to, [joined]);
    }

    /// What lacks of `0..size`, ascending.
    pub(super) fn missing(&self, size: u64) -> Vec<Range<u64>> {
        let mut missing = Vec::new();
        let mut at = 0;
        for range in &self.0 {
            if at < range.start {
                missing.push(at..range.start);
            }
            at = range.end;
        }
        if at < size {
            missing.push(at..size);
        }
        missing
    }

    /// Where the bytes end that are there from `at` on without a gap; `at` itself when it is not there.
    pub(super) fn end_from(&self, at: u64) -> u64 {
        let holds = |range: &&Range<u64>| range.contains(&at);
        self.0.iter().find(holds).map_or(at, |range| range.end)
    }

    /// How many bytes are there.
    pub(super) fn len(&self) -> u64 {
        self.0.iter().map(|range| range.end - range.start).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn it_is_a_set(pieces in proptest::collection::vec((0..60u64, 0..12u64), 0..20)) {
            let size = 80;
            let mut ranges = Ranges::default();
            let mut model = [false; 80];
            for (start, len) in pieces {
                ranges.insert(start..start + len);
                model[start as usize..(start + len) as usize].fill(true);
            }
            prop_assert!(ranges.0.windows(2).all(|pair| pair[0].end < pair[1].start));
            let mut gaps = [true; 80];
            for gap in ranges.missing(size) {
                gaps[gap.start as usize..gap.end as usize].fill(false);
            }
            prop_assert_eq!(model, gaps);
            prop_assert_eq!(ranges.len(), model.iter().filter(|there| **there).count() as u64);
            for at in 0..size {
                let end = model[at as usize..].iter().position(|there| !there);
                let end = end.map_or(size, |len| at + len as u64);
                prop_assert_eq!(ranges.end_from(at), end);
            }
        }
    }
}
