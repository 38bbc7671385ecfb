//! The book has a section for every check, and none for checks that are not there.

use km_doctor::Check;

#[test]
fn every_check_has_its_section() {
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/src/doctor.md");
    let page = std::fs::read_to_string(page).unwrap();
    let sections: Vec<&str> = page
        .lines()
        .filter_map(|line| line.strip_prefix("### "))
        .collect();
    let checks: Vec<String> = Check::ALL
        .iter()
        .map(|check| format!("`{}`", check.name()))
        .collect();
    assert_eq!(sections, checks, "in the order in which they are told");
}
