use proptest::prelude::*;

use super::*;

fn address(number: usize) -> Address {
    Address {
        domain: 0,
        bus: u8::try_from(number).unwrap(),
        device: 0,
        function: 0,
    }
}

/// Devices in order of their addresses, each with its NUMA node and the number of its switch.
fn devices(places: &[(u16, usize)]) -> Vec<Listed> {
    let device = |(number, (numa, switch)): (usize, &(u16, usize))| Listed {
        id: address(number),
        place: Place {
            numa: Some(*numa),
            switch: Some(address(100 + switch)),
        },
        nodes: Vec::new(),
        causes: Vec::new(),
    };
    places.iter().enumerate().map(device).collect()
}

/// Eight GPUs, two a switch, four a node.
fn hgx() -> Vec<Listed> {
    let places: Vec<(u16, usize)> = (0..8)
        .map(|number| (u16::try_from(number / 4).unwrap(), number / 2))
        .collect();
    devices(&places)
}

fn numbers_of(choice: &Choice) -> Vec<u8> {
    choice.ids.iter().map(|id| id.bus).collect()
}

fn ids(numbers: &[usize]) -> Vec<Address> {
    numbers.iter().map(|number| address(*number)).collect()
}

#[test]
fn two_and_four_of_eight_stay_on_one_node() {
    let all = hgx();
    let free = ids(&[0, 1, 2, 3, 4, 5, 6, 7]);
    let two = choose(&all, true, &free, &[], 2).unwrap();
    assert_eq!(numbers_of(&two), [0, 1]);
    assert!((two.numa.len(), two.switches.len(), two.partition) == (1, 1, true));
    let four = choose(&all, true, &free, &[], 4).unwrap();
    assert_eq!(numbers_of(&four), [0, 1, 2, 3]);
    assert!(four.partition);
    let said = four.to_string();
    assert!(said.contains("4 of 8 free: 0000:00:00.0"), "{said}");
    assert!(
        said.ends_with(
            "NUMA node 0, behind 0000:64:00.0 and 0000:65:00.0; a whole NVSwitch partition"
        ),
        "{said}"
    );
}

#[test]
fn small_requests_fill_gaps() {
    let all = hgx();
    // Node 1 has two left, node 0 all four.
    let free = ids(&[0, 1, 2, 3, 4, 6]);
    let one = choose(&all, true, &free, &[], 1).unwrap();
    assert_eq!(numbers_of(&one), [4]);
    // Two behind one switch are better than the gap on the other node.
    let two = choose(&all, true, &free, &[], 2).unwrap();
    assert_eq!(numbers_of(&two), [0, 1]);
    // Three of a node whose pairs are whole, beside one that is not.
    let free = ids(&[0, 1, 3, 4, 5, 6, 7]);
    let one = choose(&all, true, &free, &[], 1).unwrap();
    assert_eq!(numbers_of(&one), [3]);
}

#[test]
fn what_must_be_there_draws_its_neighbours() {
    let all = hgx();
    let free = ids(&[0, 1, 2, 3, 4, 5, 6, 7]);
    let two = choose(&all, true, &free, &ids(&[6]), 2).unwrap();
    assert_eq!(numbers_of(&two), [6, 7]);
    let four = choose(&all, true, &free, &ids(&[5]), 4).unwrap();
    assert_eq!(numbers_of(&four), [4, 5, 6, 7]);
    // What must be there counts as free, whether it is told so or not.
    let two = choose(&all, true, &ids(&[0, 7]), &ids(&[6]), 2).unwrap();
    assert_eq!(numbers_of(&two), [6, 7]);
}

#[test]
fn what_cannot_be_is_refused() {
    let all = hgx();
    let free = ids(&[0, 1]);
    for (must, size) in [(&[][..], 3), (&[], -1), (&[0, 1], 1), (&[99], 1)] {
        assert!(
            choose(&all, true, &free, &ids(must), size).is_err(),
            "{must:?} {size}"
        );
    }
    assert_eq!(choose(&all, true, &free, &[], 0).unwrap().ids, []);
    // What is no device any more is not chosen.
    assert!(choose(&all, true, &ids(&[0, 50]), &[], 2).is_err());
    assert_eq!(choose(&[], false, &free, &[], 0).unwrap().ids, []);
}

#[test]
fn many_devices_are_grown_together() {
    let places: Vec<(u16, usize)> = (0..64)
        .map(|number| (u16::try_from(number / 8).unwrap(), number / 4))
        .collect();
    let all = devices(&places);
    let free: Vec<Address> = all.iter().map(|device| device.id).collect();
    let choice = choose(&all, false, &free, &ids(&[17]), 12).unwrap();
    assert_eq!((choice.numa.len(), choice.switches.len()), (2, 3));
    assert!(numbers_of(&choice).contains(&17));
}

#[test]
fn ways_are_counted() {
    assert_eq!(combinations(16, 8), Some(12_870));
    assert_eq!(combinations(5, 0), Some(1));
    assert_eq!(combinations(3, 4), None);
    assert_eq!(combinations(1000, 500), None);
}

/// The fewest domains that `size` devices can be in, some of which are told: by trying all sets of domains.
fn fewest(all: &[Listed], free: &[Address], must: &[Address], size: usize) -> usize {
    let numa = |id: &Address| {
        let at = all.binary_search_by_key(id, |device| device.id).unwrap();
        all[at].place.numa.unwrap()
    };
    let domains: Vec<u16> = free
        .iter()
        .map(&numa)
        .collect::<BTreeSet<_>>()
        .into_iter()
        .collect();
    (0..1_usize << domains.len())
        .filter(|set| {
            let inside = |id: &Address| {
                let at = domains.binary_search(&numa(id)).unwrap();
                set >> at & 1 == 1
            };
            must.iter().all(&inside) && free.iter().filter(|id| inside(id)).count() >= size
        })
        .map(|set| set.count_ones() as usize)
        .min()
        .unwrap()
}

/// NUMA node and switch of each device, which are free, how many of those are told, how many are wanted, whether there are NVSwitches.
type Request = (Vec<(u16, usize)>, Vec<usize>, usize, usize, bool);

fn requests() -> impl Strategy<Value = Request> {
    let places = prop::collection::vec((0_u16..4, 0_usize..6), 1..13);
    places.prop_flat_map(|places| {
        let all: Vec<usize> = (0..places.len()).collect();
        let free = prop::sample::subsequence(all, 1..=places.len());
        (Just(places), free, 0_usize..4, 0_usize..14, any::<bool>())
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_choice_is_what_was_asked_for((places, free, told, size, nvswitches) in requests(), turn in 0_usize..20) {
        // A switch belongs to one node.
        let places: Vec<(u16, usize)> =
            places.iter().map(|(numa, switch)| (*numa, usize::from(*numa) * 10 + switch)).collect();
        let all = devices(&places);
        let free = ids(&free);
        let must = &free[..told.min(free.len())];
        match choose(&all, nvswitches, &free, must, i64::try_from(size).unwrap()) {
            Err(error) => {
                prop_assert!(size > free.len() || size < must.len(), "{}", error);
            }
            Ok(choice) => {
                let chosen: BTreeSet<Address> = choice.ids.iter().copied().collect();
                prop_assert_eq!(chosen.len(), size);
                prop_assert_eq!(choice.ids.len(), size);
                prop_assert!(chosen.iter().all(|id| free.contains(id)));
                prop_assert!(must.iter().all(|id| chosen.contains(id)));
                if size > 0 && combinations(free.len() - must.len(), size - must.len()).unwrap() <= LIMIT {
                    prop_assert_eq!(choice.numa.len(), fewest(&all, &free, must, size));
                }
                // The order in which the kubelet tells them changes nothing.
                let mut turned = free.clone();
                turned.rotate_left(turn % free.len());
                let again = choose(&all, nvswitches, &turned, must, i64::try_from(size).unwrap()).unwrap();
                prop_assert_eq!(again, choice);
            }
        }
    }
}
