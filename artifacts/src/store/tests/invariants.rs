//! Whatever the order of operations: what is live resolves and is right, and every name in the store is its content's
//! digest.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::store::check::hash_file;

const CLASSES: [&str; 2] = ["one", "two"];

#[derive(Clone, Debug)]
enum Step {
    Create { class: usize, artifact: usize },
    Activate { class: usize, pick: usize },
    RemoveGeneration { class: usize, pick: usize },
    RemoveClass { class: usize },
    Collect,
    Foreign { class: usize },
    Relock,
}

fn step() -> impl Strategy<Value = Step> {
    let class = 0..CLASSES.len();
    prop_oneof![
        4 => (class.clone(), 0..3usize).prop_map(|(class, artifact)| Step::Create { class, artifact }),
        4 => (class.clone(), 0..8usize).prop_map(|(class, pick)| Step::Activate { class, pick }),
        2 => (class.clone(), 0..8usize).prop_map(|(class, pick)| Step::RemoveGeneration { class, pick }),
        1 => class.clone().prop_map(|class| Step::RemoveClass { class }),
        2 => Just(Step::Collect),
        1 => class.prop_map(|class| Step::Foreign { class }),
        1 => Just(Step::Relock),
    ]
}

fn artifact(fixture: &Fixture, which: usize) -> Artifact {
    match which {
        0 => fixture.raw(&[("vmlinuz", b"kernel"), ("kata.image", b"image 0")]),
        1 => fixture.raw(&[("vmlinuz", b"kernel"), ("kata.image", b"image 1")]),
        _ => {
            let manifest = fixture.archive(&[("vmlinuz", b"kernel", true)], &[("k", "vmlinuz")]);
            fixture.store.artifact(&manifest).unwrap().unwrap()
        }
    }
}

fn pick(numbers: &[u64], pick: usize) -> Option<u64> {
    (!numbers.is_empty()).then(|| numbers[pick % numbers.len()])
}

fn check_invariants(fixture: &Fixture, live: &BTreeMap<usize, u64>, foreign: &[bool]) {
    let store = &fixture.store;
    for (index, class) in CLASSES.iter().enumerate() {
        let found = store
            .live(class)
            .unwrap()
            .map(|generation| generation.number());
        assert_eq!(found, live.get(&index).copied());
        for generation in store.generations(class).unwrap() {
            assert_eq!(store.check(&generation, true).unwrap(), []);
            let artifact = store.artifact(&generation.manifest.manifest).unwrap();
            assert!(
                artifact.is_some(),
                "the artifact of a generation stays complete"
            );
        }
        let kept = match (foreign[index], live.contains_key(&index)) {
            (true, true) => store.displaced(class).unwrap(),
            (true, false) => Some(fixture.link(class)),
            (false, _) => None,
        };
        if let Some(kept) = kept {
            assert_eq!(fs::read(kept.join("theirs")).unwrap(), b"kept");
        } else {
            assert!(store.displaced(class).unwrap().is_none());
        }
    }
    for dir in ["files/sha256", "oci/blobs/sha256"] {
        for name in names(&store.under(dir)).unwrap() {
            let digest = hash_file(
                &store.under(dir).join(&name),
                crate::digest::Algorithm::Sha256,
            )
            .unwrap();
            assert_eq!(digest.hex(), name.trim_end_matches(".x"));
        }
    }
    for session in names(&store.under("tmp")).unwrap() {
        assert!(names(&store.under("tmp").join(session)).unwrap().is_empty());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn any_order_of_operations_keeps_the_store_right(steps in prop::collection::vec(step(), 1..16)) {
        let fixture = Fixture::new();
        let store = &fixture.store;
        let mut live = BTreeMap::new();
        let mut foreign = [false; CLASSES.len()];
        for step in steps {
            match step {
                Step::Create { class, artifact: which } => {
                    let artifact = artifact(&fixture, which);
                    fixture.create(CLASSES[class], &artifact);
                }
                Step::Activate { class, pick: at } => {
                    if let Some(number) = pick(&store.numbers(CLASSES[class]).unwrap(), at) {
                        store.activate(CLASSES[class], number).unwrap();
                        live.insert(class, number);
                    }
                }
                Step::RemoveGeneration { class, pick: at } => {
                    if let Some(number) = pick(&store.numbers(CLASSES[class]).unwrap(), at) {
                        let removed = store.remove_generation(CLASSES[class], number);
                        prop_assert_eq!(removed.is_err(), live.get(&class) == Some(&number));
                    }
                }
                Step::RemoveClass { class } => {
                    store.remove_class(CLASSES[class]).unwrap();
                    live.remove(&class);
                }
                Step::Collect => {
                    store.remove_unreferenced().unwrap();
                }
                Step::Foreign { class } => {
                    if !foreign[class] && !live.contains_key(&class) {
                        fs::create_dir(fixture.link(CLASSES[class])).unwrap();
                        fs::write(fixture.link(CLASSES[class]).join("theirs"), b"kept").unwrap();
                        foreign[class] = true;
                    }
                }
                Step::Relock => drop(store.lock(Duration::ZERO).unwrap()),
            }
            check_invariants(&fixture, &live, &foreign);
        }
    }
}
