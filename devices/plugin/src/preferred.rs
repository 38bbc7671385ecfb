//! Which free devices go together best. Pure: what is free in, a choice with its reasons out.
//!
//! One choice is better than another when, in this order:
//!
//! 1. it is on fewer NUMA nodes;
//! 2. it is behind fewer PCIe switches;
//! 3. it is a whole NVSwitch partition, on a machine that has NVSwitches;
//! 4. it leaves fewer free devices behind on the NUMA nodes that it takes from, then behind the switches: small requests fill gaps
//!    and leave whole nodes to large ones;
//! 5. it breaks up fewer partitions that are wholly free;
//! 6. its addresses are lower.
//!
//! Partitions are those of NVIDIA's Fabric Manager on HGX boards (Fabric Manager User Guide, "Shared NVSwitch and GPU passthrough
//! virtualization models"): pairs, fours and eights of neighbours. Fabric Manager counts GPUs by the module that they sit on, which
//! only NVIDIA's driver can tell; here they are counted by PCI address.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use km_vfio::Address;

use crate::snapshot::{Listed, Place};

/// The most choices that are all looked at. Eight of 16 devices have 12,870; beyond it, choices are grown from each device instead.
const LIMIT: u64 = 20_000;

/// The largest partition.
const LARGEST: usize = 16;

/// A request that cannot be met.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PreferenceError {
    /// A device that must be among the choice is none of the class.
    #[error("{0:?} has to be in the choice and is no device of this resource")]
    Unknown(String),
    /// There are not that many.
    #[error("{wanted} devices are asked for, {must} of them told, and {free} are free")]
    TooMany {
        /// How many are wanted.
        wanted: i64,
        /// How many devices must be among them.
        must: usize,
        /// How many can be chosen from.
        free: usize,
    },
}

/// A choice, and what it has in common.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// The devices, by address.
    pub ids: Vec<Address>,
    /// How many there were to choose from.
    pub free: usize,
    /// Their NUMA nodes; `None` is where the firmware tells none.
    pub numa: BTreeSet<Option<u16>>,
    /// The switches that they are behind, or what stands in a switch's place.
    pub switches: BTreeSet<Address>,
    /// Whether they are a whole NVSwitch partition.
    pub partition: bool,
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ids: Vec<String> = self.ids.iter().map(Address::to_string).collect();
        let numa: Vec<String> = self
            .numa
            .iter()
            .map(|node| node.map_or_else(|| "untold".to_owned(), |node| node.to_string()))
            .collect();
        let switches: Vec<String> = self.switches.iter().map(Address::to_string).collect();
        write!(
            f,
            "{} of {} free: {}; NUMA node {}, behind {}",
            self.ids.len(),
            self.free,
            ids.join(" "),
            numa.join(" and "),
            switches.join(" and ")
        )?;
        match self.partition {
            true => write!(f, "; a whole NVSwitch partition"),
            false => Ok(()),
        }
    }
}

/// Chooses `size` of the devices in `available`, those in `must` among them. `all` are the devices of the class by ID, free or not.
/// `partitioned`
/// says whether partitions count. IDs in `available` that are no devices (any more) are passed over.
///
/// # Errors
/// [`PreferenceError`] when there is no such choice.
pub fn choose(
    all: &[Listed],
    partitioned: bool,
    available: &[Address],
    must: &[Address],
    size: i64,
) -> Result<Choice, PreferenceError> {
    let board = Board::new(all, partitioned, available, must)?;
    let too_many = || PreferenceError::TooMany {
        wanted: size,
        must: board.must.len(),
        free: board.free.len(),
    };
    let count = usize::try_from(size).map_err(|_| too_many())?;
    if count < board.must.len() || count > board.free.len() {
        return Err(too_many());
    }
    let chosen = board.best(count);
    Ok(board.describe(chosen))
}

/// The free devices as numbers. Devices are known by their place in `all`, domains by a number each.
struct Board<'a> {
    all: &'a [Listed],
    partitioned: bool,
    /// The devices that can be chosen, by address.
    free: Vec<usize>,
    /// Those of them that have to be.
    must: Vec<usize>,
    numa: Vec<usize>,
    switch: Vec<usize>,
}

type Score = (usize, usize, bool, usize, usize, usize);

impl<'a> Board<'a> {
    fn new(
        all: &'a [Listed],
        partitioned: bool,
        available: &[Address],
        must: &[Address],
    ) -> Result<Board<'a>, PreferenceError> {
        let at = |id: &Address| all.binary_search_by_key(id, |device| device.id).ok();
        let told: BTreeSet<usize> = must
            .iter()
            .map(|id| at(id).ok_or_else(|| PreferenceError::Unknown(id.to_string())))
            .collect::<Result<_, _>>()?;
        let mut free: BTreeSet<usize> = available.iter().filter_map(at).collect();
        free.extend(&told);
        Ok(Board {
            all,
            partitioned,
            free: free.into_iter().collect(),
            must: told.into_iter().collect(),
            numa: numbers(all, |device| device.place.numa),
            switch: numbers(all, switch),
        })
    }

    fn best(&self, count: usize) -> Vec<usize> {
        let others: Vec<usize> = self
            .free
            .iter()
            .filter(|device| !self.must.contains(device))
            .copied()
            .collect();
        let rest = count - self.must.len();
        if combinations(others.len(), rest).is_some_and(|all| all <= LIMIT) {
            return self.best_of_all(&others, rest);
        }
        let grown = others.iter().map(|seed| self.grow(&others, *seed, count));
        self.better(grown)
    }

    fn best_of_all(&self, others: &[usize], rest: usize) -> Vec<usize> {
        let mut best: Option<(Score, Vec<usize>)> = None;
        let mut places: Vec<usize> = (0..rest).collect();
        loop {
            let mut chosen: Vec<usize> = places.iter().map(|place| others[*place]).collect();
            chosen.extend(&self.must);
            chosen.sort_unstable();
            let scored = (self.score(&chosen), chosen);
            if best.as_ref().is_none_or(|best| scored < *best) {
                best = Some(scored);
            }
            // The next combination: the last place that can move does, and those after it follow.
            let Some(moves) = (0..rest).rfind(|at| places[*at] < others.len() - rest + at) else {
                return best.map(|(_, chosen)| chosen).unwrap_or_default();
            };
            places[moves] += 1;
            for at in moves + 1..rest {
                places[at] = places[at - 1] + 1;
            }
        }
    }

    /// A choice that begins with a device and takes the one that fits best, again and again.
    fn grow(&self, others: &[usize], seed: usize, count: usize) -> Vec<usize> {
        let mut chosen = self.must.clone();
        chosen.push(seed);
        while chosen.len() < count {
            let rest = others.iter().filter(|device| !chosen.contains(device));
            let with = rest.map(|device| {
                let mut with = chosen.clone();
                with.push(*device);
                with.sort_unstable();
                with
            });
            chosen = self.better(with);
        }
        chosen.sort_unstable();
        chosen
    }

    fn better(&self, choices: impl Iterator<Item = Vec<usize>>) -> Vec<usize> {
        choices
            .map(|choice| (self.score(&choice), choice))
            .min()
            .map(|(_, choice)| choice)
            .unwrap_or_default()
    }

    fn score(&self, chosen: &[usize]) -> Score {
        let (numa, numa_spare) = self.touched(&self.numa, chosen);
        let (switches, switch_spare) = self.touched(&self.switch, chosen);
        (
            numa,
            switches,
            !self.is_partition(chosen),
            numa_spare,
            switch_spare,
            self.broken(chosen),
        )
    }

    /// How many domains a choice takes from, and how many free devices it leaves in them.
    fn touched(&self, domain: &[usize], chosen: &[usize]) -> (usize, usize) {
        let mut domains: Vec<usize> = chosen.iter().map(|device| domain[*device]).collect();
        domains.sort_unstable();
        domains.dedup();
        let inside = |device: &&usize| domains.binary_search(&domain[**device]).is_ok();
        let free = self.free.iter().filter(inside).count();
        (domains.len(), free - chosen.len())
    }

    fn is_partition(&self, chosen: &[usize]) -> bool {
        let (Some(first), Some(last)) = (chosen.first(), chosen.last()) else {
            return false;
        };
        let size = chosen.len();
        self.partitioned
            && (2..=LARGEST).contains(&size)
            && size.is_power_of_two()
            && first % size == 0
            && last - first + 1 == size
    }

    /// How many partitions that are wholly free a choice takes a part of.
    fn broken(&self, chosen: &[usize]) -> usize {
        if !self.partitioned {
            return 0;
        }
        let sizes = [2, 4, 8, LARGEST].into_iter();
        let blocks = sizes.flat_map(|size| {
            let mut blocks: Vec<(usize, usize)> = chosen
                .iter()
                .map(|device| (device / size * size, size))
                .collect();
            blocks.dedup();
            blocks
        });
        blocks
            .filter(|(start, size)| {
                let block = *start..start + size;
                let free = self.free.iter().filter(|device| block.contains(device));
                let taken = chosen.iter().filter(|device| block.contains(device));
                free.count() == *size && taken.count() < *size
            })
            .count()
    }

    fn describe(&self, chosen: Vec<usize>) -> Choice {
        let devices = || chosen.iter().map(|at| &self.all[*at]);
        Choice {
            ids: devices().map(|device| device.id).collect(),
            free: self.free.len(),
            numa: devices().map(|device| device.place.numa).collect(),
            switches: devices().map(switch).collect(),
            partition: self.is_partition(&chosen),
        }
    }
}

/// What a device is behind; a device that is behind nothing shares nothing.
fn switch(device: &Listed) -> Address {
    let Place { switch, .. } = device.place;
    switch.unwrap_or(device.id)
}

/// A number for each of the different keys, and each device's.
fn numbers<K: Ord>(all: &[Listed], key: impl Fn(&Listed) -> K) -> Vec<usize> {
    let mut seen = BTreeMap::new();
    all.iter()
        .map(|device| {
            let next = seen.len();
            *seen.entry(key(device)).or_insert(next)
        })
        .collect()
}

/// How many ways there are to take `k` of `n`; `None` when they are too many to count.
fn combinations(n: usize, k: usize) -> Option<u64> {
    let k = k.min(n.checked_sub(k)?);
    let mut ways: u64 = 1;
    for step in 0..k {
        ways = ways.checked_mul(u64::try_from(n - step).ok()?)? / u64::try_from(step + 1).ok()?;
    }
    Some(ways)
}

#[cfg(test)]
mod tests;
